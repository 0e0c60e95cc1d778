"""
Rows that are asked one by one, on ``POST /chat/completions``.

A row has no custom id here. What happens only "the first time" goes by its model and messages; a row that is asked
again with the answer it got and a reply to it is still the same row.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from airflow_provider_siliconflow.emulator.answers import AnswerStyle, Usage, row_error, transient_status
from airflow_provider_siliconflow.emulator.draws import digest_of, share_of
from airflow_provider_siliconflow.emulator.flaws import FLAWS, drawn_flaw
from airflow_provider_siliconflow.emulator.parameters import refused_parameter
from airflow_provider_siliconflow.emulator.rate_limits import RateLimits
from airflow_provider_siliconflow.emulator.refusals import (
    DEFAULT_BODIES,
    ServiceError,
    default_refusal,
    invalid_parameter,
    rate_limited,
    unknown_model,
)
from airflow_provider_siliconflow.emulator.rows import body_problem, markers_of, user_texts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from airflow_provider_siliconflow.emulator.answers import Answerer
    from airflow_provider_siliconflow.emulator.config import EmulatorConfig

_canonical = msgspec.json.Encoder(order="sorted").encode
_encode = msgspec.json.Encoder().encode


class LiveCall(msgspec.Struct, frozen=True):
    """
    A request that will be answered.

    :param seconds: what the answer takes, in wall seconds.
    :param content: the answer.
    :param stream: the answer is a ``text/event-stream``.
    :param digest: stands for model and body.
    """

    model: str
    seconds: float
    content: bytes
    stream: bool
    usage: Usage
    digest: bytes


@dataclass
class LiveCount:
    """
    What was asked of one model.

    :param usage: of the answers.
    :param refused: requests that were refused with 429.
    :param lost: answers that the client did not get.
    """

    usage: Usage = field(default_factory=lambda: Usage(rows=0))
    refused: int = 0
    lost: int = 0


@dataclass(frozen=True)
class LiveFigures:
    """
    What was asked live so far.

    :param answered: requests that were answered, all of them billed.
    :param lost: those of them whose answer the client did not get: it had gone, or a fault took the answer.
    :param refused: requests that were refused with 429.
    :param failed: requests that got another error. Faults that answer in place of the service are not counted.
    :param open: requests being answered now.
    :param most_open: the most at once so far.
    :param asked: different bodies that were answered.
    :param asked_again: answers beyond the first of their body: what was paid for again.
    """

    answered: int
    lost: int
    refused: int
    failed: int
    open: int
    most_open: int
    asked: int
    asked_again: int

    def as_dict(self) -> dict[str, int]:
        """Return the figures as the control calls show them."""
        return asdict(self)


class LiveDesk:
    """
    Answers live requests and counts them. Safe to use from any thread.

    :param config: returns the settings in force.
    :param answerer: returns what makes the answers.
    :param format_problem: returns what is wrong with a ``response_format``.
    :param now: the service's clock in seconds.
    """

    def __init__(
        self,
        config: Callable[[], EmulatorConfig],
        answerer: Callable[[], Answerer],
        format_problem: Callable[[object], str | None],
        now: Callable[[], float],
    ) -> None:
        self._config = config
        self._answerer = answerer
        self._format_problem = format_problem
        self._now = now
        self._lock = threading.Lock()
        self._limits: defaultdict[str, RateLimits] = defaultdict(RateLimits)
        self._counts: defaultdict[str, LiveCount] = defaultdict(LiveCount)
        self._answers: Counter[bytes] = Counter()
        self._failed_once: set[bytes] = set()
        self._answered_wrongly: Counter[bytes] = Counter()
        self._failed = 0
        self._open = 0
        self._most_open = 0

    def ask(self, body: object) -> LiveCall:
        """
        Accept a request. Its tokens are reserved; it is answered and billed by :meth:`answer`.

        :param body: the JSON body.
        :raises ServiceError: 400, 402, 429, or an error that a marker or ``live_error_rate`` asks for.
        """
        config = self._config()
        with self._lock:
            try:
                call = self._accepted(body, config)
            except ServiceError as error:
                if error.status != 429:
                    self._failed += 1
                    raise
                if config.live_retry_after:
                    error.headers["Retry-After"] = f"{config.live_retry_after:g}"
                if isinstance(body, dict):
                    self._counts[body["model"]].refused += 1
                raise
            self._open += 1
            self._most_open = max(self._most_open, self._open)
            return call

    def answer(self, call: LiveCall) -> None:
        """Bill a request: its answer is done, whether the client still waits for it or not."""
        with self._lock:
            self._open -= 1
            self._answers[call.digest] += 1
            count = self._counts[call.model]
            count.usage += call.usage

    def lose(self, call: LiveCall) -> None:
        """Count an answer that the client did not get."""
        with self._lock:
            self._counts[call.model].lost += 1

    def counts(self) -> Mapping[str, LiveCount]:
        """Return what was asked so far by model."""
        with self._lock:
            return {model: LiveCount(one.usage, one.refused, one.lost) for model, one in self._counts.items()}

    def figures(self) -> LiveFigures:
        """Return what was asked so far."""
        with self._lock:
            answered = self._answers.total()
            return LiveFigures(
                answered=answered,
                lost=sum(one.lost for one in self._counts.values()),
                refused=sum(one.refused for one in self._counts.values()),
                failed=self._failed,
                open=self._open,
                most_open=self._most_open,
                asked=len(self._answers),
                asked_again=answered - len(self._answers),
            )

    def _accepted(self, body: object, config: EmulatorConfig) -> LiveCall:
        checked, model = self._checked(body, config)
        if config.balance <= 0:
            raise default_refusal(402)
        limits, now = self._limits[model], self._now()
        # Before the answer is made, so that a refusal costs next to nothing.
        if not limits.has_request(config, now):
            raise rate_limited("RPM")
        row = self._row(model, checked["messages"])
        markers = [marker for text in user_texts(checked) for marker in markers_of(text)]
        flaw = self._flaw(row, model, markers, config)
        style = AnswerStyle(config.cached_share, config.thinking_tokens)
        completion = self._answerer().completion("", checked, flaw, style)
        tokens = completion.usage.prompt + completion.usage.completion
        if not limits.has_tokens(tokens, config, now):
            raise rate_limited("TPM")
        limits.take(tokens, config)
        self._fail(row, model, markers, config)
        if flaw is not None:
            self._answered_wrongly[row] += 1
        stream = checked.get("stream") is True
        content = _event_stream(completion.body) if stream else _encode(completion.body)
        digest = completion.digest
        seconds = config.live_latency * (1 + config.live_jitter * (2 * share_of(digest[8:]) - 1))
        return LiveCall(model, seconds, content, stream, completion.usage, digest)

    def _checked(self, body: object, config: EmulatorConfig) -> tuple[dict[str, Any], str]:
        problem = body_problem(body, self._format_problem)
        if problem is not None:
            raise invalid_parameter(problem)
        assert isinstance(body, dict)
        model = body.get("model")
        if not isinstance(model, str):
            raise invalid_parameter("model is required and must be a string.")
        if model not in config.models:
            raise unknown_model()
        refused = refused_parameter(model, body, config)
        if refused is not None:
            code, message = row_error(refused)
            raise ServiceError(400, {"code": int(code), "message": message, "data": None})
        return body, model

    def _row(self, model: str, messages: list[dict[str, Any]]) -> bytes:
        """Return what stands for a row: the model and the messages with which it was asked at first."""
        row = digest_of("", model, _canonical(messages))
        while len(messages) > 2 and messages[-2]["role"] == "assistant":
            # Without the last answer and the reply to it: perhaps it was asked so before.
            messages = messages[:-2]
            earlier = digest_of("", model, _canonical(messages))
            if earlier in self._answered_wrongly or earlier in self._failed_once:
                row = earlier
        return row

    def _flaw(self, row: bytes, model: str, markers: list[str], config: EmulatorConfig) -> str | None:
        earlier = self._answered_wrongly[row]
        if not earlier:
            for marker in markers:
                if marker.endswith("-once") and marker.removesuffix("-once") in FLAWS:
                    return marker.removesuffix("-once")
        return drawn_flaw(row.hex(), model, earlier, config) if config.answer_rate else None

    def _fail(self, row: bytes, model: str, markers: list[str], config: EmulatorConfig) -> None:
        once = None
        for marker in markers:
            name, _, value = marker.partition("=")
            if name == "error":
                raise _row_refusal(int(value))
            if name == "once" and value.isdecimal():
                once = int(value)
        if once is None and config.live_error_rate:
            once = transient_status(row.hex(), model, config.live_error_rate)
        if once is not None and row not in self._failed_once:
            self._failed_once.add(row)
            raise _row_refusal(once)


def _row_refusal(status: int) -> ServiceError:
    if status in DEFAULT_BODIES:
        return default_refusal(status)
    code, message = row_error(str(status))
    # What is no error of HTTP cannot be its status.
    known = status if 400 <= status <= 599 else 500
    return ServiceError(known, {"code": int(code), "message": message, "data": None})


def _event_stream(completion: Mapping[str, Any]) -> bytes:
    """Return an answer as a stream of one piece."""
    (choice,) = completion["choices"]
    piece = {"index": 0, "delta": choice["message"], "finish_reason": choice["finish_reason"]}
    chunk = {**completion, "object": "chat.completion.chunk", "choices": [piece]}
    return b"data: " + _encode(chunk) + b"\n\ndata: [DONE]\n\n"
