"""
Connections of ``urllib3``, as ``requests`` uses them, with three guards that it lacks.

- Whether any byte of a request was sent is recorded when it happens. It cannot be told from the error: ``urllib3``
  raises the same ``ProxyError`` for an answer lost behind a proxy as for a proxy that could not be reached.
- The head of an answer is bounded: ``http.client`` accepts interim answers (``100 Continue``) without end.
- Result files are only fetched from public addresses. Names are resolved and checked right before connecting, and the
  connection is made to the address that was checked.
"""

from __future__ import annotations

import http
import http.client
import socket
import threading
from typing import TYPE_CHECKING, Any

import requests
import urllib3
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError
from urllib3.util.connection import allowed_gai_family, create_connection

from airflow_provider_siliconflow.api.addresses import is_public
from airflow_provider_siliconflow.api.exceptions import IncompleteResultsError
from airflow_provider_siliconflow.api.exchanges import Exchange
from airflow_provider_siliconflow.api.redaction import brief

#: Bytes of all lines of an answer's head, interim answers included, and of the lines between the chunks of a body.
MAX_HEAD_BYTES = 256 << 10
#: Addresses of one host that are tried.
_MOST_ADDRESSES = 8

if TYPE_CHECKING:
    _Connection = urllib3.connection.HTTPConnection
    _Pool = urllib3.connectionpool.HTTPConnectionPool
else:
    _Connection = _Pool = object


class _BoundedLines:
    """The stream of an answer. Its lines are bounded in total: those of the head, and a quarter of the body's bytes."""

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
        if size < 0:
            # A chunk that announces a negative length: "all that comes" has no end.
            raise http.client.HTTPException("the length of a chunk is negative")
        return self._counted(self._stream.read(size))

    def read1(self, size: int = -1, /) -> bytes:
        return self._counted(self._stream.read1(size))

    def readinto(self, buffer: Any, /) -> int:
        size: int = self._stream.readinto(buffer)
        self._left = min(MAX_HEAD_BYTES, self._left + (size or 0) // 4)
        return size

    def _counted(self, data: bytes) -> bytes:
        # Chunks of one byte, each with a line for its length, would keep a worker busy for minutes.
        self._left = min(MAX_HEAD_BYTES, self._left + len(data) // 4)
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _BoundedResponse(http.client.HTTPResponse):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fp: Any = _BoundedLines(self.fp)

    def _read_status(self) -> tuple[str, int, str]:
        # http.client passes over "100 Continue" only. It would take "103 Early Hints" for the answer, and the answer
        # for that to the next request.
        while True:
            version, status, reason = super()._read_status()  # type: ignore[misc]
            if not http.HTTPStatus.SWITCHING_PROTOCOLS < status < http.HTTPStatus.OK:
                return version, status, reason
            while self.fp.readline(65537).strip():
                pass


class Line(threading.local):
    """Tells the connections of a client which exchange is under way (in this thread)."""

    exchange: Exchange | None = None

    @property
    def current(self) -> Exchange:
        """The exchange for which a connection is used."""
        assert self.exchange is not None
        return self.exchange


class _GuardedConnection(_Connection):
    """Mixed into the connections of ``urllib3``."""

    response_class = _BoundedResponse
    line: Line
    _is_connecting = False

    def _new_conn(self) -> socket.socket:
        exchange = self.line.current
        if self.proxy is not None or hasattr(self, "_socks_options"):
            # The proxy is the author's choice, wherever it is.
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
            raise private_network_error(self.host, private[0])
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
        self.line.current.attach(self.sock)

    def send(self, data: Any) -> None:
        if not self._is_connecting:
            if self.sock is None:
                # http.client would do the same now. If it fails, nothing of the request was sent.
                self.connect()
            self.line.current.sent = True
        super().send(data)

    def request(self, *args: Any, **kwargs: Any) -> None:
        if self.sock is not None:
            self.line.current.attach(self.sock)
        super().request(*args, **kwargs)


class _GuardedPool(_Pool):
    """Mixed into the pools of ``urllib3``."""

    line: Line

    def _new_conn(self) -> Any:
        connection = super()._new_conn()
        connection.line = self.line  # type: ignore[attr-defined]
        return connection


def _guarded(pool: type[Any], line: Line) -> type[Any]:
    connection = type("GuardedConnection", (_GuardedConnection, pool.ConnectionCls), {})
    return type("GuardedPool", (_GuardedPool, pool), {"ConnectionCls": connection, "line": line})


class GuardedAdapter(requests.adapters.HTTPAdapter):
    """Makes guarded connections: to hosts, to proxies and through them."""

    def __init__(self, line: Line) -> None:
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


def private_network_error(host: str, address: str | None = None) -> IncompleteResultsError:
    """
    Return the error for a result file that lies in a private network.

    :param host: of its URL.
    :param address: what the host resolves to; ``None`` if the host is itself such an address.
    """
    where = brief(host, 200) + (f" ({address})" if address else "")
    advice = (
        " If the storage really is there, name a proxy for that host in the connection's proxies."
        if address
        else ""
    )
    return IncompleteResultsError(
        f"The URL of the result file leads to {where}, which is not a public address; nothing was sent there.{advice} "
        "The results are kept for 30 days; a retry asks for them again."
    )
