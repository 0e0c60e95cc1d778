"""
The HTTP API without I/O: builds requests, reads answers, decides what is sent again.

Both clients go through this module, so they differ in nothing but how bytes travel.
"""

from __future__ import annotations

import json
import logging
import random
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, Generic, TypeVar
from urllib.parse import quote, urlencode, urljoin

from pydantic import ValidationError

from airflow_provider_siliconflow.api.exceptions import (
    APIError,
    AuthenticationError,
    InsufficientBalanceError,
    InvalidRequestError,
    NoAnswerError,
    NotFoundError,
    NotSentError,
    PermissionDeniedError,
    RateLimitedError,
    ServiceUnavailableError,
    SiliconFlowError,
    UnexpectedAnswerError,
)
from airflow_provider_siliconflow.api.models import Account, Batch, UploadedFile
from airflow_provider_siliconflow.api.redaction import (
    READ_CHARACTERS,
    SHOWN_CHARACTERS,
    redact,
    snippet,
    strip_query,
)
from airflow_provider_siliconflow.api.settings import ClientSettings, is_url

log = logging.getLogger(__name__)

T = TypeVar("T")
TRACE_ID_HEADER = "x-siliconcloud-trace-id"

#: Longest wait that a ``Retry-After`` header can ask for, in seconds; after it we ask again.
RETRY_AFTER_LIMIT = 900.0
#: Longest backoff between two sends of one call, in seconds.
BACKOFF_LIMIT = 30.0
#: Batches asked for per page of a listing.
PAGE_SIZE = 100
#: Pieces in which files travel, in bytes.
CHUNK_SIZE = 1 << 20
#: Pieces in which result files are read, in bytes: larger ones are slower by a factor of four.
READ_SIZE = 1 << 17

_SUCCESS_CODE = "20000"
_BALANCE_CODE = "30001"
_OVERLOADED_CODES = frozenset({"50505", "50603"})


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """
    One request and how to read its answer.

    :param repeatable: whether sending it twice does no more than sending it once. A call that is not
        repeatable is sent again only where it certainly had no effect.
    """

    method: str
    path: str
    read: Callable[[Any], T]
    query: Mapping[str, str | int] = field(default_factory=dict)
    payload: Mapping[str, Any] | None = None
    repeatable: bool = True

    @property
    def name(self) -> str:
        """Method and path, for messages."""
        return f"{self.method} {self.path}"

    def url(self, settings: ClientSettings) -> str:
        """Return the full URL."""
        query = f"?{urlencode(self.query)}" if self.query else ""
        return f"{settings.base_url}{self.path}{query}"

    def body(self) -> bytes | None:
        """Return the JSON body, or ``None``."""
        if self.payload is None:
            return None
        return json.dumps(self.payload, ensure_ascii=False, separators=(",", ":")).encode()

    def answer(self, status: int, headers: Mapping[str, str], body: bytes, settings: ClientSettings) -> T:
        """
        Read an answer.

        :raises APIError: the service refused.
        :raises UnexpectedAnswerError: the answer is not what the API documents.
        """
        data = _parse(body)
        error = _error_of(self.name, status, headers, body, data, settings)
        if error is not None:
            raise error
        try:
            if isinstance(data, Exception):
                raise data
            return self.read(data)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
            raise UnexpectedAnswerError(
                f"{self.name} answered HTTP {status}{traced(headers)}, but not what the API documents: "
                f"{snippet(body, settings)}"
            ) from exc


# Calls ----------------------------------------------------------------------------------------------------


def create_batch(
    *,
    input_file_id: str,
    endpoint: str,
    completion_window: str,
    metadata: Mapping[str, str] | None,
    replace: Mapping[str, Any] | None,
) -> Call[Batch]:
    """Build ``POST /batches``, the call that costs money: never repeated while its effect is open."""
    payload: dict[str, Any] = {
        "input_file_id": input_file_id,
        "endpoint": endpoint,
        "completion_window": completion_window,
    }
    if metadata:
        payload["metadata"] = dict(metadata)
    if replace:
        payload["replace"] = dict(replace)
    return Call("POST", "/batches", _read_batch, payload=payload, repeatable=False)


def get_batch(batch_id: str) -> Call[Batch]:
    """Build ``GET /batches/{id}``."""
    return Call("GET", f"/batches/{quote(batch_id, safe='')}", _read_batch)


def cancel_batch(batch_id: str) -> Call[Batch]:
    """Build ``POST /batches/{id}/cancel``; asking twice is asking once."""
    return Call("POST", f"/batches/{quote(batch_id, safe='')}/cancel", _read_batch)


