"""
When a batch is settled: one rule for the sensor, the operators, downloads and jobs.

A batch may reach a terminal status a moment before its counts and result files are complete, and some services never
give counts. Judged at that moment, rows that are paid for would look missing and would be paid for again. So a batch is
settled when its counts add up and its files have as many lines as the counts promise, or when its files answer every
row that was sent. Until then it is not judged, none of its rows is sent again, and no task fails for good.

A batch that was cancelled, failed or expired may never answer some of its rows, so its counts need not add up. If its
files have exactly as many lines as the counts promise, that is enough after :data:`SETTLE_PATIENCE`, unless the counts
are zero: they may not be there yet. After :data:`SETTLE_LIMIT` the content of the files is final in any case, so that
no wait lasts forever. Both times are measured by our own clock from when the batch was first seen in a terminal status,
since the service's clock may be hours off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from airflow_provider_siliconflow.api.models import DEAD_STATUSES, Batch, BatchStatus

#: Seconds after the terminal status in which counts and files may still arrive.
SETTLE_PATIENCE = 120.0
#: Seconds after which the content of the files is final.
SETTLE_LIMIT = 3600.0
#: Longest pause between two polls of a batch that is not settled, in seconds.
SETTLE_POLL = 15.0


class Settled(Enum):
    """How certain it is that a batch in a terminal status is complete."""

    #: It is settled.
    YES = "yes"
    #: It is settled if it stays like this for :data:`SETTLE_PATIENCE`.
    PERHAPS = "perhaps"
    #: Lines that the counts promise are not there yet.
    NO = "no"


@dataclass(frozen=True, slots=True)
class Held:
    """
    The sizes of a batch's result files.

    :param output: lines of the output file; 0 if there is none.
    :param errors: lines of the error file; 0 if there is none.
    :param count_rows: counts the distinct rows in them, by reading them.
    """

    output: int
    errors: int
    count_rows: Callable[[], int]


def is_settled(batch: Batch) -> bool:
    """
    Whether a terminal batch is settled, judged without its files.

    It is settled if its counts add up, or if it was stopped before any row ran.
    """
    counts = batch.request_counts
    if counts.total > 0 and counts.completed + counts.failed == counts.total:
        return True
    return (
        batch.status in DEAD_STATUSES
        and not (counts.completed or counts.failed)
        and not (batch.output_file_id or batch.error_file_id)
        and batch.in_progress_at is None
    )


def judge_files(batch: Batch, held: Held, rows: int | None) -> Settled:
    """
    Say whether a terminal batch is settled, judged by its files.

    :param batch: the batch as it was last read.
    :param held: the sizes of its files.
    :param rows: rows that were sent in it; ``None`` if unknown.
    """
    counts, lines = batch.request_counts, held.output + held.errors
    promised = counts.completed + counts.failed
    lacks = held.output < counts.completed or lines < promised
    by_counts = not lacks and is_settled(batch)
    # Counts of fewer rows than were sent may be those of the rows so far.
    if by_counts and not (rows and 0 < counts.total < rows):
        return Settled.YES
    sent = rows or counts.total
    # The counts are not used here: a batch of which the service counts a row twice would never be settled.
    if sent and lines >= sent and held.count_rows() >= sent:
        return Settled.YES
    if by_counts:
        return Settled.PERHAPS
    if lacks or (batch.status == BatchStatus.COMPLETED and sent):
        # Every row of a completed batch has a result.
        return Settled.NO
    if not sent and lines:
        # The number of rows is unknown, so any lines must be enough; a completed batch needs answered ones.
        return Settled.PERHAPS if held.output or batch.status != BatchStatus.COMPLETED else Settled.NO
    rejected = batch.status == BatchStatus.FAILED and not lines
    counted = promised > 0 and (held.output, lines) == (counts.completed, promised)
    return Settled.PERHAPS if rejected or counted else Settled.NO
