"""The live rate limits of a model: token buckets of requests and of tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from airflow_provider_siliconflow.emulator.config import EmulatorConfig

_MINUTE = 60.0


class TokenBucket:
    """
    A bucket that fills at a steady rate and from which requests take.

    In ``t`` seconds it lets through at most ``rate * t + capacity``. A single amount above the capacity is let through
    by a full bucket, which then owes the rest, so that no request is refused forever; this amount then takes the place
    of the capacity in that bound.
    """

    def __init__(self) -> None:
        # Full, however large it is: the settings may change at any time.
        self._level = math.inf
        self._at = 0.0

    def has(self, amount: float, *, rate: float, capacity: float, now: float) -> bool:
        """
        Fill up to the time ``now``, and return whether an amount can be taken.

        :param rate: what flows in per second.
        :param now: in seconds.
        """
        self._level = min(capacity, self._level + max(0.0, now - self._at) * rate)
        self._at = now
        return self._level >= min(amount, capacity)

    def take(self, amount: float) -> None:
        """Take an amount, for which :meth:`has` has just answered."""
        self._level -= amount


class RateLimits:
    """The limits of one model."""

    def __init__(self) -> None:
        self._requests = TokenBucket()
        self._tokens = TokenBucket()

    def has_request(self, config: EmulatorConfig, now: float) -> bool:
        """Return whether ``live_rpm`` allows a request."""
        if not config.live_rpm:
            return True
        return _has(self._requests, 1, config.live_rpm, config, now)

    def has_tokens(self, amount: int, config: EmulatorConfig, now: float) -> bool:
        """Return whether ``live_tpm`` allows this many tokens."""
        if not config.live_tpm:
            return True
        return _has(self._tokens, amount, config.live_tpm, config, now)

    def take(self, tokens: int, config: EmulatorConfig) -> None:
        """Take a request and its tokens, for which both limits have just been asked."""
        if config.live_rpm:
            self._requests.take(1)
        if config.live_tpm:
            self._tokens.take(tokens)


def _has(bucket: TokenBucket, amount: int, per_minute: int, config: EmulatorConfig, now: float) -> bool:
    rate = per_minute / _MINUTE
    return bucket.has(amount, rate=rate, capacity=rate * config.live_burst, now=now)