def list_batches(after: str | None = None, limit: int = PAGE_SIZE) -> Call[Page[Batch]]:
    """Build ``GET /batches``: one page, newest first."""
    query: dict[str, str | int] = {"limit": limit}
    if after:
        query["after"] = after
    return Call("GET", "/batches", lambda data: _read_page(data, Batch.model_validate), query=query)


def list_files(limit: int = 10_000) -> Call[Page[UploadedFile]]:
    """Build ``GET /files``: the batch input files of the account. The service has no cursor for it."""
    return Call(
        "GET",
        "/files",
        lambda data: _read_page(data, UploadedFile.model_validate),
        query={"purpose": "batch", "limit": limit},
    )


def get_account() -> Call[Account]:
    """Build ``GET /user/info``."""
    return Call("GET", "/user/info", lambda data: Account.model_validate(_unwrap(data)))


def list_models() -> Call[list[str]]:
    """Build ``GET /models``: ids of the chat models the key can use live (batch may take fewer)."""
    return Call(
        "GET",
        "/models",
        lambda data: [item["id"] for item in _items(data) if isinstance(item, dict) and item.get("id")],
        query={"sub_type": "chat"},
    )


def upload_file() -> Call[UploadedFile]:
    """Build ``POST /files`` without its body; see :class:`MultipartFrame`."""
    return Call("POST", "/files", lambda data: UploadedFile.model_validate(_unwrap(data)), repeatable=False)


def _read_batch(data: Any) -> Batch:
    return Batch.model_validate(_unwrap(data))


def _unwrap(data: Any) -> Any:
    """Take an object out of the envelope ``{"code", "message", "status", "data"}`` where there is one."""
    if isinstance(data, dict) and isinstance(data.get("data"), dict) and "id" not in data:
        return data["data"]
    return data


def _items(data: Any) -> list[Any]:
    """Return the list of a listing, whether it is bare, under ``data`` or under ``data.data``."""
    for _ in range(3):
        if isinstance(data, list):
            return data
        if not isinstance(data, dict):
            break
        if data.get("data") is None and "data" in data:
            return []
        data = data.get("data")
    raise ValueError("no list in the answer")


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """One page of a listing."""

    items: tuple[T, ...]
    has_more: bool


def _read_page(data: Any, read: Callable[[Any], T]) -> Page[T]:
    items = []
    for item in _items(data):
        try:
            items.append(read(item))
        except ValidationError as exc:
            # One odd entry must not hide the others: among them may be the batch that is looked for.
            log.warning("Ignoring an entry of a listing that is not what the API documents: %s", exc)
    has_more = False
    while isinstance(data, dict):
        has_more = has_more or bool(data.get("has_more"))
        data = data.get("data")
    return Page(tuple(items), has_more)


class BatchPaging:
    """
    Walks through pages of batches, and stops at a listing that does not advance.

    The service documents a cursor and says that paging is not supported yet: a page may repeat.
    """

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._cursor: str | None = None
        self.done = False
        #: Whether there is more that the service does not hand out.
        self.cut = False

    def next_call(self) -> Call[Page[Batch]]:
        """Build the call for the next page."""
        return list_batches(after=self._cursor)

    def take(self, page: Page[Batch]) -> list[Batch]:
        """Take an answered page and return what it has that no page before had."""
        new = [batch for id_, batch in {b.id: b for b in page.items}.items() if id_ not in self._seen]
        self._seen.update(batch.id for batch in new)
        if new:
            self._cursor = page.items[-1].id
        self.done = not (new and page.has_more)
        self.cut = page.has_more and not new
        return new


# Files ----------------------------------------------------------------------------------------------------


class MultipartFrame:
    """
    What goes around a file in a ``multipart/form-data`` upload.

    The file itself is sent between :attr:`head` and :attr:`tail` piece by piece, never held whole.

    :param filename: name the file gets at the service.
    """

    def __init__(self, filename: str) -> None:
        boundary = secrets.token_hex(16)
        name = re.sub(r'[^\x20-\x7e]|["\\]', "_", filename)
        self.content_type = f"multipart/form-data; boundary={boundary}"
        self.head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
            f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n'
            "Content-Type: application/jsonl\r\n\r\n"
        ).encode()
        self.tail = f"\r\n--{boundary}--\r\n".encode()

    def length(self, file_size: int) -> int:
        """Return the length of the whole body."""
        return len(self.head) + file_size + len(self.tail)


def result_url(reference: str, settings: ClientSettings) -> str:
    """
    Return where a result file is read.

    :param reference: a batch's ``output_file_id`` or ``error_file_id``: a URL, or a file id.
    """
    if is_url(reference):
        return reference
    return f"{settings.base_url}/files/{quote(reference, safe='')}/content"


