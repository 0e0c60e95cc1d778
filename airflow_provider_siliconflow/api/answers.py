"""
Reading answers: bodies within their limits, the service's envelopes, and the error an answer stands for.

No I/O. No answer is trusted to be of a sane size, and no text of one is shown before it has gone through
:mod:`~airflow_provider_siliconflow.api.redaction`.
"""

from __future__ import annotations

import json
import math
import re
import time
import zlib
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

import msgspec

from airflow_provider_siliconflow.api.bounds import MAX_STATUS, text_within
from airflow_provider_siliconflow.api.exceptions import (
    APIError,
    AuthenticationError,
    InsufficientBalanceError,
    InvalidRequestError,
    NoAnswerError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitedError,
    ServiceUnavailableError,
    SiliconFlowError,
    UnexpectedAnswerError,
)
from airflow_provider_siliconflow.api.models import has_content, says_success
from airflow_provider_siliconflow.api.redaction import brief, hide_in_answer, shown_word, snippet, strip_query

TRACE_ID_HEADER = "x-siliconcloud-trace-id"

#: Bytes of the largest answer that is read.
MAX_ANSWER_BYTES = 4 << 20
#: Bytes of the largest page of a list that is read.
MAX_LIST_BYTES = 64 << 20
#: Bytes that are read of an answer with an error status; the rest is not read.
MAX_ERROR_BYTES = 64 << 10
#: Items of lists and objects in one answer, and in one page of a list.
MAX_ANSWER_ITEMS, MAX_LIST_ITEMS = 50_000, 1_000_000
#: Bytes above which an answer is large: it is read field by field.
LARGE_ANSWER_BYTES = 256 << 10
#: Bytes of the largest field that is kept of a large answer.
_MAX_FIELD_BYTES = 64 << 10
#: Bytes of the largest answer that is parsed again, more leniently, if it is not strict JSON.
_MAX_ODD_JSON_BYTES = 1 << 20
#: Bytes that are decompressed at once.
_PIECE_BYTES = 64 << 10
#: Longest wait that a ``Retry-After`` header can ask for, in seconds.
RETRY_AFTER_LIMIT = 900.0

_SUCCESS_CODE = "20000"
_BALANCE_CODE = "30001"
#: Codes by which the service refuses for good: no such model, a wrong parameter, no money, a disabled model.
_REFUSAL_CODES = frozenset({"20012", "20015", _BALANCE_CODE, "30003"})
#: Codes by which the service says that it is overloaded. Such an answer is a refusal: nothing was done.
OVERLOADED_CODES = frozenset({"50505", "50603"})

# Bodies -----------------------------------------------------------------------------------------------------


def is_success(status: int) -> bool:
    """Whether an HTTP status says that the request was accepted."""
    return 200 <= status < 300


def unpack(body: bytes, encoding: str | None, limit: int, *, status: int = 200) -> bytes:
    """
    Decompress a body. Nobody asked for compression, but a gateway may compress all the same.

    :param body: the bytes that came; of an error, perhaps only the first of them.
    :param encoding: the header ``Content-Encoding``.
    :param limit: most bytes of the result.
    :param status: the HTTP status. The body of an error is cut at the limit instead of being refused.
    :raises ValueError: the encoding is neither gzip nor deflate, the body is damaged, or it exceeds the limit.
    """
    name = (encoding or "").strip().lower()
    if name in ("", "identity"):
        return body
    if name not in ("gzip", "x-gzip", "deflate"):
        raise ValueError(f"it is encoded as {brief(name, 40)!r}, which was not asked for")
    # 32: gzip or zlib, as its head says.
    inflate = zlib.decompressobj(zlib.MAX_WBITS | 32)
    pieces: list[bytes] = []
    size = 0
    while body and not inflate.eof:
        try:
            piece = inflate.decompress(body, _PIECE_BYTES)
        except zlib.error as exc:
            raise ValueError(f"it cannot be decompressed: {exc}") from exc
        body = inflate.unconsumed_tail
        pieces.append(piece)
        size += len(piece)
        if size > limit:
            if is_success(status):
                raise ValueError(f"it has more than {limit} bytes once decompressed")
            break
    return b"".join(pieces)[:limit]


