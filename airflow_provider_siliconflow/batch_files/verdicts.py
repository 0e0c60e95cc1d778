"""What one result line says of its row, and whether the row is worth another attempt."""

from __future__ import annotations

import json
import re
from sys import intern
from typing import Any

import msgspec
import pydantic

from airflow_provider_siliconflow.api.models import BatchResult, Outcome, judge
from airflow_provider_siliconflow.batch_files.tally import Usage

_BALANCE_CODES = frozenset({"30001", "402", "insufficient_balance", "insufficient_quota"})
_BALANCE_MESSAGE = re.compile(r"balance[^.]{0,20} insufficient|insufficient[^.]{0,20} balance|余额不足", re.I)
_TRANSIENT_STATUSES = frozenset({408, 425, 429})
_TRANSIENT_TEXT = re.compile(
    r"rate.?limit|too.?many.?requests|\b[tr]p[md]\b|overload|time[d]?.?out|unavailable|server.?error"
    r"|internal.?(server.?)?error|try again|\bbusy\b|connection (reset|error|aborted)|bad gateway",
    re.I,
)
_PERMANENT_TEXT = re.compile(
    r"invalid|bad.?request|not.?(exist|found|supported)|unsupported|context.?length|too long|sensitive", re.I
)


def is_balance_error(
    *, code: str | None = None, message: str | None = None, status: int | None = None
) -> bool:
    """Whether a row failed because the account cannot pay: further attempts are pointless for any row."""
    return (
        status == 402
        or (code or "").lower() in _BALANCE_CODES
        or bool(message and _BALANCE_MESSAGE.search(message))
    )


def worth_retrying(
    outcome: Outcome, *, code: str | None = None, message: str | None = None, status: int | None = None
) -> bool:
    """
    Whether the same row, sent again unchanged, may be answered.

    A status or a numeric code decides where there is one, the words of code and message otherwise. What is not
    known to be passing is not retried: it would be paid again.

    :param code: ``error.code`` as text: an HTTP status, the service's own number or a word.
    :param message: what the service said.
    :param status: ``response.status_code``.
    """
    if outcome is not Outcome.ERROR:
        return outcome is not Outcome.OK
    if is_balance_error(code=code, message=message, status=status):
        return False
    if status is not None and not 200 <= status < 300:
        return status in _TRANSIENT_STATUSES or status >= 500
    if code is not None and code.isdecimal() and len(code) in (3, 5):
        # The service's own numbers are of five digits and start like the HTTP status they come with (50505:
        # 503), but for 2xxxx and 3xxxx: parameters, and the account.
        return int(code) in _TRANSIENT_STATUSES or code.startswith("5")
    words = f"{code or ''} {message or ''}"
    return bool(_TRANSIENT_TEXT.search(words)) and not _PERMANENT_TEXT.search(words)


class _Details(msgspec.Struct, gc=False):
    reasoning_tokens: int | None = None


class _UsageFields(msgspec.Struct, gc=False):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    completion_tokens_details: _Details | None = None


class _Message(msgspec.Struct, gc=False):
    content: msgspec.Raw = msgspec.Raw(b"null")


class _Choice(msgspec.Struct, gc=False):
    message: _Message
    finish_reason: str | None = None


class _Completion(msgspec.Struct, gc=False):
    choices: list[_Choice]
    model: str | None = None
    usage: _UsageFields | None = None


class _Response(msgspec.Struct, gc=False):
    body: _Completion
    status_code: int | None = None


class _Answered(msgspec.Struct, gc=False):
    """The usual answer. Whatever does not fit this is read by :class:`BatchResult`, which takes anything."""

    custom_id: str
    response: _Response
    error: None = None


_decode_answered = msgspec.json.Decoder(_Answered).decode


class Verdict(msgspec.Struct, gc=False):
    """What one result line says of its row, and where the line stands."""

    custom_id: str
    outcome: Outcome
    finish_reason: str | None = None
    model: str | None = None
    empty: bool = False
    prompt: int = 0
    completion: int = 0
    reasoning: int = 0
    total: int = 0
    code: str | None = None
    message: str | None = None
    status: int | None = None
    line: bytes | None = None
    file: int = 0
    offset: int = 0
    length: int = 0
    batch: int = 0

    def add_usage_to(self, usage: Usage) -> None:
        usage.prompt += self.prompt
        usage.completion += self.completion
        usage.reasoning += self.reasoning
        usage.total += self.total


