"""What counts as success of a batch, a download or a job, and the sentence that reports it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from airflow_provider_siliconflow.api.exceptions import (
    BatchCancelledError,
    BatchExpiredError,
    BatchFailedError,
    BatchPartialFailureError,
    IncompleteResultsError,
    SiliconFlowError,
)
from airflow_provider_siliconflow.api.models import Batch, BatchStatus, Outcome, RequestCounts
from airflow_provider_siliconflow.batch_files.decimals import exceeds
from airflow_provider_siliconflow.batch_files.result_lines import results_in
from airflow_provider_siliconflow.batch_files.tally import OTHER_MESSAGES, ModelTally
from airflow_provider_siliconflow.jobs.clock import Clock
from airflow_provider_siliconflow.jobs.downloads import ResultAPI, ResultFiles, downloaded, outcomes_in
from airflow_provider_siliconflow.jobs.options import RunOptions
from airflow_provider_siliconflow.jobs.settled import is_settled

if TYPE_CHECKING:
    from airflow_provider_siliconflow.jobs.collecting import Collected
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
    batch: Batch,
    *,
    fail_on_partial_error: bool,
    allow_all_failed: bool = False,
    reason: str | None = None,
    certain: bool = True,
) -> str | None:
    """
    Say whether a terminal batch is a success.

    :param fail_on_partial_error: whether a single failed or expired row is a failure.
    :param allow_all_failed: whether a batch without any successful row may pass.
    :param reason: the most common error of the rows, if it was looked up.
    :param certain: whether the counts are known to include every row. Otherwise successful rows may not be counted yet,
        and a retry reads the batch again.
    :returns: ``None`` for a flawless batch, otherwise a warning.
    :raises BatchError: the batch is a failure; the subclass depends on the reason.
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
            f"{story}. The batch was rejected as a whole; a retry submits a new one.", batch_id=batch.id
        )
    if batch.status == BatchStatus.CANCELLED:
        raise BatchCancelledError(f"{story}. {fetch} A retry submits a new batch.", batch_id=batch.id)
    nothing = (counts.completed == 0 and counts.total > 0) or (not counts.total and not batch.output_file_id)
    if batch.status == BatchStatus.EXPIRED and nothing and not allow_all_failed:
        # Without counts only the missing output file shows it, and the file may come late.
        raise BatchExpiredError(
            f"{story}. The completion window ended before any row did; a retry finds the same batch. Clear the task to "
            "submit a new batch, with a longer completion_window.",
            batch_id=batch.id,
            retryable=not (certain and counts.total),
        )
    if counts.total and counts.completed == 0 and not allow_all_failed:
        raise BatchFailedError(
            f"{story}. Not one row succeeded; a retry finds the same batch. Correct the requests and clear "
            "the task, or set allow_all_failed=True.",
            batch_id=batch.id,
            retryable=not certain,
        )
    if not counts.total and not batch.output_file_id and not allow_all_failed:
        raise BatchFailedError(
            f"{story}. The service states no counts and no result file; a retry reads the same batch again.",
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
    api: ResultAPI,
    batch: Batch,
    *,
    fail_on_partial_error: bool,
    allow_all_failed: bool,
    clock: Clock | None = None,
) -> str | None:
    """
    Judge an ended batch, and report the most common error of its rows.

    If its counts do not add up, the rows in its files are counted instead.

    :param api: the calls.
    :param batch: an ended batch, as a wait returned it.
    :param clock: time.
    :returns: a warning; ``None`` for a flawless batch.
    :raises IncompleteResultsError: the batch is not settled yet; a retry reads it again.
    :raises BatchError: the batch is a failure.
    """
    log.info("Batch %s has ended: %s", batch.id, batch.status)
    certain = True
    if not batch.is_dead and not is_settled(batch):
        batch, certain = _counted_by_files(api, batch, clock)
    return judge_batch(
        batch,
        fail_on_partial_error=fail_on_partial_error,
        allow_all_failed=allow_all_failed,
        reason=None if is_flawless(batch) else most_common_error(api, batch),
        certain=certain,
    )


def _counted_by_files(api: ResultAPI, batch: Batch, clock: Clock | None) -> tuple[Batch, bool]:
    """Return a batch with counts taken from its files, and whether they are known to include every row."""
    with downloaded(api, batch.id, clock) as (fresh, files):
        if is_settled(fresh):
            return fresh, True
        outcomes = list(outcomes_in(files).values())
    ok, total = outcomes.count(Outcome.OK), fresh.request_counts.total
    counts = RequestCounts(total=max(total, len(outcomes)), completed=ok, failed=len(outcomes) - ok)
    log.info(
        "The counts of batch %s do not add up; in its files %d of %d rows succeeded", batch.id, ok, total
    )
    return fresh.model_copy(update={"request_counts": counts}), 0 < total <= len(outcomes)


