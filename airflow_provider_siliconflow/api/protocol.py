"""
The HTTP API without I/O: builds requests, says how their answers are read, and decides what is sent again.

Both clients go through this module, so they differ in nothing but how bytes travel.
"""

from __future__ import annotations

import json
import logging
import random
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar
from urllib.parse import quote, urlencode, urljoin

from pydantic import ValidationError

from airflow_provider_siliconflow.api import answers
from airflow_provider_siliconflow.api.bounds import identifier
from airflow_provider_siliconflow.api.exceptions import (
    IncompleteResultsError,
    InvalidRequestError,
    NoAnswerError,
    NotFoundError,
    NotSentError,
    RateLimitedError,
    ServiceUnavailableError,
    UnexpectedAnswerError,
)
from airflow_provider_siliconflow.api.models import Account, Batch, UploadedFile
from airflow_provider_siliconflow.api.redaction import brief, hide_in_answer, snippet, strip_query
from airflow_provider_siliconflow.api.settings import ClientSettings, is_url

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Longest backoff between two sends of one call, in seconds.
BACKOFF_LIMIT = 30.0
#: Batches asked for per page of a listing.
PAGE_SIZE = 100
#: Pieces in which files travel, in bytes.
CHUNK_SIZE = 1 << 20
#: Pieces in which result files are read, in bytes: larger ones are slower by a factor of four.
READ_SIZE = 1 << 17
#: Bytes of the largest chat completion that is read: with log probabilities it is larger than other answers.
MAX_COMPLETION_BYTES = 16 << 20
#: Entries of one page of a list that are read: as many as there can be of whole batches, within the limits of an answer
#: (small ones take a hundred times their size in memory).
MAX_ENTRIES = 50_000


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """
    One request and how to read its answer.

    :param method: the HTTP method.
    :param path: below the API's base URL.
    :param read: reads the answer's JSON; raises ``ValueError`` if it is not what the API documents.
    :param query: parameters of the URL.
    :param payload: JSON to send.
    :param repeatable: whether sending it twice has the effect of sending it once. A call that is not repeatable is
        only sent again if it certainly had no effect.
    :param is_list: whether the answer is a list, which may be larger.
    :param creates: whether it creates a batch: an answer that names one is read whatever its status.
    """

    method: str
    path: str
    read: Callable[[Any], T]
    query: Mapping[str, str | int] = field(default_factory=dict)
    payload: Mapping[str, Any] | None = None
    repeatable: bool = True
    is_list: bool = False
    creates: bool = False

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

    def limit(self, status: int) -> int:
        """Return how many bytes are read of an answer with this HTTP status."""
        if not answers.is_success(status):
            return answers.MAX_ERROR_BYTES
        return answers.MAX_LIST_BYTES if self.is_list else answers.MAX_ANSWER_BYTES

    def answer(self, status: int, headers: Mapping[str, str], body: bytes) -> T:
        """
        Read an answer.

        :param status: the HTTP status.
        :param headers: of the answer; looked up without regard to case.
        :param body: the body, at most :meth:`limit` bytes.
        :raises APIError: the service refused.
        :raises UnexpectedAnswerError: the answer is not what the API documents.
        """
        data, wrong = None, None
        try:
            body = answers.unpack(body, headers.get("Content-Encoding"), self.limit(status), status=status)
            data = answers.parse(body, is_list=self.is_list)
        except ValueError as exc:
            wrong = exc
        error = answers.error_of(self.name, status, headers, body, data)
        # An answer that names a batch is a batch, whatever else it says: taken for a refusal, it would be paid twice.
        if error is None or (self.creates and answers.names_batch(data)):
            try:
                if wrong is not None:
                    raise wrong
                return self.read(data)
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
                what = f"{snippet(body)} ({_problems(exc)})"
            # Raised out here, without its cause, which holds values of the answer.
            raise self.unexpected(status, headers, what)
        if self.creates and answers.may_have_created(status, data, error):
            raise self.unexpected(status, headers, str(error), accepted=True) from error
        raise error

    def unexpected(
        self, status: int, headers: Mapping[str, str], what: str, *, accepted: bool | None = None
    ) -> UnexpectedAnswerError:
        """
        Return the error for an answer that is not what the API documents.

        :param what: what the answer is.
        :param accepted: whether the service may have done what was asked; by default whether the status is 2xx.
        """
        return UnexpectedAnswerError(
            f"{self.name} answered HTTP {status}{answers.traced(headers)}, but not what the API documents: {what}",
            accepted=answers.is_success(status) if accepted is None else accepted,
        )


