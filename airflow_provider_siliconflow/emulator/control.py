"""The emulator's own calls, below ``/_emulator/``, with which tests inspect and change it."""

from __future__ import annotations

import asyncio
import ipaddress
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec
from aiohttp import web

from airflow_provider_siliconflow.emulator.faults import Fault
from airflow_provider_siliconflow.emulator.refusals import ServiceError
from airflow_provider_siliconflow.emulator.responses import json_response, odd_json_response

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from airflow_provider_siliconflow.emulator.faults import Faults
    from airflow_provider_siliconflow.emulator.journal import Journal
    from airflow_provider_siliconflow.emulator.service import EmulatedService

PREFIX = "/_emulator/"


class Control:
    """Handlers of the control calls. They need no key."""

    def __init__(self, service: EmulatedService, faults: Faults, journal: Journal) -> None:
        self._service = service
        self._faults = faults
        self._journal = journal

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get(f"{PREFIX}state", self._state),
            web.get(f"{PREFIX}bill", self._bill),
            web.get(f"{PREFIX}live", self._live),
            web.get(f"{PREFIX}requests", self._requests),
            web.get(f"{PREFIX}faults", self._list_faults),
            web.post(f"{PREFIX}faults", self._add_fault),
            web.delete(f"{PREFIX}faults", self._clear_faults),
            web.post(f"{PREFIX}release", self._release),
            web.post(f"{PREFIX}clock", self._clock),
            web.get(f"{PREFIX}config", self._get_config),
            web.post(f"{PREFIX}config", self._config),
            web.post(f"{PREFIX}batches/{{id}}/status", self._status),
            web.post(f"{PREFIX}batches/{{id}}/cancel", self._cancel),
            web.post(f"{PREFIX}files/{{id}}/forget", self._forget),
            web.post(f"{PREFIX}seed", self._seed),
        ]

    async def answer(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """
        Answer a control call; errors are returned as ``{"error": ...}``.

        A page in the user's browser must not control the emulator. It cannot send this content type to another origin,
        and if its own host name resolves to this machine, that name is still in ``Host``.
        """
        if not _names_this_machine(request.headers.get("Host", "")):
            return json_response(
                {"error": "control calls need a loopback Host: 127.0.0.1, [::1] or localhost"}, 403
            )
        if request.method not in ("GET", "HEAD") and request.content_type != "application/json":
            return json_response(
                {"error": f"{request.method} needs Content-Type: application/json, without a body too"}, 415
            )
        try:
            return await handler(request)
        except ServiceError as error:
            return json_response(error.body, error.status)
        except (ValueError, TypeError, RecursionError) as error:
            return json_response({"error": str(error)}, 400)
        except web.HTTPException as error:
            return json_response({"error": error.reason}, error.status)

    async def _state(self, request: web.Request) -> web.StreamResponse:
        state = self._service.state(batches=request.query.get("batches") != "0")
        state["request_counts"] = dict(self._journal.counts)
        state["held"] = self._journal.held
        state["faults"] = [rule.as_dict() for rule in self._faults.rules]
        return odd_json_response(state)

    async def _bill(self, request: web.Request) -> web.StreamResponse:
        return json_response((await asyncio.to_thread(self._service.bill)).as_dict())

    async def _live(self, request: web.Request) -> web.StreamResponse:
        return json_response(self._service.live.figures().as_dict())

    async def _requests(self, request: web.Request) -> web.StreamResponse:
        return json_response([asdict(one) for one in self._journal.requests])

    async def _list_faults(self, request: web.Request) -> web.StreamResponse:
        return odd_json_response([rule.as_dict() for rule in self._faults.rules])

    async def _add_fault(self, request: web.Request) -> web.StreamResponse:
        given = await _body(request, (dict, list, str))
        # All of them are read before the first is added, so that an invalid one adds none.
        faults = [Fault.parse(spec) for spec in (given if isinstance(given, list) else [given])]
        return odd_json_response([self._faults.add(fault).as_dict() for fault in faults])

    async def _clear_faults(self, request: web.Request) -> web.StreamResponse:
        self._faults.clear()
        return json_response([])

    async def _release(self, request: web.Request) -> web.StreamResponse:
        return json_response({"released": self._journal.release()})

    async def _clock(self, request: web.Request) -> web.StreamResponse:
        given = await _body(request, dict)
        self._service.advance(msgspec.convert(given.get("advance"), float))
        return json_response({"now": self._service.now()})

    async def _get_config(self, request: web.Request) -> web.StreamResponse:
        return json_response(self._visible_config())

    async def _config(self, request: web.Request) -> web.StreamResponse:
        self._service.configure(await _body(request, dict))
        return json_response(self._visible_config())

    async def _status(self, request: web.Request) -> web.StreamResponse:
        given = await _body(request, dict)
        status = msgspec.convert(given.get("status"), str | None)
        return json_response(self._service.force_status(request.match_info["id"], status))

    async def _cancel(self, request: web.Request) -> web.StreamResponse:
        given = await _body(request, dict)
        at_once = msgspec.convert(given.get("at_once", False), bool)
        return json_response(self._service.cancel_on_console(request.match_info["id"], at_once=at_once))

    async def _forget(self, request: web.Request) -> web.StreamResponse:
        given = await _body(request, dict)
        still_listed = msgspec.convert(given.get("still_listed", False), bool)
        self._service.forget_file(request.match_info["id"], still_listed=still_listed)
        return json_response({"forgotten": request.match_info["id"]})

    async def _seed(self, request: web.Request) -> web.StreamResponse:
        given = await _body(request, dict)
        self._service.seed_foreign_batches(
            msgspec.convert(given.get("foreign_batches"), int),
            msgspec.convert(given.get("age_seconds", 0), float),
        )
        return json_response({"batch_count": self._service.state(batches=False)["batch_count"]})

    def _visible_config(self) -> dict[str, Any]:
        config = asdict(self._service.config)
        # The control calls need no key, so they must not reveal the keys.
        config["keys"] = len(config["keys"])
        config["answers"] = None if config["answers"] is None else str(config["answers"])
        return config


async def _body(request: web.Request, wanted: type | tuple[type, ...]) -> Any:
    # Not msgspec, which refuses some values of faults, such as lone surrogates.
    body = json.loads(await request.read() or b"{}")
    if not isinstance(body, wanted):
        raise ValueError("the body has the wrong JSON type")
    return body


def _names_this_machine(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
