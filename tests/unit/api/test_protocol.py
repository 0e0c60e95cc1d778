"""The protocol without a network: how answers are read, what is sent again, which arguments are refused."""

from __future__ import annotations

import json
import re
import time
from datetime import timedelta
from email.utils import formatdate
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_provider_siliconflow.api import arguments, protocol
from airflow_provider_siliconflow.api.exceptions import (
    APIError,
    AuthenticationError,
    InsufficientBalanceError,
    InvalidInputError,
    InvalidRequestError,
    NotFoundError,
    NotSentError,
    PermissionDeniedError,
    RateLimitedError,
    ServiceUnavailableError,
    UnexpectedAnswerError,
)
from airflow_provider_siliconflow.api.models import Batch
from airflow_provider_siliconflow.api.redaction import redact
from airflow_provider_siliconflow.api.settings import ClientSettings

SETTINGS = ClientSettings("sk-secret-key")
TRACE = {"x-siliconcloud-trace-id": "ti_7"}


def refuse(status: int, body: bytes, headers: dict[str, str] | None = None) -> Any:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the tests look at the class themselves
        protocol.get_batch("batch_1").answer(status, headers or {}, body, SETTINGS)
    return caught.value


@pytest.mark.parametrize(
    ("status", "body", "kind", "code", "words"),
    [
        (400, b'{"code":20012,"message":"Model does not exist.","data":null}', InvalidRequestError, "20012", "Model"),
        (400, b'{"code":20015,"message":"bad","data":null}', InvalidRequestError, "20015", "bad"),
        (401, b'"Invalid token"', AuthenticationError, None, "Invalid token"),
        (401, b'"Api key is invalid"', AuthenticationError, None, "not interchangeable"),
        (402, b'{"code":30001,"message":"Sorry"}', InsufficientBalanceError, "30001", "charge the account"),
        (403, b'{"code":30001,"message":"Sorry"}', InsufficientBalanceError, "30001", "Sorry"),
        (403, b'"Forbidden"', PermissionDeniedError, None, "Forbidden"),
        (403, b'{"code":30003,"message":"Model disabled."}', PermissionDeniedError, "30003", "Model disabled"),
        (404, b'"404 page not found"', NotFoundError, None, "page not found"),
        (404, b"404 page not found\n", NotFoundError, None, "page not found"),
        (413, b"", InvalidRequestError, None, "an empty body"),
        (429, b'{"message":"TPM limit reached.","data":null}', RateLimitedError, None, "TPM"),
        (500, b"", ServiceUnavailableError, None, "an empty body"),
        (502, b"<html><b>502</b>\n<hr>openresty</html>", ServiceUnavailableError, None, "an HTML page: 502 openresty"),
        (503, b'{"code":50505,"message":"overloaded","data":"string"}', ServiceUnavailableError, "50505", "overloaded"),
        (504, b'"upstream timed out"', ServiceUnavailableError, None, "upstream"),
        (408, b'"Request Timeout"', ServiceUnavailableError, None, "Timeout"),
        (425, b"[1]", ServiceUnavailableError, None, "[1]"),
        (400, b'{"error":{"code":"invalid","message":"nested"}}', InvalidRequestError, "invalid", "nested"),
        (400, b'{"error":"in words"}', InvalidRequestError, None, "in words"),
    ],
)  # fmt: skip
def test_error_answers(status: int, body: bytes, kind: type[APIError], code: str | None, words: str) -> None:
    error = refuse(status, body, TRACE)
    assert type(error) is kind
    assert (error.status_code, error.code, error.trace_id) == (status, code, "ti_7")
    for part in ("GET /batches/batch_1", f"HTTP {status}", "ti_7", words):
        assert part in str(error)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ({"code": 20015, "message": "bad", "status": False, "data": None}, InvalidRequestError),
        ({"code": 20012, "message": "Model does not exist.", "data": None}, InvalidRequestError),
        ({"code": 30001, "message": "Sorry", "status": False}, InsufficientBalanceError),
        ({"code": 50505, "message": "busy", "status": False}, ServiceUnavailableError),
        ({"code": 401, "message": "Invalid token", "status": False}, AuthenticationError),
    ],
)
def test_a_refusal_in_an_envelope_under_status_200(body: dict[str, Any], kind: type[APIError]) -> None:
    error = refuse(200, json.dumps(body).encode())
    assert type(error) is kind
    # It was refused in words: nobody has to search for a batch that it might have made.
    assert not protocol.leaves_effect_open(error)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>login</html>",
        b'{"id":"batch_1","sta',
        b"null",
        b"[]",
        b"7",
        b'{"data":{}}',
        b"\xff",
        b"[" * 100_000,
    ],
)
def test_a_success_that_is_none(body: bytes) -> None:
    error = refuse(200, body, TRACE)
    assert type(error) is UnexpectedAnswerError
    assert "ti_7" in str(error)
    assert protocol.leaves_effect_open(error)


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("https://other.example/v1/batches?ticket=SECRET", "https://other.example/v1/batches,"),
        ("http://[bad?SECRET", "http://[bad,"),
        ("", "nowhere"),
    ],
)
def test_a_redirect_is_not_followed_and_says_where_to(location: str, shown: str) -> None:
    error = refuse(302, b"", {"Location": location} | TRACE)
    assert type(error) is UnexpectedAnswerError
    assert shown in str(error)
    assert "ti_7" in str(error)
    assert "SECRET" not in str(error)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("3", 3),
        ("0.5", 0.5),
        ("-4", 0),
        ("1e9", protocol.RETRY_AFTER_LIMIT),
        ("nan", None),
        ("", None),
        ("soon", None),
        ("Sat, 01 Jan 999999999999 00:00:00 GMT", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
    ],
)
def test_retry_after(value: str, seconds: float | None) -> None:
    assert refuse(429, b"", {"Retry-After": value}).retry_after == seconds


