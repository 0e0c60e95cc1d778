"""
How bytes travel for the blocking client: ``requests``, with limits that it does not know.

- Whether anything of a request was sent is recorded as it happens, and not read out of an error afterwards:
  ``urllib3`` wraps an answer that was lost behind a proxy in the same error as a proxy that could not be reached.
- Every exchange ends at a time of the wall clock. ``requests`` limits the wait for the *next* byte, so that a byte
  every few hundred milliseconds holds a call for ever.
- The head of an answer is bounded: ``http.client`` takes any number of interim answers (``100 Continue``).
- Storage is reached at addresses of the internet alone, checked when its name is resolved, right before connecting.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import requests
import urllib3
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError
from urllib3.util.connection import allowed_gai_family, create_connection

from airflow_provider_siliconflow.api.addresses import is_private_name, is_public, leads_to_private
from airflow_provider_siliconflow.api.answers import is_success, traced
from airflow_provider_siliconflow.api.exceptions import (
    CredentialLeakError,
    IncompleteResultsError,
    InvalidInputError,
    NoAnswerError,
    NotSentError,
    TransportError,
    UnexpectedAnswerError,
)
from airflow_provider_siliconflow.api.protocol import READ_SIZE
from airflow_provider_siliconflow.api.redaction import (
    brief,
    keep_queries_out_of_logs,
    remember_proxy,
    strip_query,
)
from airflow_provider_siliconflow.api.settings import ClientSettings, trusted

#: Bytes of all lines of an answer's head, its interim answers included, and of the lines between its pieces.
MAX_HEAD_BYTES = 256 << 10
#: Bytes per second below which a download counts as stuck, and an upload in all.
LEAST_DOWNLOAD_RATE, LEAST_UPLOAD_RATE = 4 << 10, 32 << 10
#: Addresses of one host that are tried.
_MOST_ADDRESSES = 8

if TYPE_CHECKING:
    _Connection = urllib3.connection.HTTPConnection
    _Pool = urllib3.connectionpool.HTTPConnectionPool
else:
    _Connection = _Pool = object

# Exchanges --------------------------------------------------------------------------------------------------


class Exchange:
    """
    One request and its answer, as the connection sees it.

    :param limit: seconds it may take.
    :param may_be_private: whether it may lead to an address that is not of the internet; asked only if it does.
    """

    def __init__(self, limit: float, may_be_private: Callable[[], bool]) -> None:
        self.limit = limit
        self.may_be_private = may_be_private
        #: Whether any byte of the request may have left for the service, or for a proxy that passes requests on.
        self.sent = False
        #: Whether its time ran out, so that its connection was shut down.
        self.expired = False
        #: When it ends, by the monotonic clock; ``None`` while its answer is not being waited for.
        self.deadline: float | None = time.monotonic() + limit
        self._lock = threading.Lock()
        self._socket: Any = None

    def attach(self, connected: Any) -> None:
        """
        Take the connection over which the exchange runs.

        :param connected: a socket, or TLS over one.
        :raises OSError: time has run out already.
        """
        with self._lock:
            self._socket = connected
            if self.expired:
                raise TimeoutError("time ran out")

    def expire(self) -> None:
        """Shut the connection down, so that whoever waits for it wakes up."""
        with self._lock:
            self.expired = True
            connected = self._socket
        # TLS within TLS has a socket inside.
        while connected is not None and not isinstance(connected, socket.socket):
            connected = getattr(connected, "socket", None)
        if connected is not None:
            with contextlib.suppress(OSError):
                # The method of TLS would first forget its state, which another thread is reading with.
                socket.socket.shutdown(connected, socket.SHUT_RDWR)

    def left(self) -> float:
        """Return the seconds that are left."""
        return max(0.0, (self.deadline or 0.0) - time.monotonic())


class _Watchdog:
    """One thread for all exchanges of the process, and none while there is none."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._exchanges: set[Exchange] = set()
        self._thread: threading.Thread | None = None

    def add(self, exchange: Exchange) -> None:
        with self._changed:
            self._exchanges.add(exchange)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._watch, name="siliconflow-watchdog", daemon=True)
                self._thread.start()
            self._changed.notify()

    def remove(self, exchange: Exchange) -> None:
        with self._changed:
            self._exchanges.discard(exchange)

    def _watch(self) -> None:
        idle = 0
        while True:
            with self._changed:
                now = time.monotonic()
                due = {each for each in self._exchanges if each.deadline is not None and each.deadline <= now}
                self._exchanges -= due
                idle = 0 if self._exchanges else idle + 1
                if idle > 10:
                    self._thread = None
                    return
            for exchange in due:
                exchange.expire()
            with self._changed:
                # Deadlines move while files travel, so they are looked at often rather than told.
                left = [each.left() for each in self._exchanges if each.deadline is not None]
                self._changed.wait(min([1.0, *(max(0.02, seconds) for seconds in left)]))


_WATCHDOG = _Watchdog()


def _after_fork() -> None:
    # The thread is not in the child, and its lock may be held there for ever.
    global _WATCHDOG
    _WATCHDOG = _Watchdog()


