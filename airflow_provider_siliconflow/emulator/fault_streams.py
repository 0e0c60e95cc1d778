"""
Answers that are too large, too slow or endless.

Each is generated while it is sent, from a block of at most 1 MB, so the emulator needs little memory for any of them.
"""

from __future__ import annotations

import asyncio
import struct
import time
import zlib
from dataclasses import dataclass
from http import HTTPStatus
from itertools import repeat
from typing import TYPE_CHECKING, Any

from aiohttp import web

from airflow_provider_siliconflow.emulator.responses import TRACE_HEADER, new_trace

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from aiohttp.abc import AbstractStreamWriter

    from airflow_provider_siliconflow.emulator.faults import Fault

_BLOCK = 1 << 18
_LARGEST_BLOCK = 1 << 20
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


@dataclass
class _Filled:
    """A body that is ``head``, then ``block`` as often as needed, then ``tail``."""

    head: bytes
    block: bytes
    tail: bytes

    def pieces(self, size: int) -> Iterator[bytes]:
        """
        Yield the body.

        :param size: size of the whole body in bytes; it is at least that of head and tail.
        """
        yield self.head
        whole, rest = divmod(max(0, size - len(self.head) - len(self.tail)), len(self.block))
        yield from repeat(self.block, whole)
        yield self.block[:rest]
        yield self.tail


async def filled(fault: Fault, request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
    """Send the answer under ``huge``, ``endless`` or ``gzip-bomb``."""
    body = await _filled(fault, response)
    answer = _like(response, fault)
    size = max(fault.bytes or 0, len(body.head) + len(body.tail))
    if fault.kind == "huge" and not fault.chunked:
        answer.content_length = size
    else:
        answer.enable_chunked_encoding()
    if fault.kind == "gzip-bomb":
        answer.headers["Content-Encoding"] = "gzip"
    await answer.prepare(request)
    if fault.kind == "endless":
        await answer.write(body.head)
        until = time.monotonic() + (fault.seconds or 0)
        while time.monotonic() < until:
            await answer.write(body.block)
            # Writing to a fast client never waits, and other requests must be answered too.
            await asyncio.sleep(0)
        await answer.write(body.tail)
    else:
        pieces = body.pieces(size)
        for piece in _gzipped(pieces) if fault.kind == "gzip-bomb" else pieces:
            if piece:
                await answer.write(piece)
                await asyncio.sleep(0)
    await answer.write_eof()
    return answer


async def drip(fault: Fault, request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
    """Send the correct body one byte at a time."""
    answer = _like(response, fault)
    answer.content_length = _size(response)
    await answer.prepare(request)
    async for piece in _content(response):
        for place in range(len(piece)):
            await answer.write(piece[place : place + 1])
            await asyncio.sleep(fault.every or 0)
    await answer.write_eof()
    return answer


async def drip_headers(
    fault: Fault, request: web.Request, response: web.StreamResponse
) -> web.StreamResponse:
    """Send the status line and the headers one byte at a time, then the correct body."""
    head = _head(response, fault) + b"\r\n"
    for place in range(len(head)):
        await request.writer.write(head[place : place + 1])
        await asyncio.sleep(fault.every or 0)
    return await _rest_sent(request, response)


async def many_headers(
    fault: Fault, request: web.Request, response: web.StreamResponse
) -> web.StreamResponse:
    """Send a number of extra headers."""
    await request.writer.write(_head(response, fault))
    count = fault.count or 0
    for first in range(0, count, 1000):
        numbers = range(first, min(first + 1000, count))
        await request.writer.write(b"".join(b"x-emulator-%d: 0\r\n" % number for number in numbers))
        await asyncio.sleep(0)
    await request.writer.write(b"\r\n")
    return await _rest_sent(request, response)


async def endless_continue(fault: Fault, request: web.Request) -> None:
    """Send ``100 Continue`` until the time is over or the client disconnects."""
    until = time.monotonic() + (fault.seconds or 0)
    while time.monotonic() < until:
        await request.writer.write(_CONTINUE * 1000)
        await asyncio.sleep(0)
    # As aiohttp does after its own: they do not belong to the answer.
    request.writer.output_size = 0


class _Sent(web.StreamResponse):
    """Represents an answer that was written without aiohttp; the connection is closed after it."""

    def __init__(self, status: int) -> None:
        super().__init__(status=status)
        self.force_close()

    async def prepare(self, request: Any) -> AbstractStreamWriter | None:
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        return None


async def _rest_sent(request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
    async for piece in _content(response):
        await request.writer.write(piece)
    return _Sent(response.status)


def _like(response: web.StreamResponse, fault: Fault) -> web.StreamResponse:
    headers = {**response.headers, **fault.headers}
    headers.pop("Content-Length", None)
    return web.StreamResponse(status=response.status, headers=headers)


def _head(response: web.StreamResponse, fault: Fault) -> bytes:
    headers = {
        **response.headers,
        **fault.headers,
        TRACE_HEADER: new_trace(),
        "Content-Length": str(_size(response)),
        "Connection": "close",
    }
    lines = [f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "".join(f"{line}\r\n" for line in lines).encode()


def _size(response: web.StreamResponse) -> int:
    if isinstance(response, web.FileResponse):
        return response._path.stat().st_size
    return len(_body(response))


def _body(response: web.StreamResponse) -> bytes:
    body = response.body if isinstance(response, web.Response) else None
    return body if isinstance(body, bytes) else b""


async def _content(response: web.StreamResponse) -> AsyncIterator[bytes]:
    if not isinstance(response, web.FileResponse):
        yield _body(response)
        return
    with response._path.open("rb") as file:
        while piece := await asyncio.to_thread(file.read, _BLOCK):
            yield piece


async def _filled(fault: Fault, response: web.StreamResponse) -> _Filled:
    is_file = isinstance(response, web.FileResponse)
    fill = fault.fill or ("lines" if is_file else "spaces")
    if fill == "junk":
        return _Filled(b"", b"x" * _BLOCK, b"")
    start = b""
    async for piece in _content(response):
        start += piece
        if len(start) >= _LARGEST_BLOCK:
            break
    if fill == "lines":
        lines = start[: start.rfind(b"\n") + 1]
        return _Filled(b"", lines or b"{}\n", b"")
    return _Filled(start[:1], b" " * _BLOCK, start[1:])


def _gzipped(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """
    Compress a body that repeats a block.

    The block is deflated once. Since it ends with a full flush, its bytes are independent and can be sent repeatedly.
    """
    yield b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"
    checksum = size = 0
    last, deflated = b"", b""
    for piece in pieces:
        if piece is not last:
            packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
            last, deflated = piece, packer.compress(piece) + packer.flush(zlib.Z_FULL_FLUSH)
        checksum = zlib.crc32(piece, checksum)
        size += len(piece)
        yield deflated
    yield b"\x03\x00" + struct.pack("<II", checksum, size & 0xFFFFFFFF)