def test_retry_after_as_a_date() -> None:
    error = refuse(503, b"", {"Retry-After": formatdate(time.time() + 120, usegmt=True)})
    assert 110 < error.retry_after <= 120
    # It is honoured, whatever the backoff alone would say.
    assert protocol.backoff_delay(1, error, base=0.01, limit=30) >= error.retry_after


def test_backoff_doubles_up_to_its_limit() -> None:
    delays = [protocol.backoff_delay(attempt, None, base=1, limit=30) for attempt in (1, 2, 3, 50, 5000)]
    for delay, middle in zip(delays, (1, 2, 4, 30, 30), strict=True):
        assert 0.8 * middle <= delay <= 1.2 * middle


@pytest.mark.parametrize(
    ("error", "no_effect", "transient"),
    [
        (NotSentError("x"), True, True),
        (RateLimitedError("x", status_code=429), True, True),
        (ServiceUnavailableError("System is overloaded", status_code=503), True, True),
        (ServiceUnavailableError("x", status_code=503, code="50603"), True, True),
        (ServiceUnavailableError("x", status_code=503), False, True),
        (ServiceUnavailableError("overloaded", status_code=502), False, True),
        (protocol.NoAnswerError("x"), False, True),
        (UnexpectedAnswerError("x"), False, True),
        (InvalidRequestError("x", status_code=400), False, False),
        (AuthenticationError("x", status_code=401), False, False),
        (InsufficientBalanceError("x", status_code=402), False, False),
        (InvalidInputError("x"), False, False),
    ],
)
def test_what_is_worth_another_try(error: Exception, no_effect: bool, transient: bool) -> None:
    assert (protocol.had_no_effect(error), protocol.is_transient(error)) == (no_effect, transient)
    assert protocol.leaves_effect_open(error) == (transient and not no_effect)


@pytest.mark.parametrize(
    "text",
    [
        "key sk-secret-key is wrong",
        "Authorization: Bearer sk-secret-other=",
        "https://h/p?X-Amz-Signature=sk-secret",
        r'{"url":"https:\/\/h\/p?a=1&X-Amz-Signature=sk-secret"}',
        r'{"url":"https://h/p?a=1\u0026X-Amz-Signature=sk-secret"}',
        "Max retries exceeded with url: /results/o.jsonl?X-Amz-Signature=sk-secret (Caused by ...)",
        "HTTPS://user:sk-secret@H/p#sk-secret",
        "socks5://user:p@sk-secret@h",
        "https://user:p?sk-secret@h/p",
    ],
)
def test_redaction(text: str) -> None:
    assert "sk-secret" not in redact(text, SETTINGS)


piece = st.text(alphabet="a/.:?#=&@ \\\"'<", max_size=6)


@given(piece, piece, piece, piece)
def test_no_signature_survives_whatever_is_around_it(before: str, path: str, key: str, after: str) -> None:
    path, key = (re.sub(r"[\s\"'<>]", "", part) for part in (path, key))
    assert "SECRET" not in redact(f"{before}https://h{path}?{key}=SECRET{after}")


