"""
How bytes travel for the blocking client: requests go out over guarded connections, answers come back within limits.

Only this module and :mod:`~airflow_provider_siliconflow.api.connections` know ``requests`` and ``urllib3``. Their
errors become :class:`NotSentError`, :class:`NoAnswerError` or :class:`InvalidInputError`, by what was sent and not by
the kind of the error.
"""

from __future__ import annotations

import contextlib
import http.client
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from http.cookiejar import DefaultCookiePolicy
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import requests
import urllib3

from airflow_provider_siliconflow.api.addresses import is_private_name, leads_to_private
from airflow_provider_siliconflow.api.answers import is_success, traced
from airflow_provider_siliconflow.api.connections import GuardedAdapter, Line, private_network_error
from airflow_provider_siliconflow.api.exceptions import (
    CredentialLeakError,
    InvalidInputError,
    NoAnswerError,
    NotSentError,
    TransportError,
    UnexpectedAnswerError,
)
from airflow_provider_siliconflow.api.exchanges import Exchange, watchdog
from airflow_provider_siliconflow.api.protocol import READ_SIZE
from airflow_provider_siliconflow.api.redaction import (
    brief,
    keep_queries_out_of_logs,
    remember_proxy,
    strip_query,
)
from airflow_provider_siliconflow.api.settings import ClientSettings, trusted

#: Bytes per second below which a download counts as stuck.
LEAST_DOWNLOAD_RATE = 4 << 10
#: Bytes per second that an upload must reach on average.
LEAST_UPLOAD_RATE = 32 << 10


class _KeyAuth(requests.auth.AuthBase):
    """Sets the key and, as an auth object, keeps ``requests`` from taking another one from a netrc file."""

    def __init__(self, settings: ClientSettings | None) -> None:
        self._settings = settings

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._settings is not None:
            # Checked with the parser that connects: parsers differ about odd URLs, and the key must go to one host.
            if _connects_to(request.url or "") != _connects_to(self._settings.base_url):
                raise CredentialLeakError(
                    f"{strip_query(request.url or '')} would have got the API key, but is not at "
                    f"{self._settings.base_url}; nothing was sent"
                )
            request.headers.update(self._settings.request_headers)
        # Compressed bytes cannot be checked against the announced length, and may expand to any size.
        request.headers["Accept-Encoding"] = "identity"
        return request


def _connects_to(url: str) -> tuple[str | None, str | None, int | None]:
    parts = urllib3.util.parse_url(url)
    return parts.scheme, parts.host, parts.port or {"http": 80, "https": 443}.get(parts.scheme or "")


def _host(url: str) -> str:
    return urlsplit(url).netloc.rpartition("@")[2]


def _hostname(url: str) -> str:
    """Return the host of a URL as the parser that connects reads it."""
    try:
        return urllib3.util.parse_url(url).host or ""
    except urllib3.exceptions.LocationParseError:
        # It cannot be sent, and the attempt says why.
        return ""


