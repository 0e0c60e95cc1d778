"""The emulated service over HTTP: the routes of the API, the result storage, and the handling of each request."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import BodyPartReader, web

from airflow_provider_siliconflow.emulator.control import PREFIX, Control
from airflow_provider_siliconflow.emulator.fault_effects import FaultEffects, read_away
from airflow_provider_siliconflow.emulator.faults import TAKES_THE_ANSWER
from airflow_provider_siliconflow.emulator.journal import Journal, RecordedRequest
from airflow_provider_siliconflow.emulator.records import RESULT_KINDS
from airflow_provider_siliconflow.emulator.refusals import (
    DEFAULT_BODIES,
    ServiceError,
    invalid_parameter,
    not_found,
)
from airflow_provider_siliconflow.emulator.responses import (
    TRACE_HEADER,
    json_response,
    new_trace,
    storage_error,
)
from airflow_provider_siliconflow.emulator.rows import MAX_LINE_BYTES

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from airflow_provider_siliconflow.emulator.faults import Faults
    from airflow_provider_siliconflow.emulator.live import LiveCall
    from airflow_provider_siliconflow.emulator.service import EmulatedService

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

log = logging.getLogger(__name__)

#: Path below which the API lives.
API = "/v1"
_CHAT = "/chat/completions"
_CHUNK = 1 << 18

_STORAGE_ERRORS = {
    "ExpiredToken": ("AccessDenied", "Request has expired"),
    "SignatureDoesNotMatch": (
        "SignatureDoesNotMatch",
        "The request signature we calculated does not match the signature you provided.",
    ),
}


class _LiveAnswer(web.Response):
    """The answer to a row that was asked live, which is billed."""

    def __init__(self, call: LiveCall) -> None:
        super().__init__(
            body=call.content, content_type="text/event-stream" if call.stream else "application/json"
        )
        self.call = call


class Wire:
    """
    Answers requests with an :class:`EmulatedService`, subject to faults.

    :param service: state and rules.
    :param faults: rules for faults; shared, they may change at any time.
    :param journal: where requests are recorded.
    """

    def __init__(self, service: EmulatedService, faults: Faults, journal: Journal) -> None:
        self._service = service
        self._faults = faults
        self._journal = journal
        self._effects = FaultEffects(journal)
        self._control = Control(service, faults, journal)
        # Separate from the loop's own threads, which aiohttp needs to open the files that it sends.
        self._workers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="emulator-work")

    def api_app(self) -> web.Application:
        """Return the API with its control calls, for one port."""
        app = web.Application(middlewares=[self._api_middleware], client_max_size=MAX_LINE_BYTES)
        app.on_response_prepare.append(self._complete_headers)
        app.add_routes(
            [
                web.post(f"{API}/files", self._post_file),
                web.get(f"{API}/files", self._list_files),
                web.get(f"{API}/files/{{id}}", self._get_file),
                web.delete(f"{API}/files/{{id}}", self._delete_file),
                web.get(f"{API}/files/{{id}}/content", self._get_content),
                web.post(f"{API}/batches", self._post_batch),
                web.get(f"{API}/batches", self._list_batches),
                web.get(f"{API}/batches/{{id}}", self._get_batch),
                web.post(f"{API}/batches/{{id}}/cancel", self._cancel_batch),
                web.post(f"{API}{_CHAT}", self._post_chat),
                web.get(f"{API}/user/info", self._user_info),
                web.get(f"{API}/models", self._models),
                *self._control.routes(),
            ]
        )
        return app

    def storage_app(self) -> web.Application:
        """Return the result storage, for another port."""
        app = web.Application(middlewares=[self._storage_middleware])
        app.on_response_prepare.append(self._complete_headers)
        app.router.add_get("/results/{id}/{name}", self._get_results)
        return app

    def close(self) -> None:
        """Wait for the work that is under way."""
        self._workers.shutdown(wait=True, cancel_futures=True)

    # -- around every request ---------------------------------------------------------------------------

    @web.middleware
    async def _api_middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path.startswith(PREFIX):
            return await self._control.answer(request, handler)
        resource = request.match_info.route.resource
        route = "unknown"
        if resource is not None:
            route = resource.canonical.removeprefix(API).replace("{id}", "*")
        target = request.path.removeprefix(API)

        async def work() -> web.StreamResponse:
            try:
                scheme, _, key = request.headers.get("Authorization", "").partition(" ")
                self._service.check_key(key.strip() if scheme.lower() == "bearer" else None)
                return await handler(request)
            except ServiceError as error:
                await read_away(request)
                return json_response(error.body, error.status, error.headers)
            except (web.HTTPNotFound, web.HTTPMethodNotAllowed):
                return json_response(DEFAULT_BODIES[404], 404)

        return await self._answer(request, work, route, target, request.path_qs)

    @web.middleware
    async def _storage_middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if "Authorization" in request.headers:
            self._service.authorization_leaks += 1
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
                    return storage_error(403, *_STORAGE_ERRORS[error.body])
            except (web.HTTPNotFound, web.HTTPMethodNotAllowed):
                pass
            return storage_error(404, "NoSuchKey", "The specified key does not exist.")

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
        self._journal.arrived(request.method, route)
        fault = self._faults.take(request.method, target)
        status = 0
        correct: web.StreamResponse | None = None

        async def kept_work() -> web.StreamResponse:
            nonlocal correct
            correct = await work()
            return correct

        try:
            if fault is None:
                response = await kept_work()
            else:
                log.info("%s %s meets fault %s", request.method, path, fault.kind)
                response = await self._effects.answer(fault, request, kept_work)
            if request.transport is not None and not request.transport.is_closing():
                status = response.status
        finally:
            kind = None if fault is None else fault.kind
            self._journal.answered(RecordedRequest(request.method, path, route, status, arrived, kind))
            if isinstance(correct, _LiveAnswer) and (not status or kind in TAKES_THE_ANSWER):
                self._service.live.lose(correct.call)
        frequent = route == _CHAT or (request.method == "GET" and status < 400)
        level = logging.DEBUG if frequent else logging.INFO
        log.log(level, "%s %s -> %s", request.method, path, status or "connection closed")
        return response

    async def _complete_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        if request.path.startswith(PREFIX):
            return
        response.headers[TRACE_HEADER] = new_trace()
        if self._service.config.clock_offset_seconds:
            response.headers["Date"] = formatdate(self._service.stated_now(), usegmt=True)

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._workers, lambda: function(*arguments, **named))

    # -- the API ----------------------------------------------------------------------------------------

    async def _post_file(self, request: web.Request) -> web.StreamResponse:
        if not request.content_type.startswith("multipart/"):
            raise invalid_parameter("The body must be multipart/form-data.")
        spooled = self._service.spool_path()
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
                raise invalid_parameter(f"The form cannot be read: {error}") from None
            if filename is None:
                raise invalid_parameter("file is required.")
            answer = await self._in_thread(self._service.add_file, filename, purpose, spooled, take=True)
        finally:
            spooled.unlink(missing_ok=True)
        return json_response(answer)

    async def _spool(self, part: BodyPartReader, path: Path) -> None:
        limit = self._service.config.max_file_bytes
        size = 0
        with path.open("wb") as spooled:
            while chunk := await part.read_chunk(_CHUNK):
                size += len(chunk)
                if size <= limit:
                    spooled.write(chunk)
        # Not earlier: a client that is cut off while it sends never sees the reason.
        if size > limit:
            raise self._service.file_too_large()

    async def _list_files(self, request: web.Request) -> web.StreamResponse:
        return json_response(
            self._service.list_files(request.query.get("purpose"), request.query.get("limit"))
        )

    async def _get_file(self, request: web.Request) -> web.StreamResponse:
        return json_response(self._service.get_file(request.match_info["id"]))

    async def _delete_file(self, request: web.Request) -> web.StreamResponse:
        return json_response(self._service.delete_file(request.match_info["id"]))

    async def _get_content(self, request: web.Request) -> web.StreamResponse:
        path = await self._in_thread(self._service.open_content, request.match_info["id"])
        return web.FileResponse(path, headers={"Content-Type": "application/octet-stream"})

    async def _post_chat(self, request: web.Request) -> web.StreamResponse:
        call = self._service.live.ask(await _json_body(request))
        await asyncio.sleep(call.seconds)
        # Also if the client has gone meanwhile: the service does the work, and bills it.
        self._service.live.answer(call)
        return _LiveAnswer(call)

    async def _post_batch(self, request: web.Request) -> web.StreamResponse:
        body = await _json_body(request)
        if self._service.creation_is_slow(body):
            return json_response(await self._in_thread(self._service.create_batch, body))
        return json_response(self._service.create_batch(body))

    async def _list_batches(self, request: web.Request) -> web.StreamResponse:
        return json_response(
            self._service.list_batches(request.query.get("limit"), request.query.get("after"))
        )

    async def _get_batch(self, request: web.Request) -> web.StreamResponse:
        return json_response(self._service.get_batch(request.match_info["id"]))

    async def _cancel_batch(self, request: web.Request) -> web.StreamResponse:
        return json_response(self._service.cancel_batch(request.match_info["id"]))

    async def _user_info(self, request: web.Request) -> web.StreamResponse:
        return json_response(self._service.user_info())

    async def _models(self, request: web.Request) -> web.StreamResponse:
        return json_response(self._service.models(request.query.get("sub_type")))

    async def _get_results(self, request: web.Request) -> web.StreamResponse:
        self._service.check_signature(request.path, request.query)
        for kind in RESULT_KINDS:
            if request.match_info["name"] == f"{kind}.jsonl":
                path = await self._in_thread(self._service.open_results, request.match_info["id"], kind)
                return web.FileResponse(path, headers={"Content-Type": "application/octet-stream"})
        raise not_found()


async def _json_body(request: web.Request) -> Any:
    try:
        return msgspec.json.decode(await request.read())
    except (msgspec.DecodeError, RecursionError) as error:
        raise invalid_parameter(f"The body is not valid JSON: {error}") from None