def redirect_target(url: str, location: str | None) -> str:
    """
    Return the URL an answer to ``url`` points to.

    :raises UnexpectedAnswerError: it names no place, or leaves HTTP.
    """
    try:
        target = urljoin(url, location or "")
    except ValueError:
        target = ""
    if not location or not is_url(target):
        raise UnexpectedAnswerError(f"{strip_query(url)} redirects to nowhere")
    return target


def traced(headers: Mapping[str, str]) -> str:
    """Return the trace id of an answer for a message, or nothing where it has none."""
    trace_id = headers.get(TRACE_ID_HEADER)
    return f" (trace id {trace_id})" if trace_id else ""


def error_from_answer(
    call: str, status: int, headers: Mapping[str, str], body: bytes, settings: ClientSettings | None = None
) -> SiliconFlowError | None:
    """
    Return the error an answer stands for, or ``None`` for a success.

    :param call: method and path, for the message.
    :param headers: of the answer; looked up without regard to case.
    """
    return _error_of(call, status, headers, body, _parse(body), settings)


def _parse(body: bytes) -> Any:
    """Return what a body holds as JSON, or the error that it holds none."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as exc:
        return exc


def _error_of(
    call: str,
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    data: Any,
    settings: ClientSettings | None,
) -> SiliconFlowError | None:
    if 300 <= status < 400:
        target = strip_query(headers.get("Location") or "")
        return UnexpectedAnswerError(
            f"{call} answered HTTP {status}{traced(headers)}, a redirect to {target or 'nowhere'}, which is not "
            "followed: the API key goes to the connection's own host only. Set the connection's host to the final "
            "address."
        )
    code, message = _code_and_message(data)
    if 200 <= status < 300:
        # The envelope may carry a refusal under a success status.
        if not _is_refusal(code, data):
            return None
        status = _status_of_code(code)
    return _error_class(status, code)(
        redact(message[:READ_CHARACTERS], settings)[:SHOWN_CHARACTERS]
        if message
        else snippet(body, settings),
        status_code=status,
        code=code,
        trace_id=headers.get(TRACE_ID_HEADER),
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
    code, message = data.get("code"), data.get("message")
    return None if code is None else str(code), message if isinstance(message, str) else None


def _is_refusal(code: str | None, data: Any) -> bool:
    """Whether an answer under a success status says that the call was refused."""
    if code in (None, "0", "200", _SUCCESS_CODE):
        return False
    return data.get("status") is False or ("status" not in data and "id" not in data and not data.get("data"))


def _status_of_code(code: str | None) -> int:
    """Return the HTTP status that the service's own code stands for."""
    if code in _OVERLOADED_CODES:
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
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return None
    return min(max(seconds, 0.0), RETRY_AFTER_LIMIT) if seconds == seconds else None


def had_no_effect(error: BaseException) -> bool:
    """
    Whether a call that ended so was certainly not carried out and may be worth another try.

    True for a connection that was never made, a 429, and a 503 that says the service is overloaded.
    """
    if isinstance(error, NotSentError | RateLimitedError):
        return True
    return (
        isinstance(error, ServiceUnavailableError)
        and error.status_code == 503
        and (error.code in _OVERLOADED_CODES or "overload" in error.message.lower())
    )


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed a while later."""
    return had_no_effect(error) or isinstance(
        error, NoAnswerError | UnexpectedAnswerError | ServiceUnavailableError
    )


def leaves_effect_open(error: BaseException) -> bool:
    """Whether after this error nobody can say if the call was carried out."""
    return is_transient(error) and not had_no_effect(error)


def backoff_delay(attempt: int, error: BaseException | None, base: float, limit: float) -> float:
    """
    Return the seconds to wait before sending again.

    :param attempt: how often it failed so far, from 1.
    :param error: what happened last; its ``Retry-After`` is honoured.
    :param base: seconds for the first repetition, doubled each time up to ``limit``, with jitter.
    """
    delay = min(base * 2.0 ** min(attempt - 1, 30), limit) * random.uniform(0.8, 1.2)
    return max(delay, getattr(error, "retry_after", None) or 0.0)


def retry_options(call: Call[Any], settings: ClientSettings) -> dict[str, Any]:
    """Return the arguments for tenacity's ``Retrying`` and ``AsyncRetrying``: the one retry policy."""
    import tenacity

    should_repeat = is_transient if call.repeatable else had_no_effect

    def wait(state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        return backoff_delay(state.attempt_number, error, settings.backoff, BACKOFF_LIMIT)

    def say(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        delay = state.next_action.sleep if state.next_action else 0.0
        log.warning("%s; sending it again in %.0f s (attempt %d)", error, delay, state.attempt_number + 1)

    return {
        "retry": tenacity.retry_if_exception(should_repeat),
        "stop": tenacity.stop_after_attempt(settings.max_retries + 1),
        "wait": wait,
        "before_sleep": say,
        "reraise": True,
    }
