"""
Waiting for batches: one rule for the hook, the operators, the sensor and the trigger.

:class:`BatchWait` holds the state and makes every decision, but does no network calls and never sleeps. A driver asks
it which batches are due, reads them, and reports the answers to it.
"""

from __future__ import annotations

import logging
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from airflow_provider_siliconflow.api import arguments, protocol
from airflow_provider_siliconflow.api.answers import RETRY_AFTER_LIMIT
from airflow_provider_siliconflow.api.exceptions import (
    APIError,
    AuthenticationError,
    BatchTimeoutError,
    BatchWaitError,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
    SiliconFlowError,
    UnexpectedAnswerError,
)
from airflow_provider_siliconflow.api.models import Batch, RequestCounts
from airflow_provider_siliconflow.jobs import settled

log = logging.getLogger(__name__)

#: Seconds after a batch's ``expires_at`` at which a wait without a timeout ends.
EXPIRY_MARGIN = 3600.0
#: Seconds for which an unknown batch may simply not be visible yet.
NOT_FOUND_GRACE = 600.0
#: Failed polls in a row before an unknown batch is given up.
_MISSING_POLLS = 3
#: Seconds for which polls of a batch that was never read may be answered with "invalid request".
REFUSED_GRACE = 3600.0
#: Longest pause between two polls while the service fails, in seconds.
FAULT_PAUSE_LIMIT = 600.0
#: Seconds for the single poll of a wait that resumes after its deadline.
LAST_POLL_SECONDS = 10.0
#: Seconds that are more than any poll takes: what its repetitions may take, and the longest waits between them.
_LONGEST_POLL = 6 * 3600.0
#: Polls of one wait that may be under way at once.
MAX_CONCURRENT_POLLS = 8
#: Polls are due at multiples of this many seconds, so that an event loop with thousands of waits wakes up once for
#: several of them, which saves a third of their cost.
_POLL_STEP = 0.05
#: Progress is logged again after this share of the rows, or after this many seconds if there is any progress.
_PROGRESS_STEP, _PROGRESS_SECONDS = 0.05, 600.0
#: Most batches of one wait whose progress is logged one by one.
_FEW_BATCHES = 8


_CLEAR = "A manual clear of the task continues the wait, unless it has on_clear='resubmit'."


@dataclass(frozen=True, slots=True)
class _LastPoll:
    """The last answer about an open batch, reduced: the batch itself takes ten times the memory."""

    status: str
    total: int
    completed: int
    failed: int
    deadline: float


@dataclass(slots=True)
class _Waiting:
    """One batch that is waited for."""

    due: float
    faults: int = 0
    missing_since: float | None = None
    fault: str | None = None
    seen: _LastPoll | None = None
    #: When it was first seen in a terminal status, while it is not settled.
    terminal_since: float | None = None
    logged_at: float = 0.0
    logged_done: int = -1
    warned_status: str | None = None


@dataclass(frozen=True, slots=True)
class _LastSummary:
    """The last summary of many batches that was logged."""

    at: float
    done: int
    ended: int


