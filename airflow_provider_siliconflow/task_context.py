"""Between a running Airflow task and the rooms below: its identity, its ledger, its way to fail."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Set
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import AirflowFailException, AirflowSkipException, conf

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import BaseOperator, Context

    from airflow_provider_siliconflow.api.client import SiliconFlowClient
    from airflow_provider_siliconflow.jobs.identity import Submitter
    from airflow_provider_siliconflow.jobs.submission import Ledger, Search, Submission

log = logging.getLogger(__name__)

#: Names in the task state store beside the keys of work: the generation it was there from the start of, and the batch
#: recorded last.
_GENERATION, _LAST = "generation", "last"
#: States of a task that no person has ended.
_UNTOUCHED_STATES = frozenset({"running", "up_for_retry", "scheduled", "queued"})
#: Seconds to wait for the state of a task that is being ended; Airflow leaves it five.
_STATE_PATIENCE = 1.5
#: Entries outlive the longest batch and the files of the service, whatever the store's own default is.
_RETENTION = timedelta(days=31)


@cache
def airflow_version() -> tuple[int, int]:
    """Return Airflow's major and minor version."""
    from airflow import __version__

    major, minor = __version__.split(".")[:2]
    return int(major), int(minor)


@contextlib.contextmanager
def task_errors(*, fail_fast: bool, soft_fail: bool = False) -> Iterator[None]:
    """
    Turn errors that no retry can mend into ``AirflowFailException``.

    :param fail_fast: ``False`` leaves every error to the task's retries.
    :param soft_fail: skip the task instead of failing it.
    """
    from airflow_provider_siliconflow.api.exceptions import SiliconFlowError

    try:
        yield
    except SiliconFlowError as exc:
        if soft_fail:
            raise AirflowSkipException(f"Skipping, since soft_fail is set: {exc}") from exc
        if fail_fast and not exc.retryable:
            raise AirflowFailException(f"{exc} (A retry would end the same way, so none is made.)") from exc
        raise


def submitter_of(context: Context) -> Submitter:
    """Return who submits: this task instance in this generation of tries."""
    from airflow_provider_siliconflow.jobs.identity import Submitter

    ti = context["ti"]
    map_index = getattr(ti, "map_index", None)
    return Submitter(
        dag_id=ti.dag_id,
        run_id=ti.run_id,
        task_id=ti.task_id,
        map_index=-1 if map_index is None else map_index,
        generation=ti.max_tries or 0,
    )


def open_submission(context: Context, client: SiliconFlowClient, ledger: Ledger | None = None) -> Submission:
    """
    Return what submits for this try.

    :param ledger: what outlives a try; by default Airflow's task state store where there is one.
    """
    from airflow_provider_siliconflow.jobs.submission import Submission

    return Submission(
        client,
        ledger=ledger_of(context) if ledger is None else ledger,
        earlier_tries=_search(context),
        since=_earliest_start(context),
    )


def _search(context: Context) -> Search:
    """
    Say how hard an earlier try of this generation has to be looked for.

    A clear by a person starts a new generation at a higher try number; the arithmetic that shows it is off
    when ``retries`` was edited between two tries, so only the very first try searches nothing at all.
    """
    ti = context["ti"]
    if ti.try_number <= 1:
        return "none"
    first_of_generation = (ti.max_tries or 0) - (context["task"].retries or 0) + 1
    return "once" if ti.try_number <= first_of_generation else "patiently"


def _earliest_start(context: Context) -> float:
    """
    Return a time before which no try of this run can have submitted (epoch seconds).

    The run's own start moves when somebody clears another task of it, so the earliest of all is taken.
    """
    run = context["dag_run"]
    times = [
        getattr(run, "start_date", None),
        getattr(run, "run_after", None),
        getattr(run, "logical_date", None),
        getattr(context["ti"], "start_date", None),
    ]
    known = [time.timestamp() for time in times if time is not None]
    return min(known) if known else 0.0