def test_redaction_of_a_long_text_takes_no_time() -> None:
    """A refused picture is repeated in base64, which is full of slashes."""
    began = time.monotonic()
    redact("/a" * 100_000 + "/a?" * 100_000 + "https://" * 100_000 + "?")
    assert time.monotonic() - began < 2


def test_a_text_that_was_cut_within_a_character_can_be_written() -> None:
    error = refuse(400, b'{"message":"no \\ud83d \\ud83d\\ude00"}')
    assert error.message.encode().decode() == "no \ufffd \U0001f600"


def test_redaction_keeps_the_rest() -> None:
    said = redact('<a href="https://h/p?sig=1">10 tokens/s? yes, a=b</a>', SETTINGS)
    assert said == '<a href="https://h/p">10 tokens/s? yes, a=b</a>'


# Settings ---------------------------------------------------------------------------------------------------


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


# Arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "window"),
    [("24h", "24h"), (24, "24h"), (" 336 h ", "336h"), ("48", "48h"), (timedelta(days=14), "336h")],
)
def test_completion_window(value: Any, window: str) -> None:
    assert arguments.check_completion_window(value) == window


@pytest.mark.parametrize(
    "value",
    ["23h", 337, "1d", "", None, True, 24.0, "24.5h", "-24h", timedelta(hours=24, minutes=1), timedelta(0)],
)
def test_completion_window_is_refused(value: Any) -> None:
    with pytest.raises(InvalidInputError, match="completion_window"):
        arguments.check_completion_window(value)


def test_metadata_at_its_limits() -> None:
    fits = {f"{n:02d}" + "k" * 62: "v" * 512 for n in range(16)}
    assert arguments.check_metadata(fits) == fits
    assert arguments.check_metadata(None) == {}


@pytest.mark.parametrize(
    "value",
    [
        {str(n): "" for n in range(17)},
        {"k" * 65: ""},
        {"": ""},
        {"k": "v" * 513},
        {"k": 1},
        {"k": "\ud800"},
        {"\ud800": "v"},
        {1: "v"},
        ["k"],
        "k=v",
    ],
)
def test_metadata_is_refused(value: Any) -> None:
    with pytest.raises(InvalidInputError, match="metadata"):
        arguments.check_metadata(value)


@pytest.mark.parametrize(
    "value",
    [
        "Qwen/Qwen3-32B",
        ["m"],
        {"model": ""},
        {"model": None},
        {"model": 3},
        {"model": "\ud800"},
        {1: 2},
        {"t": {1, 2}},
    ],
)
def test_replace_is_refused(value: Any) -> None:
    with pytest.raises(InvalidInputError, match="replace"):
        arguments.check_replace(value)


@pytest.mark.parametrize("value", [None, "", "  ", "None", "null", 7, ["a"]])
def test_an_id_that_is_none(value: Any) -> None:
    with pytest.raises(InvalidInputError, match="input_file_id"):
        arguments.check_identifier("input_file_id", value)


def test_several_ids() -> None:
    assert arguments.check_identifiers("batch_id", ["b", " a", "b"]) == ["b", "a"]
    assert arguments.check_identifiers("batch_id", "a") == ["a"]
    with pytest.raises(InvalidInputError, match="batch_id"):
        arguments.check_identifiers("batch_id", [])


def test_an_id_stays_one_part_of_the_path() -> None:
    assert protocol.get_batch("a/b?c#d").url(SETTINGS) == f"{SETTINGS.base_url}/batches/a%2Fb%3Fc%23d"


# Paging -----------------------------------------------------------------------------------------------------


@given(pages=st.lists(st.lists(st.integers(0, 6), max_size=4), max_size=6), more=st.booleans())
def test_paging_ends_and_yields_each_batch_once(pages: list[list[int]], more: bool) -> None:
    """Whatever the pages repeat and claim, and though the last one repeats for ever."""
    paging = protocol.BatchPaging()
    found: list[str] = []
    calls = 0
    while not paging.done:
        paging.next_call()
        numbers = pages[min(calls, len(pages) - 1)] if pages else []
        calls += 1
        items = tuple(Batch(id=f"batch_{n}", status="completed") for n in numbers)
        found += [batch.id for batch in paging.take(protocol.Page(items, has_more=more))]
        assert calls <= 10
    assert len(found) == len(set(found))
    assert more or calls == 1


def test_paging_goes_on_behind_the_last_batch_of_a_page() -> None:
    paging = protocol.BatchPaging()
    assert "after" not in paging.next_call().query
    paging.take(protocol.Page(tuple(Batch(id=i, status="failed") for i in ("b2", "b1")), has_more=True))
    assert paging.next_call().query["after"] == "b1"
