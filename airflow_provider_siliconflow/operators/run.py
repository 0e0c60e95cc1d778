"""The operator that runs a whole job, from rows to results."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.providers.common.compat.sdk import AirflowSkipException, conf

from airflow_provider_siliconflow.api import arguments
from airflow_provider_siliconflow.operators.base import (
    DEFERRAL_BACKSTOP,
    SubmittingOperator,
)
from airflow_provider_siliconflow.task.errors import task_errors
from airflow_provider_siliconflow.task.ledger import open_submission
from airflow_provider_siliconflow.task.state import submitter_of
from airflow_provider_siliconflow.task.templating import (
    is_templated,
    refuse_both,
    rendered_list,
    rendered_mapping,
    rendered_number,
    rendered_text,
)
from airflow_provider_siliconflow.triggers.batch import BatchTrigger

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context

    from airflow_provider_siliconflow.jobs.options import RunOptions
    from airflow_provider_siliconflow.jobs.run import BatchRun


class RunBatchOperator(SubmittingOperator):
    """
    Run rows of any number over one model or several, and write the results in the order of the rows.

    The rows are checked and cut into shards of at most 5,000 rows; each shard is uploaded once and run over
    every model. One trigger waits for all batches. Every row ends as ok, error, expired or missing. A try that
    dies anywhere is taken up by the next one, which pays for nothing again; a person's clear starts afresh.

    What a retry needs lies in ``output_dir/.siliconflow`` while the job runs: ``output_dir`` must render to the
    same value on every try.

    :param requests: path or URI of a JSONL file, or the rows: a list, or what an upstream task returned. A row
        is a full request line (``custom_id``, ``body``), a short one (``custom_id``, ``messages``, other body
        parameters) or a prompt. A missing ``custom_id`` is numbered. (templated)
    :param output_dir: path or URI of a folder for ``results.jsonl``, ``errors.jsonl`` and ``manifest.json``;
        per model in a folder below when several models run. (templated)
    :param model: the model for all rows; without it (and ``models``) the rows name theirs. (templated)
    :param models: several models to run the same rows over. (templated)
    :param request_params: body parameters for rows that lack them, such as ``{"temperature": 0}``. (templated)
    :param conn_id: the connection. (templated)
    :param completion_window: ``"24h"`` to ``"336h"``, a number of hours or a ``timedelta``. (templated)
    :param metadata: pairs of strings for every batch, at most 15. (templated)
    :param max_rows_per_batch: at most 5,000. (templated)
    :param max_bytes_per_batch: at most 10**9. (templated)
    :param max_in_flight: batches that are open at once; by default all. (templated)
    :param max_row_attempts: how often a row is sent at most. Only rows that expired, vanished or failed for a
        passing reason (429, 5xx) are sent again, and none once the account is empty. (templated)
    :param max_error_rate: share of rows (0 to 1) that may not succeed before the task fails. (templated)
    :param fail_on_partial_error: fail when any row did not succeed; ``max_error_rate`` takes its place.
    :param allow_all_failed: let a job pass of which not one row succeeded.
    :param prices: CNY per million tokens by model: ``{model: {"prompt": ..., "completion": ...}}``. (templated)
    :param ordered: write results in the order of the rows. It is the only order there is.
    :param dry_run: check and plan, log and return what it would take, and send nothing.
    :param skip_if_empty: skip the task when there are no rows; by default that is an error.
    :param deferrable: wait in the triggerer, without a worker slot. Default: ``[operators]
        default_deferrable``.
    :param poll_interval: seconds between two looks at a batch, or a ``timedelta``. (templated)
    :param timeout: seconds to wait in all, from the start of the try, or a ``timedelta``; by default until an hour
        after the batches expire. (templated)
    :param cancel_on_kill: cancel the open batches when a person ends the task. While the task is deferred this
        needs Airflow 3.3.
    :param cancel_on_timeout: cancel the open batches when the wait times out.
    :param durable: must be left on: a job of many batches has no other way to go on after a crash.
    :param fail_fast: fail at once, without the task's retries, where a retry cannot help.
    :returns: the manifest: batches, rows, finish reasons, tokens, cost, errors and paths, by model and in all.
    """

    template_fields: Sequence[str] = (
        "requests",
        "output_dir",
        "model",
        "models",
        "request_params",
        "conn_id",
        "completion_window",
        "metadata",
        "prices",
        "max_rows_per_batch",
        "max_bytes_per_batch",
        "max_in_flight",
        "max_row_attempts",
        "max_error_rate",
        "poll_interval",
        "timeout",
    )
    template_fields_renderers: ClassVar[dict[str, str]] = {
        "request_params": "json",
        "metadata": "json",
        "prices": "json",
    }

    def __init__(
        self,
        *,
        requests: Any,
        output_dir: str,
        model: str | None = None,
        models: Sequence[str] | None = None,
        request_params: dict[str, Any] | str | None = None,
        completion_window: str | int | timedelta = "24h",
        metadata: dict[str, str] | str | None = None,
        max_rows_per_batch: int | str = 5000,
        max_bytes_per_batch: int | str = 10**9,
        max_in_flight: int | str | None = None,
        max_row_attempts: int | str = 1,
        max_error_rate: float | str | None = None,
        fail_on_partial_error: bool = False,
        allow_all_failed: bool = False,
        prices: dict[str, dict[str, float]] | str | None = None,
        ordered: bool = True,
        dry_run: bool = False,
        skip_if_empty: bool = False,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        poll_interval: float | timedelta | str = 60,
        timeout: float | timedelta | str | None = None,
        cancel_on_kill: bool = True,
        cancel_on_timeout: bool = False,
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
        refuse_both(model=model, models=models)
        limits = {
            "max_rows_per_batch": max_rows_per_batch,
            "max_bytes_per_batch": max_bytes_per_batch,
            "max_in_flight": max_in_flight,
            "max_row_attempts": max_row_attempts,
            "max_error_rate": max_error_rate,
        }
        known = {name: rendered_number(value) for name, value in limits.items() if not is_templated(value)}
        arguments.check_limits(**known)
        if not durable or not ordered:
            raise ValueError("RunBatchOperator is always durable and its results are always ordered")
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
        self.fail_on_partial_error = fail_on_partial_error
        self.allow_all_failed = allow_all_failed
        self.prices = prices
        self.skip_if_empty = skip_if_empty
        # `dry_run` is a method of every operator, which Airflow 2.11 calls for `airflow tasks test --dry-run`.
        self.plans_only = dry_run
        self._run: BatchRun | None = None

    def lineage_input(self) -> Any:
        """Return the rows' file, where they come from one."""
        return self.requests

    def execute(self, context: Context) -> dict[str, Any]:
        """Plan, submit and wait; or take up what an earlier try left."""
        from airflow_provider_siliconflow.api.exceptions import NoRowsError
        from airflow_provider_siliconflow.jobs.plan import estimate

        self._ti = context["ti"]
        earlier_tries = context["ti"].try_number > 1
        with task_errors(fail_fast=self.fail_fast), self._paid_batches(possible=earlier_tries):
            options = self._options()
            _, timeout = self.wait_arguments()
            try:
                if self.plans_only:
                    found = estimate(self._rows(), name=self._requests_name(), options=options)
                    self.log.info("Dry run, nothing is sent: %s", json.dumps(found, ensure_ascii=False))
                    return found
                run = self._open_run(context, options)
                manifest = run.finished_before()
                if manifest is not None:
                    self.log.info("An earlier try did everything but say so")
                    return self._judged(context, manifest, options)
                run.prepare(self._rows, self._requests_name())
                run.set_deadline(None if timeout is None else time.time() + timeout)
                run.revive()
                return self._advance(context, run)
            except NoRowsError as exc:
                if self.skip_if_empty:
                    raise AirflowSkipException(f"Skipping, since skip_if_empty is set: {exc}") from None
                raise

    def execute_complete(self, context: Context, event: Any = None) -> dict[str, Any]:
        """Resume after the trigger: note what ended, submit what is due, or finish."""
        from airflow_provider_siliconflow.jobs.events import read_event

        self._ti = context["ti"]
        with task_errors(fail_fast=self.fail_fast), self._paid_batches(possible=True):
            run = self._open_run(context, self._options(), opened=True)
            with self._failed_waits(run):
                run.note(read_event(event))
            return self._advance(context, run)

    def _advance(self, context: Context, run: BatchRun) -> dict[str, Any]:
        poll_interval, _ = self.wait_arguments()
        while True:
            while open_batches := run.submit_due():
                context["ti"].xcom_push(key="batch_ids", value=run.batch_ids)
                enough = run.wake_after(len(open_batches))
                if self.deferrable:
                    self._defer(run, open_batches, enough, poll_interval)
                with self._failed_waits(run):
                    ended = self.hook.wait_for_batches(
                        open_batches, poll_interval=poll_interval, deadline=run.deadline, enough=enough
                    )
                run.note(ended)
            if not run.merge():
                break
        return self._judged(context, run.finish(), run.options)

    def _judged(self, context: Context, manifest: dict[str, Any], options: RunOptions) -> dict[str, Any]:
        from airflow_provider_siliconflow.api.exceptions import BatchPartialFailureError
        from airflow_provider_siliconflow.jobs.outcome import judge_run

        self._manifest = manifest
        try:
            warning = judge_run(manifest, options)
        except BatchPartialFailureError:
            # A task that fails returns nothing, and its results are there and paid all the same.
            if self.do_xcom_push:
                context["ti"].xcom_push(key="return_value", value=manifest)
            raise
        if warning:
            self.log.warning("%s", warning)
        return manifest

    def _defer(
        self, run: BatchRun, open_batches: list[str], enough: int | None, poll_interval: float
    ) -> None:
        from airflow_provider_siliconflow.api.arguments import MAX_WINDOW_HOURS
        from airflow_provider_siliconflow.jobs.waiting import EXPIRY_MARGIN

        now = time.time()
        longest = MAX_WINDOW_HOURS * 3600.0 if run.deadline is None else max(run.deadline - now, 0.0)
        self.defer(
            trigger=BatchTrigger(
                batch_ids=open_batches,
                conn_id=self.conn_id,
                poll_interval=poll_interval,
                deadline=run.deadline,
                cancel_on_kill=self.cancel_on_kill,
                wake_after=enough,
                began=now,
                brief=True,
            ),
            method_name="execute_complete",
            # Without a deadline of its own the trigger stops a while after the batches expire.
            timeout=timedelta(seconds=longest + EXPIRY_MARGIN + DEFERRAL_BACKSTOP),
        )

    def _options(self) -> RunOptions:
        from airflow_provider_siliconflow.jobs.options import check_options

        return check_options(
            model=rendered_text(self.model),
            models=rendered_list(self.models),
            completion_window=rendered_number(self.completion_window),
            metadata=rendered_mapping(self.metadata),
            max_rows_per_batch=rendered_number(self.max_rows_per_batch),
            max_bytes_per_batch=rendered_number(self.max_bytes_per_batch),
            max_in_flight=rendered_number(self.max_in_flight),
            max_row_attempts=rendered_number(self.max_row_attempts),
            max_error_rate=rendered_number(self.max_error_rate),
            prices=rendered_mapping(self.prices),
            request_params=rendered_mapping(self.request_params),
            fail_on_partial_error=self.fail_on_partial_error,
            allow_all_failed=self.allow_all_failed,
        )

    def _open_run(self, context: Context, options: RunOptions, *, opened: bool = False) -> BatchRun:
        """
        Return the job.

        :param opened: take up one that was prepared before.
        :raises SiliconFlowError: the task was ended before it came as far as this.
        """
        from airflow_provider_siliconflow.jobs.run import BatchRun
        from airflow_provider_siliconflow.paths import open_folder

        client = self.hook.get_conn()
        run = BatchRun(
            options,
            submitter=submitter_of(context),
            client=client,
            conn_id=self.conn_id,
            output_dir=open_folder("output_dir", self.output_dir),
            open_submission=lambda ledger: open_submission(context, client, ledger),
            earlier_tries=context["ti"].try_number > 1,
        )
        self._run = run
        if self._killed:
            # The signal came while there was no job yet to be stopped by it.
            self._stop(run)
            run.check_not_stopped()
        if opened:
            run.open()
        return run

    def _rows(self) -> Any:
        """Return the rows: a file that opens, or Python objects."""
        from airflow_provider_siliconflow.api.exceptions import InvalidInputError
        from airflow_provider_siliconflow.paths import open_source

        requests = rendered_list(self.requests)
        if requests is None:
            raise InvalidInputError(
                f"requests must be rows or the path of a file; got {self.requests!r}. If it is templated, check that "
                "the upstream task pushed it."
            )
        return open_source(requests, "requests") if isinstance(requests, str) else requests

    def _requests_name(self) -> str:
        requests = self.requests
        return requests if isinstance(requests, str) and not requests.startswith("[") else "requests"

    @contextlib.contextmanager
    def _paid_batches(self, *, possible: bool) -> Iterator[None]:
        """
        Leave every error to the task's retries once a batch is submitted, but for a verdict on the results.

        Failing for good would leave a person nothing but a clear, which pays for every batch again.

        :param possible: whether batches may be submitted that this try does not know of yet.
        """
        from airflow_provider_siliconflow.api.exceptions import BatchPartialFailureError, SiliconFlowError

        try:
            yield
        except BatchPartialFailureError:
            raise
        except SiliconFlowError as exc:
            ids = self._run.batch_ids if self._run is not None else []
            if not exc.retryable and (ids or possible):
                self.log.error(
                    "%s; they stay as they are. Mend what is wrong and let the task retry: it takes them up. A clear "
                    "would pay for all again.",
                    f"{len(ids)} batches are submitted ({', '.join(ids[:5])}{', ...' if len(ids) > 5 else ''})"
                    if ids
                    else "Batches may be submitted by now",
                )
                exc.retryable = True
            raise

    @contextlib.contextmanager
    def _failed_waits(self, run: BatchRun) -> Iterator[None]:
        from airflow_provider_siliconflow.api.exceptions import BatchTimeoutError, BatchWaitError

        try:
            yield
        except BatchTimeoutError as exc:
            if self.cancel_on_timeout:
                raise self.cancelled_at_timeout(run.open_batches) from exc
            raise
        except BatchWaitError as exc:
            # Failing for good would leave a person nothing but a clear, which pays for every batch again.
            exc.retryable = True
            raise

    def on_kill(self) -> None:
        """Cancel the open batches when the running task is ended from outside; in any case create none any more."""
        self._killed = True
        if self._run is not None:
            self._stop(self._run)

    def _stop(self, run: BatchRun) -> None:
        from airflow_provider_siliconflow.api.exceptions import SiliconFlowError

        cancels = self.kill_cancels()
        known = run.stop(cancels=cancels)
        if not cancels:
            if known:
                self.log.warning("Batches %s are left alone; they go on and are billed", known)
            return
        # What is known goes first: there are five seconds, and a search may take more.
        self.cancel(known)
        try:
            self.cancel(run.find_unrecorded(self.kill_patience()))
        except SiliconFlowError as exc:
            self.log.warning("Batches that were being created cannot be looked up: %s", exc)
