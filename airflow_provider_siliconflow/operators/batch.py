"""Operators for batches: upload, create, download, cancel."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import conf

from airflow_provider_siliconflow.api import arguments
from airflow_provider_siliconflow.hooks.siliconflow import SiliconFlowHook
from airflow_provider_siliconflow.operators.base import (
    DEFERRAL_BACKSTOP,
    FileOperator,
    SiliconFlowOperator,
    SubmittingOperator,
    finish_batch,
    wait_deadline,
)
from airflow_provider_siliconflow.operators.run import RunBatchOperator
from airflow_provider_siliconflow.task.errors import task_errors
from airflow_provider_siliconflow.task.ledger import ledger_of, open_submission
from airflow_provider_siliconflow.task.state import may_end_in_trigger, submitter_of
from airflow_provider_siliconflow.task.templating import (
    is_templated,
    is_templated_inside,
    refuse_both,
    rendered_mapping,
    rendered_number,
    rendered_text,
)
from airflow_provider_siliconflow.triggers.batch import BatchTrigger

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context

    from airflow_provider_siliconflow.api.models import Batch
    from airflow_provider_siliconflow.api.sources import Source
    from airflow_provider_siliconflow.batch_files.reader import RequestFileSummary
    from airflow_provider_siliconflow.jobs.identity import BatchWork, Submitter
    from airflow_provider_siliconflow.jobs.submission import Submission

__all__ = [
    "CancelBatchOperator",
    "CreateBatchOperator",
    "DownloadBatchResultsOperator",
    "RunBatchOperator",
    "UploadBatchFileOperator",
]


class UploadBatchFileOperator(FileOperator):
    """
    Check a batch input file and upload it once; a retry finds the file that an earlier try uploaded.

    :param input_path: path or URI (any scheme Airflow's ``ObjectStoragePath`` takes) of a JSONL file with at
        most 5,000 lines and 1 GB. (templated)
    :param conn_id: the connection. (templated)
    :param fail_fast: fail at once, without the task's retries, where a retry cannot help.
    :returns: the file id, also pushed to XCom as ``file_id``. The service keeps the file for 30 days.
    """

    template_fields: Sequence[str] = ("input_path", "conn_id")

    def __init__(self, *, input_path: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.input_path = input_path

    def lineage_input(self) -> Any:
        """Return the file."""
        return self.input_path

    def execute(self, context: Context) -> str:
        """Upload, and return the file id."""
        with task_errors(fail_fast=self.fail_fast):
            submission = open_submission(context, self.hook.get_conn())
            file_id, _ = upload_once(self.hook, submission, submitter_of(context), self.input_path)
        context["ti"].xcom_push(key="file_id", value=file_id)
        return file_id


def upload_once(
    hook: SiliconFlowHook,
    submission: Submission,
    submitter: Submitter,
    input_path: Any,
    *,
    needs_model: bool = False,
) -> tuple[str, str]:
    """
    Check a file, and upload it unless an earlier try did.

    :param needs_model: refuse lines that name no model.
    :returns: file id, and the sha256 of the content.
    """
    from airflow_provider_siliconflow.jobs.identity import upload_name

    source, summary = _checked(input_path, needs_model=needs_model)
    client = hook.get_conn()
    key = submitter.key(upload=summary.sha256, conn_id=hook.conn_id)
    name = upload_name(str(input_path), key)
    file = submission.upload(
        key, name, summary.bytes, lambda: client.upload_file(source, size=summary.bytes, filename=name)
    )
    hook.log.info("%s (%d rows, %d bytes) is file %s", input_path, summary.rows, summary.bytes, file.id)
    return file.id, summary.sha256


def _checked(input_path: Any, *, needs_model: bool) -> tuple[Source, RequestFileSummary]:
    from airflow_provider_siliconflow.api.exceptions import InvalidInputError
    from airflow_provider_siliconflow.batch_files.reader import check_request_file
    from airflow_provider_siliconflow.paths import open_source

    source = open_source(input_path, "input_path")
    summary = check_request_file(source, name=str(input_path))
    if needs_model and summary.rows_without_model:
        raise InvalidInputError(
            f"{input_path}: {summary.rows_without_model} of {summary.rows} lines name no model in body.model; "
            "add it, or name one for all with replace={'model': ...}. Nothing was uploaded."
        )
    return source, summary


class CreateBatchOperator(SubmittingOperator):
    """
    Create a batch exactly once and, if told to, wait until it has ended.

    The batch carries the task's identity in its metadata. A retry finds the batch that an earlier try created,
    whatever that try died of, and pays nothing again; a person's clear starts afresh. The batch id is pushed to
    XCom as ``batch_id`` before any waiting begins.

    :param input_file_id: an uploaded file. Give this or ``input_path``. (templated)
    :param input_path: path or URI of a JSONL file, which is checked and uploaded first. (templated)
    :param endpoint: only ``/v1/chat/completions``. (templated)
    :param completion_window: ``"24h"`` to ``"336h"``, a number of hours or a ``timedelta``. (templated)
    :param metadata: pairs of strings for the batch, at most 15 (16 with ``durable=False``). (templated)
    :param replace: ``{"model": "..."}`` overrides the model of every line. (templated)
    :param conn_id: the connection. (templated)
    :param wait_for_completion: wait until the batch has ended, and fail if it did not succeed.
    :param deferrable: wait in the triggerer, without a worker slot. Default: ``[operators]
        default_deferrable``.
    :param poll_interval: seconds between two looks at the batch, or a ``timedelta``. (templated)
    :param timeout: seconds to wait, or a ``timedelta``; by default until an hour after the batch expires. (templated)
    :param cancel_on_kill: cancel the batch when a person ends the task. While the task is deferred this needs
        Airflow 3.3; on older versions the batch goes on.
    :param cancel_on_timeout: cancel the batch when the wait times out. By default it is left alone: a retry
        waits on.
    :param fail_on_partial_error: fail when any row failed or expired; by default that is a warning.
    :param allow_all_failed: let a batch pass of which not one row succeeded.
    :param durable: find and adopt the batch of an earlier try. ``False`` submits on every try.
    :param fail_fast: fail at once, without the task's retries, where a retry cannot help.
    :returns: the batch id.
    """

    template_fields: Sequence[str] = (
        "input_file_id",
        "input_path",
        "endpoint",
        "completion_window",
        "metadata",
        "replace",
        "conn_id",
        "poll_interval",
        "timeout",
    )
    template_fields_renderers = {"metadata": "json", "replace": "json"}  # noqa: RUF012

    def __init__(
        self,
        *,
        input_file_id: str | None = None,
        input_path: str | None = None,
        endpoint: str = "/v1/chat/completions",
        completion_window: str | int | timedelta = "24h",
        metadata: dict[str, str] | str | None = None,
        replace: dict[str, Any] | str | None = None,
        wait_for_completion: bool = False,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        poll_interval: float | timedelta | str = 60,
        timeout: float | timedelta | str | None = None,
        cancel_on_kill: bool = True,
        cancel_on_timeout: bool = False,
        fail_on_partial_error: bool = False,
        allow_all_failed: bool = False,
        durable: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            deferrable=deferrable,
            poll_interval=poll_interval,
            timeout=timeout,
            cancel_on_kill=cancel_on_kill,
            cancel_on_timeout=cancel_on_timeout,
            completion_window=completion_window,
            metadata=metadata,
            durable=durable,
            **kwargs,
        )
        refuse_both(input_file_id=input_file_id, input_path=input_path)
        if not is_templated(endpoint):
            arguments.check_endpoint(endpoint)
        if not is_templated(replace) and not is_templated_inside(replace):
            arguments.check_replace(rendered_mapping(replace))
        self.input_file_id = input_file_id
        self.input_path = input_path
        self.endpoint = endpoint
        self.replace = replace
        self.wait_for_completion = wait_for_completion
        self.fail_on_partial_error = fail_on_partial_error
        self.allow_all_failed = allow_all_failed
        self.batch_id: str | None = None
        self._submission: Submission | None = None
        self._work: BatchWork | None = None
        self._is_ended = False

    def lineage_input(self) -> Any:
        """Return the file, where the operator uploads one."""
        return self.input_path

    def execute(self, context: Context) -> str:
        """Create the batch or adopt it, and wait if told to."""
        self._ti = context["ti"]
        with task_errors(fail_fast=self.fail_fast), self._paid_batch(context, resumed=False):
            poll_interval, timeout = self.wait_arguments()
            batch = self._submit(context)
            self.batch_id = batch.id
            if self._is_ended:
                # Ended while the request was on its way, when there was no batch to be found yet.
                self.cancel([batch.id])
            context["ti"].xcom_push(key="batch_id", value=batch.id)
            if not self.wait_for_completion:
                return batch.id
            if batch.is_terminal:
                return self._finish(batch)
            deadline = wait_deadline(batch, timeout)
            if self.deferrable:
                self._defer(context, batch.id, poll_interval, deadline)
            try:
                batch = self.hook.wait_for_batches(
                    [batch.id], poll_interval=poll_interval, deadline=deadline
                )[0]
            except Exception as exc:
                self._after_timeout(exc)
                raise
            return self._finish(batch)

    @contextlib.contextmanager
    def _paid_batch(self, context: Context, *, resumed: bool) -> Iterator[None]:
        """
        Leave an error to the task's retries where a batch is paid for, but for a verdict on the batch.

        Failing for good would leave a person nothing but a clear, which pays for another.
        """
        from airflow_provider_siliconflow.api.exceptions import BatchError, BatchWaitError, SiliconFlowError

        try:
            yield
        except SiliconFlowError as exc:
            verdict = isinstance(exc, BatchError) and not isinstance(exc, BatchWaitError)
            if exc.retryable or verdict or not self.durable:
                raise
            paid = self.batch_id or getattr(ledger_of(context), "submitted", None)
            if paid or resumed or context["ti"].try_number > 1:
                which = f"Batch {paid} is submitted" if paid else "A batch may be submitted by an earlier try"
                exc.args = (
                    f"{exc} {which}, and stays as it is. Mend what is wrong and let the task retry: it takes the "
                    "batch up. A clear would pay for another.",
                )
                exc.retryable = True
            raise

    def execute_complete(self, context: Context, event: Any = None) -> str:
        """Resume after the trigger."""
        self._ti = context["ti"]
        from airflow_provider_siliconflow.jobs.events import read_event

        with task_errors(fail_fast=self.fail_fast), self._paid_batch(context, resumed=True):
            if event == "success":
                # dag.test() resumes the task even where the trigger ended it.
                return str(context["ti"].xcom_pull(task_ids=self.task_id, key="batch_id"))
            try:
                (batch,) = read_event(event)
            except Exception as exc:
                self.batch_id = getattr(exc, "batch_id", None)
                self._after_timeout(exc)
                raise
            self.batch_id = batch.id
            return self._finish(batch)

    def _submit(self, context: Context) -> Batch:
        from airflow_provider_siliconflow.api.exceptions import InvalidInputError
        from airflow_provider_siliconflow.jobs.identity import BatchWork, check_user_metadata

        input_file_id, input_path = rendered_text(self.input_file_id), rendered_text(self.input_path)
        if (input_file_id is None) == (input_path is None):
            raise InvalidInputError("give either input_file_id or input_path: one of them, not both")
        # Everything is checked before anything is sent.
        window = arguments.check_completion_window(rendered_number(self.completion_window))
        endpoint = arguments.check_endpoint(self.endpoint)
        given = rendered_mapping(self.metadata)
        metadata = check_user_metadata(given) if self.durable else arguments.check_metadata(given)
        replace = arguments.check_replace(rendered_mapping(self.replace))
        submitter = submitter_of(context)
        client = self.hook.get_conn()
        submission = self._submission = open_submission(context, client)
        if self._killed:
            submission.stop()
        if input_path is not None:
            needs_model = not (replace or {}).get("model")
            if self.durable:
                file_id, content = upload_once(
                    self.hook, submission, submitter, input_path, needs_model=needs_model
                )
            else:
                source, _ = _checked(input_path, needs_model=needs_model)
                file_id = self.hook.upload_file(source).id
        else:
            file_id = content = arguments.check_identifier("input_file_id", input_file_id)
        if not self.durable:
            submission.check_not_stopped("POST /batches")
            batch = self.hook.create_batch(
                file_id, endpoint=endpoint, completion_window=window, metadata=metadata, replace=replace
            )
            self.log.info("Created batch %s; durable is off, so a retry creates another", batch.id)
            return batch
        work = BatchWork(
            key=submitter.key(
                input=content,
                endpoint=endpoint,
                completion_window=window,
                replace=replace,
                # Not the metadata: a time in it would make every try another piece of work.
                conn_id=self.conn_id,
            ),
            label=submitter.label,
            input_file_id=file_id,
            endpoint=endpoint,
            completion_window=window,
            metadata=metadata,
            replace=replace,
        )
        self._work = work
        batch = submission.submit(work)
        self.log.info(
            "Batch %s (%s) over file %s, window %s%s; it is billed as its rows are done",
            batch.id,
            batch.status,
            file_id,
            window,
            f", model {replace['model']}" if replace and "model" in replace else "",
        )
        return batch

    def _defer(self, context: Context, batch_id: str, poll_interval: float, deadline: float) -> None:
        end_in_trigger = may_end_in_trigger(self)
        if end_in_trigger and self.do_xcom_push:
            # No worker will come to push it.
            context["ti"].xcom_push(key="return_value", value=batch_id)
        self.defer(
            trigger=BatchTrigger(
                batch_ids=[batch_id],
                conn_id=self.conn_id,
                poll_interval=poll_interval,
                deadline=deadline,
                cancel_on_kill=self.cancel_on_kill,
                end_in_trigger=end_in_trigger,
            ),
            method_name="execute_complete",
            timeout=timedelta(seconds=max(deadline - time.time(), 0) + DEFERRAL_BACKSTOP),
        )

    def _finish(self, batch: Batch) -> str:
        warning = finish_batch(
            self.hook,
            batch,
            fail_on_partial_error=self.fail_on_partial_error,
            allow_all_failed=self.allow_all_failed,
        )
        if warning:
            self.log.warning("%s", warning)
        return batch.id

    def _after_timeout(self, error: Exception) -> None:
        from airflow_provider_siliconflow.api.exceptions import BatchTimeoutError

        if isinstance(error, BatchTimeoutError) and self.cancel_on_timeout and self.batch_id:
            raise self.cancelled_at_timeout([self.batch_id]) from error

    def on_kill(self) -> None:
        """Cancel the batch when the running task is ended from outside; in any case create none any more."""
        self._killed = True
        if self._submission is not None:
            self._submission.stop()
        if not self.kill_cancels():
            if self.batch_id:
                self.log.warning("Batch %s is left alone; it goes on and is billed", self.batch_id)
            return
        self._is_ended = True
        batch_id = self.batch_id
        if batch_id is None and self._submission is not None and self._work is not None:
            # Killed between sending and the answer: the batch may exist though its id is not known here.
            from airflow_provider_siliconflow.api.exceptions import SiliconFlowError

            try:
                found = self._submission.find([self._work], self.kill_patience())
            except SiliconFlowError as exc:
                self.log.warning("Killed while the batch was created; it cannot be looked up: %s", exc)
                return
            batch_id = found[0].id if found else None
        if batch_id is not None:
            self.cancel([batch_id])


class DownloadBatchResultsOperator(FileOperator):
    """
    Download the results of an ended batch: completed, expired or cancelled.

    Writes ``results.jsonl`` (every row the service returned, as it returned it), ``errors.jsonl`` (those that
    did not succeed) and ``manifest.json`` into ``output_dir``. Each appears only when it is whole.

    :param batch_id: the batch. (templated)
    :param output_dir: path or URI of a folder. (templated)
    :param conn_id: the connection. (templated)
    :param fail_on_partial_error: fail when any row failed, expired or is missing; the files are written first.
    :param fail_fast: fail at once, without the task's retries, where a retry cannot help.
    :returns: the manifest.
    """

    template_fields: Sequence[str] = ("batch_id", "output_dir", "conn_id")

    def __init__(
        self, *, batch_id: str, output_dir: str, fail_on_partial_error: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.batch_id = batch_id
        self.output_dir = output_dir
        self.fail_on_partial_error = fail_on_partial_error

    def execute(self, context: Context) -> dict[str, Any]:
        """Download, and return the manifest."""
        with task_errors(fail_fast=self.fail_fast):
            manifest = self._manifest = self.hook.download_results(self.batch_id, self.output_dir)
            if self.fail_on_partial_error:
                from airflow_provider_siliconflow.jobs.outcome import refuse_partial

                refuse_partial(manifest, self.batch_id)
        return manifest


class CancelBatchOperator(SiliconFlowOperator):
    """
    Ask for a batch to be cancelled. Rows that are done are billed and stay readable.

    A batch that has ended already is left as it is, and the task succeeds.

    :param batch_id: the batch. (templated)
    :param conn_id: the connection. (templated)
    :param fail_fast: fail at once, without the task's retries, where a retry cannot help.
    :returns: the batch as JSON; it may still show its old status.
    """

    template_fields: Sequence[str] = ("batch_id", "conn_id")

    def __init__(self, *, batch_id: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.batch_id = batch_id

    def execute(self, context: Context) -> dict[str, Any]:
        """Cancel, and return the batch."""
        with task_errors(fail_fast=self.fail_fast):
            batch: dict[str, Any] = self.hook.cancel_batch(self.batch_id).to_json_dict()
            return batch
