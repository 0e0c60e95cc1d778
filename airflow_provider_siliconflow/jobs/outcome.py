"""What counts as success: of a batch, a download and a job, and the sentence that says so."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from airflow_provider_siliconflow.api.exceptions import (
    BatchCancelledError,
    BatchExpiredError,
    BatchFailedError,
    BatchPartialFailureError,
    SiliconFlowError,
)
from airflow_provider_siliconflow.api.models import Batch, BatchStatus
from airflow_provider_siliconflow.batch_files.tally import OTHER_MESSAGES, ModelTally
from airflow_provider_siliconflow.batch_files.verdicts import NotJSONError, read_result
from airflow_provider_siliconflow.jobs.downloads import ResultAPI, ResultFiles
from airflow_provider_siliconflow.jobs.options import RunOptions

if TYPE_CHECKING:
    from airflow_provider_siliconflow.jobs.job import OpenJob

log = logging.getLogger(__name__)


def is_flawless(batch: Batch) -> bool:
    """Whether a batch is known to have completed with every row successful."""
    counts = batch.request_counts
    return (
        batch.status == BatchStatus.COMPLETED
        and counts.total > 0
        and counts.failed == 0
        and counts.completed >= counts.total
    )


def judge_batch(
    batch: Batch, *, fail_on_partial_error: bool, allow_all_failed: bool = False, reason: str | None = None
) -> str | None:
    """
    Say whether a terminal batch is a success.

    :param fail_on_partial_error: whether a single failed or expired row is a failure.
    :param allow_all_failed: whether a batch without any successful row may pass.
    :param reason: the most common error of the rows, if it was looked up.
    :returns: ``None`` for a flawless batch, else a sentence to warn with.
    :raises BatchError: it is a failure, by the kind of it.
    """
    counts = batch.request_counts
    lost = max(counts.total - counts.completed, counts.failed, 0)
    story = f"Batch {batch.id} {batch.status}"
    if counts.total:
        story += f": {counts.completed} of {counts.total} rows succeeded, {lost} did not"
    if reason:
        story += f"; most often: {reason}"
    if batch.error_messages:
        story += f"; the service says: {'; '.join(batch.error_messages[:5])}"
    fetch = "The rows that succeeded are billed and can be downloaded for 30 days."
    if batch.status == BatchStatus.FAILED:
        raise BatchFailedError(
            f"{story}. It was rejected as a whole; a retry submits a new batch.", batch_id=batch.id
        )
    if batch.status == BatchStatus.CANCELLED:
        raise BatchCancelledError(f"{story}. {fetch} A retry submits a new batch.", batch_id=batch.id)
    nothing = (counts.completed == 0 and counts.total > 0) or (not counts.total and not batch.output_file_id)
    if batch.status == BatchStatus.EXPIRED and nothing and not allow_all_failed:
        # Without counts it is the missing output file that tells, and that may come late.
        raise BatchExpiredError(
            f"{story}. The completion window ended before any row did; a retry finds the same batch. Clear "
            "the task to submit anew, with a longer completion_window.",
            batch_id=batch.id,
            retryable=not counts.total,
        )
    if counts.total and counts.completed == 0 and not allow_all_failed:
        raise BatchFailedError(
            f"{story}. Not one row succeeded; a retry finds the same batch. Correct the requests and clear "
            "the task, or set allow_all_failed=True.",
            batch_id=batch.id,
            retryable=False,
        )
    if not counts.total and batch.error_file_id and not batch.output_file_id and not allow_all_failed:
        raise BatchFailedError(
            f"{story}. The service gives no counts and names a file with errors, but none with results; a retry "
            "looks at the same batch again.",
            batch_id=batch.id,
        )
    if lost == 0 and batch.status != BatchStatus.EXPIRED:
        return None
    if fail_on_partial_error:
        raise BatchPartialFailureError(
            f"{story}. {fetch} fail_on_partial_error is set, and a retry finds the same batch.",
            batch_id=batch.id,
        )
    return f"{story}. {fetch}"


def finish_batch(
    api: ResultAPI, batch: Batch, *, fail_on_partial_error: bool, allow_all_failed: bool
) -> str | None:
    """
    Judge an ended batch, with the most common error of its rows unless it is flawless.

    :param api: the calls.
    :returns: a sentence to warn with, or ``None``.
    :raises BatchError: the batch is a failure.
    """
    log.info("Batch %s has ended: %s", batch.id, batch.status)
    if not batch.request_counts.total and not batch.is_dead:
        # Counts and files may come a moment after the status; judged without them, paid rows would pass for none.
        try:
            batch = ResultFiles(api, batch.id).batch
        except SiliconFlowError as exc:
            log.warning("Batch %s cannot be read again, and is judged as it is: %s", batch.id, exc)
    reason = None if is_flawless(batch) else most_common_error(api, batch)
    return judge_batch(
        batch, fail_on_partial_error=fail_on_partial_error, allow_all_failed=allow_all_failed, reason=reason
    )


def most_common_error(api: ResultAPI, batch: Batch) -> str | None:
    """
    Return the most common error message of a batch's rows, with its count; ``None`` if none can be read.

    :param api: the calls.
    :param batch: an ended batch.
    """
    tally = ModelTally()
    try:
        for line in ResultFiles(api, batch.id, patience=()).lines("error"):
            with contextlib.suppress(NotJSONError):
                if result := read_result(line):
                    tally.add_message(result.error_message or "no reason given")
    except SiliconFlowError as exc:
        log.warning("The error file of batch %s cannot be read: %s", batch.id, exc)
    tally.messages.pop(OTHER_MESSAGES, None)
    for message, rows in tally.commonest_errors(1).items():
        return f"{message} ({rows} rows)"
    return None


def judge_run(manifest: Mapping[str, Any], options: RunOptions) -> str | None:
    """
    Say whether a finished job is a success.

    :returns: ``None`` for a flawless one, else a sentence to warn with.
    :raises BatchPartialFailureError: it is a failure; the results are written.
    """
    rows = manifest["rows"]
    lost = rows["total"] - rows["ok"]
    if not lost:
        return None
    story = _rows_story(manifest)
    if worth := manifest.get("worth_another_attempt"):
        story += (
            f". {worth} of them failed for a transient reason: with max_row_attempts above "
            f"{options.max_row_attempts} the task would have sent them again"
        )
    story += f". The results are in {manifest['paths']['output_dir']}"
    rate = options.max_error_rate
    if rate is not None and lost > rate * rows["total"]:
        raise BatchPartialFailureError(
            f"{story}. {lost / rows['total']:.2%} is more than max_error_rate allows ({rate:.2%})."
        )
    if options.fail_on_partial_error and rate is None:
        raise BatchPartialFailureError(f"{story}. fail_on_partial_error is set.")
    if not rows["ok"] and not options.allow_all_failed:
        raise BatchPartialFailureError(f"{story}. Not one row succeeded.")
    return story


def refuse_partial(manifest: Mapping[str, Any], what: str) -> None:
    """
    Fail if any row of a manifest did not succeed.

    :param what: what the rows belong to, for the message.
    :raises BatchPartialFailureError: one did not; the files are written.
    """
    rows = manifest["rows"]
    if rows["ok"] != rows["total"]:
        raise BatchPartialFailureError(
            f"{what}: {_rows_story(manifest)}. The results are written to {manifest['paths']['output_dir']}."
        )


def _rows_story(manifest: Mapping[str, Any]) -> str:
    rows = manifest["rows"]
    story = (
        f"{rows['ok']} of {rows['total']} rows succeeded ({rows['error']} failed, {rows['expired']} expired, "
        f"{rows['missing']} missing)"
    )
    for message, count in list(manifest["errors"].items())[:1]:
        story += f"; most often: {message} ({count} rows)"
    return story


def unfinished_job(job: OpenJob, output_dir: Any) -> BatchFailedError | None:
    """
    Return the error for batches that a retry has to submit (again); ``None`` if there are none.

    :param job: the job; the results of its other batches are written.
    :param output_dir: where they are, for the message.
    """
    pieces = list(job.pieces)
    story: list[str] = []
    # The rows of a batch that failed in an earlier round went into the next one.
    dead = [ended for piece in job.rounds[-1] if (ended := job.dead(piece))]
    if dead:
        named = ", ".join(f"{ended.batch_id} ({ended.status})" for ended in dead[:5])
        reasons = [message for ended in dead for message in ended.errors]
        reason = f"; the service says: {reasons[0]}" if reasons else ""
        story.append(f"{len(dead)} of {len(pieces)} batches failed or were cancelled: {named}{reason}.")
    if refused := [(piece, state) for piece in pieces if (state := job.refused(piece))]:
        models = {job.options.replacements[piece.model] or "the rows' own models" for piece, _ in refused}
        first = refused[0][1]
        story.append(
            f"{len(refused)} of {len(pieces)} batches were refused, of {', '.join(sorted(models))}: HTTP "
            f"{first.status}, {first.message.rstrip('.')}."
        )
    if not story:
        return None
    also = " (of a cancelled one also the rows that were done)" if dead else ""
    return BatchFailedError(
        f"{' '.join(story)} The rows of the others are written to {output_dir}. A retry submits these "
        f"batches{also} and pays for nothing else again; a clear would pay for all.",
        batch_id=dead[0].batch_id if dead else None,
    )