def read_verdict(line: bytes) -> Verdict | None:
    """Judge a result line; ``None`` if it is none."""
    try:
        answered = _decode_answered(line)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return _read_unusual(line)
    response = answered.response
    body = response.body
    if not body.choices:
        return _read_unusual(line)
    outcome = judge(error_code=None, has_error=False, status_code=response.status_code, has_answer=True)
    if outcome is not Outcome.OK:
        return _read_unusual(line)
    choice = body.choices[0]
    content = choice.message.content
    # Only a short text can be blank in earnest.
    empty = len(content) < 64 and _is_blank(msgspec.json.decode(content))
    reason, model = choice.finish_reason, body.model
    verdict = Verdict(answered.custom_id, outcome, reason and intern(reason), model and intern(model), empty)
    usage = body.usage
    if usage is not None:
        verdict.prompt = usage.prompt_tokens or 0
        verdict.completion = usage.completion_tokens or 0
        verdict.total = usage.total_tokens or verdict.prompt + verdict.completion
        details = usage.completion_tokens_details
        if details is not None:
            verdict.reasoning = details.reasoning_tokens or 0
    return verdict


def read_result(line: bytes) -> BatchResult | None:
    """Read a result line of any shape; ``None`` if it is none: not JSON, or without a ``custom_id``."""
    try:
        data = msgspec.json.decode(line)
    except (msgspec.DecodeError, ValueError, RecursionError):
        # A model's answer may be cut within an escaped character pair, which only the standard library takes.
        try:
            data = json.loads(line)
        except (ValueError, RecursionError):
            return None
    if not isinstance(data, dict) or not isinstance(data.get("custom_id"), str):
        return None
    try:
        return BatchResult.model_validate(data)
    except pydantic.ValidationError:
        # The row was answered, perhaps paid for: a field of an odd kind is no reason to lose it.
        response = data.get("response")
        return BatchResult.model_construct(
            custom_id=data["custom_id"],
            id=None if data.get("id") is None else str(data["id"]),
            response=response if isinstance(response, dict) else {"body": response},
            error=data.get("error"),
            trace_id=None,
        )


def _read_unusual(line: bytes) -> Verdict | None:
    result = read_result(line)
    if result is None:
        return None
    outcome = result.outcome
    usage = result.usage
    details = usage.get("completion_tokens_details")
    status = (result.response or {}).get("status_code")
    model = result.body.get("model")
    verdict = Verdict(
        result.custom_id,
        outcome,
        result.finish_reason if isinstance(result.finish_reason, str) else None,
        model if isinstance(model, str) else None,
        outcome is Outcome.OK and _is_blank(result.text),
        _whole(usage.get("prompt_tokens")),
        _whole(usage.get("completion_tokens")),
        _whole(details.get("reasoning_tokens")) if isinstance(details, dict) else 0,
        status=status if isinstance(status, int) else None,
    )
    verdict.total = _whole(usage.get("total_tokens")) or verdict.prompt + verdict.completion
    if outcome is not Outcome.OK:
        verdict.code, verdict.message = _reason(result)
    return verdict


def _reason(result: BatchResult) -> tuple[str | None, str]:
    """Code and message of a row that failed, from ``error`` or else from the answer's body."""
    if result.error:
        return result.error_code, result.error_message or ""
    said = (result.response or {}).get("body")
    if isinstance(said, dict) and said and not said.get("choices"):
        error = said.get("error", said)
        from_body = BatchResult.model_construct(custom_id="", error=error)
        if isinstance(error, str) or (isinstance(error, dict) and error.get("message")):
            return from_body.error_code, from_body.error_message or ""
    elif isinstance(said, str) and said.strip():
        return None, said
    status = (result.response or {}).get("status_code")
    return None, "the answer holds no choice" if status in (None, 200) else f"HTTP {status}"


def _is_blank(text: Any) -> bool:
    return not (text.strip() if isinstance(text, str) else text)


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0
