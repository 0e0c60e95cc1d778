"""An odd connection is refused by an error of ours that shows nothing secret, not even in its causes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from airflow_provider_siliconflow.api.async_client import AsyncSiliconFlowClient
from airflow_provider_siliconflow.api.client import SiliconFlowClient
from airflow_provider_siliconflow.api.exceptions import InvalidInputError
from airflow_provider_siliconflow.hooks.connection import aread_connection, read_connection

pytestmark = pytest.mark.usefixtures("no_proxies", "own_secrets")

SECRET = "secret-0123456789abcdef"

EXTRAS: dict[str, Any] = {
    "a list": ["x"],
    "a number": 5,
    "true": True,
    "an endless timeout": {"timeout": 1e300},
    "a timeout that no socket takes": {"connect_timeout": 1e10},
    "a verify with NUL": {"verify": "\0"},
    "a password beyond Latin-1": {"proxies": f"http://u:%E5%AF%86{SECRET}@127.0.0.1:1"},
    "proxies cut": {"proxies": f'{{"https": "http://u:{SECRET}@h'},
    "headers cut": {"secret_headers": f'{{"X": "{SECRET}'},
    "headers in a list": {"headers": [f"X: {SECRET}"]},
    "a header of two lines": {"headers": {"X": f"{SECRET}\r\nY: 1"}},
    "a proxy's port": {"proxies": f"http://u:{SECRET}@h:99999"},
}


CONNECT: dict[str, Callable[[], Any]] = {
    "worker": lambda: SiliconFlowClient(read_connection("odd")),
    "triggerer": lambda: AsyncSiliconFlowClient(asyncio.run(aread_connection("odd"))),
}


def chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize("where", CONNECT)
@pytest.mark.parametrize("extra", EXTRAS)
def test_an_odd_extra_is_refused(monkeypatch: pytest.MonkeyPatch, extra: str, where: str) -> None:
    fields = {"conn_type": "siliconflow", "host": "http://127.0.0.1:9", "password": "sk-0123456789abcdef"}
    monkeypatch.setenv("AIRFLOW_CONN_ODD", json.dumps(fields | {"extra": EXTRAS[extra]}))
    with pytest.raises(InvalidInputError) as caught:
        CONNECT[where]()
    for error in chain(caught.value):
        assert (
            SECRET
            not in f"{error!r} {vars(error)} {getattr(error, 'doc', '')} {getattr(error, 'object', '')}"
        )


def test_the_environments_proxy_with_a_password_beyond_latin_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://u:%E5%AF%86{SECRET}@127.0.0.1:1")
    monkeypatch.setenv("AIRFLOW_CONN_ODD", "siliconflow://:sk-0123456789abcdef@http%3A%2F%2Fapi.invalid")
    with pytest.raises(InvalidInputError, match="Latin-1"):
        AsyncSiliconFlowClient(asyncio.run(aread_connection("odd")))