def most_common_error(api: ResultAPI, batch: Batch) -> str | None:
    """
    Return the most common error message of a batch's rows, with its count; ``None`` if none can be read.

    :param api: the calls.
    :param batch: an ended batch.
    """
    tally = ModelTally()
    try:
        chunks = ResultFiles(api, batch.id).chunks("error")
        for result in results_in(chunks, name="the error file", on_unreadable=lambda problem: None):
            tally.add_message(result.error_message or "no reason given")
    except SiliconFlowError as exc:
        log.warning("The error file of batch %s cannot be read: %s", batch.id, exc)
    tally.messages.pop(OTHER_MESSAGES, None)
    for message, rows in tally.most_common_errors(1).items():
        return f"{message} ({rows} rows)"
    return None


def judge_run(manifest: Mapping[str, Any], options: RunOptions) -> str | None:
    """
    Say whether a finished job is a success.

    :returns: ``None`` for a flawless job, otherwise a warning.
    :raises BatchPartialFailureError: the job is a failure; its results are written.
    """
    rows = manifest["rows"]
    lost = rows["total"] - rows["ok"]
    if not lost:
        return None
    story = _rows_story(manifest)
    if worth := manifest.get("worth_another_attempt"):
        story += (
            f". {worth} of them failed for a transient reason{' or are invalid' if rows['invalid'] else ''}; with "
            f"max_row_attempts above {options.max_row_attempts} the task would have sent them again"
        )
    if (budget := manifest.get("budget")) and budget["rows_not_sent"]:
        story += (
            f". {budget['rows_not_sent']} rows, which could cost up to {budget['cost_not_sent']:g} CNY, were not sent: "
            f"of max_cost ({budget['max_cost']:g} CNY) {budget['spent']:g} are spent and up to {budget['held']:g} held"
        )
    story += f". The results are in {manifest['paths']['output_dir']}"
    rate = options.max_error_rate
    if rate is not None and exceeds(lost, rows["total"], rate):
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

    :param what: name of the batch or download, for the message.
    :raises BatchPartialFailureError: a row did not succeed; the files are written.
    """
    rows = manifest["rows"]
    if rows["ok"] != rows["total"]:
        raise BatchPartialFailureError(
            f"{what}: {_rows_story(manifest)}. The results are written to {manifest['paths']['output_dir']}."
        )


def _rows_story(manifest: Mapping[str, Any]) -> str:
    rows = manifest["rows"]
    invalid = f"{rows['invalid']} invalid, " if rows["invalid"] else ""
    story = (
        f"{rows['ok']} of {rows['total']} rows succeeded ({rows['error']} failed, {invalid}{rows['expired']} expired, "
        f"{rows['missing']} missing)"
    )
    for message, count in list(manifest["errors"].items())[:1]:
        story += f"; most often: {message} ({count} rows)"
    return story


def unfinished_job(
    job: OpenJob, collected: Collected, output_dir: Any, *, live_problem: SiliconFlowError | None = None
) -> SiliconFlowError | None:
    """
    Return the error for what a retry has to submit, to read or to ask; ``None`` if there is nothing.

    :param job: the job; the results of its other batches are written.
    :param collected: the results of its batches.
    :param output_dir: folder of the results, for the message.
    :param live_problem: why rows were not asked one by one.
    """
    if live_problem is not None:
        live_problem.add_note(
            f"The rows that were answered are written to {output_dir}. A retry asks only those without an answer."
        )
        return live_problem
    pieces = list(job.pieces)
    story: list[str] = []
    # The rows of a batch that failed in an earlier round went into the next one, but for those that came late.
    dead = [
        ended
        for piece in job.current
        if (ended := job.dead(piece))
        and collected.unanswered.get(ended.batch_id, 1)
        and not job.is_asked_live(piece)
    ]
    if dead:
        named = ", ".join(f"{ended.batch_id} ({ended.status})" for ended in dead[:5])
        reasons = [message for ended in dead for message in ended.errors]
        reason = f"; the service says: {reasons[0]}" if reasons else ""
        story.append(f"{len(dead)} of {len(pieces)} batches failed or were cancelled: {named}{reason}.")
    if refused := [(piece, state) for piece in pieces if (state := job.refused(piece))]:
        models = {job.options.replacements[piece.model] or "the rows' own models" for piece, _ in refused}
        first = refused[0][1]
        story.append(
            f"{len(refused)} of {len(pieces)} batches were refused, for {', '.join(sorted(models))}: HTTP "
            f"{first.status}, {first.message.rstrip('.')}."
        )
    for batch_id, why in list(collected.spoilt.items())[:5]:
        story.append(f"Batch {batch_id} cannot be read: {why.rstrip('.')}.")
    if unjudged := collected.unjudged:
        story.append(
            f"{unjudged.rows} answers could not be judged, the first of them that of row {unjudged.custom_id!r}: "
            f"{unjudged.reason.rstrip('.')}. They are paid for and written as invalid. Correct the function and let "
            "the task retry, which judges them again at no extra cost."
        )
    if not story:
        return None
    kind = BatchFailedError if dead or refused else IncompleteResultsError
    named_first = dead[0].batch_id if dead else next(iter(collected.spoilt), None)
    return kind(
        f"{' '.join(story)} The rows of the other batches are written to {output_dir}. A retry submits only the rows "
        "without an answer and reads again what could not be read; nothing else is paid for again.",
        batch_id=named_first,
    )