def parse(body: bytes, *, is_list: bool = False) -> Any:
    """
    Parse JSON.

    In a large answer that is not a list, fields of an absurd size become ``None``: parsing them would hold up every
    other wait of a triggerer, and they must not hide the batch.

    :param body: the body, within its limit of bytes.
    :param is_list: whether the answer is a list, which may have many items.
    :raises ValueError: it is not JSON, has too many items, or is nested beyond reading.
    """
    body = hide_in_answer(body)
    limit = MAX_LIST_ITEMS if is_list else MAX_ANSWER_ITEMS
    # Each item except the first of its list follows a comma. Commas and brackets in texts count too, which is fine.
    if body.count(b"[") + body.count(b"{") + body.count(b",") > limit:
        raise ValueError(f"it has more than {limit} items")
    try:
        try:
            if is_list or len(body) <= LARGE_ANSWER_BYTES:
                return msgspec.json.decode(body)
            return {
                name: None if len(raw) > _MAX_FIELD_BYTES else msgspec.json.decode(raw)
                for name, raw in _decode_fields(body).items()
            }
        except (msgspec.DecodeError, UnicodeDecodeError):
            if len(body) > _MAX_ODD_JSON_BYTES:
                raise
            # Lone surrogates, NaN, control characters: json is more lenient, and slower.
            return json.loads(body, strict=False, parse_int=_parse_int)
    except RecursionError as exc:
        raise ValueError("it is nested beyond reading") from exc


