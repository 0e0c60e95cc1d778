"""The rate of live requests finds the service's limit, keeps below it, and follows it."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_provider_siliconflow.jobs.pacing import Pacer


@dataclass
class Outcome:
    seconds: float
    sent: int
    refused: int
    most_under_way: int
    first_after_refusal: float = 0.0


class Bucket:
    """A limit that refills evenly, with room for a burst."""

    def __init__(self, rate: float, burst: float) -> None:
        self.rate, self.room = rate, max(rate * burst, 1.0)
        self.tokens, self.at = self.room, 0.0

    def __call__(self, now: float) -> bool:
        self.tokens = min(self.room, self.tokens + (now - self.at) * self.rate)
        self.at = now
        if self.tokens < 1:
            return False
        self.tokens -= 1
        return True


def drive(
    rows: int,
    limit: Callable[[float], bool],
    *,
    latency: float,
    most: int,
    seed: int = 0,
    retry_after: float | None = None,
) -> Outcome:
    """Ask rows of a service with a limit, in simulated time; a refusal comes at once."""
    draw = random.Random(seed)
    pacer, now, left, done = Pacer(most), 0.0, rows, 0
    under_way: list[tuple[float, int, bool, int]] = []
    found = Outcome(0.0, 0, 0, 0)
    while done < rows:
        while left and pacer.delay(now) == 0.0:
            epoch, accepted = pacer.sent(now), limit(now)
            found.sent += 1
            left -= 1
            takes = latency * draw.uniform(0.7, 1.3) if accepted else 0.01
            heapq.heappush(under_way, (now + takes, found.sent, accepted, epoch))
            found.most_under_way = max(found.most_under_way, len(under_way))
        delay = pacer.delay(now) if left else None
        if delay is not None and (not under_way or now + delay < under_way[0][0]):
            now += max(delay, 1e-6)
            continue
        now, _, accepted, epoch = heapq.heappop(under_way)
        if accepted:
            pacer.accepted(epoch)
            done += 1
        else:
            found.refused += 1
            left += 1
            pacer.refused(epoch, now, retry_after)
    found.seconds = now
    return found


@pytest.mark.parametrize("burst", [1.0, 0.1])
@pytest.mark.parametrize("latency", [0.05, 0.2, 0.6])
def test_a_limit_of_50_per_second_is_used(burst: float, latency: float) -> None:
    found = drive(3000, Bucket(50, burst), latency=latency, most=64)
    assert found.refused <= 0.05 * found.sent
    assert 3000 / found.seconds >= 45


@given(
    rate=st.floats(2, 400),
    burst=st.floats(0.1, 2),
    latency=st.floats(0.02, 3),
    most=st.integers(1, 200),
    seed=st.integers(0, 9),
    retry_after=st.one_of(st.none(), st.floats(0.1, 2)),
)
def test_any_limit_is_found(
    rate: float, burst: float, latency: float, most: int, seed: int, retry_after: float | None
) -> None:
    rows = int(min(max(rate * 30, 100), 4000))
    found = drive(rows, Bucket(rate, burst), latency=latency, most=most, seed=seed, retry_after=retry_after)
    # The first refusals come before anything is known: at most all that are under way then.
    assert found.refused <= 0.06 * found.sent + most + 5
    assert found.most_under_way <= most
    possible = min(rate, most / latency)
    assert found.seconds <= rows / possible / 0.45 + 20 * latency + 5 * (retry_after or 0) + 10


def test_without_refusals_nothing_slows_down() -> None:
    found = drive(2000, lambda now: True, latency=0.2, most=64)
    assert found.seconds < 2000 / 64 * 0.2 * 1.3


def test_requests_pause_while_nothing_is_accepted_and_go_on_after_it() -> None:
    found = drive(300, lambda now: now < 1 or now > 300, latency=0.1, most=16)
    # Five minutes without an answer.
    assert found.refused < 60
    assert found.seconds < 340


def test_retry_after_is_honoured() -> None:
    pacer = Pacer(4)
    epoch = pacer.sent(0.0)
    pacer.refused(epoch, 1.0, retry_after=20.0)
    assert pacer.delay(1.0) == pytest.approx(20.0)