@dataclass(frozen=True, slots=True)
class Completion:
    """
    A chat completion, as it came.

    :param body: the JSON object, byte for byte but for line ends between its tokens.
    :param trace_id: the trace id of the answer, if it has a plausible one.
    """

    body: bytes
    trace_id: str | None


@dataclass(frozen=True, slots=True)
class CompletionCall(Call[Completion]):
    """
    ``POST /chat/completions``, whose body is sent and whose answer is kept as bytes.

    :param content: the JSON to send.
    """

    content: bytes = b"{}"

    def body(self) -> bytes | None:
        """Return the JSON body."""
        return self.content

    def limit(self, status: int) -> int:
        """Return how many bytes are read of an answer with this HTTP status."""
        return MAX_COMPLETION_BYTES if answers.is_success(status) else answers.MAX_ERROR_BYTES

    def answer(self, status: int, headers: Mapping[str, str], body: bytes) -> Completion:
        """
        Read an answer; parameters and errors as for :meth:`Call.answer`.

        Only that it is a completion is checked here; its content is judged as that of any result line.
        """
        if answers.is_success(status):
            try:
                whole = answers.unpack(
                    body, headers.get("Content-Encoding"), self.limit(status), status=status
                )
                fields, whole = _completion_in(whole)
            except ValueError as exc:
                wrong: str | None = _problems(exc)
            else:
                wrong = None
                if "choices" in fields:
                    # Line ends can only stand between tokens: in texts they are escaped.
                    kept = hide_in_answer(whole).replace(b"\r", b" ").replace(b"\n", b" ")
                    return Completion(kept.strip(), answers.trace_id(headers))
            if wrong is not None:
                raise self.unexpected(status, headers, f"{snippet(body)} ({wrong})")
        # The class is named, since slots make another one of it.
        return Call.answer(self, status, headers, body)


def _completion_in(body: bytes) -> tuple[Collection[str], bytes]:
    """
    Return the names of the fields of a JSON object, and the object as bytes that can be a part of a line.

    It is paid for. So one with a control character or half a surrogate pair, as in a text that was cut, is repaired as
    such a line of a result file is: taken for no answer, its row would be asked and paid for again.

    :raises ValueError: it is no object, even so.
    """
    try:
        return answers.fields_of(body), body
    except ValueError:
        data = answers.parse(body.decode("utf-8-sig", "replace").encode())
        if not isinstance(data, dict):
            raise
        # In ASCII, so that half a pair can be written.
        return data, json.dumps(data, separators=(",", ":")).encode()


# Calls ----------------------------------------------------------------------------------------------------


def complete_chat(content: bytes) -> CompletionCall:
    """
    Build ``POST /chat/completions``, which costs money and has no key against being carried out twice.

    :param content: the body of a request line, as JSON.
    """
    return CompletionCall("POST", "/chat/completions", _no_completion, repeatable=False, content=content)


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
    return Call("POST", "/batches", _read_batch, payload=payload, repeatable=False, creates=True)


def get_batch(batch_id: str) -> Call[Batch]:
    """Build ``GET /batches/{id}``. An answer about another batch is not accepted."""
    return Call("GET", f"/batches/{quote(batch_id, safe='')}", partial(_read_batch, batch_id=batch_id))