_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def fields_of(body: bytes) -> dict[str, msgspec.Raw]:
    """
    Return the fields of a JSON object, unread.

    :raises ValueError: it is not JSON, or no object.
    """
    try:
        return _decode_fields(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ValueError(f"it is no JSON object: {exc}") from exc


def _parse_int(digits: str) -> int | float:
    # Python refuses to parse more than a few thousand digits.
    return int(digits) if len(digits) < 1000 else float(digits)


# Envelopes --------------------------------------------------------------------------------------------------


def unwrap(data: Any) -> Any:
    """Take an object out of the envelope ``{"code", "message", "status", "data"}``, or out of a list of one."""
    for _ in range(3):
        if isinstance(data, list) and len(data) == 1:
            data = data[0]
        elif isinstance(data, dict) and isinstance(data.get("data"), dict | list) and not _names_one(data):
            data = data["data"]
        else:
            break
    return data


def names_batch(data: Any) -> bool:
    """Whether an answer, whatever its status, describes a batch: it has an id and other fields of one."""
    data = unwrap(data)
    return (
        isinstance(data, dict)
        and _names_one(data)
        and ("batch_id" in data or "input_file_id" in data or data.get("object") == "batch")
    )


def may_have_created(status: int, data: Any, error: SiliconFlowError) -> bool:
    """
    Whether something may have been created despite a refusal: it has an id, or comes with a success status.

    With a success status, only what the service certainly means as a refusal is one.

    :param error: what :func:`error_of` made of the answer.
    """
    inner = unwrap(data)
    if isinstance(inner, dict) and _names_one(inner):
        return True
    if not is_success(status):
        return False
    refused = isinstance(error, APIError) and not isinstance(
        error, RateLimitedError | ServiceUnavailableError
    )
    return not refused or not (
        (isinstance(data, dict) and data.get("status") is False) or _is_known_refusal(error)
    )


def _is_known_refusal(error: SiliconFlowError) -> bool:
    code = getattr(error, "code", None)
    return code in _REFUSAL_CODES or (code is not None and len(code) == 3 and code.startswith("4"))


def _names_one(data: dict[str, Any]) -> bool:
    return "id" in data or "batch_id" in data


def items_of(data: Any) -> list[Any]:
    """
    Return the list of a listing, whether it is bare, under ``data`` or under ``data.data``.

    :raises ValueError: there is no list, or an error beside it. An unreadable list is not an empty one.
    """
    for _ in range(3):
        if isinstance(data, list):
            return data
        if not isinstance(data, dict) or _complains(data):
            break
        data = data.get("data")
    raise ValueError("no list in the answer")


def has_more(data: Any) -> bool | None:
    """Return whether a listing says that there are further pages; ``None`` if it does not say."""
    said = None
    while isinstance(data, dict):
        if isinstance(data.get("has_more"), bool | int):
            said = bool(said or data["has_more"])
        data = data.get("data")
    return said


def _complains(data: dict[str, Any]) -> bool:
    """Whether an object reports an error beside its ``data``."""
    if has_content(data.get("error")) or data.get("status") is False or data.get("success") is False:
        return True
    code, message = data.get("code"), data.get("message")
    if code not in (None, ""):
        return not says_success(code, None)
    return message not in (None, "") and not says_success(None, message)


# Errors -----------------------------------------------------------------------------------------------------


def trace_id(headers: Mapping[str, str]) -> str | None:
    """Return the trace id of an answer, if it has a plausible one."""
    found = headers.get(TRACE_ID_HEADER)
    return brief(found) if found and re.fullmatch(r"[\w.:/+=-]{1,128}", found) else None


def traced(headers: Mapping[str, str]) -> str:
    """Return the trace id of an answer for a message, or nothing if it has none."""
    found = trace_id(headers)
    return f" (trace id {found})" if found else ""


def error_from_answer(
    call: str, status: int, headers: Mapping[str, str], body: bytes
) -> SiliconFlowError | None:
    """
    Return the error an answer stands for, or ``None`` for a success.

    :param call: method and path, for the message.
    :param headers: of the answer; looked up without regard to case.
    :param body: the body of the answer, or its start.
    """
    try:
        data = parse(body)
    except ValueError:
        data = None
    return error_of(call, status, headers, body, data)


def error_of(
    call: str, status: int, headers: Mapping[str, str], body: bytes, data: Any
) -> SiliconFlowError | None:
    """
    Return the error an answer stands for, or ``None`` for a success.

    :param data: what :func:`parse` read of the body, or ``None``.
    """
    if status < 200:
        return NoAnswerError(
            f"{call} got no answer but HTTP {status}{traced(headers)}, which announces one, or another protocol"
        )
    if 300 <= status < 400:
        target = brief(strip_query(headers.get("Location") or ""), 200)
        return UnexpectedAnswerError(
            f"{call} answered HTTP {status}{traced(headers)}, a redirect to {target or 'nowhere'}, which is not "
            "followed: the API key goes to the connection's own host only. Set the connection's host to the final "
            "address."
        )
    code, message = _code_and_message(data)
    if is_success(status):
        # The envelope may carry a refusal under a success status.
        if not _is_refusal(code, data):
            return None
        status = _status_of_code(code)
    return _error_class(status, code)(
        brief(message) if message else snippet(body),
        status_code=status,
        code=code,
        trace_id=trace_id(headers),
        retry_after=_retry_after(headers.get("Retry-After")),
        call=call,
    )


def _code_and_message(data: Any) -> tuple[str | None, str | None]:
    if isinstance(data, str):
        return None, data
    if not isinstance(data, dict):
        return None, None
    nested = data.get("error")
    if isinstance(nested, dict):
        data = {**data, **nested}
    elif isinstance(nested, str):
        data = {"message": nested, **data}
    code, message = text_within(data.get("code"), MAX_STATUS), data.get("message")
    return code and shown_word(code), message if isinstance(message, str) else None


def _is_refusal(code: str | None, data: Any) -> bool:
    """Whether an answer under a success status says that the call was refused."""
    if code in (None, "0", "200", _SUCCESS_CODE):
        return False
    return data.get("status") is False or (
        "status" not in data and not _names_one(data) and not data.get("data")
    )


def _status_of_code(code: str | None) -> int:
    """Return the HTTP status that the service's own code stands for."""
    if code in OVERLOADED_CODES:
        return 503
    number = int(code) if code and code.isdecimal() and len(code) in (3, 5) else 0
    status = number // 100 if number > 999 else number
    return status if 400 <= status < 600 else 400


def _error_class(status: int, code: str | None) -> type[APIError]:
    if status == 402 or code == _BALANCE_CODE:
        return InsufficientBalanceError
    if status in (408, 425) or status >= 500:
        return ServiceUnavailableError
    by_status: dict[int, type[APIError]] = {
        401: AuthenticationError,
        403: PermissionDeniedError,
        404: NotFoundError,
        429: RateLimitedError,
    }
    return by_status.get(status, InvalidRequestError)


def _retry_after(value: str | None) -> float | None:
    """Read ``Retry-After``, which is seconds or an HTTP date."""
    if not value or len(value) > 64:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return None
    return None if math.isnan(seconds) else min(max(seconds, 0.0), RETRY_AFTER_LIMIT)