os.register_at_fork(after_in_child=_after_fork)

# Connections ------------------------------------------------------------------------------------------------


class _BoundedLines:
    """The stream of an answer, whose lines are bounded in all: the head, and in the body a quarter of its bytes."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._left = MAX_HEAD_BYTES

    def readline(self, size: int = -1, /) -> bytes:
        most = self._left + 1
        line: bytes = self._stream.readline(most if size < 0 else min(size, most))
        self._left -= len(line)
        if self._left < 0:
            raise http.client.HTTPException(f"the head of the answer has more than {MAX_HEAD_BYTES} bytes")
        return line

    def read(self, size: int = -1, /) -> bytes:
        return self._counted(self._stream.read(size))

    def read1(self, size: int = -1, /) -> bytes:
        return self._counted(self._stream.read1(size))

    def readinto(self, buffer: Any, /) -> int:
        size: int = self._stream.readinto(buffer)
        self._left = min(MAX_HEAD_BYTES, self._left + (size or 0) // 4)
        return size

    def _counted(self, data: bytes) -> bytes:
        # Pieces of a byte, each with the line of its length, would keep a worker busy for minutes.
        self._left = min(MAX_HEAD_BYTES, self._left + len(data) // 4)
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _BoundedResponse(http.client.HTTPResponse):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fp: Any = _BoundedLines(self.fp)


class _Line:
    """What a client's connections have in common: the exchange that is under way."""

    exchange: Exchange


class _GuardedConnection(_Connection):
    """Mixed into the connections of ``urllib3``."""

    response_class = _BoundedResponse
    line: _Line
    _is_connecting = False

    def _new_conn(self) -> socket.socket:
        exchange = self.line.exchange
        if self.proxy is not None or hasattr(self, "_socks_options"):
            # The connection's own; what it connects to is its business.
            connected: socket.socket = super()._new_conn()
        else:
            connected = self._connect_to_checked(exchange)
        try:
            exchange.attach(connected)
        except BaseException:
            connected.close()
            raise
        return connected

    def _connect_to_checked(self, exchange: Exchange) -> socket.socket:
        try:
            found = socket.getaddrinfo(self._dns_host, self.port, allowed_gai_family(), socket.SOCK_STREAM)
        except OSError as exc:
            raise NameResolutionError(self.host, self, exc) from exc  # type: ignore[arg-type]
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))[:_MOST_ADDRESSES]
        private = [address for address in addresses if not is_public(address)]
        if private and not exchange.may_be_private():
            raise _private_network(self.host, private[0])
        error: Exception | None = None
        for address in addresses:
            timeout = self.timeout if isinstance(self.timeout, int | float) else exchange.limit
            try:
                return create_connection(
                    (address, self.port),
                    max(0.001, min(timeout, exchange.left())),
                    source_address=self.source_address,
                    socket_options=self.socket_options,
                )
            except TimeoutError as exc:
                error = ConnectTimeoutError(self, f"Connection to {self.host} timed out")
                error.__cause__ = exc
            except OSError as exc:
                error = NewConnectionError(self, f"Failed to establish a new connection: {exc}")
                error.__cause__ = exc
        raise error or NewConnectionError(self, "the host has no address")

    def connect(self) -> None:
        self._is_connecting = True
        try:
            super().connect()
        finally:
            self._is_connecting = False
        self.line.exchange.attach(self.sock)

    def send(self, data: Any) -> None:
        if not self._is_connecting:
            if self.sock is None:
                # What http.client would do now; nothing of the request has left if it fails.
                self.connect()
            self.line.exchange.sent = True
        super().send(data)

    def request(self, *args: Any, **kwargs: Any) -> None:
        if self.sock is not None:
            self.line.exchange.attach(self.sock)
        super().request(*args, **kwargs)


class _GuardedPool(_Pool):
    """Mixed into the pools of ``urllib3``."""

    line: _Line

    def _new_conn(self) -> Any:
        connection = super()._new_conn()
        connection.line = self.line  # type: ignore[attr-defined]
        return connection


def _guarded(pool: type[Any], line: _Line) -> type[Any]:
    connection = type("GuardedConnection", (_GuardedConnection, pool.ConnectionCls), {})
    return type("GuardedPool", (_GuardedPool, pool), {"ConnectionCls": connection, "line": line})


class _GuardedAdapter(requests.adapters.HTTPAdapter):
    """Makes guarded connections: to hosts, to proxies and through them."""

    def __init__(self, line: _Line) -> None:
        self._line = line
        super().__init__()

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self._guard(self.poolmanager)

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        is_new = proxy not in self.proxy_manager
        manager = super().proxy_manager_for(proxy, **kwargs)
        if is_new:
            self._guard(manager)
        return manager

    def _guard(self, manager: Any) -> None:
        pools = manager.pool_classes_by_scheme
        manager.pool_classes_by_scheme = {name: _guarded(pool, self._line) for name, pool in pools.items()}


