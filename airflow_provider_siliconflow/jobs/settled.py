"""
When a batch is settled: the one rule for the sensor, the operators, a download and a job.

A batch reaches a terminal status a moment before its counts and its result files are complete, and some services never
give counts. If it were judged then, rows that are paid for would pass for missing, and be paid for again. So a batch is
settled when its counts add up and its files hold what they promise, or when its files answer every row that was sent.
Until then nothing is judged, nothing is sent again and nothing fails for good.

A batch that was cancelled, failed or expired may never answer some of its rows, and its counts then need not add up. If
its files hold exactly what they promise, that is enough once :data:`SETTLE_PATIENCE` has passed; but counts of zero may
be counts that are not there yet. After :data:`SETTLE_LIMIT` what the files hold is final in any case, so that nothing
waits for ever. Both are counted by our own clock, from when the batch was first seen in a terminal status: that of the
service may be hours off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from airflow_provider_siliconflow.api.models import DEAD_STATUSES, Batch, BatchStatus

#: Seconds for which counts and files may come later than the terminal status.
SETTLE_PATIENCE = 120.0
#: Seconds after which what the files hold is final.
SETTLE_LIMIT = 3600.0
#: Seconds between two polls of a batch that is not settled, at most.
SETTLE_POLL = 15.0


class Settled(Enum):
    """How sure it is that a batch in a terminal status will not change any more."""

    #: It is settled.
    YES = "yes"
    #: It is, if it stays like this for :data:`SETTLE_PATIENCE`.
    PERHAPS = "perhaps"
    #: Something that is promised is not there yet.
    NO = "no"


@dataclass(frozen=True, slots=True)
class Held:
    """
    What the result files of a batch hold.

    :param output: lines of the output file; 0 if none is named.
    :param errors: lines of the error file; 0 if none is named.
    :param count_rows: counts the different rows in them; costs reading them.
    """

    output: int
    errors: int
    count_rows: Callable[[], int]


def is_settled(batch: Batch) -> bool:
    """
    Whether a terminal batch is settled as far as can be said without its files.

    It is if its counts add up, or if it was stopped before any row ran.
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
    Say whether a terminal batch is settled, from its files.

    :param batch: as it was read last.
    :param held: what its files hold.
    :param rows: rows that were sent in it; ``None`` if that is not known.
    """
    counts, lines = batch.request_counts, held.output + held.errors
    promised = counts.completed + counts.failed
    lacks = held.output < counts.completed or lines < promised
    by_counts = not lacks and is_settled(batch)
    # Counts of fewer rows than were sent may be those of the rows so far.
    if by_counts and not (rows and 0 < counts.total < rows):
        return Settled.YES
    sent = rows or counts.total
    # Not counts.total + x: a service that counts a row twice would never be settled.
    if sent and lines >= sent and held.count_rows() >= sent:
        return Settled.YES
    if by_counts:
        return Settled.PERHAPS
    if lacks or (batch.status == BatchStatus.COMPLETED and sent):
        # Every row of a completed batch has a result.
        return Settled.NO
    if not sent and lines:
        # Nobody knows how many rows there are, so some must be enough; of a completed batch, answered ones.
        return Settled.PERHAPS if held.output or batch.status != BatchStatus.COMPLETED else Settled.NO
    rejected = batch.status == BatchStatus.FAILED and not lines
    counted = promised > 0 and (held.output, lines) == (counts.completed, promised)
    return Settled.PERHAPS if rejected or counted else Settled.NO