@dataclass(slots=True)
class BatchWait:
    """
    A wait for one or more batches.

    :param batch_ids: the batches to wait for.
    :param now: epoch seconds.
    :param poll_interval: seconds between two polls of one batch, plus or minus 20 % jitter.
    :param deadline: epoch seconds at which the wait ends; by default an hour after the batches expire.
    :param min_ended: how many ended batches end the wait; by default all.
    :param began: epoch seconds at which the wait began, if that was in another process; by default now.
    :param resume_at: epoch seconds at which the wait is over, whatever has ended; ``None`` for never.
    """

    batch_ids: Sequence[str]
    now: float
    poll_interval: float
    deadline: float | None = None
    min_ended: int | None = None
    began: float | None = None
    resume_at: float | None = None
    ended: dict[str, Batch] = field(default_factory=dict)
    _pending: dict[str, _Waiting] = field(default_factory=dict)
    _summary: _LastSummary | None = None
    _longest_pause: float = 0.0

    def __post_init__(self) -> None:
        if self.began is None:
            self.began = self.now
        self._longest_pause = max(self.poll_interval, FAULT_PAUSE_LIMIT, RETRY_AFTER_LIMIT) * 1.2 + _POLL_STEP
        # The first polls of many batches are spread a little, so that they are not all due at once.
        spread = min(self.poll_interval, 0.02 * len(self.batch_ids))
        self._pending = {
            batch_id: _Waiting(due=self.now + (random.uniform(0, spread) if spread > 1 else 0.0))
            for batch_id in self.batch_ids
        }

    @property
    def finished(self) -> bool:
        """Whether all batches, or ``min_ended`` of them, have ended."""
        return not self._pending or (self.min_ended is not None and len(self.ended) >= self.min_ended)

    def is_over(self, now: float) -> bool:
        """Whether the wait has reached its goal, or is to end now without it."""
        return self.finished or (self.resume_at is not None and now >= self.resume_at)

    @property
    def settling(self) -> bool:
        """Whether a batch reached a terminal status, but its counts do not add up yet."""
        return any(state.terminal_since is not None for state in self._pending.values())

    @property
    def batches(self) -> list[Batch]:
        """The ended batches, in the order of ``batch_ids``."""
        return [self.ended[batch_id] for batch_id in self.batch_ids if batch_id in self.ended]

    @property
    def rows(self) -> RequestCounts:
        """Rows of all batches that were read so far."""
        seen = (state.seen for state in self._pending.values() if state.seen)
        ended = (batch.request_counts for batch in self.ended.values())
        counts: list[_LastPoll | RequestCounts] = [*seen, *ended]
        return RequestCounts(
            total=sum(count.total for count in counts),
            completed=sum(count.completed for count in counts),
            failed=sum(count.failed for count in counts),
        )

    def due(self, now: float) -> list[str]:
        """Return ids whose poll is due, longest overdue first, at most as many as may run at once."""
        ready = [
            (state.due, batch_id)
            for batch_id, state in self._pending.items()
            if self._due_in(state, now) <= 0
        ]
        return [batch_id for _, batch_id in sorted(ready)[:MAX_CONCURRENT_POLLS]]

    def make_all_due(self, now: float) -> None:
        """Make every open batch due now, for the poke of a sensor."""
        for state in self._pending.values():
            state.due = min(state.due, now)

    @property
    def has_missing(self) -> bool:
        """Whether the account did not know some batch at its last poll."""
        return any(state.missing_since is not None for state in self._pending.values())

    def pause(self, now: float) -> float:
        """Return the seconds until the next poll is due or the deadline has come."""
        left = min((self._due_in(state, now) for state in self._pending.values()), default=0.0)
        for end in (self.deadline, self.resume_at):
            if end is not None:
                left = min(left, end - now)
        return max(left, 0.0)

    def _due_in(self, state: _Waiting, now: float) -> float:
        """Return the seconds until a poll is due; 0 if they are more than any pause: the clock was set back since."""
        left = state.due - now
        return left if left <= self._longest_pause else 0.0

    def time_left(self, now: float) -> float | None:
        """Return the seconds that are left for a poll; ``None`` if there is no limit."""
        left = min(self._deadline(), math.inf if self.resume_at is None else self.resume_at) - now
        return None if left == math.inf else max(left, 0.0)

    def poll_limit(self, now: float) -> float | None:
        """
        Return how many seconds a poll that begins now may take; ``None`` if there is no limit.

        A wait that resumes after its deadline still polls once, since its batches may have ended.
        """
        left = self.time_left(now)
        if left is None or left > _LONGEST_POLL:
            # No poll takes that long with all of its repetitions, and a timer for each one costs a tenth of a poll.
            return None
        return left or LAST_POLL_SECONDS

    def check_deadline(self, now: float) -> None:
        """
        End the wait once its deadline has passed.

        :raises BatchTimeoutError: it has passed; the batches are untouched.
        """
        if self.finished:
            return
        deadline = self._deadline()
        if now < deadline:
            return
        states = ", ".join(map(self._state_of, list(self._pending)[:10]))
        read = any(state.seen for state in self._pending.values())
        raise BatchTimeoutError(
            f"The wait ended at {_utc(deadline)}, its deadline, with {len(self._pending)} of "
            f"{len(self.batch_ids)} batch(es) still open: {states}. "
            + (
                "They continue and are billed; their results can be fetched when they end. Waiting again, by a retry "
                "or a cleared sensor, costs nothing."
                if read
                else "It is not known whether they exist; check the ids and the connection."
            ),
            batch_id=next(iter(self._pending), None),
        )

    def _state_of(self, batch_id: str) -> str:
        state = self._pending[batch_id]
        status = state.seen.status if state.seen else "never read"
        return f"{batch_id} ({status}{f'; last poll: {state.fault}' if state.fault else ''})"

    def _deadline(self) -> float:
        """Return the deadline, by default an hour after the last expiry; infinity while a batch was never read."""
        if self.deadline is not None:
            return self.deadline
        seen = [state.seen for state in self._pending.values()]
        return max((poll.deadline if poll else math.inf for poll in seen), default=math.inf)

    def observe(self, batch_id: str, batch: Batch, now: float) -> bool:
        """
        Record the answer of a poll; return whether the batch has ended.

        An unknown status counts as pending: it must neither crash a wait nor end it. A terminal batch that is not
        settled counts as pending for at most :data:`~.settled.SETTLE_PATIENCE`.
        """
        if batch.id != batch_id:
            answered = UnexpectedAnswerError(
                f"Asked for batch {batch_id}, the service answered about {batch.id}"
            )
            self.fault(batch_id, answered, now)
            return False
        state = self._pending[batch_id]
        state.faults, state.missing_since, state.fault = 0, None, None
        self._log_progress(state, batch, now)
        if batch.is_terminal and self._is_over(state, batch, now):
            self.ended[batch_id] = batch
            del self._pending[batch_id]
            return True
        counts = batch.request_counts
        state.seen = _LastPoll(
            # A status is one of a few words, but every answer brings a new copy of it.
            sys.intern(batch.status),
            counts.total,
            counts.completed,
            counts.failed,
            default_deadline(batch, self.began or self.now),
        )
        pause = self.poll_interval * random.uniform(0.8, 1.2)
        if batch.is_terminal:
            pause = min(pause, settled.SETTLE_POLL)
        state.due = _step_after(now + pause)
        return False

    @staticmethod
    def _is_over(state: _Waiting, batch: Batch, now: float) -> bool:
        """Whether a terminal batch is settled, or the wait for its counts has been long enough."""
        if settled.is_settled(batch):
            return True
        if state.terminal_since is None:
            state.terminal_since = now
            log.info(
                "Batch %s is %s, but its counts do not add up yet; waiting for them for up to %.0f s",
                batch.id,
                batch.status,
                settled.SETTLE_PATIENCE,
            )
        return now - state.terminal_since >= settled.SETTLE_PATIENCE

    def fault(self, batch_id: str, error: SiliconFlowError, now: float) -> None:
        """
        Record a failed poll.

        :raises BatchWaitError: the wait cannot continue (401, 403, or 404 for ten minutes).
        """
        state = self._pending[batch_id]
        state.faults += 1
        state.fault = str(error)[:300]
        refused = isinstance(error, InvalidRequestError) and state.seen is None and self.deadline is None
        if isinstance(error, NotFoundError) or refused:
            # If each poll is a process of its own, the time of the first one counts.
            state.missing_since = state.missing_since or (self.began if state.seen is None else None) or now
            grace = REFUSED_GRACE if refused else NOT_FOUND_GRACE
            if now - state.missing_since >= grace and state.faults >= _MISSING_POLLS:
                seen = (
                    "It was read before, so it exists; it is untouched and billed. "
                    if state.seen
                    else "Check the id. If the batch exists, it is untouched. "
                )
                raise BatchWaitError(
                    f"Batch {batch_id} is not known to this account: {error} {seen}Check that the connection is the "
                    f"one with which the batch was created. {_CLEAR}",
                    batch_id=batch_id,
                    # Earlier polls in other processes may have found it.
                    retryable=self.began != self.now,
                ) from error
        elif isinstance(error, AuthenticationError | PermissionDeniedError):
            raise BatchWaitError(
                f"Waiting for batch {batch_id} ended: {error} The batch is untouched: it continues and is billed, and "
                f"its results can be fetched once the connection is right. {_CLEAR}",
                batch_id=batch_id,
            ) from error
        elif not protocol.is_transient(error) and not isinstance(error, APIError):
            raise error
        delay = protocol.backoff_delay(state.faults, error, self.poll_interval, FAULT_PAUSE_LIMIT)
        state.due = now + max(delay, 1.0)
        log.warning("Reading batch %s failed (%s); polling again in %.0f s", batch_id, error, delay)

    def _log_progress(self, state: _Waiting, batch: Batch, now: float) -> None:
        before, counts = state.seen, batch.request_counts
        if not batch.is_known_status and state.warned_status != batch.status:
            state.warned_status = batch.status
            log.warning("Batch %s has the unknown status %r; it counts as pending", batch.id, batch.status)
        if len(self.batch_ids) > _FEW_BATCHES:
            return
        done = counts.completed + counts.failed
        changed = before is None or before.status != batch.status
        if not changed:
            step = done - max(state.logged_done, 0)
            small = counts.total and step < counts.total * _PROGRESS_STEP
            if step == 0 or (small and now - state.logged_at < _PROGRESS_SECONDS):
                return
        state.logged_at, state.logged_done = now, done
        log.info("%s", progress_line(batch, now))

    def log_summary(self, now: float) -> None:
        """Log the progress of many batches together if it changed; a few batches are logged one by one."""
        if len(self.batch_ids) <= _FEW_BATCHES or any(state.seen is None for state in self._pending.values()):
            return
        rows = self.rows
        total, failed, done = rows.total, rows.failed, rows.completed + rows.failed
        last = self._summary
        step = max(total * _PROGRESS_STEP, 1)
        if (
            last
            and done - last.done < step
            and not (
                (done, len(self.ended)) != (last.done, last.ended) and now - last.at >= _PROGRESS_SECONDS
            )
        ):
            return
        line = f"{len(self.ended)}/{len(self.batch_ids)} batches ended, {done}/{total} rows done, {failed} failed"
        if last and done > last.done and not self.finished:
            rate = (done - last.done) / max(now - last.at, 1e-3)
            line += f", {rate:.1f} rows/s, expected end {_utc(now + (total - done) / rate)}"
        self._summary = _LastSummary(now, done, len(self.ended))
        log.info("%s", line)


