"""Time as a parameter, so that tests can drive waits and backoffs without waiting."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Two clocks, and a way to let time pass."""

    def time(self) -> float:
        """Return epoch seconds. Not for measuring waits: this clock may be set at any moment."""
        ...

    def monotonic(self) -> float:
        """Return seconds since an arbitrary moment; they never decrease."""
        ...

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        ...


class SystemClock:
    """The machine's clocks."""

    def time(self) -> float:
        """Return epoch seconds."""
        return time.time()

    def monotonic(self) -> float:
        """Return seconds since an arbitrary moment."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        time.sleep(seconds)


class SteadyClock:
    """
    A clock whose epoch seconds pass as fast as its monotonic ones, even if the machine's clock is set meanwhile.

    For one process: its start is what the machine's clock says then.

    :param clock: what it reads.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._offset = clock.time() - clock.monotonic()

    def time(self) -> float:
        """Return epoch seconds."""
        return self._offset + self._clock.monotonic()

    def monotonic(self) -> float:
        """Return seconds since an arbitrary moment."""
        return self._clock.monotonic()

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self._clock.sleep(seconds)
