"""The trigger that waits for batches."""

from __future__ import annotations

import asyncio
import contextlib
import time
import traceback
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

from airflow.triggers.base import BaseTrigger, TaskSuccessEvent, TriggerEvent

if TYPE_CHECKING:
    from airflow_provider_siliconflow.api.async_client import AsyncSiliconFlowClient
    from airflow_provider_siliconflow.api.exceptions import SiliconFlowError
    from airflow_provider_siliconflow.api.settings import ClientSettings
    from airflow_provider_siliconflow.jobs.waiting import BatchWait

#: Cancellations under way; the event loop itself only keeps weak references to its tasks.
_CANCELLATIONS: set[asyncio.Task[None]] = set()

#: Seconds before a trigger starts. An event within about a second of the deferral can reach Airflow's scheduler before
#: the worker that deferred has ended, and then counts as a failure (seen on 3.3.2 under load).
_FIRST_PAUSE = 3.0

#: Most waits that begin per second. A restarted triggerer starts all of its waits at once; without a limit their
#: connections and first polls would block its event loop and every other trigger.
_BEGUN_PER_SECOND = 400

#: First and longest pause before a connection that Airflow could not return is read again, in seconds.
_CONNECTION_PAUSE, _LONGEST_CONNECTION_PAUSE = 5.0, 300.0

#: Seconds for which an undefined connection may be one that Airflow cannot read at the moment.
_MISSING_CONNECTION_PATIENCE = 600.0

#: Pauses between attempts to read how a task ended, in seconds: two minutes in total, since a database may be down.
_STATE_PAUSES = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 30.0, 30.0)


class _ResumeNow(Exception):  # noqa: N818
    """The task is to resume, although the connection cannot be read."""


