"""Connections in every form Airflow keeps them: where they point, what they may hold, what is masked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from airflow_provider_siliconflow.api.exceptions import (
    InvalidInputError,
)
from airflow_provider_siliconflow.hooks.connection import aread_connection, read_connection
from airflow_provider_siliconflow.hooks.connection_form import CONN_FIELDS
from airflow_provider_siliconflow.hooks.siliconflow import SiliconFlowHook

if TYPE_CHECKING:
    from pytest_mock import MockerFixture

    from airflow_provider_siliconflow.emulator import Emulator


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | dict[str, Any]], SiliconFlowHook]:
    """Defines the default connection, as URI or JSON, and returns a hook for it."""

    def make(connection: str | dict[str, Any]) -> SiliconFlowHook:
        if isinstance(connection, dict):
            connection = json.dumps({"conn_type": "siliconflow", "password": "sk-secret-key"} | connection)
        monkeypatch.setenv("AIRFLOW_CONN_SILICONFLOW_DEFAULT", connection)
        return SiliconFlowHook()

    return make


@pytest.mark.parametrize(
    ("connection", "base_url"),
    [
        ({}, "https://api.siliconflow.cn/v1"),
        ({"host": " "}, "https://api.siliconflow.cn/v1"),
        ({"host": "http://127.0.0.1:8787/v1/"}, "http://127.0.0.1:8787/v1"),
        ({"host": "https://api.siliconflow.com"}, "https://api.siliconflow.com/v1"),
        ({"host": "https://gateway.example/"}, "https://gateway.example/v1"),
        ({"host": "https://gateway.example", "schema": "/"}, "https://gateway.example"),
        ({"host": "http://gateway/v2/", "port": 8080}, "http://gateway:8080/v2"),
        ({"host": "api.siliconflow.com"}, "https://api.siliconflow.com/v1"),
        ({"host": "api.siliconflow.com/v1"}, "https://api.siliconflow.com/v1"),
        ({"host": "gateway", "port": 8443, "schema": "llm/v1"}, "https://gateway:8443/llm/v1"),
        ({"host": "http://gateway", "port": 8080}, "http://gateway:8080/v1"),
        ("siliconflow://:sk-secret-key@", "https://api.siliconflow.cn/v1"),
        ("siliconflow://:sk-secret-key@gateway:8443/v2", "https://gateway:8443/v2"),
        ("siliconflow://http://:sk-secret-key@127.0.0.1:8787/v1", "http://127.0.0.1:8787/v1"),
        ("siliconflow://:sk-secret-key@http%3A%2F%2F127.0.0.1%3A8787%2Fv1", "http://127.0.0.1:8787/v1"),
    ],
)
def test_where_a_connection_points(connect: Any, connection: Any, base_url: str) -> None:
    settings = connect(connection).settings
    assert (settings.base_url, settings.api_key) == (base_url, "sk-secret-key")


def test_a_connection_survives_its_own_uri(connect: Any, emulator: Emulator) -> None:
    from airflow.models import Connection

    made = Connection(
        conn_type="siliconflow", host=emulator.base_url, password="sk-/?@:", extra=json.dumps({"timeout": 7})
    )
    settings = connect(made.get_uri()).settings
    assert (settings.base_url, settings.api_key, settings.timeout) == (emulator.base_url, "sk-/?@:", 7)


def test_extras_as_a_form_stores_them(connect: Any) -> None:
    """Up to Airflow 3.1 every field of the form is a string, and one left empty is there as well."""
    extra = {
        "timeout": "7.5",
        "connect_timeout": "",
        "max_retries": "2",
        "proxies": '{"https": "proxy:3128"}',
        "verify": "False",
        "secret_headers": '{"X-Team": "nlp"}',
    }
    settings = connect({"extra": json.dumps(extra)}).settings
    assert (settings.timeout, settings.connect_timeout, settings.max_retries) == (7.5, 10.0, 2)
    assert settings.proxies == {"https": "http://proxy:3128"}
    assert settings.verify is False
    assert settings.headers == {"X-Team": "nlp"}


@pytest.mark.parametrize(
    ("extra", "settings"),
    [
        ({"max_retries": 0, "timeout": 5}, {"max_retries": 0, "timeout": 5.0}),
        (
            {"timeout": None, "verify": None, "headers": None},
            {"timeout": 60.0, "verify": True, "headers": {}},
        ),
        ({"proxies": "http://p:1"}, {"proxies": {"http": "http://p:1", "https": "http://p:1"}}),
        ({"proxies": {"http": "http://p:1"}}, {"proxies": {"http": "http://p:1"}}),
        ({"verify": "/etc/ca.pem"}, {"verify": "/etc/ca.pem"}),
        ({"verify": "true"}, {"verify": True}),
        ({"something": "else"}, {}),
    ],
)
def test_extras(connect: Any, extra: dict[str, Any], settings: dict[str, Any]) -> None:
    found = connect({"extra": extra}).settings
    assert {name: getattr(found, name) for name in settings} == settings


@pytest.mark.parametrize(
    ("connection", "named"),
    [
        ({"password": ""}, "no API key"),
        ({"password": None}, "no API key"),
        ({"host": "ftp://api.siliconflow.cn"}, "base URL"),
        ({"extra": {"timeout": "soon"}}, "timeout"),
        ({"extra": {"timeout": "-1"}}, "timeout"),
        ({"extra": {"max_retries": "many"}}, "max_retries"),
        ({"extra": {"max_retries": float("inf")}}, "max_retries"),
        ({"extra": {"headers": "X-Team: nlp"}}, "headers"),
        ({"extra": {"headers": {"X-Team": 7}}}, "headers"),
        ({"extra": {"secret_headers": "X-Team: nlp"}}, "secret_headers must be"),
        ({"extra": {"headers": '{"X-Team": "pass'}}, "headers starts with '{' but is not JSON"),
        (
            {"extra": {"proxies": '{"https": "http://me:pass@p:1",}'}},
            "proxies starts with '{' but is not JSON",
        ),
        ({"extra": {"proxies": "http://me:pa/pass@p:1"}}, "proxies"),
        ({"host": "https://me:pa/pass@h/v1"}, "host"),
        ({"extra": {"proxies": ["http://p:1"]}}, "proxies"),
    ],
)
def test_a_connection_that_cannot_work_names_its_field(connect: Any, connection: Any, named: str) -> None:
    with pytest.raises(InvalidInputError, match=named):
        _ = connect(connection).settings
    ok, message = connect(connection).test_connection()
    assert not ok
    assert named in message
    assert "pass@" not in message


def test_a_connection_that_is_not_there_is_named() -> None:
    with pytest.raises(InvalidInputError, match="'no_such'"):
        _ = SiliconFlowHook("no_such").settings


def redacted(value: Any) -> Any:
    """What Airflow shows of a value, in its logs and in its UI."""
    try:
        from airflow.sdk.log import redact
    except ImportError:
        from airflow.utils.log.secrets_masker import redact
    return redact(value)


@pytest.mark.parametrize("process", ["worker", "triggerer"])
def test_secrets_of_a_connection_are_masked_in_whichever_process_reads_it(
    monkeypatch: pytest.MonkeyPatch, process: str
) -> None:
    # Of its own for each process, since what was masked once stays masked.
    extra = {
        "headers": {"X-Token": f"{process}-header"},
        "secret_headers": json.dumps({"X-Other": f"{process}-formheader"}),
        "proxies": {"https": f"http://me:{process}-pa%2Fss@p:1"},
    }
    connection = {"conn_type": "siliconflow", "password": f" {process}-key ", "extra": extra}
    monkeypatch.setenv("AIRFLOW_CONN_SILICONFLOW_DEFAULT", json.dumps(connection))
    if process == "worker":
        settings = read_connection("siliconflow_default")
    else:
        settings = asyncio.run(aread_connection("siliconflow_default"))
    assert settings.headers == {"X-Token": f"{process}-header", "X-Other": f"{process}-formheader"}
    words = ["key", "header", "formheader", "pa%2Fss", "pa/ss"]
    shown = redacted(" ".join(f"{process}-{word}" for word in words) + " and the rest")
    assert process not in shown
    assert "and the rest" in shown


@pytest.mark.parametrize("connection", [{"password": "sk-masked-though-wrong", "host": "ftp://x"}])
def test_a_key_is_masked_before_the_connection_is_found_to_be_wrong(connect: Any, connection: Any) -> None:
    with pytest.raises(InvalidInputError):
        _ = connect(connection).settings
    assert "masked-though-wrong" not in redacted("sk-masked-though-wrong")


def test_a_triggerer_masks_a_secret_once(monkeypatch: pytest.MonkeyPatch, mocker: MockerFixture) -> None:
    """Each is a round trip between two processes, and thousands of waits share a connection."""
    mask = mocker.patch("airflow_provider_siliconflow.hooks.connection._amask")
    connection = {"conn_type": "siliconflow", "password": "sk-shared-by-many-waits"}
    monkeypatch.setenv("AIRFLOW_CONN_SILICONFLOW_DEFAULT", json.dumps(connection))
    for _ in range(3):
        asyncio.run(aread_connection("siliconflow_default"))
    assert mask.await_count == 1


def test_airflow_hides_what_the_form_stores() -> None:
    """By the names of the fields: the UI, the API and the CLI show the rest of an extra as it is."""
    shown = redacted({"secret_headers": '{"X-Token": "abc"}', "proxies": "http://me:pass@p:1", "timeout": 5})
    assert shown == {"secret_headers": "***", "proxies": "***", "timeout": 5}
    assert {"secret_headers", "proxies"} <= set(CONN_FIELDS)
    assert "headers" not in CONN_FIELDS


@pytest.mark.parametrize("kind", ["http", "openai", "generic"])
def test_a_connection_of_another_type_is_refused(
    connect: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Its password would go to another service, or to this one's default host."""
    hook = connect({"conn_type": kind, "password": "another-secret"})
    for read in (lambda: hook.settings, lambda: asyncio.run(aread_connection("siliconflow_default"))):
        with pytest.raises(InvalidInputError, match=f"'siliconflow_default' is of type '{kind}'") as caught:
            read()
        assert "another-secret" not in str(caught.value)


def test_secret_headers_win(connect: Any) -> None:
    extra = {"headers": {"X-A": "1", "X-B": "2"}, "secret_headers": {"X-B": "3"}}
    assert connect({"extra": extra}).settings.headers == {"X-A": "1", "X-B": "3"}
