"""
When a batch is settled: the one rule for the sensor, the operators, a download and a job.

A batch reaches a terminal status a moment before its counts and its result files are complete, and some services never
give counts. If it were judged then, rows that are paid for would pass for missing, and be paid for again. So a batch is
settled when its counts add up and its files hold what they promise, or when its files answer every row that was sent.
Until then nothing is judged, nothing is sent again and nothing fails for good.

A batch that was cancelled, failed or expired may never answer some of its rows. Its counts then need not add up: what
they promise is enough once :data:`SETTLE_PATIENCE` has passed. After :data:`SETTLE_LIMIT` what the files hold is final
in any case, so that nothing waits for ever. Both are counted by our own clock, from when the batch was first seen in a
terminal status: the service's clock may be hours off.
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
        and not (counts.total or counts.completed or counts.failed)
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
    counts = batch.request_counts
    lacks = _lacks_lines(batch, held)
    if not lacks and is_settled(batch):
        return Settled.YES
    sent = rows or counts.total
    # Not counts.total + x: a service that counts a row twice would never be settled.
    if sent and held.output + held.errors >= sent and held.count_rows() >= sent:
        return Settled.YES
    if lacks:
        return Settled.NO
    if batch.status == BatchStatus.FAILED:
        return Settled.PERHAPS
    if not sent:
        # Nobody knows how many rows there are, so some must be enough; of a completed batch, answered ones.
        named = held.output or (held.errors and batch.status != BatchStatus.COMPLETED)
        return Settled.PERHAPS if named else Settled.NO
    # Every row of a completed batch has a result. One that was stopped may leave out rows, if it counts them so.
    stopped = batch.status != BatchStatus.COMPLETED and counts.total
    return Settled.PERHAPS if stopped else Settled.NO


def _lacks_lines(batch: Batch, held: Held) -> bool:
    """Whether the files hold fewer lines than the counts promise."""
    counts = batch.request_counts
    return held.output < counts.completed or held.output + held.errors < counts.completed + counts.failed
