"""How faults act on a request and its answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from typing import TYPE_CHECKING

from aiohttp import web

from airflow_provider_siliconflow.emulator import fault_streams
from airflow_provider_siliconflow.emulator.odd_json import rewritten
from airflow_provider_siliconflow.emulator.refusals import DEFAULT_BODIES
from airflow_provider_siliconflow.emulator.responses import odd_json_response

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from airflow_provider_siliconflow.emulator.faults import Fault
    from airflow_provider_siliconflow.emulator.journal import Journal

_HTML_BODY = (
    "<html>\r\n<head><title>{status}</title></head>\r\n<body>\r\n"
    "<center><h1>{status}</h1></center>\r\n<hr><center>openresty</center>\r\n</body>\r\n</html>\r\n"
)


_STREAMS = {
    "huge": fault_streams.filled,
    "gzip-bomb": fault_streams.filled,
    "endless": fault_streams.filled,
    "drip": fault_streams.drip,
    "drip-headers": fault_streams.drip_headers,
    "many-headers": fault_streams.many_headers,
}

log = logging.getLogger(__name__)


class FaultEffects:
    """
    Answers requests to which a fault applies.

    :param journal: holds requests for the kinds ``hold`` and ``hold-after``.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    async def answer(
        self, fault: Fault, request: web.Request, work: Callable[[], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """
        Return the answer under a fault.

        :param work: carries out the request and returns the correct answer.
        """
        kind = fault.kind
        if kind in ("status", "html", "redirect"):
            await read_away(request)
            return _fault_answer(fault)
        if kind == "reset":
            return _reset(request)
        if kind == "hold":
            await self._hold(request)
            return await work()

        if request.path.startswith("/results/") and kind in ("slow", "hold-after"):
            # A download changes nothing, so there is nothing to carry out first; the file is opened when it is sent.
            await self._delay(fault, request)
            return await work()
        response = await work()
        if kind == "status-after":
            return _fault_answer(fault)
        if kind == "reset-after":
            return _reset(request)
        if kind == "cut":
            return await _cut(request, response, fault.bytes or 0)
        if kind in _STREAMS:
            return await _STREAMS[kind](fault, request, response)
        if kind in ("slow", "hold-after"):
            await self._delay(fault, request)
        elif kind == "endless-continue":
            await fault_streams.endless_continue(fault, request)
        elif kind == "rewrite":
            response = _rewritten(fault, response)
        elif kind in ("empty", "truncated-json"):
            body = b""
            if kind == "truncated-json" and isinstance(response, web.Response):
                whole = response.body if isinstance(response.body, bytes) else b""
                body = whole[: len(whole) // 2]
            response = web.Response(body=body, status=response.status, content_type="application/json")
        response.headers.update(fault.headers)
        return response

    async def _delay(self, fault: Fault, request: web.Request) -> None:
        if fault.kind == "slow":
            await asyncio.sleep(fault.seconds or 0)
        else:
            await self._hold(request)

    async def _hold(self, request: web.Request) -> None:
        await self._journal.hold(f"{request.method} {request.path}")


def _fault_answer(fault: Fault) -> web.Response:
    if fault.kind == "redirect":
        return web.Response(status=302, headers={"Location": fault.location or "", **fault.headers})
    status = fault.status or 502
    if fault.kind == "html" or (fault.body is None and status in (502, 520, 522)):
        text = _HTML_BODY.format(status=status)
        return web.Response(text=text, status=status, headers=fault.headers, content_type="text/html")
    body = fault.body
    if body is None:
        body = DEFAULT_BODIES.get(status, {"code": status, "message": f"Status {status}.", "data": None})
    answer = odd_json_response(body, status)
    answer.headers.update(fault.headers)
    return answer


def _rewritten(fault: Fault, response: web.StreamResponse) -> web.StreamResponse:
    status = response.status if fault.status is None else fault.status
    if fault.raw is not None:
        return web.Response(text=fault.raw, status=status, content_type="application/json")
    if fault.body is not None:
        return odd_json_response(fault.body, status)
    try:
        body = response.body if isinstance(response, web.Response) else None
        answer = json.loads(body if isinstance(body, bytes) else b"")
    except ValueError:
        log.warning("Fault rewrite changes nothing: the answer is not JSON")
        return response
    changed = rewritten(
        answer, rename=fault.rename, merge=fault.merge, remove=fault.remove, envelope=fault.envelope
    )
    return odd_json_response(changed, status)


def _reset(request: web.Request) -> web.Response:
    if request.transport is not None:
        request.transport.abort()
    # Never sent: the connection is gone.
    return web.Response(status=500)


async def _cut(request: web.Request, response: web.StreamResponse, size: int) -> web.StreamResponse:
    """Announce the whole body, send the first bytes of it and close."""
    headers = dict(response.headers)
    status = response.status
    if isinstance(response, web.FileResponse):
        path = response._path
        found = path.stat()
        whole = found.st_size
        # The same entity tag as aiohttp's for the whole file, which a client compares if it resumes.
        headers["ETag"] = f'"{found.st_mtime_ns:x}-{whole:x}"'
        headers["Accept-Ranges"] = "bytes"
        first, last, _ = request.http_range.indices(whole)
        if request.http_range.start is not None:
            headers["Content-Range"] = f"bytes {first}-{last - 1}/{whole}"
            status = 206
        length = max(0, last - first)
        content = await asyncio.to_thread(_read_part, path, first, min(size, length))
    else:
        body = response.body if isinstance(response, web.Response) else None
        content = body if isinstance(body, bytes) else b""
        length = len(content)
    headers["Content-Length"] = str(length)
    shortened = web.StreamResponse(status=status, headers=headers)
    await shortened.prepare(request)
    await shortened.write(content[:size])
    if request.transport is not None:
        request.transport.close()
    return shortened


def _read_part(path: Path, first: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(first)
        return file.read(size)


async def read_away(request: web.Request) -> None:
    """Read a refused upload to its end: a client that is still sending would not see the answer."""
    with contextlib.suppress(ConnectionError, web.HTTPException):
        while await request.content.readany():
            pass
