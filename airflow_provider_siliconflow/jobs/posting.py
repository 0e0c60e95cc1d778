"""Sending a request that must take effect once: what each answer means, and when it may be sent again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from airflow_provider_siliconflow.api import protocol
from airflow_provider_siliconflow.api.exceptions import (
    RateLimitedError,
    SiliconFlowError,
    SubmissionUnknownError,
    TransportError,
)
from airflow_provider_siliconflow.jobs.clock import Clock

log = logging.getLogger(__name__)

T = TypeVar("T")

#: How long to wait out definite refusals (429, overloaded, no connection), in seconds.
REFUSAL_PATIENCE = 900.0
#: How often a request is sent if each time the outcome remains unknown.
MAX_OPEN_SENDS = 3


@dataclass(frozen=True, slots=True)
class Request(Generic[T]):
    """
    A request that must take effect once.

    :param what: method, path and label, for messages.
    :param send: records the intent, and sends.
    :param find: returns what a send with unknown outcome created, after searching long enough to be sure.
    :param forget: removes the intent, since nothing was created.
    :param accept: records that the service may have created it, so that no try sends it again; ``None`` if sending it
        again costs nothing.
    :param lost: returns the error for a request that was accepted but whose result cannot be found.
    :param rate_limit_patience: how long to wait out a 429, in seconds.
    """

    what: str
    send: Callable[[], T]
    find: Callable[[], T | None]
    forget: Callable[[], None]
    accept: Callable[[], None] | None = None
    lost: Callable[[SiliconFlowError], SubmissionUnknownError] | None = None
    rate_limit_patience: float = REFUSAL_PATIENCE

    def patience(self, error: SiliconFlowError) -> float:
        """Return how long to wait out a definite refusal, in seconds."""
        return self.rate_limit_patience if isinstance(error, RateLimitedError) else REFUSAL_PATIENCE


def send_once(request: Request[T], clock: Clock, check_not_stopped: Callable[[str], None]) -> T:
    """
    Send a request until it took effect once: wait out definite refusals, and search after an unknown outcome.

    :param check_not_stopped: raises if nothing may be sent any more.
    :raises SubmissionUnknownError: the outcome remains unknown.
    :raises SiliconFlowError: the service refused; nothing was created.
    """
    began = clock.monotonic()
    refusals = open_sends = 0
    while True:
        _check_not_stopped(request, check_not_stopped, open_sends)
        try:
            return request.send()
        except SiliconFlowError as exc:
            error = exc
        if protocol.had_no_effect(error):
            refusals += 1
            delay = protocol.backoff_delay(refusals, error, 2.0, 60.0)
            if clock.monotonic() + delay <= began + request.patience(error):
                log.warning("%s; nothing was created; sending it again in %.0f s", error, delay)
                clock.sleep(delay)
                continue
        if not protocol.leaves_effect_open(error):
            if open_sends:
                # This send was refused, but an earlier one may have taken effect and be listed late.
                raise unknown(request.what, open_sends, error) from error
            request.forget()
            raise error
        open_sends += 1
        found = _find(request, open_sends, error)
        if found is not None:
            return found
        if open_sends >= MAX_OPEN_SENDS:
            raise unknown(request.what, open_sends, error) from error
        log.warning("%s created nothing in the account; sending it again", request.what)


def _check_not_stopped(
    request: Request[T], check_not_stopped: Callable[[str], None], open_sends: int
) -> None:
    try:
        check_not_stopped(request.what)
    except SiliconFlowError:
        if not open_sends:
            request.forget()
        raise


def _find(request: Request[T], open_sends: int, error: SiliconFlowError) -> T | None:
    """Search for the result of a send with unknown outcome."""
    log.warning("%s; the outcome is unknown, so the account is searched", error)
    # A success status in any form may mean "created".
    accepted = request.accept is not None and isinstance(error, TransportError) and error.accepted
    if accepted and request.accept is not None:
        request.accept()
    try:
        found = request.find()
    except SiliconFlowError as unread:
        raise unknown(request.what, open_sends, unread) from error
    if found is None and accepted and request.lost is not None:
        raise request.lost(error) from error
    return found


def unknown(what: str, sends: int, last: SiliconFlowError) -> SubmissionUnknownError:
    """Return the error for an outcome that remains unknown."""
    # Unlike a direct call of the hook, this one can be retried: the retry searches.
    return SubmissionUnknownError(
        f"{what} was sent {sends} time(s) without a usable answer, and it may have taken effect: the account does not "
        "list its result yet, or cannot be read. A retry of this task searches the account before it sends again; a "
        f"manual clear that submits again does not, and might pay twice. Last answer: {last}",
        retryable=True,
    )
