"""
The verdict on one result line: the outcome of its row, and whether the row is worth another attempt.

The service, or a gateway in front of it, may write anything into a line. Usual answers are read by a typed decoder that
skips unneeded fields; everything else by :class:`BatchResult`, which accepts anything. Both agree on every line. Only
short, limited parts of a line are kept: a hostile line costs its own row, and no more memory than its size.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from sys import intern
from typing import Annotated, Any, Generic, Protocol, TypeVar

import msgspec
import pydantic

from airflow_provider_siliconflow.api.bounds import MAX_COUNT, MAX_STATUS
from airflow_provider_siliconflow.api.models import BatchResult, Outcome, has_content
from airflow_provider_siliconflow.api.models import judge as outcome_of
from airflow_provider_siliconflow.api.redaction import READ_CHARACTERS, brief, valid_text
from airflow_provider_siliconflow.batch_files.tally import MESSAGE_CHARACTERS, Usage

#: Bytes of the longest error whose verdict is cached.
_LONGEST_KNOWN = 1024

#: Characters of the longest model name that is kept.
_LONGEST_MODEL = 256

#: Bytes from which the values of a line are counted before it is read: as objects they may take thirty times as much.
_LARGE_LINE = 4 << 20
#: Values of a large line above which only the needed fields are read.
_MOST_VALUES = 500_000
#: Bytes of the longest line that is repaired; a repair takes several copies of it.
_LONGEST_REPAIR = 16 << 20

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
    """Whether a row failed because the account cannot pay, so that no row is worth another attempt."""
    return (
        status == 402
        or (code or "").lower() in _BALANCE_CODES
        or bool(message and _BALANCE_MESSAGE.search(message))
    )


def worth_retrying(
    outcome: Outcome, *, code: str | None = None, message: str | None = None, status: int | None = None
) -> bool:
    """
    Whether the same row may be answered if it is sent again unchanged.

    A status or numeric code decides if there is one, otherwise the words of code and message. Errors that are not known
    to be transient are not retried, since the retry would be paid for.

    :param code: ``error.code`` as text: an HTTP status, the service's own number or a word.
    :param message: the service's message.
    :param status: ``response.status_code``.
    """
    if outcome is not Outcome.ERROR:
        return outcome in (Outcome.EXPIRED, Outcome.MISSING)
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


_Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_COUNT)]


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
    finish_reason: Annotated[str, msgspec.Meta(max_length=MAX_STATUS)] | None = None


class _LargeMessage(_Message, gc=False):
    reasoning_content: msgspec.Raw = msgspec.Raw(b"null")


class _LargeChoice(_Choice, gc=False):
    message: _LargeMessage


Choices = TypeVar("Choices")


class _Completion(msgspec.Struct, Generic[Choices], gc=False):
    choices: Choices
    model: Annotated[str, msgspec.Meta(max_length=_LONGEST_MODEL)] | None = None
    usage: _UsageFields | None = None


class _Response(msgspec.Struct, Generic[Choices], gc=False):
    body: _Completion[Choices]
    status_code: int | None = None


class _Answered(msgspec.Struct, Generic[Choices], gc=False):
    """The usual answer. Anything else is read by :class:`BatchResult`, which accepts anything."""

    custom_id: str
    response: _Response[Choices]
    error: None = None
    invalid: None = None


class _Failed(msgspec.Struct, gc=False):
    """The usual failure."""

    custom_id: str
    error: msgspec.Raw
    response: None = None


class _Named(msgspec.Struct, gc=False):
    custom_id: str | int


_decode_answered = msgspec.json.Decoder(_Answered[list[_Choice]]).decode
# Usually there is one choice; a list of millions would fill the memory.
_decode_large = msgspec.json.Decoder(_Answered[tuple[_LargeChoice]]).decode
_decode_failed = msgspec.json.Decoder(_Failed).decode
_decode_named = msgspec.json.Decoder(_Named).decode

_REFUSED = (msgspec.DecodeError, ValueError, RecursionError)

#: Digits of the longest number that is read as an integer; Python refuses longer ones.
_LONGEST_NUMBER = 4000
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})?')


class UnjudgedError(Exception):
    """It cannot be said whether an answer is accepted, since the author's code failed; the text says how."""


