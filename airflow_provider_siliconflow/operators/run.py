"""The operator that runs a whole job, from rows to results."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from airflow.providers.common.compat.sdk import AirflowSkipException, conf

from airflow_provider_siliconflow.operators.base import SubmittingOperator
from airflow_provider_siliconflow.task import arguments as read
from airflow_provider_siliconflow.task.deferral import defer, end_wait, record_wait
from airflow_provider_siliconflow.task.ledger import open_submission
from airflow_provider_siliconflow.task.state import TaskTry
from airflow_provider_siliconflow.triggers.batch import BatchTrigger

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context

    from airflow_provider_siliconflow.api.models import Batch
    from airflow_provider_siliconflow.batch_files.output_types import Accept, OutputType
    from airflow_provider_siliconflow.jobs.options import RunOptions
    from airflow_provider_siliconflow.jobs.run import BatchRun, Wait

#: The arguments of :func:`~..jobs.options.check_options`.
_OPTIONS = {
    "model": read.optional(read.model),
    "models": read.optional(read.models),
    "request_params": read.optional(read.parameters),
    "completion_window": read.window,
    "metadata": read.optional(read.metadata),
    "prices": read.optional(read.prices),
    "max_cost": read.optional(read.max_cost),
    "max_rows_per_batch": read.limit,
    "max_bytes_per_batch": read.limit,
    "max_in_flight": read.limit,
    "max_row_attempts": read.limit,
    "max_error_rate": read.limit,
    "on_invalid_row": read.choice("fail", "report"),
    "structured_output": read.optional(read.structured_output),
    "retry_params": read.optional(read.retry_parameters),
    "live_after": read.optional(read.live_after),
    "live_concurrency": read.concurrency,
}
#: More of them, which are Python objects and never rendered. A task that resumes has them from its DAG file.
_OBJECTS = {"output_type": read.output_type, "accept": read.accept}
_READERS = {
    "output_dir": read.place,
    "cache_dir": read.optional(read.place),
    "conn_id": read.text,
    "poll_interval": read.seconds,
    "timeout": read.optional(read.seconds),
    **_OPTIONS,
}
#: The rows are read only if they are needed: a try that continues an earlier try's plan may not need them.
_AT_START = (*_READERS, *_OBJECTS)


@dataclass(frozen=True, slots=True)
class _Job:
    """A job in one try."""

    task_try: TaskTry
    run: BatchRun
    options: RunOptions
    poll_interval: float


class RunBatchOperator(SubmittingOperator):
    """
    Run any number of rows over one or more models, and write the results in the order of the rows.

    The rows are checked and split into shards of at most 5,000 rows; each shard is uploaded once and run over
    every model. One trigger waits for all batches. Every row ends as ok, error, invalid, expired or missing. If a try
    dies, the next one continues its work and pays for nothing again. A manual clear pays only for rows without an
    accepted answer, unless ``on_clear`` says otherwise.

    While the job runs, ``output_dir/.siliconflow`` contains what a retry needs, so ``output_dir`` must render to the
    same value on every try.

    :param requests: path or URI of a JSONL file, or the rows: a list, or the output of an upstream task. A row
        is a full request line (``custom_id``, ``body``), a short one (``custom_id``, ``messages``, other body
        parameters) or a prompt. Rows without a ``custom_id`` are numbered. (templated)
    :param output_dir: path or URI of a folder for ``results.jsonl``, ``errors.jsonl`` and ``manifest.json``; with
        several models, each has its own folder in it. (templated)
    :param model: the model for all rows; without it and ``models``, the rows name their models. (templated)
    :param models: several models to run the same rows over: a list, or a mapping of them to body parameters for rows
        that lack them, such as ``{"Qwen/Qwen3-32B": {"enable_thinking": False}}``. (templated)
    :param request_params: body parameters for rows that lack them, such as ``{"temperature": 0}``. (templated)
    :param conn_id: the connection. (templated)
    :param completion_window: ``"24h"`` to ``"336h"``, a number of hours or a ``timedelta``. (templated)
    :param metadata: pairs of strings for every batch, at most 15. (templated)
    :param max_rows_per_batch: at most 5,000. (templated)
    :param max_bytes_per_batch: at most 10**9. (templated)
    :param max_in_flight: most open batches at a time; by default all. (templated)
    :param max_row_attempts: how often a row is sent at most. Only rows that expired, got no result or failed for a
        transient reason (429, 5xx) or with an answer that is not accepted are sent again, and none once the account
        has no balance. (templated)
    :param output_type: a pydantic model class or a JSON schema that each answer must satisfy; otherwise the row is
        invalid. A row that is sent again shows the model its last answer and what was wrong with it.
    :param structured_output: how the service is asked for answers of that type: ``"json_object"`` (JSON mode and an
        instruction with the schema), ``"json_schema"`` or ``"prompt"`` (the instruction alone). (templated)
    :param accept: a function of a :class:`~airflow_provider_siliconflow.api.models.BatchResult` that returns ``True``,
        ``False`` or the reason why the answer is not accepted.
    :param retry_params: body parameters of rows that are sent again, such as ``{"max_tokens": 8192}``; they replace
        those of the row. (templated)
    :param max_error_rate: share of rows (0 to 1) that may fail before the task fails. (templated)
    :param on_invalid_row: what an invalid row does: ``"fail"`` fails the task before anything is sent; ``"report"``
        makes it an error row, and the others run. (templated)
    :param fail_on_partial_error: fail if any row did not succeed; ignored if ``max_error_rate`` is set.
    :param allow_all_failed: succeed even if not one row of the job succeeded.
    :param cache_dir: path or URI of a folder of answers that jobs share. A row whose model and body were answered
        before is not sent; the answers of this job are added. (templated)
    :param prices: CNY per million tokens by model: ``{model: {"prompt": ..., "completion": ...}}``. A model without an
        entry gets its price from the connection's extra, or from ``[siliconflow] prices``. (templated)
    :param max_cost: the most that the job may cost, in CNY; nothing is sent that could go over it. Every model needs a
        price, and every row ``max_tokens`` and a limit on its thinking. (templated)
    :param live_after: when the rows that are still open are asked one by one, at the live price: seconds from the start
        of the job or a ``timedelta`` (0: no batch at all), or a time with its zone, such as
        ``"{{ data_interval_end + macros.timedelta(hours=8) }}"``. The open batches are cancelled then, and what they
        answered is kept. By default rows are only sent in batches. (templated)
    :param live_concurrency: most rows that are asked at once. A killed worker may have to ask as many again.
        (templated)
    :param dry_run: check and plan without sending anything; log and return the estimated size and cost.
    :param skip_if_empty: skip the task if there are no rows; by default that is an error.
    :param deferrable: wait in the triggerer, without a worker slot. Default: ``[operators]
        default_deferrable``.
    :param poll_interval: seconds between two polls of a batch, or a ``timedelta``. (templated)
    :param timeout: seconds to wait in total, from the start of the try, or a ``timedelta``; by default until an hour
        after the batches expire. (templated)
    :param cancel_on_kill: cancel the open batches if the task is ended by hand. While the task is deferred this
        needs Airflow 3.3.
    :param cancel_on_timeout: cancel the open batches if the wait times out.
    :param on_clear: what a manual clear does to work that is paid for: ``"reuse"`` continues with it, and pays only
        for what has no answer; ``"resubmit"`` submits everything again.
    :param fail_fast: fail at once, without the task's retries, if a retry cannot help.
    :returns: the manifest: batches, rows, finish reasons, tokens, cost, errors and paths, by model and in total.
    """

    template_fields: Sequence[str] = ("requests", *_READERS)
    template_fields_renderers: ClassVar[dict[str, str]] = {
        "models": "json",
        "request_params": "json",
        "metadata": "json",
        "prices": "json",
        "retry_params": "json",
    }
    ARGUMENTS: ClassVar = read.Arguments(
        {"requests": read.rows, **_READERS, **_OBJECTS},
        not_both=("model", "models"),
        needs={"structured_output": "output_type"},
        never_rendered=tuple(_OBJECTS),
    )

    def __init__(
        self,
        *,
        requests: Any,
        output_dir: str,
        model: str | None = None,
        models: Sequence[str] | Mapping[str, Mapping[str, Any]] | str | None = None,
        request_params: dict[str, Any] | str | None = None,
        conn_id: str = "siliconflow_default",
        completion_window: str | int | timedelta = "24h",
        metadata: dict[str, str] | str | None = None,
        max_rows_per_batch: int | str = 5000,
        max_bytes_per_batch: int | str = 10**9,
        max_in_flight: int | str | None = None,
        max_row_attempts: int | str = 1,
        max_error_rate: float | str | None = None,
        on_invalid_row: str = "fail",
        output_type: OutputType | None = None,
        structured_output: str | None = None,
        accept: Accept | None = None,
        retry_params: dict[str, Any] | str | None = None,
        fail_on_partial_error: bool = False,
        allow_all_failed: bool = False,
        cache_dir: str | None = None,
        prices: Mapping[str, Mapping[str, Any]] | str | None = None,
        max_cost: float | str | None = None,
        live_after: float | timedelta | datetime | str | None = None,
        live_concurrency: int | str = 16,
        dry_run: bool = False,
        skip_if_empty: bool = False,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        poll_interval: float | timedelta | str = 60,
        timeout: float | timedelta | str | None = None,
        cancel_on_kill: bool = True,
        cancel_on_timeout: bool = False,
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
        self.requests = requests
        self.output_dir = output_dir
        self.model = model
        self.models = models
        self.request_params = request_params
        self.max_rows_per_batch = max_rows_per_batch
        self.max_bytes_per_batch = max_bytes_per_batch
        self.max_in_flight = max_in_flight
        self.max_row_attempts = max_row_attempts
        self.max_error_rate = max_error_rate
        self.on_invalid_row = on_invalid_row
        self.output_type = output_type
        self.structured_output = structured_output
        self.accept = accept
        self.retry_params = retry_params
        self.fail_on_partial_error = fail_on_partial_error
        self.allow_all_failed = allow_all_failed
        self.cache_dir = cache_dir
        self.prices = prices
        self.max_cost = max_cost
        self.live_after = live_after
        self.live_concurrency = live_concurrency
        self.skip_if_empty = skip_if_empty
        # `dry_run` is a method of every operator, which Airflow 2.11 calls for `airflow tasks test --dry-run`.
        self.plans_only = dry_run
        self._job: _Job | None = None
        self.ARGUMENTS.check(self)

    def lineage_input(self) -> Any:
        """Return the file of the rows, if they come from a file."""
        return self.requests

    def known_batches(self) -> Sequence[str]:
        """Return the ids of all batches so far."""
        return self._job.run.batch_ids if self._job is not None else ()

    def open_batches(self) -> Sequence[str]:
        """Return the ids of the batches that are not known to have ended."""
        return self._job.run.open_batches if self._job is not None else ()

    def ownership(self) -> Callable[[Batch], bool] | None:
        """Return what proves that an open batch is the job's: its ledger lies in a folder where others may write."""
        return self._job.run.owns if self._job is not None else None

    def execute(self, context: Context) -> dict[str, Any]:
        """Plan, submit and wait, or continue the work of an earlier try."""
        from airflow_provider_siliconflow.api.exceptions import NoRowsError

        task_try = self._try = TaskTry.of(context, on_clear=self.on_clear)
        with self.errors(earlier_tries=task_try.number > 1):
            given = self.ARGUMENTS.read(self, *_AT_START)
            try:
                if self.plans_only:
                    return self._estimate(given)
                job = self._open(task_try, given)
                return self._carry_out(
                    job, job.run.start(self._rows, self._requests_name(), timeout=given["timeout"])
                )
            except NoRowsError as exc:
                if self.skip_if_empty:
                    raise AirflowSkipException(f"Skipping, since skip_if_empty is set: {exc}") from None
                raise

    def execute_complete(self, context: Context, event: Any = None) -> dict[str, Any]:
        """Resume after the trigger: submit what is due and wait again, or finish."""
        from airflow_provider_siliconflow.jobs.events import batches_of

        task_try = self._try = TaskTry.of(context, on_clear=self.on_clear)
        with self.errors(earlier_tries=True):
            end_wait(task_try)
            job = self._open(task_try, self.ARGUMENTS.read(self, *_AT_START))
            # `airflow tasks test` resumes a waiting task without an event; the job then waits for its batches again.
            ended = [] if event is None else batches_of(event)
            return self._carry_out(job, job.run.resume(ended))

    def _carry_out(self, job: _Job, wait: Wait | None) -> dict[str, Any]:
        while wait is not None:
            job.task_try.push("batch_ids", list(job.run.batch_ids))
            if self.deferrable:
                self._defer(job, wait)
            ended = self.hook.wait_for_batches(
                wait.batch_ids,
                poll_interval=wait.poll_interval(job.poll_interval),
                deadline=wait.deadline,
                min_ended=wait.min_ended,
                resume_at=wait.resume_at,
            )
            wait = job.run.resume(ended)
        return self._judged(job, job.run.finish())

    def _judged(self, job: _Job, manifest: dict[str, Any]) -> dict[str, Any]:
        from airflow_provider_siliconflow.jobs.outcome import judge_run

        self._manifest = manifest
        if self.do_xcom_push:
            # A task that fails because of its rows returns nothing, but its results are written and paid for.
            job.task_try.push("return_value", manifest)
        if warning := judge_run(manifest, job.options):
            self.log.warning("%s", warning)
        return manifest

    def _defer(self, job: _Job, wait: Wait) -> None:
        trigger = BatchTrigger(
            batch_ids=wait.batch_ids,
            conn_id=self.conn_id,
            poll_interval=wait.poll_interval(job.poll_interval),
            deadline=wait.deadline,
            cancel_on_kill=self.cancel_on_kill,
            wait_token=record_wait(job.task_try) if self.cancel_on_kill else None,
            min_ended=wait.min_ended,
            began=time.time(),
            counts_only=True,
            resume_at=wait.resume_at,
        )
        defer(self, trigger, deadline=wait.resume_at if wait.deadline is None else wait.deadline)

    def _options(self, given: dict[str, Any]) -> RunOptions:
        from airflow_provider_siliconflow.jobs.options import check_options

        return check_options(
            **{name: given[name] for name in (*_OPTIONS, *_OBJECTS)}
            | {"prices": self._all_prices(given["prices"])},
            fail_on_partial_error=self.fail_on_partial_error,
            allow_all_failed=self.allow_all_failed,
        )

    def _all_prices(self, given: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """Return the prices by model: of the argument, of the connection and of Airflow's configuration."""
        from airflow_provider_siliconflow.api.exceptions import InvalidInputError
        from airflow_provider_siliconflow.batch_files.prices import merge_prices
        from airflow_provider_siliconflow.task.prices import configured_prices

        try:
            return merge_prices(given, self.hook.prices)
        except InvalidInputError as exc:
            if not self.plans_only:
                raise
            # A dry run needs no connection.
            self.log.info("Prices of the connection are not used: %s", exc)
            return merge_prices(given, configured_prices())

    def _estimate(self, given: dict[str, Any]) -> dict[str, Any]:
        from airflow_provider_siliconflow.jobs.plan import estimate

        found = estimate(self._rows(), name=self._requests_name(), options=self._options(given))
        self.log.info("Dry run, nothing is sent: %s", json.dumps(found, ensure_ascii=False))
        return found

    def _open(self, task_try: TaskTry, given: dict[str, Any]) -> _Job:
        """
        Return the job.

        :raises SiliconFlowError: the task was ended before.
        """
        from airflow_provider_siliconflow.jobs.opening import JobTry
        from airflow_provider_siliconflow.jobs.run import BatchRun
        from airflow_provider_siliconflow.paths import open_folder

        options = self._options(given)
        client = self.hook.get_conn()
        cache_dir = given["cache_dir"]
        run = BatchRun(
            JobTry(
                options=options,
                submitter=task_try.submitter,
                client=client,
                conn_id=self.conn_id,
                output_dir=open_folder("output_dir", given["output_dir"]),
                open_submission=lambda ledger: open_submission(task_try, client, ledger),
                earlier_tries=task_try.number > 1,
                owner=task_try.new_owner(),
                cancel_on_kill=self.cancel_on_kill,
                cache_dir=None if cache_dir is None else open_folder("cache_dir", cache_dir),
            )
        )
        self._job = _Job(task_try, run, options, given["poll_interval"])
        if self._killed:
            # The signal came before there was a job to stop.
            self._stop(run)
            run.check_not_stopped()
        return self._job

    def _rows(self) -> Any:
        """Return the rows: a file that opens, or Python objects."""
        from airflow_provider_siliconflow.paths import open_source

        requests = self.ARGUMENTS.read(self, "requests")["requests"]
        return open_source(requests, "requests") if isinstance(requests, str) else requests

    def _requests_name(self) -> str:
        requests = self.requests
        return requests if isinstance(requests, str) and not requests.startswith("[") else "requests"

    def on_kill(self) -> None:
        """Create no more batches, and cancel the open ones if the running task was ended by hand."""
        self._killed = True
        if self._job is not None:
            self._stop(self._job.run)

    def _stop(self, run: BatchRun) -> None:
        from airflow_provider_siliconflow.api.exceptions import SiliconFlowError

        cancels = self.kill_cancels()
        known = run.stop(cancels=cancels)
        if not cancels:
            if known:
                self.log.warning(
                    "Batches %s are not cancelled; they continue and are billed", ", ".join(known)
                )
            return
        # What is known goes first: there are five seconds, and a search may take more.
        self.cancel(known, is_ours=self.ownership())
        try:
            self.cancel(run.find_unrecorded(self.kill_patience()))
        except SiliconFlowError as exc:
            self.log.warning("Batches that were being created cannot be looked up: %s", exc)
