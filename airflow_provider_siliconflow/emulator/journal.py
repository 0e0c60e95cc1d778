"""The requests that the server has received, and those that a fault holds at the moment."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from dataclasses import dataclass

_KEPT_REQUESTS = 20_000


@dataclass(frozen=True, slots=True)
class RecordedRequest:
    """
    A request the server has answered.

    :param method: HTTP method.
    :param path: path below the origin, with its query except on the storage.
    :param route: method-less route as faults name it: ``/batches/*``, ``storage``.
    :param status: status that was sent; 0 if the connection was closed without a complete answer.
    :param at: epoch seconds of its arrival.
    :param fault: kind of the fault that hit it.
    """

    method: str
    path: str
    route: str
    status: int
    at: float
    fault: str | None = None


class Journal:
    """
    Record of the requests. Only the server's event loop may change it.

    ``counts`` has the number of all requests by ``METHOD /route``; ``requests`` has the last 20,000, oldest first.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.requests: deque[RecordedRequest] = deque(maxlen=_KEPT_REQUESTS)
        self._held: dict[asyncio.Event, str] = {}

    def arrived(self, method: str, route: str) -> None:
        """Count a request, before it is answered."""
        self.counts[f"{method} {route}"] += 1

    def answered(self, request: RecordedRequest) -> None:
        """Record a request once it is answered."""
        self.requests.append(request)

    @property
    def held(self) -> list[str]:
        """The requests that a fault holds at the moment, as ``METHOD /path``."""
        return list(self._held.values())

    async def hold(self, name: str) -> None:
        """
        Hold a request until :meth:`release`.

        :param name: the request as ``METHOD /path``.
        """
        event = asyncio.Event()
        self._held[event] = name
        try:
            await event.wait()
        finally:
            del self._held[event]

    def release(self) -> int:
        """Let all held requests continue, and return how many there were."""
        held = list(self._held)
        for event in held:
            event.set()
        return len(held)
