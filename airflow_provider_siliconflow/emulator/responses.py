"""HTTP answers in the forms the service uses."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from airflow_provider_siliconflow.emulator.odd_json import encode_odd

if TYPE_CHECKING:
    from collections.abc import Mapping

TRACE_HEADER = "x-siliconcloud-trace-id"
_encode = msgspec.json.Encoder().encode


def new_trace() -> str:
    """Return a value for ``TRACE_HEADER``, which every answer of the service has."""
    return f"ti_{secrets.token_hex(8)}"


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """Return a JSON answer."""
    return web.Response(body=_encode(body), status=status, headers=headers, content_type="application/json")


def odd_json_response(body: Any, status: int = 200) -> web.Response:
    """Return a JSON answer with values that no well-behaved service sends."""
    return web.Response(body=encode_odd(body), status=status, content_type="application/json")


def storage_error(status: int, code: str, message: str) -> web.Response:
    """Return an error as the result storage sends it."""
    error = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    text = f'<?xml version="1.0" encoding="UTF-8"?>\n{error}'
    return web.Response(text=text, status=status, content_type="application/xml")
