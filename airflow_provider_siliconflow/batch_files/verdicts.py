"""What one result line says of its row, and whether the row is worth another attempt."""

from __future__ import annotations

import json
import re
from sys import intern
from typing import Annotated, Any

import msgspec
import pydantic

from airflow_provider_siliconflow.api.models import BatchResult, Outcome, has_content, judge
from airflow_provider_siliconflow.api.redaction import READ_CHARACTERS, valid_text
from airflow_provider_siliconflow.batch_files.tally import Usage

#: More than this is no count of tokens, and does not fit into a column of a data frame.
_LARGEST_COUNT = (1 << 63) - 1

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


_Count = Annotated[int, msgspec.Meta(ge=0, le=_LARGEST_COUNT)]


class _Details(msgspec.Struct, gc=False):
    reasoning_tokens: _Count | None = None


class _UsageFields(msgspec.Struct, gc=False):
    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None
    total_tokens: _Count | None = None
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

_REFUSED = (msgspec.DecodeError, ValueError, RecursionError)

#: Digits of the longest number that is read as a whole one: Python refuses longer ones.
_LONGEST_NUMBER = 4000
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})?')


class NotJSONError(ValueError):
    """A line of a result file is not JSON: it was cut, or the file is no result file."""


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
    """
    Judge a result line; ``None`` if it is none.

    :raises NotJSONError: it is not JSON.
    """
    try:
        answered = _decode_answered(line)
        # Only a short text can be blank in earnest.
        content = answered.response.body.choices[0].message.content
        empty = len(content) < 64 and _is_blank(msgspec.json.decode(content))
    except (*_REFUSED, IndexError):
        return _read_unusual(line)
    response = answered.response
    body = response.body
    outcome = judge(error_code=None, has_error=False, status_code=response.status_code, has_answer=True)
    if outcome is not Outcome.OK:
        return _read_unusual(line)
    choice = body.choices[0]
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
    """
    Read a result line of any shape; ``None`` if it is none: without a ``custom_id``, or nested beyond reading.

    :raises NotJSONError: it is not JSON.
    """
    try:
        data = msgspec.json.decode(line)
    except _REFUSED:
        data = _decode_damaged(line)
    if not isinstance(data, dict):
        return None
    custom_id = data.get("custom_id")
    if isinstance(custom_id, int) and not isinstance(custom_id, bool):
        custom_id = data["custom_id"] = str(custom_id)
    if not isinstance(custom_id, str):
        return None
    try:
        return BatchResult.model_validate(data)
    except pydantic.ValidationError:
        # The row was answered, perhaps paid for: a field of an odd kind is no reason to lose it.
        response = data.get("response")
        return BatchResult.model_construct(
            custom_id=custom_id,
            id=None if data.get("id") is None else str(data["id"]),
            response=response if isinstance(response, dict) else {"body": response},
            error=data.get("error"),
            trace_id=None,
        )


def _decode_damaged(line: bytes) -> Any:
    """
    Read JSON as well as it can be read: one damaged text must not withhold the rows around it.

    An answer may be cut within an escaped pair of characters or within the bytes of one; or a gateway puts bytes
    into it that JSON does not have.
    """
    text = line.decode("utf-8-sig", "replace")
    try:
        try:
            return _loads(text)
        except ValueError:
            return _loads(_ESCAPE.sub(lambda found: found[0] if len(found[0]) > 1 else "\\\\", text))
    except ValueError as exc:
        raise NotJSONError(str(exc)) from exc
    except RecursionError:
        return None


def _loads(text: str) -> Any:
    # With "strict" off, control characters may stand in texts.
    return json.loads(
        text, strict=False, parse_int=lambda n: int(n) if len(n) < _LONGEST_NUMBER else float(n)
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
        valid_text(result.finish_reason) if isinstance(result.finish_reason, str) else None,
        valid_text(model) if isinstance(model, str) else None,
        outcome is Outcome.OK and _is_blank(result.text),
        whole_number(usage.get("prompt_tokens")) or 0,
        whole_number(usage.get("completion_tokens")) or 0,
        (whole_number(details.get("reasoning_tokens")) or 0) if isinstance(details, dict) else 0,
        status=status if isinstance(status, int) else None,
    )
    verdict.total = whole_number(usage.get("total_tokens")) or verdict.prompt + verdict.completion
    if outcome is not Outcome.OK:
        code, message = _reason(result)
        # Thousands of them may be kept, and each may repeat its prompt.
        verdict.code, verdict.message = code and code[:READ_CHARACTERS], message[:READ_CHARACTERS]
    return verdict


def _reason(result: BatchResult) -> tuple[str | None, str]:
    """Code and message of a row that failed, from ``error`` or else from the answer's body."""
    if has_content(result.error):
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


def whole_number(value: Any) -> int | None:
    """Return a count as the service may send it: a number, one with a fraction of zero, or digits."""
    digits = isinstance(value, str) and value.isdecimal() and len(value) < 20
    if digits or (isinstance(value, float) and value.is_integer()):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _LARGEST_COUNT:
        return None
    return value
