"""Servers and proxies that do what no honest one does, over real sockets, and both clients behind one face."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from airflow_provider_siliconflow.api import protocol
from airflow_provider_siliconflow.api.settings import ClientSettings

KEY = "sk-test-0123456789abcdef"
BATCH = {"id": "batch_1", "object": "batch", "status": "in_progress", "input_file_id": "file-1"}

#: Writes an answer to a request (its head and body as bytes) onto a connection, which is closed afterwards.
Serve = Callable[[socket.socket, bytes], None]


def answer(body: bytes | Any, status: int = 200, **headers: str) -> bytes:
    """Return a whole answer; ``headers`` with underscores for dashes."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [
        f"HTTP/1.1 {status} X",
        # As it is: a client that meant to use the connection again would race its end.
        "Connection: close",
        *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
    ]
    if "Transfer_Encoding" not in headers and "Content_Length" not in headers:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def read_request(connection: socket.socket) -> bytes:
    """Read a request, with as much of its body as it announces."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(65536)
        if not piece:
            return data
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    size = 0
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            size = int(line.split(b":")[1])
    while len(body) < size:
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


class Server:
    """
    Accepts connections on a free port of the loopback.

    :param serve: what it does to each request. A connection that its client leaves is no error.
    """

    def __init__(self, serve: Serve, tls: ssl.SSLContext | None = None) -> None:
        self.serve, self._tls = serve, tls
        self.requests: list[bytes] = []
        self.sent = 0
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self.port}"
        self.closed = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while not self.closed.is_set():
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._handle, args=(connection,), daemon=True).start()

    def _handle(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stack.enter_context(connection)
            if self._tls is not None:
                connection = stack.enter_context(self._tls.wrap_socket(connection, server_side=True))
            request = read_request(connection)
            if request:
                self.requests.append(request)
                self.serve(connection, request)

    def flood(self, connection: socket.socket, pieces: Iterator[bytes]) -> None:
        """Send until the other side has had enough, and count the bytes."""
        for piece in pieces:
            if self.closed.is_set():
                return
            connection.sendall(piece)
            self.sent += len(piece)

    def drip(self, connection: socket.socket, data: bytes, pause: float = 0.05) -> None:
        """Send a byte now and then."""
        for number in range(len(data)):
            if self.closed.wait(pause):
                return
            connection.sendall(data[number : number + 1])

    def close(self) -> None:
        self.closed.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def always(data: bytes) -> Serve:
    """Return what answers every request so."""
    return lambda connection, request: connection.sendall(data)


def reset(connection: socket.socket) -> None:
    """Close a connection so that the other side sees a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()


@contextlib.contextmanager
def serving(serve: Serve | bytes, tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    """Run a server for as long as the block lasts."""
    server = Server(always(serve) if isinstance(serve, bytes) else serve, tls)
    try:
        yield server
    finally:
        server.close()


def certificate(folder: Path) -> Path:
    """Write a certificate of 127.0.0.1 and localhost, with its key, that signs itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "test.pem"
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path.write_bytes(key.private_bytes(pem, form, serialization.NoEncryption()) + signed.public_bytes(pem))
    return path


def server_tls(pem: Path) -> ssl.SSLContext:
    """Return what makes a server speak TLS."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pem)
    return context


# Clients ----------------------------------------------------------------------------------------------------

Ask = Callable[[ClientSettings, protocol.Call[Any]], Any]


def make_settings(url: str, **values: Any) -> ClientSettings:
    """Return settings that give up soon."""
    return ClientSettings(
        KEY, base_url=f"{url}/v1", **({"backoff": 0.01, "max_retries": 0, "timeout": 5.0} | values)
    )


def ask_sync(settings: ClientSettings, call: protocol.Call[Any]) -> Any:
    from airflow_provider_siliconflow.api.client import SiliconFlowClient

    with SiliconFlowClient(settings) as client:
        return client.call(call)


def ask_async(settings: ClientSettings, call: protocol.Call[Any]) -> Any:
    from airflow_provider_siliconflow.api.async_client import AsyncSiliconFlowClient

    async def run() -> Any:
        async with AsyncSiliconFlowClient(settings) as client:
            return await client.call(call)

    return asyncio.run(run())


ASK = {"sync": ask_sync, "async": ask_async}


def creation() -> protocol.Call[Any]:
    """Return the call that costs money."""
    return protocol.create_batch(
        input_file_id="file-1",
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata=None,
        replace=None,
    )
