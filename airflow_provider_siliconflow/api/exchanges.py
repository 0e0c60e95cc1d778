"""
One request and its answer on the way, and the clock that ends it.

``requests`` limits the wait for the *next* byte, so that a server that sends a byte now and then holds a call forever.
Here every exchange has a deadline: one thread for the whole process shuts down the connection of an exchange that
exceeds it, and whoever reads from that connection wakes up.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any


class Exchange:
    """
    One request and its answer, as the connection sees it.

    :param limit: seconds it may take.
    :param may_be_private: whether it may lead to an address that is not public; only called if it does.
    """

    def __init__(self, limit: float, may_be_private: Callable[[], bool]) -> None:
        self.limit = limit
        self.may_be_private = may_be_private
        #: Whether any byte of the request may have been sent to the service, or to a proxy that forwards requests.
        self.sent = False
        #: Whether its time ran out, so that its connection was shut down.
        self.expired = False
        #: When it ends, by the monotonic clock; ``None`` while nobody waits for bytes of its answer.
        self.deadline: float | None = time.monotonic() + limit
        self._lock = threading.Lock()
        self._socket: Any = None

    def attach(self, connected: Any) -> None:
        """
        Set the connection that the exchange uses.

        :param connected: a socket, or TLS over one.
        :raises OSError: its time has already run out.
        """
        with self._lock:
            self._socket = connected
            if self.expired:
                raise TimeoutError("time ran out")

    def expire(self) -> None:
        """Shut the connection down, so that whoever waits for it wakes up."""
        with self._lock:
            self.expired = True
            connected = self._socket
            # TLS within TLS wraps a socket.
            while connected is not None and not isinstance(connected, socket.socket):
                connected = getattr(connected, "socket", None)
            if connected is not None:
                with contextlib.suppress(OSError):
                    # An SSLSocket's own method would first drop its TLS state, which another thread is using.
                    socket.socket.shutdown(connected, socket.SHUT_RDWR)

    def release(self) -> None:
        """Let the connection go: from now on it is that of another exchange, if it is used again."""
        with self._lock:
            self._socket = None

    def left(self) -> float:
        """Return the seconds that are left."""
        return max(0.0, (self.deadline or 0.0) - time.monotonic())


class Watchdog:
    """Ends exchanges at their deadlines, in one thread that runs only while there are any."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._exchanges: set[Exchange] = set()
        self._thread: threading.Thread | None = None

    def add(self, exchange: Exchange) -> None:
        """Watch an exchange from now on."""
        with self._changed:
            self._exchanges.add(exchange)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._watch, name="siliconflow-watchdog", daemon=True)
                self._thread.start()
            self._changed.notify()

    def remove(self, exchange: Exchange) -> None:
        """Stop watching an exchange, whose connection may serve another one from now on."""
        with self._changed:
            self._exchanges.discard(exchange)
        # The thread may have found it due already.
        exchange.release()

    def _watch(self) -> None:
        idle = 0
        while True:
            with self._changed:
                now = time.monotonic()
                due = {each for each in self._exchanges if each.deadline is not None and each.deadline <= now}
                self._exchanges -= due
                idle = 0 if self._exchanges else idle + 1
                if idle > 10:
                    self._thread = None
                    return
            for exchange in due:
                exchange.expire()
            with self._changed:
                # Deadlines move while files travel, so they are checked often instead of being announced.
                left = [each.left() for each in self._exchanges if each.deadline is not None]
                self._changed.wait(min([1.0, *(max(0.02, seconds) for seconds in left)]))


_watchdog = Watchdog()


def watchdog() -> Watchdog:
    """Return the watchdog of this process."""
    return _watchdog


def _after_fork() -> None:
    # The thread does not exist in the child, where the parent's lock may be held forever.
    global _watchdog
    _watchdog = Watchdog()


os.register_at_fork(after_in_child=_after_fork)
