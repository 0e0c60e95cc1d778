"""The token buckets behind the live rate limits."""

from __future__ import annotations

from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from airflow_provider_siliconflow.emulator import EmulatorConfig
from airflow_provider_siliconflow.emulator.rate_limits import RateLimits, TokenBucket

#: Seconds since the arrival before, and the amount asked for. Repeated, so that a small excess adds up.
ARRIVALS = st.lists(st.tuples(st.floats(0, 2), st.integers(1, 10)), min_size=1, max_size=6).map(
    lambda pattern: pattern * 40
)


@given(arrivals=ARRIVALS, rate=st.floats(0.1, 20), capacity=st.floats(0, 20))
def test_no_arrival_pattern_gets_more_through_than_rate_and_capacity(
    arrivals: list[tuple[float, int]], rate: float, capacity: float
) -> None:
    bucket = TokenBucket()
    times = list(accumulate(gap for gap, _ in arrivals))
    passed: list[tuple[float, int]] = []
    for now, (_, amount) in zip(times, arrivals, strict=True):
        if bucket.has(amount, rate=rate, capacity=capacity, now=now):
            bucket.take(amount)
            passed.append((now, amount))
    burst = max(capacity, max(amount for _, amount in arrivals))
    for first in range(len(passed)):
        through = 0
        for now, amount in passed[first:]:
            through += amount
            assert through <= rate * (now - passed[first][0]) + burst + 1e-6


@given(arrivals=ARRIVALS, rpm=st.integers(1, 6000), tpm=st.integers(1, 6000), burst=st.floats(0, 5))
def test_whoever_waits_long_enough_gets_through(
    arrivals: list[tuple[float, int]], rpm: int, tpm: int, burst: float
) -> None:
    config = EmulatorConfig(live_rpm=rpm, live_tpm=tpm, live_burst=burst)
    limits, now = RateLimits(), 0.0
    for gap, tokens in arrivals:
        now += gap
        if limits.has_request(config, now) and limits.has_tokens(tokens, config, now):
            limits.take(tokens, config)
        # What the largest request owes, and a whole bucket.
        later = now + 60 / rpm + (burst * tpm / 60 + 60) * 60 / tpm + burst + 1e-3
        now = later
        assert limits.has_request(config, later)
        assert limits.has_tokens(tokens, config, later)
