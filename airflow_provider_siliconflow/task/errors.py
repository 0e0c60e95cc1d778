"""
How an error ends a task.

An error that a retry cannot fix fails the task at once. Paid work is the exception: only a verdict on its batches fails
it at once. Any other error is left to the retries, since after the last one only a person can clear the task.
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

#: Most batch ids in a message; a job may have hundreds.
_NAMED = 5


@dataclass(frozen=True, slots=True)
class PaidWork:
    """
    The batches that a task has, or may have, paid for.

    :param batch_ids: returns the ids of the batches that this try knows; only called after an error.
    :param possible: whether an earlier try may have left batches that this one does not know.
    :param clear_pays: whether a manual clear submits everything again.
    """

    batch_ids: Callable[[], Sequence[str]]
    possible: bool
    clear_pays: bool = False


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
    End a task as its arguments require if the block raises one of our errors.

    This writes nothing to XCom or the task state store, and does not change the error: additional information is added
    as a note, and logged, since Airflow's UI does not show notes.

    :param fail_fast: raise ``AirflowFailException`` if a retry cannot help; ``False`` leaves every error to the task's
        retries.
    :param paid: the batches at stake. If there are or may be any, only a verdict on them fails the task at once.
    :param cancel_at_timeout: requests the cancellation of the open batches after a wait has timed out, and returns
        their ids; ``None`` does not cancel them.
    :param soft_fail: skip the task instead of failing it.
    :param timeout_error: the error to raise for a wait that timed out, instead of our own.
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
        f"The wait timed out and cancel_on_timeout is set: the cancellation of {_named(batch_ids)} was requested. Rows "
        "that are done are billed and can be downloaded for 30 days; a retry submits the cancelled batches again and "
        "pays for them again.",
        batch_id=batch_ids[0],
    )


def _paid_note(error: SiliconFlowError, paid: PaidWork) -> str | None:
    """Return the advice for an error while batches are paid for; ``None`` if it is final, or nothing is paid."""
    from airflow_provider_siliconflow.api.exceptions import BatchError, BatchWaitError

    if isinstance(error, BatchError) and not isinstance(error, BatchWaitError):
        # A verdict on the batches: a retry would find the same batches and judge them the same way.
        return None
    try:
        batch_ids = paid.batch_ids()
    except Exception as exc:  # noqa: BLE001
        # The store that records them may be what failed.
        log.warning("The submitted batches cannot be read: %s", exc)
        batch_ids = ()
    if not batch_ids and not paid.possible:
        return None
    which = f"Submitted: {_named(batch_ids)}" if batch_ids else "An earlier try may have submitted batches"
    cleared = "would pay again" if paid.clear_pays else "does the same"
    return (
        f"{which}, which are not affected. Fix the cause and let the task retry: the retry continues with them "
        f"at no extra cost. A manual clear {cleared}."
    )


def _named(batch_ids: Sequence[str]) -> str:
    more = f" and {len(batch_ids) - _NAMED} more" if len(batch_ids) > _NAMED else ""
    return f"{'batch' if len(batch_ids) == 1 else 'batches'} {', '.join(batch_ids[:_NAMED])}{more}"
