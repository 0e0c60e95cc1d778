"""Downloading a result file: in pieces, resumed where it broke, within limits of size, time and place."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import tenacity
import urllib3

from airflow_provider_siliconflow.api import protocol
from airflow_provider_siliconflow.api.answers import MAX_ERROR_BYTES, error_from_answer
from airflow_provider_siliconflow.api.exceptions import (
    APIError,
    IncompleteResultsError,
    NoAnswerError,
    ServiceUnavailableError,
    SiliconFlowError,
)
from airflow_provider_siliconflow.api.redaction import brief, strip_query
from airflow_provider_siliconflow.api.transport import Answer, Transport

log = logging.getLogger(__name__)

_MAX_REDIRECTS = 5
#: Answers that one file may take: so many, and one more for each so many bytes.
_MAX_ANSWERS, _BYTES_PER_ANSWER = 100, 4096

#: Content encodings that ``urllib3`` decodes; it passes others through.
_DECODERS = frozenset(urllib3.response.HTTPResponse.CONTENT_DECODERS)

#: Returns a fresh reference to the file.
Refresh: TypeAlias = Callable[[], str | None]


def read_result_file(
    transport: Transport, reference: str, refresh: Refresh, *, limit: int | None = None
) -> Iterator[bytes]:
    """
    Yield the bytes of a result file; see :meth:`SiliconFlowClient.iter_file`.

    :param transport: sends the requests.
    """
    settings = transport.settings
    file = _RemoteFile(_shown(reference), limit)
    failures = answers = 0
    refreshed = False
    while True:
        before = file.done
        try:
            answers += 1
            if answers > _MAX_ANSWERS + file.done // _BYTES_PER_ANSWER:
                raise IncompleteResultsError(
                    f"{file.name} came in {answers - 1} answers that brought {file.done} bytes in all, and has no end"
                )
            with _open_file(transport, reference, file) as answer:
                if answer is None:
                    file.check_end()
                    return
                yield from file.take_body(answer)
                if answer.status == 206 and file.size is None and file.done > before:
                    # Only a request for more shows whether that was the end.
                    continue
                file.check_end()
                return
        except APIError as exc:
            # Storage refuses an aged signature with 400, 403 or 404.
            if exc.status_code in (400, 401, 403, 404, 410):
                if not refreshed:
                    refreshed = True
                    reference = refresh() or reference
                    continue
                if not settings.owns(protocol.result_url(reference, settings)):
                    # The storage says nothing about the key or the request, so another try may well succeed.
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
        failures = 1 if file.done > before else failures + 1
        refreshed = refreshed and file.done == before
        if failures > settings.max_retries:
            raise error
        delay = protocol.backoff_delay(failures, error, settings.backoff, protocol.BACKOFF_LIMIT)
        log.warning("%s; going on from byte %d in %.0f s", error, file.done, delay)
        tenacity.nap.sleep(delay)
        reference = refresh() or reference


def _shown(url: str) -> str:
    return brief(strip_query(url), 500)


@contextlib.contextmanager
def _open_file(transport: Transport, reference: str, file: _RemoteFile) -> Iterator[Answer | None]:
    """Ask for a file from where it is; yield ``None`` if that is its end."""
    url = protocol.result_url(reference, transport.settings)
    start = 0 if file.encoded else file.done
    headers = {}
    if start:
        headers["Range"] = f"bytes={start}-"
        if file.etag and not file.etag.startswith("W/"):
            headers["If-Range"] = file.etag
    for _ in range(_MAX_REDIRECTS + 1):
        name = f"GET {_shown(url)}"
        with transport.send("GET", url, name=name, headers=headers) as answer:
            if answer.status in (301, 302, 303, 307, 308):
                url = protocol.redirect_target(url, answer.headers.get("Location"))
                continue
            if answer.status in (200, 206):
                yield answer
                return
            if start and answer.status == 416:
                if answer.headers.get("Content-Range") == f"bytes */{start}":
                    yield None
                    return
                raise NoAnswerError(
                    f"{name} has nothing from byte {start} on, and does not say that it ends there"
                )
            body = b""
            with contextlib.suppress(NoAnswerError):
                body = answer.read(MAX_ERROR_BYTES)
            raise error_from_answer(name, answer.status, answer.headers, body) or NoAnswerError(
                f"{name} answered HTTP {answer.status} without a file"
            )
    raise ServiceUnavailableError(
        f"more than {_MAX_REDIRECTS} redirects", status_code=508, call=f"GET {_shown(reference)}"
    )


@dataclass
class _RemoteFile:
    """
    What is known of a result file, which may take several answers.

    :param name: for messages.
    :param limit: most bytes that it may have.
    :param done: bytes that have been yielded.
    :param size: its size in bytes, if known.
    :param encoded: whether the storage compresses it unasked. Its bytes can then neither be counted nor requested from
        the middle.
    """

    name: str
    limit: int | None = None
    done: int = 0
    etag: str | None = None
    size: int | None = None
    encoded: bool = False

    def take_body(self, answer: Answer) -> Iterator[bytes]:
        """
        Read an answer and yield what it has beyond the bytes yielded before.

        :raises IncompleteResultsError: it is another file than before, or larger than it may be.
        :raises NoAnswerError: it is of no use.
        """
        self._take_head(answer)
        # Without range support the answer starts from the beginning: what was already yielded is skipped.
        skip = self.done if answer.status == 200 else 0
        for chunk in answer.pieces(decode=self.encoded):
            if skip >= len(chunk):
                skip -= len(chunk)
                continue
            piece, skip = chunk[skip:] if skip else chunk, 0
            self.done += len(piece)
            self._check_limit(self.done)
            yield piece

    def _take_head(self, answer: Answer) -> None:
        encoding = answer.headers.get("Content-Encoding", "").strip().lower()
        self.encoded = encoding not in ("", "identity")
        known = encoding in ("", "identity", *_DECODERS)
        if not known or (self.encoded and answer.status == 206):
            raise NoAnswerError(f"{self.name} came encoded as {brief(encoding, 40)}, which was not asked for")
        etag, size = answer.headers.get("ETag"), None if self.encoded else self._size_in(answer)
        if self.done and (
            (etag and self.etag and etag != self.etag) or (size and self.size and size != self.size)
        ):
            raise IncompleteResultsError(f"{self.name} changed while it was downloaded; download it again")
        self.etag, self.size = (self.etag or etag, self.size or size) if self.done else (etag, size)
        self._check_limit(self.size or 0)

    def check_end(self) -> None:
        """:raises NoAnswerError: the file has more than the bytes that came."""
        if self.size is not None and self.done != self.size:
            raise NoAnswerError(f"{self.name} was cut at byte {self.done} of {self.size}")

    def _check_limit(self, size: int) -> None:
        if self.limit is not None and size > self.limit:
            raise IncompleteResultsError(
                f"{self.name} has at least {size} bytes, more than the results of its batch can have "
                f"({self.limit} bytes); the rest was not read"
            )

    def _size_in(self, answer: Answer) -> int | None:
        if answer.status == 206:
            span, _, size = answer.headers.get("Content-Range", "").partition("/")
            if not span.startswith(f"bytes {self.done}-"):
                raise NoAnswerError(
                    f"the storage answered another range than asked for: {brief(span, 100)!r}"
                )
        elif "Transfer-Encoding" in answer.headers:
            return None
        else:
            size = answer.headers.get("Content-Length", "")
        return int(size) if size.isdecimal() and len(size) < 20 else None
