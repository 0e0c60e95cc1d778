"""
How fast requests are sent to a service that limits their rate, without knowing the limit.

No I/O, and no clock of its own. Until the first refusal, the number of requests under way grows with every answer. From
then on the rate counts: a refusal lowers it to what the service was seen to accept, and each answer raises it a little.
If nothing is accepted any more, requests pause for longer and longer.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

#: Requests under way at first.
_FIRST_WINDOW = 8
#: Requests of which one is refused that prove that the service accepts some: those that were sent before it.
_PROOF = 3
#: Seconds over which accepted requests are counted.
_SPAN = 3.0
#: What a refusal makes of the rate, if others were accepted before it, and if that is not known.
_DECREASE, _UNPROVEN_DECREASE = 0.9, 0.7
#: By how much each answer raises the rate: so the rate grows by 2 % a second, or by half while it recovers.
_INCREASE, _RECOVERY = 0.02, 0.5
#: Lowest and highest rate, in requests per second.
_LOWEST, _HIGHEST = 0.1, 10_000.0
#: Seconds by which a timer may be late.
_TIMER_ERROR = 0.05
#: First and longest pause while nothing is accepted, in seconds.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 30.0


@dataclass(slots=True)
class Pacer:
    """
    Decides when the next request to one model may be sent.

    :param most: most requests under way.
    """

    most: int
    #: Requests that were accepted and refused so far.
    accepted_total: int = 0
    refused_total: int = 0
    _window: float = 0.0
    _under_way: int = 0
    _rate: float | None = None
    #: Up to this rate, it grows fast again after a pause.
    _level: float = _HIGHEST
    _next: float = 0.0
    _closed_until: float = 0.0
    #: Increased with each refusal that counts: later refusals of requests that were sent before say nothing new.
    _epoch: int = 0
    _sent_in_epoch: int = 0
    _strikes: int = 0
    #: When requests were sent that were not refused. A refusal comes at once, an answer perhaps after minutes.
    _sent_at: deque[float] = field(default_factory=deque)
    _began: float | None = None

    def __post_init__(self) -> None:
        """Begin with few requests."""
        self._window = float(min(_FIRST_WINDOW, self.most))

    @property
    def rate(self) -> float | None:
        """Requests per second at present; ``None`` if nothing was refused so far."""
        return self._rate

    def delay(self, now: float) -> float | None:
        """
        Return the seconds until a request may be sent; ``None`` if one that is under way must end first.

        :param now: seconds of a monotonic clock, as in all methods.
        """
        if self._under_way >= int(self._window):
            return None
        return max(self._closed_until - now, self._next - now, 0.0)

    def sent(self, now: float) -> int:
        """Count a request that is sent now; return what its outcome must be reported with."""
        if self._began is None:
            self._began = now
        self._under_way += 1
        self._sent_in_epoch += 1
        self._sent_at.append(now)
        while self._sent_at[0] < now - _SPAN:
            self._sent_at.popleft()
        if self._rate is not None:
            # A late timer is made up for, a pause is not.
            interval = 1 / self._rate
            self._next = max(self._next, now - min(_TIMER_ERROR, interval)) + interval
        return self._epoch

    def ended(self) -> None:
        """Count the end of a request that says nothing about the limit."""
        self._under_way -= 1

    def accepted(self, epoch: int) -> None:
        """
        Count a request that the service accepted.

        :param epoch: what :meth:`sent` returned.
        """
        self._under_way -= 1
        self.accepted_total += 1
        self._window = min(self._window + 1, self.most)
        self._strikes = 0
        if self._rate is not None and epoch == self._epoch:
            step = _RECOVERY if self._rate < self._level else _INCREASE
            self._rate = min(self._rate + step, _HIGHEST)

    def refused(self, epoch: int, now: float, retry_after: float | None = None) -> None:
        """
        Count a request that the service refused because of its limit, or since it is overloaded.

        :param epoch: what :meth:`sent` returned.
        :param retry_after: seconds that the service asks to wait.
        """
        self._under_way -= 1
        self.refused_total += 1
        if self._sent_at:
            self._sent_at.pop()
        if retry_after:
            self._closed_until = max(self._closed_until, now + retry_after)
        if epoch < self._epoch:
            return
        seen, is_first = self._seen_rate(now), self._rate is None
        if self._sent_in_epoch > _PROOF:
            self._rate = max(min(self._rate or seen, seen) * _DECREASE, _LOWEST)
            if not is_first:
                # The first refusal comes after too short a time for a good guess.
                self._level = self._rate
            self._strikes = 0
        else:
            # Perhaps it accepts none at all.
            self._strikes += 1
            before = self._rate or max(seen, 1.0)
            self._rate = max(before * _UNPROVEN_DECREASE, _LOWEST)
            if self._strikes == 1 and not is_first:
                # It accepted one since the last refusal.
                self._level = self._rate
            if self._strikes > 1:
                pause = min(_FIRST_PAUSE * 2.0 ** min(self._strikes - 2, 20), _LONGEST_PAUSE)
                self._closed_until = max(self._closed_until, now + pause)
        self._epoch += 1
        self._sent_in_epoch = 0
        self._next = now + 1 / self._rate

    def _seen_rate(self, now: float) -> float:
        """Return how many requests per second were accepted lately, or are not refused yet."""
        began = now if self._began is None else self._began
        span = min(_SPAN, max(now - began, 0.2))
        return sum(at >= now - span for at in self._sent_at) / span