class Judge(Protocol):
    """Says whether a job accepts an answer."""

    def __call__(self, line: bytes, text: str | None, finish_reason: str | None) -> str | None:
        """
        Judge the answer of a row.

        :param line: its result line.
        :param text: its text; ``None`` if it has none.
        :param finish_reason: why it ended.
        :returns: ``None`` if it is accepted, otherwise the reason why not.
        :raises UnjudgedError: it cannot be said.
        """
        ...


class UnreadableLineError(ValueError):
    """A line of a result file cannot be read, so its row is unknown; the text says what is wrong."""


class Verdict(msgspec.Struct, gc=False):
    """
    The verdict on one result line, and the position of the line.

    :param empty: whether an answer that is ok has no text.
    :param metered: whether the line states the tokens of prompt and completion.
    :param code: ``error.code`` of a row that is not ok, shortened.
    :param message: the service's message about a row that is not ok, shortened and without secrets.
    :param transient: whether a row that is not ok is worth another attempt.
    :param out_of_balance: whether the row failed because the account cannot pay.
    :param unjudged: whether the answer is only invalid because it could not be judged.
    """

    custom_id: str
    outcome: Outcome
    finish_reason: str | None = None
    model: str | None = None
    empty: bool = False
    metered: bool = False
    prompt: int = 0
    completion: int = 0
    reasoning: int = 0
    total: int = 0
    code: str | None = None
    message: str | None = None
    transient: bool = False
    out_of_balance: bool = False
    unjudged: bool = False
    line: bytes | None = None
    file: int = 0
    offset: int = 0
    length: int = 0
    batch: int = 0

    @property
    def rank(self) -> int:
        """Which of several results of a row is kept: the highest. An answer that is paid for is never given up."""
        if self.outcome is Outcome.OK:
            return 3
        if self.outcome is Outcome.INVALID:
            return 2 if self.unjudged else 1
        return 0

    def add_usage_to(self, usage: Usage) -> None:
        """Add the line's tokens to ``usage``."""
        usage.prompt += self.prompt
        usage.completion += self.completion
        usage.reasoning += self.reasoning
        usage.total += self.total


def read_verdict(line: bytes, judge: Judge | None = None) -> Verdict | None:
    """
    Judge a line; ``None`` if it is not a result line.

    :param judge: what answers must satisfy; without it, every answer is ok.
    :raises UnreadableLineError: it is not JSON, or nested too deeply.
    """
    try:
        answered = _decode_answered(line) if len(line) <= _LARGE_LINE else _decode_large(line)
        # Only a short text can be blank.
        content = answered.response.body.choices[0].message.content
        is_short = len(content) < 64
        text = msgspec.json.decode(content) if is_short or judge is not None else None
        empty = is_short and _is_blank(text)
    except (*_REFUSED, IndexError):
        return _read_failure(line) or _read_unusual(line, judge)
    response = answered.response
    body = response.body
    outcome = outcome_of(error_code=None, has_error=False, status_code=response.status_code, has_answer=True)
    if outcome is not Outcome.OK:
        return _read_unusual(line, judge)
    choice = body.choices[0]
    reason, model = choice.finish_reason, body.model
    metered, prompt, completion, reasoning, total = False, 0, 0, 0, 0
    usage = body.usage
    if usage is not None:
        of_prompt, of_completion = usage.prompt_tokens, usage.completion_tokens
        metered = of_prompt is not None and of_completion is not None
        prompt, completion = of_prompt or 0, of_completion or 0
        total = usage.total_tokens or prompt + completion
        details = usage.completion_tokens_details
        if details is not None:
            reasoning = details.reasoning_tokens or 0
    # Positional arguments are faster, and this runs for every row.
    verdict = Verdict(
        answered.custom_id,
        outcome,
        reason and intern(reason),
        model and intern(model),
        empty,
        metered,
        prompt,
        completion,
        reasoning,
        total,
    )
    if judge is not None:
        _apply(judge, verdict, line, text)
    return verdict


