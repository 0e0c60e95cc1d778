"""Settings: what a connection may say, and which URLs are the API's own."""

from __future__ import annotations

from typing import Any

import pytest

from airflow_provider_siliconflow.api.exceptions import InvalidInputError
from airflow_provider_siliconflow.api.settings import ClientSettings


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"api_key": ""}, "no API key"),
        ({"api_key": "  "}, "no API key"),
        ({"api_key": "Bearer sk-1"}, "not an API key"),
        ({"api_key": "sk-\u00e9"}, "not an API key"),
        ({"base_url": "api.siliconflow.cn"}, "base URL"),
        ({"base_url": "ftp://api.siliconflow.cn/v1"}, "base URL"),
        ({"base_url": "http://[bad"}, "base URL"),
        ({"base_url": "http://h:port/v1"}, "base URL"),
        ({"base_url": "https://a..b/v1"}, "base URL"),
        ({"base_url": "https://h /v1"}, "base URL"),
        ({"base_url": "https://h\\/v1"}, "base URL"),
        ({"base_url": "https://me:1/pw@h/v1"}, "without user, query"),
        ({"base_url": "https://h/v1?key=1"}, "without user, query"),
        ({"base_url": "https://me:pw@h/v1"}, "without user, query"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": float("inf")}, "timeout"),
        ({"connect_timeout": float("nan")}, "connect_timeout"),
        ({"max_retries": -1}, "max_retries"),
        ({"headers": {"X-Team": "a\r\nX-Evil: 1"}}, "X-Team"),
        ({"headers": {"X Team": "a"}}, "X Team"),
        ({"proxies": {"https": "http://"}}, "https"),
        ({"proxies": {"https": "socks5://me:pw@p:1"}}, "https"),
        ({"proxies": {"https": '{"https": "http://me:pw@p:1"'}}, "https"),
        ({"proxies": {"https": "http://me:pw/pw@p:1"}}, "https"),
        ({"proxies": {"https": "http://me:1/pw@p:1"}}, "https"),
    ],
)
def test_settings_that_cannot_work(values: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidInputError, match=named) as caught:
        ClientSettings(**({"api_key": "sk-1"} | values))
    assert "pw" not in str(caught.value)


def test_settings_show_no_secret_and_keep_their_own_headers() -> None:
    headers = {"authorization": "Bearer other", "ACCEPT": "x", "X-Team": "hidden"}
    settings = ClientSettings(" sk-secret-key\n", base_url="https://H:443/v1/", headers=headers)
    assert "secret" not in repr(settings)
    assert "hidden" not in repr(settings)
    assert {name.lower(): value for name, value in settings.request_headers.items()} == {
        "authorization": "Bearer sk-secret-key",
        "accept": "application/json",
        "user-agent": "airflow-provider-siliconflow",
        "x-team": "hidden",
    }
    # Two headers of one name would both be sent.
    assert len(settings.request_headers) == 4


@pytest.mark.parametrize(
    ("url", "own"),
    [
        ("https://api.siliconflow.cn/v1/files/f/content", True),
        ("https://API.siliconflow.cn:443/x", True),
        ("http://api.siliconflow.cn/x", False),
        ("https://api.siliconflow.cn:8443/x", False),
        ("https://api.siliconflow.cn.evil.example/x", False),
        ("https://api.siliconflow.cn@evil.example/x", False),
        ("https://h:99999/x", False),
        ("https://evil.example\\@api.siliconflow.cn/x", False),
        ("https://api.siliconflow.cn\n/x", False),
        ("http://[bad", False),
    ],
)
def test_where_the_key_may_go(url: str, own: bool) -> None:
    assert ClientSettings("sk-1").owns(url) is own
