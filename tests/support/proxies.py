"""
What stands between a worker and SiliconFlow in a company: a forward proxy, and TLS; with answers that get lost.

::

    client --CONNECT--> proxy --bytes--> TLS endpoint --HTTP--> emulator      (the API at https://)
    client --GET http://...--> proxy --HTTP--> emulator                       (the API at http://)

The TLS endpoint reads the requests, so it knows which answer is to be lost; the proxy, which carries bytes that
it cannot read, then closes the tunnel. By that time the emulator has carried the request out.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import random
import re
import socket
import ssl
import struct
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from tests.support.certificates import CertificateAuthority

#: The service's name behind a TLS proxy; only the proxy knows where it is.
HOST = "api.siliconflow.test"

#: ``close``: the connection ends in an orderly way, without an answer. ``reset``: it is reset. ``half``: half of the
#: answer arrives. ``gateway-timeout``: HTTP 504 in place of it, as a gateway answers that lost patience.
Ending = Literal["close", "reset", "half", "gateway-timeout"]


@dataclass
class LostAnswers:
    """
    Which answers are lost.

    :param request: regular expression for ``METHOD /path?query``, matched in full.
    :param times: how many; -1 is all.
    :param chance: share (0 to 1) of the matching answers that is lost.
    :param ending: what the client sees instead.
    :param seed: of the chances.
    :param lost: the requests whose answers were lost.
    """

    request: str
    times: int = -1
    chance: float = 1.0
    ending: Ending = "close"
    seed: int = 0
    lost: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def take(self, request: str) -> bool:
        if len(self.lost) == self.times or not re.fullmatch(self.request, request):
            return False
        if self._random.random() >= self.chance:
            return False
        self.lost.append(request)
        return True


@dataclass
class Refusals:
    """
    Which of the proxy's clients are turned away: tunnels of a TLS client, requests of a plain one.

    :param status: HTTP status, 407, 403 or 502; ``None`` closes the connection without an answer.
    :param times: how many; -1 is all.
    :param count: how many were.
    """

    status: int | None
    times: int = -1
    count: int = 0

    def take(self) -> bool:
        if self.count == self.times:
            return False
        self.count += 1
        return True


class ProxiedService:
    """
    An API behind a proxy, served in a thread; made by :func:`proxied`.

    Everything may be changed at any time and counts for the requests that follow.

    :param base_url: the emulator's API, at http://.
    :param folder: for certificates; ``None`` leaves the API at http://.
    """

    def __init__(self, base_url: str, folder: Path | None) -> None:
        target = urlsplit(base_url)
        assert target.hostname
        assert target.port
        self._target = (target.hostname, target.port)
        self._authority = None if folder is None else CertificateAuthority(folder)
        self.losses: list[LostAnswers] = []
        self.refusals: list[Refusals] = []
        #: ``name:password`` that the proxy asks for.
        self.credentials: str | None = None
        #: ``METHOD /path`` of the requests that reached the API, and ``CONNECT host:port`` of the tunnels.
        self.seen: Counter[str] = Counter()
        self.base_url = f"https://{HOST}{target.path}" if self._authority else base_url
        self.port = 0
        self._endpoint_port = 0
        #: The tunnels by the address from which the proxy came to the TLS endpoint.
        self._tunnels: dict[tuple[str, int], asyncio.StreamWriter] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped: asyncio.Event | None = None
        self._thread: threading.Thread | None = None

    # For tests --------------------------------------------------------------------------------------------

    def lose(self, request: str, **how: object) -> LostAnswers:
        """Lose answers; arguments as :class:`LostAnswers`."""
        rule = LostAnswers(request, **how)  # type: ignore[arg-type]
        self.losses.append(rule)
        return rule

    def refuse(self, status: int | None, times: int = -1) -> Refusals:
        """Turn clients away; arguments as :class:`Refusals`."""
        rule = Refusals(status, times)
        self.refusals.append(rule)
        return rule

    @property
    def proxy_url(self) -> str:
        """The proxy's own URL, without credentials."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def bundle(self) -> Path | None:
        """The CA bundle that the API's certificate is checked with."""
        return self._authority.bundle if self._authority else None

    def extra(self, **changes: object) -> dict[str, object]:
        """Return the extra of a connection that goes through the proxy."""
        scheme = urlsplit(self.base_url).scheme
        verify = {"verify": str(self.bundle)} if self.bundle else {}
        return {"proxies": {scheme: self.proxy_url}} | verify | changes

    def connection(self, key: str = "sk-behind-a-proxy", **extra: object) -> str:
        """Return an Airflow connection through the proxy as JSON; `extra` as for :meth:`extra`."""
        fields = {"conn_type": "siliconflow", "host": self.base_url, "password": key}
        return json.dumps(fields | {"extra": self.extra(**extra)})

    # Life -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        started: Future[None] = Future()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(started)), name="proxy", daemon=True
        )
        self._thread.start()
        started.result(timeout=30)

    def stop(self) -> None:
        if self._loop is not None and self._stopped is not None and self._thread is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._stopped.set)
            self._thread.join()

    async def _serve(self, started: Future[None]) -> None:
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        servers: list[asyncio.Server] = []
        connections: set[asyncio.Task[None]] = set()

        async def listen(
            handle: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
            context: ssl.SSLContext | None = None,
        ) -> int:
            async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                task = asyncio.current_task()
                assert task
                connections.add(task)
                try:
                    # Whoever is cut off in the middle has seen what it was meant to see.
                    with contextlib.suppress(OSError, EOFError, ssl.SSLError, asyncio.CancelledError):
                        await handle(reader, writer)
                finally:
                    connections.discard(task)
                    writer.close()

            server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=context, backlog=1024)
            servers.append(server)
            return int(server.sockets[0].getsockname()[1])

        try:
            if self._authority is not None:
                self._endpoint_port = await listen(self._terminate, self._authority.server_context(HOST))
            self.port = await listen(self._proxy)
        except BaseException as error:
            started.set_exception(error)
            raise
        started.set_result(None)
        await self._stopped.wait()
        for server in servers:
            server.close()
        for task in list(connections):
            task.cancel()
        await asyncio.sleep(0)

    # The proxy --------------------------------------------------------------------------------------------

    async def _proxy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async for request in _messages(reader):
            if self.credentials is not None and not request.authorizes(self.credentials):
                writer.write(_answer(407, {"Proxy-Authenticate": 'Basic realm="proxy"'}))
                return
            if refusal := next((one for one in self.refusals if one.take()), None):
                if refusal.status is not None:
                    writer.write(_answer(refusal.status))
                    await writer.drain()
                return
            if request.method == "CONNECT":
                await self._tunnel(request, reader, writer)
                return
            url = urlsplit(request.target)
            path = url._replace(scheme="", netloc="").geturl()
            assert url.hostname
            target = (url.hostname, url.port or 80)
            if not await self._carry_out(request.with_target(path), target, writer, writer):
                return

    async def _tunnel(
        self, request: _Message, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.seen[f"CONNECT {request.target}"] += 1
        if request.target != f"{HOST}:443" or not self._endpoint_port:
            # As a proxy says of a name that it cannot resolve.
            writer.write(_answer(502))
            return
        onward, outward = await asyncio.open_connection("127.0.0.1", self._endpoint_port)
        ours = outward.get_extra_info("sockname")
        self._tunnels[ours] = writer
        try:
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            await writer.drain()
            async with asyncio.TaskGroup() as both:
                both.create_task(_pump(reader, outward))
                both.create_task(_pump(onward, writer))
        finally:
            del self._tunnels[ours]
            outward.close()

    # The TLS endpoint -------------------------------------------------------------------------------------

    async def _terminate(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client = self._tunnels[writer.get_extra_info("peername")]
        async for request in _messages(reader):
            if not await self._carry_out(request, self._target, writer, client):
                return

    async def _carry_out(
        self,
        request: _Message,
        target: tuple[str, int],
        writer: asyncio.StreamWriter,
        client: asyncio.StreamWriter,
    ) -> bool:
        """
        Hand a request on and bring its answer, or lose it.

        :param writer: for the answer.
        :param client: the proxy's connection to the client.
        :returns: whether the connection goes on.
        """
        self.seen[f"{request.method} {request.target.partition('?')[0]}"] += 1
        answer, goes_on = await _ask(target, request)
        loss = next((one for one in self.losses if one.take(f"{request.method} {request.target}")), None)
        if loss is None:
            writer.write(answer)
            await writer.drain()
            return goes_on
        if loss.ending == "gateway-timeout":
            writer.write(_answer(504))
            await writer.drain()
            return False
        if loss.ending == "half":
            writer.write(answer[: len(answer) // 2])
            await writer.drain()
            # It is to be on its way before the tunnel ends.
            await asyncio.sleep(0.05)
        if loss.ending == "reset":
            linger = struct.pack("ii", 1, 0)
            client.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        # In a tunnel this is the end without TLS's own goodbye, which only the endpoint could send.
        client.close()
        return False


@contextlib.contextmanager
def proxied(base_url: str, folder: Path | None = None) -> Iterator[ProxiedService]:
    """
    Put a proxy before an emulator.

    :param base_url: the emulator's.
    :param folder: for certificates: the API is then at https://, and reached through a tunnel. ``None`` leaves it
        at http://, and the proxy reads what it carries.
    """
    service = ProxiedService(base_url, folder)
    service.start()
    try:
        yield service
    finally:
        service.stop()


# HTTP -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Message:
    """A request as it came."""

    method: str
    target: str
    headers: Mapping[str, str]
    raw: bytes

    def with_target(self, target: str) -> _Message:
        rest = self.raw.partition(b"\r\n")[2]
        line = f"{self.method} {target} HTTP/1.1\r\n"
        return _Message(self.method, target, self.headers, line.encode() + rest)

    def authorizes(self, credentials: str) -> bool:
        given = self.headers.get("proxy-authorization", "")
        return given == f"Basic {base64.b64encode(credentials.encode()).decode()}"


async def _messages(reader: asyncio.StreamReader) -> AsyncIterator[_Message]:
    while True:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return
        line, *lines = head.decode("latin-1").split("\r\n")
        method, target, _ = line.split(" ", 2)
        pairs = (one.partition(":") for one in lines if one)
        headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        if "transfer-encoding" in headers:
            raise ValueError("the provider announces the length of all that it sends")
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        yield _Message(method, target, headers, head + body)


async def _ask(target: tuple[str, int], request: _Message) -> tuple[bytes, bool]:
    """Return the whole answer of a server, and whether its length is announced, so that others can follow."""
    line, _, rest = request.raw.partition(b"\r\n")
    reader, writer = await asyncio.open_connection(*target)
    try:
        # Its end is then the connection's; what is the proxy's own is not handed on.
        writer.write(line + b"\r\nConnection: close\r\n" + _without(rest, b"connection|proxy-[a-z]+"))
        await writer.drain()
        answer = await reader.read(-1)
    finally:
        writer.close()
    if not re.search(rb"(?i)^content-length:", answer.partition(b"\r\n\r\n")[0], re.MULTILINE):
        return answer, False
    return _without(answer, b"connection"), True


def _without(message: bytes, names: bytes) -> bytes:
    head, end, body = message.partition(b"\r\n\r\n")
    return re.sub(rb"(?im)^(%s):.*\r\n" % names, b"", head + b"\r\n").removesuffix(b"\r\n") + end + body


def _answer(status: int, headers: Mapping[str, str] | None = None) -> bytes:
    body = f"<html><body><h1>{status}</h1>The proxy's own page.</body></html>".encode()
    given = {"Content-Type": "text/html", "Content-Length": str(len(body)), "Connection": "close"}
    lines = [f"HTTP/1.1 {status} From the proxy"]
    lines += [f"{name}: {value}" for name, value in (given | dict(headers or {})).items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    # One side's end is the other's: neither HTTP client nor server goes on with half a connection.
    writer.close()