def _step_after(when: float) -> float:
    return math.ceil(when / _POLL_STEP) * _POLL_STEP


def default_deadline(batch: Batch, began: float) -> float:
    """
    Return when a wait without a timeout ends, in epoch seconds: an hour after the batch expires.

    A wait that begins after that, for example of a retry, lasts an hour, since a batch may be late.

    :param began: epoch seconds at which the wait began.
    """
    longest = arguments.MAX_WINDOW_HOURS * 3600.0
    expiry = batch.expires_at or (batch.created_at or began) + longest
    # The service may state any expiry, but no batch runs longer than the longest window.
    return max(min(expiry, began + longest), began) + EXPIRY_MARGIN


def _utc(epoch: float) -> str:
    try:
        return datetime.fromtimestamp(epoch, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):
        # The service stated a time in another unit; a log line must not end a wait.
        return "a time out of range"


def progress_line(batch: Batch, now: float) -> str:
    """Return one line about the progress of a batch: rows done, failed and total, rate, expected end."""
    counts = batch.request_counts
    line = f"Batch {batch.id}: {batch.status}"
    if not counts.total:
        return line
    done = counts.completed + counts.failed
    line += f", {done}/{counts.total} rows done, {counts.failed} failed"
    if batch.is_terminal or not batch.in_progress_at or not done:
        return line
    rate = done / max(now - batch.in_progress_at, 1.0)
    return f"{line}, {rate:.1f} rows/s, expected end {_utc(now + (counts.total - done) / rate)}"
