"""Connections in every form Airflow keeps them: where they point, what they may hold, what is masked."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from airflow_provider_siliconflow.api.exceptions import (
    InvalidInputError,
)
from airflow_provider_siliconflow.hooks.siliconflow import SiliconFlowHook

if TYPE_CHECKING:
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
        "headers": '{"X-Team": "nlp"}',
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


def test_secrets_of_a_connection_are_masked(connect: Any) -> None:
    extra = {"headers": {"X-Token": "header-secret"}, "proxies": {"https": "http://me:proxy-secret@p:1"}}
    _ = connect({"extra": extra}).settings
    try:
        from airflow.sdk.log import redact
    except ImportError:
        from airflow.utils.log.secrets_masker import redact
    shown = redact("sk-secret-key, header-secret, proxy-secret and the rest")
    assert "secret" not in shown
    assert "and the rest" in shown