class TaskStateLedger:
    """
    The ledger over Airflow's task state store (3.3+), which survives retries, crashes and deferral.

    It is complete where it was there from the first try of the generation on: an earlier try may have run before
    Airflow was upgraded, or with the store switched off.

    :param store: ``context["task_state_store"]``.
    :param generation: of the tries, see :class:`~.jobs.identity.Submitter`.
    :param first: whether no earlier try of this generation can have submitted anything.
    """

    def __init__(self, store: Any, *, generation: int, first: bool) -> None:
        self._store = store
        self._generation = generation
        if first:
            self.set(_GENERATION, {"number": generation})
        self.complete = first or (self.get(_GENERATION) or {}).get("number") == generation

    @staticmethod
    def _name(key: str) -> str:
        return f"siliconflow.{key}"

    def older_batches(self, key: str) -> Set[str]:
        """Return none: a task that submits a single batch has no older one."""
        return frozenset()

    @property
    def submitted(self) -> str | None:
        """The batch that a try of this generation recorded last, whatever its request was."""
        last = self.get(_LAST) or {}
        return last.get("batch_id") if last.get("generation") == self._generation else None

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the entry of a key."""
        value = self._store.get(self._name(key))
        return value if isinstance(value, dict) else None

    def set(self, key: str, entry: dict[str, Any]) -> None:
        """Write the entry of a key."""
        self._store.set(self._name(key), entry, retention=_RETENTION)
        if batch_id := entry.get("batch_id"):
            last = {"batch_id": batch_id, "generation": self._generation}
            self._store.set(self._name(_LAST), last, retention=_RETENTION)

    def delete(self, key: str) -> None:
        """Forget a key."""
        self._store.delete(self._name(key))


def ledger_of(context: Context) -> Ledger:
    """Return the task's ledger; ``[siliconflow] task_state_store = False`` does without Airflow's store."""
    from airflow_provider_siliconflow.jobs.submission import NoLedger

    store = context.get("task_state_store")
    if store is None or not conf.getboolean("siliconflow", "task_state_store", fallback=True):
        return NoLedger()
    first = _search(context) in ("none", "once")
    return TaskStateLedger(store, generation=context["ti"].max_tries or 0, first=first)


def task_state(ti: Any) -> str | None:
    """
    Return the state that Airflow has of a task instance now; ``None`` where it has none.

    :param ti: the task instance of a context or of a trigger.
    """
    if airflow_version() < (3, 0):
        state = ti.current_state()
    else:
        from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance

        states = RuntimeTaskInstance.get_task_states(
            dag_id=ti.dag_id, task_ids=[ti.task_id], run_ids=[ti.run_id], map_index=ti.map_index
        )
        by_task = states.get(ti.run_id) or {}
        # A mapped task is answered under "task_id_<map index>".
        name = ti.task_id if ti.map_index is None or ti.map_index < 0 else f"{ti.task_id}_{ti.map_index}"
        state = by_task.get(name, by_task.get(ti.task_id))
    return None if state is None else str(getattr(state, "value", state))


def only_the_worker_ends(ti: Any) -> bool:
    """
    Whether a task is being ended though nobody has touched it: by a deployment, an eviction, or by Airflow, which took
    it for dead and is about to try again.

    A signal tells all endings alike; the task's state does not: a person's makes it failed, success, skipped or
    restarting, before the signal. Where that cannot be read in time, a person is assumed.

    :param ti: the task instance of the context.
    """
    found: list[str | None] = []

    def ask() -> None:
        try:
            found.append(task_state(ti))
        except Exception as exc:  # noqa: BLE001
            log.warning("The task's state cannot be read (%s): it is taken to be ended by a person", exc)

    # In a thread, since the signal may have come in the middle of the main one's own talk with Airflow.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_STATE_PATIENCE)
    return bool(found) and found[0] in _UNTOUCHED_STATES


def may_end_in_trigger(operator: BaseOperator) -> bool:
    """
    Whether a trigger may end this task without a worker: nothing of it would be lost by that.

    Asset events of outlets, a ``post_execute``, a subclass's own ending and listeners (lineage) run on a worker
    only.
    """
    if operator.outlets or getattr(operator, "_post_execute_hook", None) is not None:
        return False
    ours = ("airflow.", "airflow_provider_siliconflow.")
    for name in ("execute_complete", "post_execute"):
        if not getattr(operator, name).__module__.startswith(ours):
            return False
    if airflow_version() < (3, 3):
        return False
    try:
        from airflow.sdk.listener import get_listener_manager
    except ImportError:
        from airflow.listeners.listener import get_listener_manager
    return not get_listener_manager().has_listeners