class BatchTrigger(BaseTrigger):
    """
    Wait until batches have ended. All triggers of a triggerer share one connection pool for their polls.

    The trigger always emits one event: ``{"status": "ended", "batches": [...]}``, or ``"timeout"`` or ``"error"``
    with a ``message``. It never submits anything, since two copies of a trigger may run at once.

    :param batch_ids: ids of the batches.
    :param batch_id: the same as one id or a list; a sensor's template uses this name.
    :param conn_id: the connection.
    :param poll_interval: seconds between two polls of one batch.
    :param deadline: epoch seconds at which the wait ends; by default an hour after the batches expire.
    :param cancel_on_kill: whether to cancel the batches if the deferred task is ended by hand (Airflow 3.3+). Needs
        ``wait_token``.
    :param end_in_trigger: whether to end the task in the triggerer, without a worker, if every row of every batch
        succeeded.
    :param min_ended: how many ended batches end the wait; by default all. Open batches are not in the event.
    :param began: epoch seconds at which the task began to wait; it stays the same if the triggerer restarts.
    :param counts_only: whether the event contains only the id, status, counts and errors of each batch.
    :param wait_token: the token that the task recorded for this wait before it deferred, see
        :func:`~airflow_provider_siliconflow.task.deferral.record_wait`.
    :param resume_at: epoch seconds at which the wait ends with the event of the batches that have ended by then.
    """

    def __init__(
        self,
        *,
        batch_ids: Sequence[str] | None = None,
        batch_id: str | Sequence[str] | None = None,
        conn_id: str = "siliconflow_default",
        poll_interval: float = 60,
        deadline: float | None = None,
        cancel_on_kill: bool = False,
        end_in_trigger: bool = False,
        min_ended: int | None = None,
        began: float | None = None,
        counts_only: bool = False,
        wait_token: str | None = None,
        resume_at: float | None = None,
    ) -> None:
        super().__init__()
        self.batch_id = batch_id if batch_ids is None else list(batch_ids)
        self.conn_id = conn_id
        self.poll_interval = poll_interval
        self.deadline = deadline
        self.cancel_on_kill = cancel_on_kill
        self.end_in_trigger = end_in_trigger
        self.min_ended = min_ended
        self.began = began
        self.counts_only = counts_only
        self.wait_token = wait_token
        self.resume_at = resume_at
        self._settings: ClientSettings | None = None
        self._wait: BatchWait | None = None

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return the class path and the arguments: JSON values without secrets."""
        return (
            f"{type(self).__module__}.{type(self).__qualname__}",
            {
                "batch_id": self.batch_id,
                "conn_id": self.conn_id,
                "poll_interval": self.poll_interval,
                "deadline": self.deadline,
                "cancel_on_kill": self.cancel_on_kill,
                "end_in_trigger": self.end_in_trigger,
                "min_ended": self.min_ended,
                "began": self.began,
                "counts_only": self.counts_only,
                "wait_token": self.wait_token,
                "resume_at": self.resume_at,
            },
        )

    def _batch_ids(self) -> list[str]:
        from airflow_provider_siliconflow.api.arguments import check_identifiers
        from airflow_provider_siliconflow.task.templating import rendered_list

        return check_identifiers("batch_id", rendered_list(self.batch_id))

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Wait, and yield one event."""
        from airflow_provider_siliconflow.api.exceptions import SiliconFlowError
        from airflow_provider_siliconflow.api.redaction import redact, valid_text

        await _FIRST_PAUSES.pause()
        try:
            event = await self._event()
        except SiliconFlowError as exc:
            event = self._failure(exc)
        except Exception as exc:  # noqa: BLE001
            # Without an event Airflow fails the task, and says nothing of the batches that go on.
            event = self._failure(_unexpected(exc))
            # Its text and those of its causes are anybody's, and perhaps such that no log can encode them.
            trace = "".join(traceback.format_exception(exc))
            self.log.error("The wait failed with an unexpected error\n%s", valid_text(redact(trace)))
        yield event

    async def _event(self) -> TriggerEvent:
        """Wait, and return the event of a wait that reached its goal."""
        from airflow_provider_siliconflow.jobs.events import encode, ended
        from airflow_provider_siliconflow.jobs.outcome import is_flawless
        from airflow_provider_siliconflow.jobs.waiting import BatchWait

        batch_ids = self._batch_ids()
        try:
            self._settings = await self._read_connection()
        except _ResumeNow:
            return TriggerEvent(encode(ended(())))
        self._wait = BatchWait(
            batch_ids,
            time.time(),
            self.poll_interval,
            deadline=self.deadline,
            min_ended=self.min_ended,
            began=self.began,
            resume_at=self.resume_at,
        )
        async with shared_client(self._settings) as client:
            # Thousands of waits share one copy.
            self._settings = client.settings
            await self._until_ended(self._wait, client)
        batches = self._wait.batches
        if self.end_in_trigger and all(map(is_flawless, batches)):
            self.log.info("Every row succeeded; the task ends here, without a worker")
            return TaskSuccessEvent()
        return TriggerEvent(encode(ended(batches), counts_only=self.counts_only))

    def _failure(self, error: SiliconFlowError) -> TriggerEvent:
        """Return the event of a wait that did not reach its goal."""
        from airflow_provider_siliconflow.api.exceptions import InvalidInputError
        from airflow_provider_siliconflow.jobs.events import encode, failed

        try:
            batch_ids = self._batch_ids()
        except InvalidInputError:
            batch_ids = []
        return TriggerEvent(encode(failed(error, batch_ids)))

    async def _read_connection(self) -> ClientSettings:
        """Read the connection; try again while Airflow's own API is down."""
        from airflow.providers.common.compat.sdk import AirflowNotFoundException

        from airflow_provider_siliconflow.api.exceptions import BatchTimeoutError, InvalidInputError
        from airflow_provider_siliconflow.api.redaction import brief
        from airflow_provider_siliconflow.hooks.connection import aread_connection

        pause, began = _CONNECTION_PAUSE, time.time()
        while True:
            try:
                return await aread_connection(self.conn_id)
            except InvalidInputError:
                raise
            except Exception as exc:
                # A wait of days must not end because Airflow does not answer. Airflow also reports a connection as
                # undefined for some other failures, for example if its own API is down.
                missing = isinstance(exc, AirflowNotFoundException)
                if missing and time.time() >= began + _MISSING_CONNECTION_PATIENCE:
                    raise InvalidInputError(
                        f"connection {self.conn_id!r} is not defined: {brief(str(exc))}. The batches are untouched.",
                        retryable=True,
                    ) from exc
                if self.resume_at is not None and time.time() >= self.resume_at:
                    raise _ResumeNow from exc
                if self.deadline is not None and time.time() >= self.deadline:
                    raise BatchTimeoutError(
                        f"The wait ended at its deadline: connection {self.conn_id!r} could not be read "
                        f"({brief(str(exc))}). The batches are untouched."
                    ) from exc
                self.log.warning(
                    "Reading connection %r failed (%s); trying again in %.0f s",
                    self.conn_id,
                    brief(str(exc)),
                    pause,
                )
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LONGEST_CONNECTION_PAUSE)

    async def _until_ended(self, wait: BatchWait, client: AsyncSiliconFlowClient) -> None:
        from airflow_provider_siliconflow.api.exceptions import SiliconFlowError

        async def poll(batch_id: str) -> None:
            try:
                batch = await client.get_batch(batch_id)
            except SiliconFlowError as exc:
                wait.fault(batch_id, exc, time.time())
            else:
                wait.observe(batch_id, batch, time.time())

        while True:
            due = wait.due(time.time())
            # The deadline ends polls under way; check_deadline() then reports their batches.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait.poll_limit(time.time())):
                    if len(due) == 1:
                        await poll(due[0])
                    elif due:
                        await _run_all([poll(batch_id) for batch_id in due])
            wait.log_summary(time.time())
            if wait.is_over(time.time()):
                return
            wait.check_deadline(time.time())
            await asyncio.sleep(wait.pause(time.time()))

    async def on_kill(self) -> None:
        """
        Cancel the batches if the deferred task was ended by hand. Only Airflow 3.3+ calls this.

        Airflow cancels this call a second after it starts, and also makes it if a trigger only moves to another
        triggerer, or if another copy of the trigger has resumed the task. So the work is done in a separate asyncio
        task, which needs proof first.
        """
        if not self.cancel_on_kill:
            return
        task = asyncio.get_running_loop().create_task(self._cancel_if_ended_by_hand())
        _CANCELLATIONS.add(task)
        task.add_done_callback(_CANCELLATIONS.discard)
        await asyncio.shield(task)

    async def _cancel_if_ended_by_hand(self) -> None:
        batch_ids = self._batch_ids()
        open_ids = [one for one in batch_ids if self._wait is None or one not in self._wait.ended]
        named = ", ".join(open_ids[:10]) + (f" and {len(open_ids) - 10} more" if len(open_ids) > 10 else "")
        if doubt := await self._doubt():
            self.log.warning("Nothing is cancelled, and batches %s continue: %s", named, doubt)
            return
        self.log.info("The task was ended by hand while it waited for batches %s; cancelling them", named)
        try:
            # If the wait was ended in its first seconds, it may not have read its connection yet.
            settings = self._settings or await self._read_connection()
            await self._cancel(open_ids, settings)
        except Exception as exc:  # noqa: BLE001
            self.log.warning("Batches %s may continue and be billed: cancelling them failed: %s", named, exc)

    async def _doubt(self) -> str | None:
        """
        Return why it is not certain that the task was ended by hand during this wait; ``None`` if it is certain.

        The task recorded a token for this wait before it deferred, and overwrites it when it resumes. So if the task
        has ended and the recorded token is still that of this wait, the task ended during the wait.
        """
        from asgiref.sync import sync_to_async

        from airflow_provider_siliconflow.task.deferral import recorded_wait
        from airflow_provider_siliconflow.task.state import ENDED_STATES, task_state

        if self.wait_token is None:
            return "the trigger has no token for its wait"
        pauses = iter(_STATE_PAUSES)
        while True:
            try:
                state = await sync_to_async(task_state)(self.task_instance)
                token = await sync_to_async(recorded_wait)(self.task_instance)
                break
            except Exception as exc:  # noqa: BLE001
                # A cancelled batch cannot be restored.
                if (pause := next(pauses, None)) is None:
                    return f"the task's state cannot be read ({exc}), so it is unknown why the wait ended"
                await asyncio.sleep(pause)
        if state not in ENDED_STATES:
            return (
                f"the task is {state or 'cleared, or without a state'}. Either the wait continues elsewhere, or the "
                "task has resumed; if it was cleared, the new try decides about these batches"
            )
        if token != self.wait_token:
            return f"the task is {state}, but it ended after this wait and not during it"
        return None

    async def _cancel(self, batch_ids: Sequence[str], settings: ClientSettings) -> None:
        from dataclasses import replace

        from airflow_provider_siliconflow.api.async_client import AsyncSiliconFlowClient
        from airflow_provider_siliconflow.api.exceptions import SiliconFlowError

        async with AsyncSiliconFlowClient(replace(settings, max_retries=3)) as client:

            async def cancel(batch_id: str) -> None:
                try:
                    batch = await client.cancel_batch(batch_id)
                except SiliconFlowError as exc:
                    self.log.warning("Batch %s could not be cancelled and may continue: %s", batch_id, exc)
                else:
                    self.log.info(
                        "Requested cancellation of batch %s; its status is %s", batch_id, batch.status
                    )

            await asyncio.gather(*map(cancel, batch_ids))


