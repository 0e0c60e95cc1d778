"""A request that must count once: what each answer leads to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from airflow_provider_siliconflow.api.exceptions import (
    InvalidRequestError,
    NoAnswerError,
    NotSentError,
    RateLimitedError,
    ServiceUnavailableError,
    SiliconFlowError,
    SubmissionUnknownError,
    UnexpectedAnswerError,
)
from airflow_provider_siliconflow.jobs.posting import MAX_OPEN_SENDS, REFUSAL_PATIENCE, Request, send_once
from tests.unit.jobs.faulty import FakeClock

FULL = RateLimitedError("full", status_code=429)
UNSENT = NotSentError("no connection")
LOST = NoAnswerError("reset")
ODD = UnexpectedAnswerError("<html>", accepted=True)
WRONG = InvalidRequestError("wrong", status_code=400)


class Sent:
    """What was done to send a request, in order."""

    def __init__(self, answers: Iterable[Any], finds: Iterable[Any] = (), *, stops_before: int = 99) -> None:
        self._answers, self._finds = iter(answers), iter(finds)
        self._stops_before = stops_before
        self.done: list[str] = []
        self.clock = FakeClock()

    def _next(self, what: str, script: Any, otherwise: Any) -> Any:
        self.done.append(what)
        answer = next(script, otherwise)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def run(self, *, accepts: bool = True, **more: Any) -> Any:
        def check_not_stopped(what: str) -> None:
            if self.done.count("send") >= self._stops_before:
                raise SiliconFlowError(f"{what} is stopped")

        request = Request(
            "POST /x",
            lambda: self._next("send", self._answers, "made"),
            lambda: self._next("find", self._finds, None),
            lambda: self.done.append("forget"),
            accept=(lambda: self.done.append("accept")) if accepts else None,
            lost=(lambda answer: SubmissionUnknownError(f"lost: {answer}")) if accepts else None,
            **more,
        )
        return send_once(request, self.clock, check_not_stopped)


def test_an_answer_is_the_end_of_it() -> None:
    sent = Sent([])
    assert sent.run() == "made"
    assert sent.done == ["send"]


@pytest.mark.parametrize(
    "error", [FULL, UNSENT, ServiceUnavailableError("busy", status_code=503, code="50505")]
)
def test_a_refusal_is_sat_out_with_growing_pauses(error: SiliconFlowError) -> None:
    sent = Sent([error] * 4)
    began = sent.clock.now
    assert sent.run() == "made"
    assert sent.done == ["send"] * 5
    # 2, 4, 8 and 16 seconds, give or take a fifth.
    assert 0.8 * 30 <= sent.clock.now - began <= 1.2 * 30


@pytest.mark.parametrize(("error", "patience"), [(FULL, 100.0), (UNSENT, REFUSAL_PATIENCE)])
def test_a_refusal_that_goes_on_leaves_no_intent_and_the_patience_with_429_is_the_callers(
    error: SiliconFlowError, patience: float
) -> None:
    sent = Sent([error] * 99)
    began = sent.clock.now
    with pytest.raises(type(error)):
        sent.run(rate_limit_patience=100.0)
    assert sent.done[-1] == "forget"
    assert sent.done.count("forget") == 1
    assert patience - 72 < sent.clock.now - began <= patience


def test_a_refusal_for_good_leaves_no_intent() -> None:
    sent = Sent([WRONG])
    with pytest.raises(InvalidRequestError):
        sent.run()
    assert sent.done == ["send", "forget"]


@pytest.mark.parametrize("error", [LOST, ServiceUnavailableError("gateway", status_code=502)])
def test_an_open_outcome_is_searched_for(error: SiliconFlowError) -> None:
    sent = Sent([error], ["found"])
    assert sent.run() == "found"
    assert sent.done == ["send", "find"]


def test_what_left_nothing_is_sent_again_and_not_without_end() -> None:
    sent = Sent([LOST, LOST])
    assert sent.run() == "made"
    assert sent.done == ["send", "find", "send", "find", "send"]
    sent = Sent([LOST] * 9)
    with pytest.raises(SubmissionUnknownError, match=rf"POST /x was sent {MAX_OPEN_SENDS} time") as caught:
        sent.run()
    assert caught.value.retryable
    assert sent.done == ["send", "find"] * 3


@pytest.mark.parametrize("error", [WRONG, FULL])
def test_a_refusal_after_an_open_outcome_says_nothing_of_the_first_send(error: SiliconFlowError) -> None:
    sent = Sent([LOST, *[error] * 99])
    with pytest.raises(SubmissionUnknownError, match=r"1 time.*Last answer"):
        sent.run(rate_limit_patience=0.0)
    assert sent.done == ["send", "find", "send"], "the intent stays"


def test_a_search_that_fails_leaves_it_open() -> None:
    sent = Sent([LOST], [LOST])
    with pytest.raises(SubmissionUnknownError, match="1 time"):
        sent.run()
    assert sent.done == ["send", "find"]


def test_what_was_accepted_is_never_sent_again() -> None:
    sent = Sent([ODD])
    with pytest.raises(SubmissionUnknownError, match="lost: <html>"):
        sent.run()
    assert sent.done == ["send", "accept", "find"]
    sent = Sent([ODD], ["found"])
    assert sent.run() == "found"
    # But for what costs nothing.
    sent = Sent([ODD])
    assert sent.run(accepts=False) == "made"
    assert sent.done == ["send", "find", "send"]
    sent = Sent([UnexpectedAnswerError("cut")])
    assert sent.run() == "made", "an answer that is no success accepts nothing"


def test_a_task_that_was_ended_sends_nothing_and_takes_back_only_what_did_not_leave() -> None:
    sent = Sent([], stops_before=0)
    with pytest.raises(SiliconFlowError, match="POST /x is stopped"):
        sent.run()
    assert sent.done == ["forget"]
    sent = Sent([LOST], stops_before=1)
    with pytest.raises(SiliconFlowError, match="POST /x is stopped"):
        sent.run()
    assert sent.done == ["send", "find"]