# The key ----------------------------------------------------------------------------------------------------


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
        # Compressed bytes could not be counted against the announced length, and may unfold to any size.
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


def _private_network(host: str, address: str) -> IncompleteResultsError:
    at = "" if host.strip("[]") == address else f" ({address})"
    return IncompleteResultsError(
        f"The result file is said to be at {brief(host, 200)}{at}, which is not on the internet; nothing was sent "
        "there. If that is where the storage is, name a proxy for that host in the connection's proxies. The results "
        "are kept for 30 days; a retry asks for them again."
    )


# The transport ----------------------------------------------------------------------------------------------

#: What ``requests`` raises of a request that it could not even begin to send.
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
        # Said here, before anything is sent: the triggerer would say it when the batch is paid for.
        trusted(settings.verify)
        for proxy in getproxies().values():
            remember_proxy(proxy)
        keep_queries_out_of_logs()
        self._line = _Line()
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, _GuardedAdapter(self._line))

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    @cached_property
    def _is_private(self) -> bool:
        """Whether the API itself is not on the internet, as an emulator or a gateway is: then storage need not be."""
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
        Send a request and yield its answer, of which the head has come.

        :param name: how messages call the request.
        :param data: the body: bytes, or what yields them piece by piece.
        :param size: of ``data`` in bytes if it is a file.
        :param patience: seconds that the service may be silent after a file was sent, if more than usual.
        :param limit: seconds that all of it may take; by default the connection's, and for a file as much longer as
            its size needs at the least throughput.
        :raises NotSentError: nothing of the request has left.
        :raises NoAnswerError: the answer did not come, or not in time.
        :raises InvalidInputError: there is no such URL, or no such file of certificates.
        :raises IncompleteResultsError: the URL leads into a private network.
        :raises CredentialLeakError: the URL is not where the key may go.
        """
        settings = self.settings
        if limit is None:
            limit = max(settings.call_limit, patience) + (size or 0) / LEAST_UPLOAD_RATE
        own = settings.owns(url)

        def may_be_private() -> bool:
            return own or self._is_private

        exchange = self._line.exchange = Exchange(limit, may_be_private)
        host = _hostname(url)
        # Behind a proxy the name is all there is to judge by.
        if is_private_name(host) and not may_be_private():
            raise _private_network(host, host)
        # urllib3 keeps the connect timeout while it sends, so a long upload needs it longer too.
        timeout = (max(settings.connect_timeout, patience / 5), max(settings.timeout, patience))
        proxy = settings.proxy_for(url)
        _WATCHDOG.add(exchange)
        try:
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
            # "from None": the text of the causes holds the whole URL, its signature too, and a traceback shows them.
            except (*_FAILURES, *_UNSENDABLE) as exc:
                raise _failure(name, url, exc, exchange) from None
            with contextlib.closing(response):
                yield Answer(name, response, exchange)
        finally:
            _WATCHDOG.remove(exchange)


class Answer:
    """
    An answer of which the head has come.

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
        Read the body, as it came.

        :param limit: bytes of a success at most; of an error the first so many.
        :raises UnexpectedAnswerError: it has more.
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
        Yield the body of a file piece by piece. What is done with a piece takes no time of the exchange.

        :param decode: whether to take a compression off that ``urllib3`` knows.
        :raises NoAnswerError: it did not come whole, or too slowly.
        """
        exchange = self._exchange
        patience = exchange.limit
        stream = self._response.raw.stream(READ_SIZE, decode_content=decode)
        while True:
            began = time.monotonic()
            exchange.deadline = began + patience
            try:
                piece: bytes | None = next(stream, None)
            except _FAILURES as exc:
                raise self._lost(exc) from None
            exchange.deadline = None
            if piece is None:
                # A connection that was shut down in the middle looks like one that was closed at the end.
                self._check_time()
                return
            patience += len(piece) / LEAST_DOWNLOAD_RATE - (time.monotonic() - began)
            patience = min(patience, exchange.limit)
            yield piece

    def _read_piece(self, size: int) -> bytes:
        try:
            piece: bytes = self._response.raw.read(size, decode_content=False) or b""
        except _FAILURES as exc:
            raise self._lost(exc) from None
        self._check_time()
        return piece

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
    """Return the error for a request whose answer's head did not come."""
    if exchange.sent:
        return NoAnswerError(f"{name} got no whole answer from {_host(url)}: {_why(exc, exchange)}")
    # While it sends, requests makes its own kinds of OSError: this one is a CA bundle that is not there.
    if isinstance(exc, _UNSENDABLE) or (
        isinstance(exc, OSError) and not isinstance(exc, requests.RequestException)
    ):
        return InvalidInputError(f"{name} cannot be sent: {_why(exc, exchange)}")
    return NotSentError(f"{name} did not reach {_host(url)}: {_why(exc, exchange)}")


def _why(exc: BaseException, exchange: Exchange) -> str:
    if exchange.expired:
        return f"it took longer than {exchange.limit:.0f} s, or was slower than a transfer may be"
    return f"{type(exc).__name__}: {brief(str(exc))}"
