"""The emulated service on HTTP: the API, the result storage on another origin, faults, control calls."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import tempfile
import threading
import time
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import BodyPartReader, web

from airflow_provider_siliconflow.emulator.config import EmulatorConfig
from airflow_provider_siliconflow.emulator.control import PREFIX, Control, answer_control
from airflow_provider_siliconflow.emulator.faults import DEFAULT_BODIES, HTML_BODY, Fault, Faults
from airflow_provider_siliconflow.emulator.records import RESULT_KINDS
from airflow_provider_siliconflow.emulator.service import (
    EmulatedService,
    ServiceError,
    invalid_parameter,
    not_found,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

log = logging.getLogger(__name__)

TRACE_HEADER = "x-siliconcloud-trace-id"
_API = "/v1"
_LOGGED_REQUESTS = 20_000
_CHUNK = 1 << 18

_encode = msgspec.json.Encoder().encode

_STORAGE_ERRORS = {
    "ExpiredToken": ("AccessDenied", "Request has expired"),
    "SignatureDoesNotMatch": (
        "SignatureDoesNotMatch",
        "The request signature we calculated does not match the signature you provided.",
    ),
}


@dataclass(frozen=True)
class RecordedRequest:
    """
    A request the server has answered.

    :param method: HTTP method.
    :param path: path below the origin, with its query except on the storage.
    :param route: method-less route as faults name it: ``/batches/*``, ``storage``.
    :param status: status that was sent; 0 when the connection was closed without an answer.
    :param at: epoch seconds of its arrival.
    :param fault: kind of the fault that hit it.
    """

    method: str
    path: str
    route: str
    status: int
    at: float
    fault: str | None = None


class EmulatorServer:
    """
    Serves an :class:`EmulatedService`.

    :param service: state and rules.
    :param faults: rules for faults; shared, they may change at any time.
    """

    def __init__(self, service: EmulatedService, faults: Faults) -> None:
        self.service = service
        self.faults = faults
        self.base_url = ""
        self.storage_url = ""
        self.request_counts: Counter[str] = Counter()
        self.requests: deque[RecordedRequest] = deque(maxlen=_LOGGED_REQUESTS)
        self._held: dict[asyncio.Event, str] = {}
        self._runners: list[web.AppRunner] = []
        # Apart from the loop's own threads, which aiohttp needs to open the files it sends.
        self._workers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="emulator-work")

    async def start(
        self, host: str = "127.0.0.1", port: int = 0, storage_port: int = 0, storage_host: str = "localhost"
    ) -> None:
        """
        Listen.

        :param host: address both ports are bound to.
        :param port: port of the API; 0 takes a free one.
        :param storage_port: port of the result storage; 0 takes a free one.
        :param storage_host: host name inside result URLs, other than the API's so that the origins differ.
        :raises OSError: a port is taken.
        :raises OverflowError: a port is no port number.
        """
        bound = await self._listen(self._storage_app(), host, storage_port)
        self.storage_url = f"http://{storage_host}:{bound}"
        self.service.storage_origin = self.storage_url
        bound = await self._listen(self._api_app(), host, port)
        shown = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host
        self.base_url = f"http://{f'[{shown}]' if ':' in shown else shown}:{bound}{_API}"

    async def stop(self) -> None:
        """Close both ports and every open connection."""
        self.release()
        for runner in self._runners:
            await runner.cleanup()
        self._runners.clear()
        self._workers.shutdown(wait=True, cancel_futures=True)

    @property
    def held(self) -> list[str]:
        """The requests a fault holds at this moment, as ``METHOD /path``."""
        return list(self._held.values())

    def release(self) -> int:
        """Let all held requests go on, and return how many there were."""
        held = list(self._held)
        for event in held:
            event.set()
        return len(held)

    async def _listen(self, app: web.Application, host: str, port: int) -> int:
        # A client that keeps its connection open must not delay the end.
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        self._runners.append(runner)
        await web.TCPSite(runner, host, port, backlog=4096).start()
        bound: int = runner.addresses[0][1]
        return bound

    def _api_app(self) -> web.Application:
        app = web.Application(middlewares=[self._api_middleware])
        app.add_routes(
            [
                web.post(f"{_API}/files", self._post_file),
                web.get(f"{_API}/files", self._list_files),
                web.get(f"{_API}/files/{{id}}", self._get_file),
                web.delete(f"{_API}/files/{{id}}", self._delete_file),
                web.get(f"{_API}/files/{{id}}/content", self._get_content),
                web.post(f"{_API}/batches", self._post_batch),
                web.get(f"{_API}/batches", self._list_batches),
                web.get(f"{_API}/batches/{{id}}", self._get_batch),
                web.post(f"{_API}/batches/{{id}}/cancel", self._cancel_batch),
                web.get(f"{_API}/user/info", self._user_info),
                web.get(f"{_API}/models", self._models),
                *Control(self).routes(),
            ]
        )
        return app

    def _storage_app(self) -> web.Application:
        app = web.Application(middlewares=[self._storage_middleware])
        app.router.add_get("/results/{id}/{name}", self._get_results)
        return app

    # -- around every request ---------------------------------------------------------------------------

    @web.middleware
    async def _api_middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path.startswith(PREFIX):
            return await answer_control(request, handler)
        resource = request.match_info.route.resource
        route = "unknown"
        if resource is not None:
            route = resource.canonical.removeprefix(_API).replace("{id}", "*")
        target = request.path.removeprefix(_API)

        async def work() -> web.StreamResponse:
            try:
                scheme, _, key = request.headers.get("Authorization", "").partition(" ")
                self.service.check_key(key.strip() if scheme.lower() == "bearer" else None)
                return await handler(request)
            except ServiceError as error:
                await _read_away(request)
                return _json(error.body, error.status)
            except (web.HTTPNotFound, web.HTTPMethodNotAllowed):
                return _json(DEFAULT_BODIES[404], 404)

        return await self._answer(request, work, route, target, request.path_qs)

    @web.middleware
    async def _storage_middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if "Authorization" in request.headers:
            self.service.authorization_leaks += 1
            log.error(
                "%s %s came to the result storage with an Authorization header: the client leaks its API key",
                request.method,
                request.path,
            )

        async def work() -> web.StreamResponse:
            try:
                return await handler(request)
            except ServiceError as error:
                if error.status == 403:
                    return _xml_error(403, *_STORAGE_ERRORS[error.body])
            except (web.HTTPNotFound, web.HTTPMethodNotAllowed):
                pass
            return _xml_error(404, "NoSuchKey", "The specified key does not exist.")

        return await self._answer(request, work, "storage", f"storage{request.path}", request.path)

    async def _answer(
        self,
        request: web.Request,
        work: Callable[[], Awaitable[web.StreamResponse]],
        route: str,
        target: str,
        path: str,
    ) -> web.StreamResponse:
        arrived = time.time()
        self.request_counts[f"{request.method} {route}"] += 1
        fault = self.faults.take(request.method, target)
        trace = f"ti_{secrets.token_hex(8)}"
        status = 0
        try:
            if fault is None:
                response = await work()
            else:
                log.info("%s %s meets fault %s", request.method, path, fault.kind)
                response = await self._with_fault(fault, request, work)
            transport = request.transport
            if transport is not None and not transport.is_closing():
                status = response.status
                if not response.prepared:
                    response.headers[TRACE_HEADER] = trace
        finally:
            self.requests.append(
                RecordedRequest(
                    request.method, path, route, status, arrived, None if fault is None else fault.kind
                )
            )
        level = logging.DEBUG if request.method == "GET" and status < 400 else logging.INFO
        log.log(level, "%s %s -> %s", request.method, path, status or "connection closed")
        return response

    async def _with_fault(
        self, fault: Fault, request: web.Request, work: Callable[[], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        kind = fault.kind
        if kind in ("status", "html", "redirect"):
            await _read_away(request)
            return _fault_answer(fault)
        if kind == "reset":
            return _reset(request)
        if kind == "hold":
            await self._hold(request)
            return await work()

        if request.path.startswith("/results/") and kind in ("slow", "hold-after"):
            # A download has no effect to come first, and its file is best looked up when it is sent.
            await self._delay(fault, request)
            return await work()
        response = await work()
        if kind == "status-after":
            return _fault_answer(fault)
        if kind == "reset-after":
            return _reset(request)
        if kind == "cut":
            return await _cut(request, response, fault.bytes or 0)
        if kind in ("slow", "hold-after"):
            await self._delay(fault, request)
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
        event = asyncio.Event()
        self._held[event] = f"{request.method} {request.path}"
        try:
            await event.wait()
        finally:
            del self._held[event]

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._workers, lambda: function(*arguments, **named))

    # -- the API ----------------------------------------------------------------------------------------

    async def _post_file(self, request: web.Request) -> web.StreamResponse:
        if not request.content_type.startswith("multipart/"):
            raise invalid_parameter("The body must be multipart/form-data.")
        spooled = self.service.spool_path()
        purpose, filename = "", None
        try:
            try:
                async for part in await request.multipart():
                    if not isinstance(part, BodyPartReader):
                        raise invalid_parameter("The form must not be nested.")
                    if part.name == "purpose":
                        purpose = (await part.read()).decode()
                    elif part.name == "file":
                        filename = part.filename or "file"
                        await self._spool(part, spooled)
            except ValueError as error:
                raise invalid_parameter(f"The form can not be read: {error}") from None
            if filename is None:
                raise invalid_parameter("file is required.")
            answer = await self._in_thread(self.service.add_file, filename, purpose, spooled, take=True)
        finally:
            spooled.unlink(missing_ok=True)
        return _json(answer)

    async def _spool(self, part: BodyPartReader, path: Path) -> None:
        limit = self.service.config.max_file_bytes
        size = 0
        with path.open("wb") as spooled:
            while chunk := await part.read_chunk(_CHUNK):
                size += len(chunk)
                if size <= limit:
                    spooled.write(chunk)
        # Only now: a client that is cut off while it sends never sees why.
        if size > limit:
            raise self.service.file_too_large()

    async def _list_files(self, request: web.Request) -> web.StreamResponse:
        return _json(self.service.list_files(request.query.get("purpose"), request.query.get("limit")))

    async def _get_file(self, request: web.Request) -> web.StreamResponse:
        return _json(self.service.get_file(request.match_info["id"]))

    async def _delete_file(self, request: web.Request) -> web.StreamResponse:
        return _json(self.service.delete_file(request.match_info["id"]))

    async def _get_content(self, request: web.Request) -> web.StreamResponse:
        path = await self._in_thread(self.service.open_content, request.match_info["id"])
        return web.FileResponse(path, headers={"Content-Type": "application/octet-stream"})

    async def _post_batch(self, request: web.Request) -> web.StreamResponse:
        try:
            body = msgspec.json.decode(await request.read())
        except msgspec.DecodeError as error:
            raise invalid_parameter(f"The body is not valid JSON: {error}") from None
        if self.service.creation_is_slow(body):
            return _json(await self._in_thread(self.service.create_batch, body))
        return _json(self.service.create_batch(body))

    async def _list_batches(self, request: web.Request) -> web.StreamResponse:
        return _json(self.service.list_batches(request.query.get("limit"), request.query.get("after")))

    async def _get_batch(self, request: web.Request) -> web.StreamResponse:
        return _json(self.service.get_batch(request.match_info["id"]))

    async def _cancel_batch(self, request: web.Request) -> web.StreamResponse:
        return _json(self.service.cancel_batch(request.match_info["id"]))

    async def _user_info(self, request: web.Request) -> web.StreamResponse:
        return _json(self.service.user_info())

    async def _models(self, request: web.Request) -> web.StreamResponse:
        return _json(self.service.models(request.query.get("sub_type")))

    async def _get_results(self, request: web.Request) -> web.StreamResponse:
        self.service.check_signature(request.path, request.query)
        for kind in RESULT_KINDS:
            if request.match_info["name"] == f"{kind}.jsonl":
                path = await self._in_thread(self.service.open_results, request.match_info["id"], kind)
                return web.FileResponse(path, headers={"Content-Type": "application/octet-stream"})
        raise not_found()


class Emulator:
    """A running emulator, in a thread and an event loop of its own. Made by :func:`running_emulator`."""

    def __init__(
        self,
        config: EmulatorConfig,
        data_dir: str | Path | None,
        faults: Iterable[Fault | dict[str, Any] | str],
        host: str,
        port: int,
        storage_port: int,
        storage_host: str,
    ) -> None:
        self.faults = Faults()
        for fault in faults:
            self.faults.add(fault)
        self._temporary = (
            None
            if data_dir is not None
            else tempfile.TemporaryDirectory(prefix="siliconflow-", ignore_cleanup_errors=True)
        )
        folder = data_dir if self._temporary is None else self._temporary.name
        assert folder is not None
        self.service = EmulatedService(config, folder, persistent=data_dir is not None)
        self.server = EmulatorServer(self.service, self.faults)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped: asyncio.Event | None = None
        started: Future[None] = Future()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(started, host, port, storage_port, storage_host)),
            name="siliconflow-emulator",
            daemon=True,
        )
        self._thread.start()
        try:
            started.result(timeout=30)
        except BaseException:
            self.close()
            raise

    async def _serve(
        self, started: Future[None], host: str, port: int, storage_port: int, storage_host: str
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        try:
            await self.server.start(host, port, storage_port, storage_host)
        except (OSError, OverflowError) as error:
            await self.server.stop()
            started.set_exception(error)
            return
        started.set_result(None)
        await self._stopped.wait()
        await self.server.stop()

    @property
    def base_url(self) -> str:
        """What a connection's host is set to: ``http://127.0.0.1:PORT/v1``."""
        return self.server.base_url

    @property
    def storage_url(self) -> str:
        """Origin of the result URLs."""
        return self.server.storage_url

    @property
    def control_url(self) -> str:
        """Where the control calls live: ``http://127.0.0.1:PORT/_emulator``."""
        return self.base_url.removesuffix(_API) + PREFIX.rstrip("/")

    @property
    def requests(self) -> list[RecordedRequest]:
        """The recent requests, oldest first."""
        return list(self.server.requests)

    @property
    def request_counts(self) -> dict[str, int]:
        """All requests so far by ``METHOD /route``, for example ``GET /batches/*``."""
        return dict(self.server.request_counts)

    @property
    def held(self) -> list[str]:
        """The requests a fault holds at this moment, as ``METHOD /path``."""
        return self.server.held

    @property
    def airflow_connection(self) -> str:
        """An Airflow connection to this emulator, as JSON for ``AIRFLOW_CONN_SILICONFLOW_DEFAULT``."""
        return connection_json(self.base_url, self.service.config)

    def release(self) -> None:
        """Let requests held by a fault go on."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.server.release)

    def close(self) -> None:
        """Stop serving, and remove the temporary files. May be called twice."""
        if self._loop is not None and self._stopped is not None and self._thread.is_alive():
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()
        if self._temporary is not None:
            self._temporary.cleanup()


@contextlib.contextmanager
def running_emulator(
    config: EmulatorConfig | None = None,
    *,
    data_dir: str | Path | None = None,
    faults: Iterable[Fault | dict[str, Any] | str] = (),
    host: str = "127.0.0.1",
    port: int = 0,
    storage_port: int = 0,
    storage_host: str = "localhost",
    **settings: Any,
) -> Iterator[Emulator]:
    """
    Run an emulator in a background thread, for tests.

    :param config: behaviour; or give its fields by name, as ``running_emulator(speed=1000)``.
    :param data_dir: keep state here over restarts; otherwise a temporary folder is used.
    :param faults: as for :meth:`Faults.add`.
    :param host: address to listen on.
    :param port: port of the API; 0 takes a free one.
    :param storage_port: port of the result storage; 0 takes a free one.
    :param storage_host: host name in result URLs.
    :param settings: fields of :class:`EmulatorConfig`.
    :raises TypeError: both ``config`` and its fields were given, or an unknown field.
    :raises OSError: a port is taken.
    """
    if config is None:
        config = EmulatorConfig(**settings)
    elif settings:
        raise TypeError(f"give either config or its fields, not both: {', '.join(settings)}")
    emulator = Emulator(config, data_dir, faults, host, port, storage_port, storage_host)
    try:
        yield emulator
    finally:
        emulator.close()


def connection_json(base_url: str, config: EmulatorConfig) -> str:
    """Return an Airflow connection to an emulator as JSON."""
    password = config.keys[0] if config.keys else "sk-emulator"
    connection = {"conn_type": "siliconflow", "password": password, "host": base_url}
    return json.dumps(connection, separators=(",", ":"))


def _json(body: Any, status: int = 200) -> web.Response:
    return web.Response(body=_encode(body), status=status, content_type="application/json")


def _xml_error(status: int, code: str, message: str) -> web.Response:
    error = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    text = f'<?xml version="1.0" encoding="UTF-8"?>\n{error}'
    return web.Response(text=text, status=status, content_type="application/xml")


def _fault_answer(fault: Fault) -> web.Response:
    if fault.kind == "redirect":
        return web.Response(status=302, headers={"Location": fault.location or "", **fault.headers})
    status = fault.status or 502
    if fault.kind == "html" or (fault.body is None and status in (502, 520, 522)):
        text = HTML_BODY.format(status=status)
        return web.Response(text=text, status=status, headers=fault.headers, content_type="text/html")
    body = fault.body
    if body is None:
        body = DEFAULT_BODIES.get(status, {"code": status, "message": f"Status {status}.", "data": None})
    answer = _json(body, status)
    answer.headers.update(fault.headers)
    return answer


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
        # As aiohttp makes it for the whole file: what a client compares when it goes on from here.
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
    headers[TRACE_HEADER] = f"ti_{secrets.token_hex(8)}"
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


async def _read_away(request: web.Request) -> None:
    """Read a refused upload to its end: a client that is still sending would not see the answer."""
    with contextlib.suppress(ConnectionError, web.HTTPException):
        while await request.content.readany():
            pass
