"""The operator that creates a batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from airflow.providers.common.compat.sdk import conf

from airflow_provider_siliconflow.operators.base import SubmittingOperator
from airflow_provider_siliconflow.operators.upload import checked_file, upload_of
from airflow_provider_siliconflow.task import arguments as read
from airflow_provider_siliconflow.task.deferral import (
    defer,
    end_wait,
    forget_left_waiting,
    left_waiting,
    record_wait,
)
from airflow_provider_siliconflow.task.ledger import open_submission
from airflow_provider_siliconflow.task.state import TaskTry, may_end_in_trigger
from airflow_provider_siliconflow.triggers.batch import BatchTrigger

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context

    from airflow_provider_siliconflow.api.models import Batch
    from airflow_provider_siliconflow.jobs.identity import BatchWork, Submitter
    from airflow_provider_siliconflow.jobs.submission import Submission

_READERS = {
    "input_file_id": read.optional(read.identifier),
    "input_path": read.optional(read.place),
    "endpoint": read.endpoint,
    "completion_window": read.window,
    "metadata": read.optional(read.metadata),
    "replace": read.optional(read.replace),
    "conn_id": read.text,
    "poll_interval": read.seconds,
    "timeout": read.optional(read.seconds),
}
_INPUT = ("input_file_id", "input_path")


class CreateBatchOperator(SubmittingOperator):
    """
    Create a batch exactly once and, with ``wait_for_completion``, wait until it has ended.

    The batch carries the task's identity in its metadata. A retry finds the batch that an earlier try created,
    however that try ended, and does not pay for it again; neither does a manual clear, unless ``on_clear`` says
    otherwise. The batch id is pushed to XCom as ``batch_id`` before the wait.

    :param input_file_id: id of an uploaded file. Give either this or ``input_path``. (templated)
    :param input_path: path or URI of a JSONL file, which is checked and uploaded first. (templated)
    :param endpoint: only ``/v1/chat/completions``. (templated)
    :param completion_window: ``"24h"`` to ``"336h"``, a number of hours or a ``timedelta``. (templated)
    :param metadata: pairs of strings for the batch, at most 15 (16 with ``durable=False``). (templated)
    :param replace: ``{"model": "..."}`` overrides the model of every line. (templated)
    :param conn_id: the connection. (templated)
    :param wait_for_completion: wait until the batch has ended, and fail if it did not succeed.
    :param deferrable: wait in the triggerer, without a worker slot. Default: ``[operators]
        default_deferrable``.
    :param poll_interval: seconds between two polls of the batch, or a ``timedelta``. (templated)
    :param timeout: seconds to wait, or a ``timedelta``; by default until an hour after the batch expires. (templated)
    :param cancel_on_kill: cancel the batch if the task is ended by hand. While the task is deferred this needs
        Airflow 3.3; on older versions the batch continues.
    :param cancel_on_timeout: cancel the batch if the wait times out. By default it continues, and a retry waits
        for it again.
    :param fail_on_partial_error: fail if any row failed or expired; by default that is a warning.
    :param allow_all_failed: succeed even if not one row of the batch succeeded.
    :param durable: find and adopt the batch of an earlier try. ``False`` submits a new batch on every try.
    :param on_clear: what a manual clear does to work that is paid for: ``"reuse"`` continues with it (a batch without
        a single answer is replaced); ``"resubmit"`` submits a new batch.
    :param fail_fast: fail at once, without the task's retries, if a retry cannot help.
    :returns: the batch id.
    """

    template_fields: Sequence[str] = tuple(_READERS)
    template_fields_renderers = {"metadata": "json", "replace": "json"}  # noqa: RUF012
    ARGUMENTS: ClassVar = read.Arguments(_READERS, one_of=_INPUT)
    #: Without the identity there is room for one more pair of metadata.
    _PLAIN: ClassVar = read.Arguments(
        _READERS | {"metadata": read.optional(read.plain_metadata)}, one_of=_INPUT
    )

    def __init__(
        self,
        *,
        input_file_id: str | None = None,
        input_path: str | None = None,
        endpoint: str = "/v1/chat/completions",
        completion_window: str | int | timedelta = "24h",
        metadata: dict[str, str] | str | None = None,
        replace: dict[str, Any] | str | None = None,
        conn_id: str = "siliconflow_default",
        wait_for_completion: bool = False,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        poll_interval: float | timedelta | str = 60,
        timeout: float | timedelta | str | None = None,
        cancel_on_kill: bool = True,
        cancel_on_timeout: bool = False,
        fail_on_partial_error: bool = False,
        allow_all_failed: bool = False,
        durable: bool = True,
        on_clear: Literal["reuse", "resubmit"] = "reuse",
        fail_fast: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            conn_id=conn_id,
            fail_fast=fail_fast,
            deferrable=deferrable,
            poll_interval=poll_interval,
            timeout=timeout,
            cancel_on_kill=cancel_on_kill,
            cancel_on_timeout=cancel_on_timeout,
            completion_window=completion_window,
            metadata=metadata,
            on_clear=on_clear,
            **kwargs,
        )
        self.input_file_id = input_file_id
        self.input_path = input_path
        self.endpoint = endpoint
        self.replace = replace
        self.wait_for_completion = wait_for_completion
        self.fail_on_partial_error = fail_on_partial_error
        self.allow_all_failed = allow_all_failed
        self.durable = durable
        self.batch_id: str | None = None
        self._submission: Submission | None = None
        self._work: BatchWork | None = None
        self._cancels_late = False
        self._arguments.check(self)

    @property
    def _arguments(self) -> read.Arguments:
        return self.ARGUMENTS if self.durable else self._PLAIN

    def lineage_input(self) -> Any:
        """Return the file, if the operator uploads one."""
        return self.input_path

    def known_batches(self) -> Sequence[str]:
        """Return the id of the batch once it exists."""
        return [self.batch_id] if self.batch_id else []

    open_batches = known_batches

    def execute(self, context: Context) -> str:
        """Create or adopt the batch and, with ``wait_for_completion``, wait for it."""
        task_try = self._try = TaskTry.of(context, on_clear=self.on_clear)
        with self.errors(earlier_tries=task_try.number > 1):
            given = self._arguments.read(self)
            submission = self._submission = open_submission(task_try, self.hook.get_conn())
            if self._killed:
                submission.stop()
            reuses = self.durable and self.on_clear == "reuse"
            if not reuses:
                self._cancel_left_waiting(task_try)
            if self.durable:
                batch = self._submit(submission, task_try.submitter, given)
                if reuses:
                    self._cancel_left_waiting(task_try, but=batch.id)
            else:
                batch = self._submit_anew(submission, given)
            self.batch_id = batch.id
            if self._cancels_late:
                # The task was ended while the request was under way, when there was no batch to be found yet.
                self.cancel([batch.id])
            task_try.push("batch_id", batch.id)
            if not self.wait_for_completion:
                return batch.id
            return self._wait(task_try, batch, given)

    def execute_complete(self, context: Context, event: Any = None) -> str:
        """Resume after the trigger."""
        from airflow_provider_siliconflow.api.exceptions import BatchError
        from airflow_provider_siliconflow.jobs.events import batches_of

        task_try = self._try = TaskTry.of(context, on_clear=self.on_clear)
        with self.errors(earlier_tries=True):
            end_wait(task_try)
            if event is None:
                return self._resume_without_event(task_try)
            if event == "success":
                # dag.test() resumes the task even if the trigger ended it.
                return str(task_try.ti.xcom_pull(task_ids=self.task_id, key="batch_id"))
            try:
                (batch,) = batches_of(event)
            except BatchError as exc:
                self.batch_id = exc.batch_id
                raise
            self.batch_id = batch.id
            return self._judged(batch)

    def _resume_without_event(self, task_try: TaskTry) -> str:
        """Continue if the task resumes without its trigger: ``airflow tasks test`` does that to a waiting task."""
        batch = self.hook.get_batch(task_try.ti.xcom_pull(task_ids=self.task_id, key="batch_id"))
        self.batch_id = batch.id
        self.log.warning("Resumed without an event from the trigger; waiting for batch %s again", batch.id)
        return self._wait(task_try, batch, self._arguments.read(self))

    def _cancel_left_waiting(self, task_try: TaskTry, *, but: str | None = None) -> None:
        """
        Cancel the batch for which the task waited when it was cleared; nothing else cancels it.

        :param but: the batch that the task continues with.
        """
        from airflow_provider_siliconflow.api.exceptions import SiliconFlowError

        if (left := left_waiting(task_try)) is None:
            return
        if left.batch_id == but:
            forget_left_waiting(task_try)
            return
        if not self.cancel_on_kill:
            self.log.warning(
                "The task was cleared; batch %s is not cancelled, continues and is billed", left.batch_id
            )
            forget_left_waiting(task_try)
            return
        try:
            batch = self.hook.get_batch(left.batch_id)
            if left.is_it(batch) and not batch.is_terminal:
                self.log.info("The task was cleared while it waited for batch %s", batch.id)
                self.hook.cancel_batch(batch.id)
        except SiliconFlowError as exc:
            self.log.warning("Batch %s may continue and be billed: %s", left.batch_id, exc)
            return
        forget_left_waiting(task_try)

    def _submit(self, submission: Submission, submitter: Submitter, given: dict[str, Any]) -> Batch:
        """Return the batch of this task: the one of an earlier try, or a new one."""
        from airflow_provider_siliconflow.jobs.identity import BatchWork

        replace = given["replace"]
        upload, content = None, given["input_file_id"]
        if given["input_path"] is not None:
            upload = upload_of(self.hook, submitter, given["input_path"], needs_model=_needs_model(replace))
            content = upload.sha256
        request = {"endpoint": given["endpoint"], "completion_window": given["completion_window"]}
        # Without the metadata: a time in it would make every try a different piece of work.
        key = submitter.key(input=content, replace=replace, conn_id=self.conn_id, **request)
        self._work = BatchWork(
            key=key,
            label=submitter.label,
            input_file_id=given["input_file_id"],
            metadata=given["metadata"] or {},
            replace=replace,
            upload=upload,
            submitter=submitter,
            only_one=True,
            **request,
        )
        batch = submission.submit(self._work)
        self.log.info(
            "Batch %s (%s) over file %s, window %s%s; it is billed as its rows are done",
            batch.id,
            batch.status,
            batch.input_file_id,
            given["completion_window"],
            f", model {replace['model']}" if replace and "model" in replace else "",
        )
        return batch

    def _submit_anew(self, submission: Submission, given: dict[str, Any]) -> Batch:
        """Return a new batch, whatever an earlier try created."""
        file_id = given["input_file_id"]
        if given["input_path"] is not None:
            source, _ = checked_file(given["input_path"], needs_model=_needs_model(given["replace"]))
            file_id = self.hook.upload_file(source).id
        submission.check_not_stopped("POST /batches")
        names = ("endpoint", "completion_window", "metadata", "replace")
        batch = self.hook.create_batch(file_id, **{name: given[name] for name in names})
        self.log.info("Created batch %s; durable is off, so a retry creates another one", batch.id)
        return batch

    def _wait(self, task_try: TaskTry, batch: Batch, given: dict[str, Any]) -> str:
        if not batch.is_terminal:
            deadline = _deadline(batch, given["timeout"])
            if self.deferrable:
                self._defer(task_try, batch, given["poll_interval"], deadline)
            (batch,) = self.hook.wait_for_batches(
                [batch.id], poll_interval=given["poll_interval"], deadline=deadline
            )
        return self._judged(batch)

    def _defer(self, task_try: TaskTry, batch: Batch, poll_interval: float, deadline: float) -> None:
        end_in_trigger = may_end_in_trigger(self)
        if end_in_trigger and self.do_xcom_push:
            # No worker will run again to push it.
            task_try.push("return_value", batch.id)
        trigger = BatchTrigger(
            batch_ids=[batch.id],
            conn_id=self.conn_id,
            poll_interval=poll_interval,
            deadline=deadline,
            cancel_on_kill=self.cancel_on_kill,
            wait_token=record_wait(task_try, batch) if self.cancel_on_kill else None,
            end_in_trigger=end_in_trigger,
        )
        defer(self, trigger, deadline=deadline)

    def _judged(self, batch: Batch) -> str:
        from airflow_provider_siliconflow.jobs.outcome import finish_batch

        warning = finish_batch(
            self.hook.get_conn(),
            batch,
            fail_on_partial_error=self.fail_on_partial_error,
            allow_all_failed=self.allow_all_failed,
        )
        if warning:
            self.log.warning("%s", warning)
        return batch.id

    def on_kill(self) -> None:
        """Create no more batches, and cancel the batch if the running task was ended by hand."""
        self._killed = True
        if self._submission is not None:
            self._submission.stop()
        if not self.kill_cancels():
            if self.batch_id:
                self.log.warning("Batch %s is not cancelled; it continues and is billed", self.batch_id)
            return
        self._cancels_late = True
        if batch_ids := self.known_batches() or self._being_created():
            self.cancel(batch_ids)

    def _being_created(self) -> list[str]:
        """Return the batch whose request was sent but not answered yet, if the account lists it."""
        from airflow_provider_siliconflow.api.exceptions import SiliconFlowError

        if self._submission is None or self._work is None:
            return []
        try:
            return [batch.id for batch in self._submission.find([self._work], self.kill_patience())][:1]
        except SiliconFlowError as exc:
            self.log.warning("The task was killed while creating a batch, which cannot be looked up: %s", exc)
            return []


def _needs_model(replace: dict[str, Any] | None) -> bool:
    return not (replace or {}).get("model")


def _deadline(batch: Batch, timeout: float | None) -> float:
    """Return the absolute time (epoch seconds) at which the wait for a batch ends, fixed once per try."""
    from airflow_provider_siliconflow.jobs.waiting import default_deadline

    now = time.time()
    return default_deadline(batch, now) if timeout is None else now + timeout