def cancel_batch(batch_id: str) -> Call[Batch]:
    """Build ``POST /batches/{id}/cancel``, which may be repeated."""
    return Call(
        "POST", f"/batches/{quote(batch_id, safe='')}/cancel", partial(_read_batch, batch_id=batch_id)
    )


def list_batches(after: str | None = None, limit: int = PAGE_SIZE) -> Call[Page[Batch]]:
    """Build ``GET /batches``: one page, newest first."""
    query: dict[str, str | int] = {"limit": limit}
    if after:
        query["after"] = after
    return Call(
        "GET", "/batches", lambda data: _read_page(data, Batch.model_validate), query=query, is_list=True
    )


def list_files(limit: int = 10_000) -> Call[Page[UploadedFile]]:
    """Build ``GET /files``: the batch input files of the account. The service has no cursor for it."""
    return Call(
        "GET",
        "/files",
        lambda data: _read_page(_null_is_empty(data), UploadedFile.model_validate),
        query={"purpose": "batch", "limit": limit},
        is_list=True,
    )


def get_account() -> Call[Account]:
    """Build ``GET /user/info``."""
    return Call("GET", "/user/info", lambda data: Account.model_validate(answers.unwrap(data)))


def list_models() -> Call[list[str]]:
    """Build ``GET /models``: ids of the chat models the key can use live (batch may take fewer)."""
    return Call(
        "GET",
        "/models",
        lambda data: [name for item in answers.items_of(data) if (name := _model_name(item))],
        query={"sub_type": "chat"},
        is_list=True,
    )


def upload_file() -> Call[UploadedFile]:
    """Build ``POST /files`` without its body; see :class:`MultipartFrame`."""
    return Call(
        "POST", "/files", lambda data: UploadedFile.model_validate(answers.unwrap(data)), repeatable=False
    )


def _no_completion(data: Any) -> Completion:
    raise ValueError("it has no choices")


def _read_batch(data: Any, batch_id: str | None = None) -> Batch:
    batch = Batch.model_validate(answers.unwrap(data))
    if batch_id not in (None, batch.id):
        raise ValueError(f"it is about batch {batch.id}, not {batch_id}")
    return batch


def _model_name(item: Any) -> str | None:
    return identifier(item.get("id")) if isinstance(item, dict) else None


def _null_is_empty(data: Any) -> Any:
    """
    Take ``null`` for an empty list of files.

    An account without files may answer so. If ``null`` hides a file, the file is uploaded again, which costs nothing.
    A list of batches must not be ``null``.
    """
    inner = data.get("data") if isinstance(data, dict) else None
    if isinstance(data, dict) and "data" in data and inner is None:
        return {**data, "data": []}
    if isinstance(inner, dict) and "data" in inner and inner["data"] is None:
        return {**data, "data": {**inner, "data": []}}
    return data


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """
    One page of a listing.

    :param items: what could be read of it.
    :param has_more: whether there are further pages, if the service says.
    :param unreadable: how many entries could not be read, or were not.
    """

    items: tuple[T, ...]
    has_more: bool | None = None
    unreadable: int = 0


def _read_page(data: Any, read: Callable[[Any], T]) -> Page[T]:
    entries = answers.items_of(data)
    items: list[T] = []
    refused, first = 0, ""
    for item in entries[:MAX_ENTRIES]:
        try:
            items.append(read(item))
        except ValidationError as exc:
            # One odd entry must not hide the others: the batch that is searched for may be among them.
            first = first or _problems(exc)
            refused += 1
    if refused:
        log.warning(
            "Ignoring %d entries of a listing that are not what the API documents; the first: %s",
            refused,
            first,
        )
    if len(entries) > MAX_ENTRIES:
        log.warning("Ignoring all but the first %d of the %d entries of a listing", MAX_ENTRIES, len(entries))
        refused += len(entries) - MAX_ENTRIES
    return Page(tuple(items), answers.has_more(data), refused)