def _apply(judge: Judge, verdict: Verdict, line: bytes, text: Any) -> None:
    """Judge an answer that is ok so far."""
    try:
        problem = judge(line, text if isinstance(text, str) else None, verdict.finish_reason)
        verdict.transient = problem is not None
    except UnjudgedError as exc:
        # It is not sent again: it may be what was asked for, and it is paid for.
        problem = str(exc)
        verdict.unjudged = True
    if problem is not None:
        verdict.outcome = Outcome.INVALID
        verdict.message = intern(brief(problem, MESSAGE_CHARACTERS))


def read_result(line: bytes) -> BatchResult | None:
    """
    Read a result line of any shape; ``None`` if it has no ``custom_id`` and so is not a result line.

    Only the custom id, the texts, the finish reason and the usage are read from a line of more than 4 MiB with more
    than 500,000 values (mostly log probabilities), and from a damaged line of more than 16 MiB.

    :raises UnreadableLineError: it is not JSON, or nested too deeply.
    """
    if len(line) > _LARGE_LINE and sum(map(line.count, (b",", b"[", b"{"))) > _MOST_VALUES:
        return _read_large(line)
    try:
        data = msgspec.json.decode(line)
    except _REFUSED:
        if len(line) > _LONGEST_REPAIR:
            return _read_large(line)
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
        # The row was answered and perhaps paid for; one field of an odd type must not lose it.
        response = data.get("response")
        return BatchResult.model_construct(
            custom_id=custom_id,
            id=None if data.get("id") is None else str(data["id"]),
            response=response if isinstance(response, dict) else {"body": response},
            error=data.get("error"),
            trace_id=None,
        )


def _read_large(line: bytes) -> BatchResult | None:
    try:
        answered = _decode_large(line)
    except _REFUSED:
        return _read_name(line)
    body = answered.response.body
    message = body.choices[0].message
    texts = {name: _text_of(getattr(message, name)) for name in ("content", "reasoning_content")}
    usage = {
        name: value for name, value in msgspec.to_builtins(body.usage or {}).items() if value is not None
    }
    choice = {"index": 0, "message": texts, "finish_reason": body.choices[0].finish_reason}
    read = {"choices": [choice], "model": body.model, "usage": usage}
    response = {"status_code": answered.response.status_code, "body": read}
    return BatchResult.model_construct(custom_id=answered.custom_id, response=response)


def _read_name(line: bytes) -> BatchResult | None:
    try:
        custom_id = str(_decode_named(line).custom_id)
    except msgspec.ValidationError:
        return None
    except _REFUSED as exc:
        raise UnreadableLineError("is not JSON") from exc
    error = {
        "code": "unreadable",
        "message": f"the result of {len(line)} bytes has too many values to be read",
    }
    return BatchResult.model_construct(custom_id=custom_id, error=error)


def _text_of(raw: msgspec.Raw) -> str | None:
    try:
        return msgspec.json.decode(raw, type=str | None)
    except _REFUSED:
        return None


def _decode_damaged(line: bytes) -> Any:
    """
    Read damaged JSON as well as possible: one damaged text must not lose the rows around it.

    An answer may be cut off within an escaped surrogate pair or within the bytes of a character, or a gateway may
    insert bytes that JSON does not allow.
    """
    text = line.decode("utf-8-sig", "replace")
    try:
        try:
            return _loads(text)
        except ValueError:
            return _loads(_ESCAPE.sub(lambda found: found[0] if len(found[0]) > 1 else "\\\\", text))
    except ValueError as exc:
        raise UnreadableLineError("is not JSON") from exc
    except RecursionError as exc:
        raise UnreadableLineError("is nested too deeply to be read") from exc


