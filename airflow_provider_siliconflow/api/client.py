"""The HTTP API over ``requests``, for workers and notebooks."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import requests
import tenacity
import urllib3

from airflow_provider_siliconflow.api import protocol
from airflow_provider_siliconflow.api.exceptions import (
    APIError,
    CredentialLeakError,
    IncompleteResultsError,
    InvalidInputError,
    NoAnswerError,
    NotSentError,
    ServiceUnavailableError,
    SiliconFlowError,
)
from airflow_provider_siliconflow.api.models import Account, Batch, UploadedFile
from airflow_provider_siliconflow.api.protocol import CHUNK_SIZE, READ_SIZE, Call
from airflow_provider_siliconflow.api.redaction import redact, strip_query
from airflow_provider_siliconflow.api.settings import ClientSettings, trusted

if TYPE_CHECKING:
    from airflow_provider_siliconflow.api.sources import Source

from airflow_provider_siliconflow.api.redaction import keep_queries_out_of_logs

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Fewest seconds to wait while a file is sent and taken in: the service works on it before it answers.
_UPLOAD_PATIENCE = 300.0
_MAX_REDIRECTS = 5


class _UploadBody:
    """A request body with a known length that is read while it is sent."""

    def __init__(self, source: Source, size: int, frame: protocol.MultipartFrame) -> None:
        self._source, self._size, self._frame = source, size, frame

    def __len__(self) -> int:
        return self._frame.length(self._size)

    def __iter__(self) -> Iterator[bytes]:
        yield self._frame.head
        left = self._size
        with self._source.open("rb") as stream:
            while left:
                chunk = stream.read(min(CHUNK_SIZE, left))
                if not chunk:
                    raise InvalidInputError(
                        f"{self._source} became {left} bytes shorter during its upload; nothing was created"
                    )
                left -= len(chunk)
                yield chunk
            if stream.read(1):
                raise InvalidInputError(f"{self._source} grew during its upload; nothing was created")
        yield self._frame.tail


class _KeyAuth(requests.auth.AuthBase):
    """Sets the key and, being an auth object, keeps ``requests`` from taking another out of a netrc file."""

    def __init__(self, settings: ClientSettings | None) -> None:
        self._settings = settings

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._settings is not None:
            # Asked of the parser that connects, of what it made of the URL: parsers differ, and the key must not.
            if _connects_to(request.url or "") != _connects_to(self._settings.base_url):
                raise CredentialLeakError(
                    f"{strip_query(request.url or '')} would have got the API key, but is not at "
                    f"{self._settings.base_url}; nothing was sent"
                )
            request.headers.update(self._settings.request_headers)
        return request


def _connects_to(url: str) -> tuple[str | None, str | None, int | None]:
    parts = urllib3.util.parse_url(url)
    return parts.scheme, parts.host, parts.port or {"http": 80, "https": 443}.get(parts.scheme or "")


#: What ``requests`` raises of a request that it could not even begin to send.
_UNSENDABLE = (
    requests.exceptions.InvalidURL,
    requests.exceptions.MissingSchema,
    requests.exceptions.InvalidSchema,
    urllib3.exceptions.LocationValueError,
    UnicodeError,
)


class SiliconFlowClient:
    """
    Calls of the API, blocking. Not for use by several threads at once.

    :param settings: key, host, timeouts, retries.
    """

    def __init__(self, settings: ClientSettings) -> None:
        self.settings = settings
        # Said here, before anything is sent: the triggerer would say it when the batch is paid for.
        trusted(settings.verify)
        self._session = requests.Session()
        #: Whether the last listing of batches that was read to its end lacked older ones.
        self.listing_cut = False
        keep_queries_out_of_logs()

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def __enter__(self) -> SiliconFlowClient:
        """Return the client itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connections."""
        self.close()

    def call(self, call: Call[T], body: Callable[[], tuple[Any, dict[str, str], float]] | None = None) -> T:
        """
        Carry out a call, with the repetitions the protocol allows.

        :param body: makes (body, headers, least patience in seconds) anew for each send, instead of JSON.
        """
        for attempt in tenacity.Retrying(**protocol.retry_options(call, self.settings)):
            with attempt:
                return self._send(call, body)
        raise AssertionError("unreachable")

    def _send(self, call: Call[T], body: Callable[[], tuple[Any, dict[str, str], float]] | None) -> T:
        data, headers, patience = body() if body else (call.body(), {"Content-Type": "application/json"}, 0.0)
        with self._open(call.method, call.url(self.settings), call.name, data, headers, patience) as response:
            try:
                content = response.content
            except (requests.RequestException, OSError) as exc:
                raise self._no_answer(call.name, response.url, exc, response.headers) from None
            return call.answer(response.status_code, response.headers, content, self.settings)

    def _open(
        self,
        method: str,
        url: str,
        name: str,
        data: Any = None,
        headers: dict[str, str] | None = None,
        patience: float = 0.0,
        with_key: bool = True,
    ) -> requests.Response:
        settings = self.settings
        # urllib3 keeps the connect timeout while it sends, so a long upload needs it longer too.
        timeout = (max(settings.connect_timeout, patience / 5), max(settings.timeout, patience))
        proxy = settings.proxy_for(url)
        try:
            return self._session.request(
                method,
                url,
                data=data,
                headers=headers,
                auth=_KeyAuth(settings if with_key else None),
                timeout=timeout,
                # Given here they win over the environment's; set on the session they would not.
                proxies={urlsplit(url).scheme: proxy} if proxy else {},
                verify=settings.verify,
                stream=True,
                allow_redirects=False,
            )
        # "from None": the text of the causes holds the whole URL, its signature too, and a traceback shows them.
        except requests.ConnectTimeout as exc:
            raise self._not_sent(name, url, exc) from None
        except requests.ConnectionError as exc:
            raise (self._not_sent if _was_not_sent(exc) else self._no_answer)(name, url, exc) from None
        except _UNSENDABLE as exc:
            raise InvalidInputError(f"{name} cannot be sent: {self._why(exc)}") from None
        # Anything else may be about the answer, such as two different lengths in its headers: sent it was, then.
        except (requests.RequestException, urllib3.exceptions.HTTPError) as exc:
            raise self._no_answer(name, url, exc) from None
        except OSError as exc:
            # While it sends, requests makes its own kinds of these: this is a CA bundle that is not there.
            raise InvalidInputError(f"{name} cannot be sent: {self._why(exc)}") from None

    def _why(self, exc: BaseException) -> str:
        return f"{type(exc).__name__}: {redact(str(exc), self.settings)}"

    def _not_sent(self, name: str, url: str, exc: BaseException) -> NotSentError:
        return NotSentError(f"{name} did not reach {_host(url)}: {self._why(exc)}")

    def _no_answer(
        self, name: str, url: str, exc: BaseException, headers: Mapping[str, str] | None = None
    ) -> NoAnswerError:
        trace = protocol.traced(headers or {})
        return NoAnswerError(f"{name} got no whole answer from {_host(url)}{trace}: {self._why(exc)}")

    # Calls ------------------------------------------------------------------------------------------------

    def create_batch(self, **request: Any) -> Batch:
        """Create a batch; arguments as :func:`protocol.create_batch`."""
        return self.call(protocol.create_batch(**request))

    def get_batch(self, batch_id: str, *, repeat: bool = True) -> Batch:
        """Read a batch; ``repeat=False`` leaves it to the caller to ask again after a fault."""
        call = protocol.get_batch(batch_id)
        return self.call(call) if repeat else self._send(call, None)

    def cancel_batch(self, batch_id: str) -> Batch:
        """Ask for a batch to be cancelled; the answer may still show its old status."""
        return self.call(protocol.cancel_batch(batch_id))

    def list_batches(self) -> Iterator[Batch]:
        """Yield the account's batches, newest first, page by page as they are asked for."""
        paging = protocol.BatchPaging()
        while not paging.done:
            yield from paging.take(self.call(paging.next_call()))
        self.listing_cut = paging.cut

    def list_files(self) -> tuple[UploadedFile, ...]:
        """Return the account's batch input files."""
        return self.call(protocol.list_files()).items

    def get_account(self) -> Account:
        """Read the account: name, status, balances. Costs nothing."""
        return self.call(protocol.get_account())

    def list_models(self, *, repeat: bool = True) -> list[str]:
        """Return ids of chat models. Costs nothing. ``repeat=False`` asks once."""
        call = protocol.list_models()
        return self.call(call) if repeat else self._send(call, None)

    def upload_file(self, source: Source, *, size: int, filename: str) -> UploadedFile:
        """
        Upload a batch input file, streaming it.

        :param source: opens for reading, anew for each attempt.
        :param size: its size in bytes.
        :param filename: its name at the service.
        """

        def body() -> tuple[Any, dict[str, str], float]:
            frame = protocol.MultipartFrame(filename)
            return _UploadBody(source, size, frame), {"Content-Type": frame.content_type}, _UPLOAD_PATIENCE

        return self.call(protocol.upload_file(), body)

    # Result files -----------------------------------------------------------------------------------------

    def iter_file(self, reference: str, refresh: Callable[[], str | None]) -> Iterator[bytes]:
        """
        Yield the bytes of a result file; a cut connection is resumed where it broke.

        :param reference: what the batch gives: a URL, which is fetched without the key, or a file id.
        :param refresh: returns the reference anew, for a signature that has aged.
        :raises IncompleteResultsError: the file changed under the download, or stays cut.
        :raises SiliconFlowError: it cannot be read.
        """
        done, failures, refreshed = 0, 0, False
        file = _RemoteFile(strip_query(reference))
        while True:
            before = done
            try:
                response = self._open_file(reference, 0 if file.encoded else done, file.etag)
                if response is None:
                    file.check_end(done)
                    return
                with closing(response):
                    file.take(response, done)
                    # Without range support the answer starts over: what was yielded already is passed over.
                    skip = done if response.status_code == 200 else 0
                    for chunk in self._chunks(response, decode=file.encoded):
                        if skip >= len(chunk):
                            skip -= len(chunk)
                            continue
                        piece, skip = chunk[skip:] if skip else chunk, 0
                        done += len(piece)
                        yield piece
                    if response.status_code == 206 and file.size is None and done > before:
                        # Whether that was the end, the storage says when it is asked for more.
                        continue
                    file.check_end(done)
                    return
            except APIError as exc:
                # Storage refuses an aged signature with 400, 403 or 404.
                if exc.status_code in (400, 401, 403, 404, 410):
                    if not refreshed:
                        refreshed = True
                        reference = refresh() or reference
                        continue
                    if not self.settings.owns(protocol.result_url(reference, self.settings)):
                        # Not the API's word on the key or the request, so another try may well succeed.
                        raise IncompleteResultsError(
                            f"{exc.summary} The results are kept for 30 days; a retry asks for them again."
                        ) from exc
                if not protocol.is_transient(exc):
                    raise
                error: SiliconFlowError = exc
            except SiliconFlowError as exc:
                if not protocol.is_transient(exc):
                    raise
                error = exc
            failures = 1 if done > before else failures + 1
            refreshed = refreshed and done == before
            if failures > self.settings.max_retries:
                raise error
            delay = protocol.backoff_delay(failures, error, self.settings.backoff, protocol.BACKOFF_LIMIT)
            log.warning("%s; going on from byte %d in %.0f s", error, done, delay)
            tenacity.nap.sleep(delay)
            reference = refresh() or reference

    def _open_file(self, reference: str, start: int, etag: str | None) -> requests.Response | None:
        """Ask for a file from the byte ``start`` on; ``None`` where that is its end."""
        url = protocol.result_url(reference, self.settings)
        # Compressed bytes could not be counted against the announced length.
        headers = {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
            if etag and not etag.startswith("W/"):
                headers["If-Range"] = etag
        for _ in range(_MAX_REDIRECTS):
            name = f"GET {strip_query(url)}"
            response = self._open("GET", url, name, None, dict(headers), with_key=self.settings.owns(url))
            if response.status_code in (301, 302, 303, 307, 308):
                url = protocol.redirect_target(url, response.headers.get("Location"))
                response.close()
                continue
            if response.status_code in (200, 206):
                return response
            with closing(response):
                if start and response.status_code == 416:
                    if response.headers.get("Content-Range") == f"bytes */{start}":
                        return None
                    raise NoAnswerError(
                        f"{name} has nothing from byte {start} on, and does not say that it ends there"
                    )
                try:
                    body = response.raw.read(4096, decode_content=True) or b""
                except (urllib3.exceptions.HTTPError, OSError):
                    body = b""
                error = protocol.error_from_answer(
                    name, response.status_code, response.headers, body, self.settings
                )
            raise error or NoAnswerError(f"{name} answered HTTP {response.status_code} without a file")
        raise ServiceUnavailableError(
            f"more than {_MAX_REDIRECTS} redirects", status_code=508, call=f"GET {strip_query(reference)}"
        )

    def _chunks(self, response: requests.Response, *, decode: bool) -> Iterator[bytes]:
        try:
            yield from response.raw.stream(READ_SIZE, decode_content=decode)
        except (urllib3.exceptions.HTTPError, OSError) as exc:
            name = f"GET {strip_query(response.url)}"
            raise self._no_answer(name, response.url, exc, response.headers) from None


@dataclass
class _RemoteFile:
    """
    What the answers so far told of a result file, which may take several of them.

    :param name: for messages.
    :param size: its bytes, where they are known.
    :param encoded: whether the storage compresses it, though nobody asked for that: its bytes can neither be
        counted nor asked for from the middle then.
    """

    name: str
    etag: str | None = None
    size: int | None = None
    encoded: bool = False

    def take(self, response: requests.Response, done: int) -> None:
        """
        Take in the head of an answer.

        :param done: bytes of the file that earlier answers brought.
        :raises IncompleteResultsError: it is another file than before.
        :raises NoAnswerError: what follows is of no use.
        """
        encoding = response.headers.get("Content-Encoding", "").strip().lower()
        self.encoded = encoding not in ("", "identity")
        unknown = {each.strip() for each in encoding.split(",")} - {*_DECODERS, "", "identity"}
        if unknown or (self.encoded and response.status_code == 206):
            raise NoAnswerError(f"{self.name} came encoded as {encoding}, which was not asked for")
        etag, size = response.headers.get("ETag"), None if self.encoded else self._size_in(response, done)
        if done and (
            (etag and self.etag and etag != self.etag) or (size and self.size and size != self.size)
        ):
            raise IncompleteResultsError(f"{self.name} changed while it was downloaded; download it again")
        self.etag, self.size = (self.etag or etag, self.size or size) if done else (etag, size)

    def check_end(self, done: int) -> None:
        """:raises NoAnswerError: the file has more than the ``done`` bytes that came."""
        if self.size is not None and done != self.size:
            raise NoAnswerError(f"{self.name} was cut at byte {done} of {self.size}")

    @staticmethod
    def _size_in(response: requests.Response, done: int) -> int | None:
        if response.status_code == 206:
            span, _, size = response.headers.get("Content-Range", "").partition("/")
            if not span.startswith(f"bytes {done}-"):
                raise NoAnswerError(f"the storage answered another range than asked for: {span!r}")
        elif "Transfer-Encoding" in response.headers:
            return None
        else:
            size = response.headers.get("Content-Length", "")
        return int(size) if size.isdecimal() else None


#: Content encodings that ``urllib3`` takes off; it passes others through.
_DECODERS = frozenset(urllib3.response.HTTPResponse.CONTENT_DECODERS)


def _host(url: str) -> str:
    return urlsplit(url).netloc.rpartition("@")[2]


def _was_not_sent(exc: requests.ConnectionError) -> bool:
    """Whether the request certainly never left: no connection, no tunnel, or a certificate was refused."""
    reason = exc.args[0] if exc.args else None
    cause = getattr(reason, "reason", reason)
    inner = cause.args[0] if isinstance(cause, urllib3.exceptions.SSLError) and cause.args else cause
    return isinstance(exc, requests.exceptions.ProxyError) or isinstance(
        inner, urllib3.exceptions.NewConnectionError | ssl.SSLCertVerificationError
    )