async def _run_all(polls: Sequence[Coroutine[Any, Any, None]]) -> None:
    """
    Run polls concurrently. The first error cancels the others.

    ``gather`` would leave the others running unattended, with a client that is already closed.
    """
    tasks = [asyncio.ensure_future(each) for each in polls]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _unexpected(error: Exception) -> SiliconFlowError:
    """Return the error for an unexpected exception."""
    from airflow_provider_siliconflow.api.exceptions import BatchWaitError
    from airflow_provider_siliconflow.api.redaction import redact

    return BatchWaitError(
        f"The wait ended with an unexpected error: {type(error).__name__}: {redact(str(error))} The batches are "
        "untouched: they continue and are billed. A retry continues the wait at no extra cost.",
        retryable=True,
    )


class _FirstPauses:
    """The pauses before waits begin: the more waits start at once, the longer the later ones pause."""

    def __init__(self) -> None:
        self._pausing = 0

    async def pause(self) -> None:
        self._pausing += 1
        try:
            await asyncio.sleep(_FIRST_PAUSE + (self._pausing - 1) / _BEGUN_PER_SECOND)
        finally:
            self._pausing -= 1


_FIRST_PAUSES = _FirstPauses()


#: One client per event loop and connection, with the number of waits that use it.
_CLIENTS: dict[tuple[int, str], tuple[AsyncSiliconFlowClient, int]] = {}


@contextlib.asynccontextmanager
async def shared_client(settings: ClientSettings) -> AsyncIterator[AsyncSiliconFlowClient]:
    """
    Share one client among all waits of this event loop with the same connection; the last one closes it.

    One client per trigger would cost about 800 KiB each, and a TLS handshake per poll.

    :param settings: the connection.
    """
    from dataclasses import replace

    from airflow_provider_siliconflow.api.async_client import AsyncSiliconFlowClient

    key = (id(asyncio.get_running_loop()), settings.fingerprint)
    # The wait polls again anyway; retries in the client would only hide failures from it.
    client, users = _CLIENTS.get(key) or (AsyncSiliconFlowClient(replace(settings, max_retries=0)), 0)
    _CLIENTS[key] = (client, users + 1)
    try:
        yield client
    finally:
        client, users = _CLIENTS[key]
        if users > 1:
            _CLIENTS[key] = (client, users - 1)
        else:
            del _CLIENTS[key]
            await client.close()
