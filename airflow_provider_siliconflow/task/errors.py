"""
How an error ends a task.

An error that a retry cannot change fails the task at once. Work that is paid for is the exception: it never fails for
good, but for a verdict on it. Failing for good would leave only a manual clear.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from airflow.providers.common.compat.sdk import AirflowFailException, AirflowSkipException

if TYPE_CHECKING:
    from airflow_provider_siliconflow.api.exceptions import SiliconFlowError

log = logging.getLogger(__name__)

#: Batch ids that a message names; a job may have hundreds.
_NAMED = 5


@dataclass(frozen=True, slots=True)
class PaidWork:
    """
    What a task has paid for, or may have.

    :param batch_ids: returns the ids of the batches this try knows of; called only after an error.
    :param possible: whether an earlier try may have left batches that this one does not know of.
    """

    batch_ids: Callable[[], Sequence[str]]
    possible: bool


@contextlib.contextmanager
def task_errors(
    *,
    fail_fast: bool,
    paid: PaidWork | None = None,
    cancel_at_timeout: Callable[[], Sequence[str]] | None = None,
    soft_fail: bool = False,
    timeout_error: type[Exception] | None = None,
) -> Iterator[None]:
    """
    End a task as its arguments say, whichever of our errors comes out of the block.

    Nothing is written to XCom or to the task state store here, and no error is changed: what there is to add is a note
    of it, and a line of the log, since Airflow's UI shows no notes.

    :param fail_fast: raise ``AirflowFailException`` if a retry cannot help; ``False`` leaves every error to the task's
        retries.
    :param paid: the batches at stake; while there are or may be any, only a verdict on them fails for good.
    :param cancel_at_timeout: asks for the open batches to be cancelled once a wait has timed out, and returns their
        ids; ``None`` leaves them alone.
    :param soft_fail: skip the task instead of failing it.
    :param timeout_error: what a wait that timed out raises, if not our own error.
    """
    from airflow_provider_siliconflow.api.exceptions import BatchTimeoutError, SiliconFlowError

    try:
        yield
    except SiliconFlowError as exc:
        error = exc if cancel_at_timeout is None else _cancelled_at_timeout(exc, cancel_at_timeout)
        if soft_fail:
            raise AirflowSkipException(f"Skipping, since soft_fail is set: {error}") from error
        if timeout_error is not None and isinstance(error, BatchTimeoutError):
            raise timeout_error(str(error)) from error
        if not error.retryable and paid is not None and (note := _paid_note(error, paid)):
            error.add_note(note)
            log.error("%s", note)
        elif not error.retryable and fail_fast:
            raise AirflowFailException(
                f"{error} (A retry would end the same way, so none is made.)"
            ) from error
        if error is exc:
            raise
        raise error from exc


def _cancelled_at_timeout(error: SiliconFlowError, cancel: Callable[[], Sequence[str]]) -> SiliconFlowError:
    from airflow_provider_siliconflow.api.exceptions import BatchCancelledAtTimeoutError, BatchTimeoutError

    if not isinstance(error, BatchTimeoutError) or not (batch_ids := cancel()):
        return error
    return BatchCancelledAtTimeoutError(
        f"The wait timed out and cancel_on_timeout is set: {_named(batch_ids)} were asked to be cancelled. Rows that "
        "are done are billed and can be downloaded for 30 days; a retry submits the cancelled batches anew and pays "
        "for them again.",
        batch_id=batch_ids[0],
    )


def _paid_note(error: SiliconFlowError, paid: PaidWork) -> str | None:
    """Return what to do about an error while batches are paid for; ``None`` if it is final, or nothing is paid."""
    from airflow_provider_siliconflow.api.exceptions import BatchError, BatchWaitError

    if isinstance(error, BatchError) and not isinstance(error, BatchWaitError):
        # A verdict on the batches themselves: a retry would find the same ones and judge them alike.
        return None
    try:
        batch_ids = paid.batch_ids()
    except Exception as exc:  # noqa: BLE001
        # They may be kept in a store that is the very thing that failed.
        log.warning("Which batches are submitted cannot be read: %s", exc)
        batch_ids = ()
    if not batch_ids and not paid.possible:
        return None
    which = f"Submitted: {_named(batch_ids)}" if batch_ids else "An earlier try may have submitted batches"
    return (
        f"{which}; nothing about them has changed. Fix the cause and let the task retry: the retry takes them up and "
        "pays nothing again. A manual clear would pay again."
    )


def _named(batch_ids: Sequence[str]) -> str:
    more = f" and {len(batch_ids) - _NAMED} more" if len(batch_ids) > _NAMED else ""
    return f"{'batch' if len(batch_ids) == 1 else 'batches'} {', '.join(batch_ids[:_NAMED])}{more}"