def _loads(text: str) -> Any:
    # Without "strict", texts may contain control characters.
    return json.loads(
        text, strict=False, parse_int=lambda n: int(n) if len(n) < _LONGEST_NUMBER else float(n)
    )


def _read_failure(line: bytes) -> Verdict | None:
    """Judge the usual failure; a file may contain thousands that differ only in their rows."""
    try:
        failed = _decode_failed(line)
        if len(failed.error) > _LONGEST_KNOWN:
            return None
        return msgspec.structs.replace(_judge_error(bytes(failed.error)), custom_id=failed.custom_id)
    except _REFUSED:
        return None


@lru_cache(maxsize=256)
def _judge_error(error: bytes) -> Verdict:
    return _verdict_of(BatchResult.model_construct(custom_id="", error=msgspec.json.decode(error)))


def _read_unusual(line: bytes, judge: Judge | None) -> Verdict | None:
    result = read_result(line)
    if result is None:
        return None
    verdict = _verdict_of(result)
    if judge is not None and verdict.outcome is Outcome.OK:
        _apply(judge, verdict, line, result.text)
    return verdict


def _verdict_of(result: BatchResult) -> Verdict:
    outcome = result.outcome
    usage = result.usage
    details = usage.get("completion_tokens_details")
    reason, model = result.finish_reason, result.body.get("model")
    prompt, completion = map(whole_number, (usage.get("prompt_tokens"), usage.get("completion_tokens")))
    verdict = Verdict(
        result.custom_id,
        outcome,
        valid_text(reason[:MAX_STATUS]) if isinstance(reason, str) else None,
        valid_text(model[:_LONGEST_MODEL]) if isinstance(model, str) else None,
        outcome is Outcome.OK and _is_blank(result.text),
        prompt is not None and completion is not None,
        prompt or 0,
        completion or 0,
        (whole_number(details.get("reasoning_tokens")) or 0) if isinstance(details, dict) else 0,
    )
    verdict.total = whole_number(usage.get("total_tokens")) or verdict.prompt + verdict.completion
    if outcome is not Outcome.OK:
        code, message = _reason(result)
        status = (result.response or {}).get("status_code")
        status = status if isinstance(status, int) else None
        words = message[:READ_CHARACTERS]
        verdict.transient = worth_retrying(outcome, code=code, message=words, status=status)
        verdict.out_of_balance = outcome is Outcome.ERROR and is_balance_error(
            code=code, message=words, status=status
        )
        # Thousands of them may be kept, and most are the same.
        verdict.code = code and intern(code)
        verdict.message = intern(brief(message, MESSAGE_CHARACTERS))
    return verdict


def _reason(result: BatchResult) -> tuple[str | None, str]:
    """Code and message of a row that failed, from ``error`` or else from the answer's body."""
    if has_content(result.error) or result.outcome is Outcome.INVALID:
        return result.error_code, result.error_message or ""
    said = (result.response or {}).get("body")
    if isinstance(said, dict) and said and not said.get("choices"):
        error = said.get("error", said)
        from_body = BatchResult.model_construct(custom_id="", error=error)
        is_one = isinstance(error, str) or (isinstance(error, dict) and error.get("message"))
        # A body that says success, but holds no answer, does not say why.
        if is_one and (message := from_body.error_message):
            return from_body.error_code, message
    elif isinstance(said, str) and said.strip():
        return None, said
    status = (result.response or {}).get("status_code")
    if not isinstance(status, int) or isinstance(status, bool) or not 100 <= status <= 599:
        status = None
    return None, "the answer has no choice" if status in (None, 200) else f"HTTP {status}"


def _is_blank(text: Any) -> bool:
    return not (text.strip() if isinstance(text, str) else text)


def whole_number(value: Any) -> int | None:
    """Return a count, which the service may send as an integer, as a float without a fraction, or as digits."""
    digits = isinstance(value, str) and value.isdecimal() and len(value) < 20
    if digits or (isinstance(value, float) and value.is_integer()):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_COUNT:
        return None
    return value