class _Session(requests.Session):
    """
    A session that takes nothing of an answer upon itself.

    ``requests`` prepares the next request of a redirect even if redirects are not followed: for that it reads the whole
    body, decompressed and without a limit, and stumbles over odd locations. It would also collect cookies for as long
    as the session lives, and send them with every call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """Return that there is none: whoever sends the request reads the location."""
        return None


# The transport ----------------------------------------------------------------------------------------------

#: What ``requests`` raises for a request that it cannot begin to send.
_UNSENDABLE = (
    requests.exceptions.InvalidURL,
    requests.exceptions.MissingSchema,
    requests.exceptions.InvalidSchema,
    urllib3.exceptions.LocationValueError,
    UnicodeError,
)

_FAILURES = (requests.RequestException, urllib3.exceptions.HTTPError, http.client.HTTPException, OSError)


class Transport:
    """
    Sends requests and hands out their answers, one at a time.

    :param settings: key, host, timeouts, proxies, certificates.
    """

    def __init__(self, settings: ClientSettings) -> None:
        self.settings = settings
        # Checked before anything is sent: the triggerer would find out when the batch is paid for.
        trusted(settings.verify)
        for proxy in getproxies().values():
            remember_proxy(proxy)
        keep_queries_out_of_logs()
        self._line = Line()
        self._session = _Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, GuardedAdapter(self._line))

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    @cached_property
    def _is_private(self) -> bool:
        """Whether the API itself has a private address, as an emulator or a gateway does: then storage may have one."""
        return leads_to_private(self.settings.base_url)

    @contextlib.contextmanager
    def send(
        self,
        method: str,
        url: str,
        *,
        name: str,
        data: Any = None,
        headers: Mapping[str, str] | None = None,
        size: int | None = None,
        patience: float = 0.0,
        limit: float | None = None,
    ) -> Iterator[Answer]:
        """
        Send a request and yield its answer once the head has come.

        :param name: how messages call the request.
        :param data: the body: bytes, or an iterable of pieces.
        :param size: size of ``data`` in bytes if it is a file.
        :param patience: seconds that the service may be silent after a file was sent, if more than usual.
        :param limit: seconds that the exchange may take; by default ``settings.call_limit``, plus the time that a file
            of ``size`` needs at the least throughput.
        :raises NotSentError: no byte of the request was sent.
        :raises NoAnswerError: the answer did not come, or not in time.
        :raises InvalidInputError: the URL is invalid, or the CA bundle does not exist.
        :raises IncompleteResultsError: the URL leads into a private network.
        :raises CredentialLeakError: the key would go to another host.
        """
        settings = self.settings
        if limit is None:
            limit = max(settings.call_limit, patience) + (size or 0) / LEAST_UPLOAD_RATE
        own = settings.owns(url)

        def may_be_private() -> bool:
            return own or self._is_private

        exchange = Exchange(limit, may_be_private)
        host = _hostname(url)
        # Behind a proxy, the name is all that can be checked.
        if is_private_name(host) and not may_be_private():
            raise private_network_error(host)
        # urllib3 keeps the connect timeout while it sends, so a long upload needs it longer too.
        timeout = (max(settings.connect_timeout, patience / 5), max(settings.timeout, patience))
        proxy = settings.proxy_for(url)
        watchdog().add(exchange)
        try:
            # A signal handler may use this client in the middle of another request, which then continues unchanged.
            interrupted = self._line.exchange
            self._line.exchange = exchange
            failure: TransportError | InvalidInputError | None = None
            try:
                response = self._session.request(
                    method,
                    url,
                    data=data,
                    headers=headers,
                    auth=_KeyAuth(settings if own else None),
                    timeout=timeout,
                    # Given here they win over the environment's; set on the session they would not.
                    proxies={urlsplit(url).scheme: proxy} if proxy else {},
                    verify=settings.verify,
                    stream=True,
                    allow_redirects=False,
                )
            except (*_FAILURES, *_UNSENDABLE) as exc:
                failure = _failure(name, url, exc, exchange)
            finally:
                self._line.exchange = interrupted
            if failure is not None:
                # Raised out here, without its cause, which holds the request: its key, and the signature of its URL.
                raise failure
            with contextlib.closing(response):
                yield Answer(name, response, exchange)
        finally:
            watchdog().remove(exchange)


class Answer:
    """
    An answer whose head has come; its body is read from here.

    :param name: how messages call the request.
    """

    def __init__(self, name: str, response: requests.Response, exchange: Exchange) -> None:
        self.name = name
        self.status: int = response.status_code
        self.headers: Mapping[str, str] = response.headers
        self._response = response
        self._exchange = exchange

    def read(self, limit: int) -> bytes:
        """
        Read the whole body, without decompressing it.

        :param limit: most bytes of a success; the body of an error is cut there.
        :raises UnexpectedAnswerError: a success has more.
        :raises NoAnswerError: it did not come whole, or not in time.
        """
        announced = self.headers.get("Content-Length", "")
        too_long = is_success(self.status) and announced.isdecimal() and int(announced[:20]) > limit
        pieces: list[bytes] = []
        size = 0
        while size <= limit and not too_long:
            piece = self._read_piece(READ_SIZE)
            if not piece:
                return b"".join(pieces)
            pieces.append(piece)
            size += len(piece)
        if not is_success(self.status):
            return b"".join(pieces)[:limit]
        raise UnexpectedAnswerError(
            f"{self.name} answered HTTP {self.status}{traced(self.headers)} with more than {limit} bytes; the rest was "
            "not read",
            accepted=True,
        )

    def pieces(self, *, decode: bool = False) -> Iterator[bytes]:
        """
        Yield the body of a file piece by piece. The time that the caller takes for a piece does not count.

        :param decode: whether to decompress what ``urllib3`` can decompress.
        :raises NoAnswerError: it did not come whole, or too slowly.
        """
        exchange = self._exchange
        patience = exchange.limit
        stream = self._response.raw.stream(READ_SIZE, decode_content=decode)
        while True:
            began = time.monotonic()
            exchange.deadline = began + patience
            piece = self._received(lambda: next(stream, None))
            exchange.deadline = None
            if piece is None:
                # A connection that was shut down looks like one that was closed at the end of the body.
                self._check_time()
                return
            patience += len(piece) / LEAST_DOWNLOAD_RATE - (time.monotonic() - began)
            patience = min(patience, exchange.limit)
            yield piece

    def _read_piece(self, size: int) -> bytes:
        piece = self._received(lambda: self._response.raw.read(size, decode_content=False))
        self._check_time()
        return piece or b""

    def _received(self, receive: Callable[[], bytes | None]) -> bytes | None:
        try:
            return receive()
        except _FAILURES as exc:
            lost = self._lost(exc)
        # Raised out here, without its cause, which holds the request.
        raise lost

    def _check_time(self) -> None:
        if self._exchange.expired:
            raise self._lost(TimeoutError("time ran out"))

    def _lost(self, exc: BaseException) -> NoAnswerError:
        return NoAnswerError(
            f"{self.name} got no whole answer from {_host(self._response.url)}{traced(self.headers)}: "
            f"{_why(exc, self._exchange)}",
            accepted=is_success(self.status),
        )


def _failure(
    name: str, url: str, exc: BaseException, exchange: Exchange
) -> TransportError | InvalidInputError:
    """Return the error for a request that got no head of an answer."""
    if exchange.sent:
        return NoAnswerError(f"{name} got no whole answer from {_host(url)}: {_why(exc, exchange)}")
    # requests wraps connection errors in classes of its own: a plain OSError is a missing CA bundle.
    if isinstance(exc, _UNSENDABLE) or (
        isinstance(exc, OSError) and not isinstance(exc, requests.RequestException)
    ):
        return InvalidInputError(f"{name} cannot be sent: {_why(exc, exchange)}")
    return NotSentError(f"{name} did not reach {_host(url)}: {_why(exc, exchange)}")


def _why(exc: BaseException, exchange: Exchange) -> str:
    if exchange.expired:
        return f"it took longer than {exchange.limit:.0f} s, or was slower than a transfer may be"
    return f"{type(exc).__name__}: {brief(str(exc))}"