def _problems(exc: Exception) -> str:
    """Return in one line what was wrong with an answer."""
    if not isinstance(exc, ValidationError):
        return brief(str(exc), 200)
    return brief("; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in exc.errors()), 200)


#: Pages and batches after which a listing counts as cut.
MAX_PAGES, MAX_LISTED = 1000, 100_000


class BatchListing(Iterator[Batch]):
    """
    The account's batches, each once, usually the newest first. Pages are fetched as they are needed.

    The service documents a cursor and also says that paging is not supported yet: pages may repeat or be missing.

    :param fetch: carries out the call for one page.
    """

    def __init__(self, fetch: Callable[[Call[Page[Batch]]], Page[Batch]]) -> None:
        self._fetch = fetch
        self._seen: set[str] = set()
        self._batches = self._walk()
        #: Whether the account has, or may have, batches that the service did not return. True until the end is reached.
        self.cut = True
        #: How many entries could not be read so far.
        self.unreadable = 0

    def __iter__(self) -> BatchListing:
        """Return the listing itself; it can only be read once."""
        return self

    def __next__(self) -> Batch:
        """
        Return the next batch.

        :raises UnexpectedAnswerError: a page cannot be read. It does not count as empty.
        """
        return next(self._batches)

    def _walk(self) -> Iterator[Batch]:
        cursor: str | None = None
        for _ in range(MAX_PAGES):
            try:
                page = self._fetch(list_batches(cursor))
            except (InvalidRequestError, NotFoundError):
                if cursor is None:
                    raise
                # A service without paging may refuse the cursor.
                return
            self.unreadable += page.unreadable
            new = 0
            for batch in page.items:
                if batch.id not in self._seen:
                    self._seen.add(batch.id)
                    new += 1
                    yield batch
            if page.has_more is False or not page.items:
                # An empty page that promises more withholds it.
                self.cut = bool(page.has_more)
                return
            if not new or len(self._seen) >= MAX_LISTED:
                return
            cursor = page.items[-1].id


# Files ----------------------------------------------------------------------------------------------------


class MultipartFrame:
    """
    What goes around a file in a ``multipart/form-data`` upload.

    The file itself is sent piece by piece between :attr:`head` and :attr:`tail`, and never held in memory.

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
    Return the URL at which a result file is read.

    :param reference: a batch's ``output_file_id`` or ``error_file_id``: a URL, or a file id.
    """
    if is_url(reference):
        return reference
    return f"{settings.base_url}/files/{quote(reference, safe='')}/content"


def redirect_target(url: str, location: str | None) -> str:
    """
    Return the URL an answer to ``url`` points to.

    :raises UnexpectedAnswerError: there is no location, or it is not an HTTP URL.
    :raises IncompleteResultsError: it leads from https to http, where the results could be read on the way.
    """
    try:
        target = urljoin(url, location or "")
    except ValueError:
        target = ""
    if not location or not is_url(target):
        raise UnexpectedAnswerError(f"{strip_query(url)} redirects to nowhere")
    if url[:6].lower() == "https:" and target[:6].lower() != "https:":
        raise IncompleteResultsError(
            f"{strip_query(url)} redirects from https to http ({brief(strip_query(target), 200)}), which is not "
            "followed. The results are kept for 30 days; a retry asks for them again."
        )
    return target


# Repetition -------------------------------------------------------------------------------------------------


def had_no_effect(error: BaseException) -> bool:
    """
    Whether a call that ended so was certainly not carried out and may be worth another try.

    True for a connection that was never made, a 429, and a 503 in which the service says by its own code that it is
    overloaded; a gateway says so, too, of a request that it has passed on.
    """
    if isinstance(error, NotSentError | RateLimitedError):
        return True
    return (
        isinstance(error, ServiceUnavailableError)
        and error.status_code == 503
        and error.code in answers.OVERLOADED_CODES
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
