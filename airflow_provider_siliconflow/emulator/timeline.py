"""The life of one batch as times fixed in advance, from which its state at any time is computed."""

from __future__ import annotations

from bisect import bisect_left

import msgspec

TERMINAL_STATUSES = frozenset({"completed", "failed", "expired", "cancelled"})


class Timeline(msgspec.Struct, kw_only=True):
    """
    Times of a batch in epoch seconds.

    ``fate`` is the status with which the batch ends, ``fate_at`` the time; a cancellation or control call changes them.
    """

    created: float
    queue_until: float
    #: When the first row began, or would have begun for the rows done so far at the current speed.
    progress_from: float
    rows_until: float
    expires: float
    total: int
    fate: str
    fate_at: float
    cancel_at: float | None = None
    #: Rows that were done when the batch was stopped early.
    stopped_rows: int | None = None
    #: A status shown instead of the real one.
    shown_status: str | None = None

    @classmethod
    def plan(
        cls, *, created: float, window: float, queue: float, processing: float, finalizing: float, total: int
    ) -> Timeline:
        """Plan a batch without interruptions; all durations are in wall seconds."""
        queue_until = created + queue
        rows_until = queue_until + processing
        expires = created + window
        in_time = rows_until <= expires
        return cls(
            created=created,
            queue_until=queue_until,
            progress_from=queue_until,
            rows_until=rows_until,
            expires=expires,
            total=total,
            fate="completed" if in_time else "expired",
            fate_at=rows_until + finalizing if in_time else expires,
        )

    def ended(self, now: float) -> bool:
        return self.shown_status is None and now >= self.fate_at

    def status(self, now: float) -> str:
        """Return the status as the API shows it."""
        if self.shown_status is not None:
            return self.shown_status
        if self.ended(now):
            return self.fate
        if self.cancel_at is not None:
            return "cancelling"
        if now < self.queue_until:
            return "in_queue"
        return "in_progress" if now < self.rows_until else "finalizing"

    def rows_done(self, now: float) -> int:
        """Return how many rows have been run, successfully or not."""
        if self.stopped_rows is not None:
            return self.stopped_rows
        moment = min(now, self.expires) if self.fate == "expired" else now
        if moment >= self.rows_until:
            return self.total
        if moment <= self.progress_from:
            return 0
        share = (moment - self.progress_from) / (self.rows_until - self.progress_from)
        return min(self.total, int(share * self.total))

    def started(self, now: float) -> bool:
        stop = min(now, self.fate_at) if self.cancel_at is None else min(now, self.cancel_at)
        return self.queue_until <= stop and self.fate != "failed"

    def timestamps(self, now: float) -> dict[str, int | None]:
        """Return every time field of the batch object in its documented order; null if it is not reached."""
        ended = self.ended(now)

        def end(fate: str) -> int | None:
            return int(self.fate_at) if ended and self.fate == fate else None

        finalizing = self.fate == "completed" and self.started(now) and now >= self.rows_until
        return {
            "created_at": int(self.created),
            "in_progress_at": int(self.queue_until) if self.started(now) else None,
            "expires_at": int(self.expires),
            "finalizing_at": int(self.rows_until) if finalizing else None,
            "completed_at": end("completed"),
            "failed_at": end("failed"),
            "expired_at": end("expired"),
            "cancelling_at": None if self.cancel_at is None else int(self.cancel_at),
            "cancelled_at": end("cancelled"),
        }

    def cancel(self, now: float, duration: float) -> None:
        """Stop the batch. It still completes if its last rows are done before the cancellation takes effect."""
        self.cancel_at = now
        started = now >= self.queue_until
        if started and self.rows_until <= now + duration:
            return
        self.stopped_rows = self.rows_done(now)
        self.fate = "cancelled"
        self.fate_at = now + duration

    def show(self, status: str | None, now: float) -> None:
        """
        Force a status: a terminal one ends the batch now, any other is shown until None shows the real one.

        While a batch shows a forced status, its end is not visible.
        """
        if status not in TERMINAL_STATUSES:
            self.shown_status = status
            return
        self.shown_status = None
        self.stopped_rows = {"completed": self.total, "failed": 0}.get(status, self.rows_done(now))
        if status == "completed":
            self.queue_until = min(self.queue_until, now)
            self.rows_until = min(self.rows_until, now)
        self.fate = status
        self.fate_at = now

    def stretch(self, factor: float, now: float) -> None:
        """Multiply the remaining time of the batch; the past does not change."""
        if self.ended(now):
            return

        def moved(instant: float) -> float:
            return now + (instant - now) * factor if instant > now else instant

        # Even if it is in the past, so that the rows done so far stay the same.
        if self.rows_until > now:
            self.progress_from = now + (self.progress_from - now) * factor
        self.queue_until = moved(self.queue_until)
        self.rows_until = moved(self.rows_until)
        self.expires = moved(self.expires)
        self.fate_at = moved(self.fate_at)


class FinishOrder:
    """
    The order in which the rows of a batch finish: a fixed permutation, with a constant stride.

    :param total: number of rows.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._start = total // 2
        stride = max(1, int(total * 0.618))
        while _shares_factor(stride, total):
            stride += 1
        self._stride = stride

    def row_at(self, position: int) -> int:
        return (self._stride * position + self._start) % self._total

    def position_of(self, row: int) -> int:
        return (
            (pow(self._stride, -1, self._total) * (row - self._start)) % self._total if self._total > 1 else 0
        )


def counts(timeline: Timeline, failed_positions: list[int], now: float) -> dict[str, int] | None:
    """Return ``request_counts``: null until the batch has started."""
    if not timeline.started(now):
        return None
    done = timeline.rows_done(now)
    failed = bisect_left(failed_positions, done)
    if timeline.fate == "expired" and timeline.ended(now):
        failed += timeline.total - done
        done = timeline.total
    return {"total": timeline.total, "completed": done - failed, "failed": failed}


def _shares_factor(one: int, other: int) -> bool:
    while other:
        one, other = other, one % other
    return one > 1
