"""Time as something that can be handed in, so that waits and backoffs can be driven without waiting."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Two clocks, and a way to let some time pass."""

    def time(self) -> float:
        """Return epoch seconds. This clock may be set forward or back at any moment, so no wait is measured by it."""
        ...

    def monotonic(self) -> float:
        """Return seconds since an arbitrary moment; they only ever grow."""
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
