"""Answers without a network: which error each stands for, and what is within limits."""

from __future__ import annotations

import json
import time
from email.utils import formatdate
from typing import Any

import pytest

from airflow_provider_siliconflow.api import answers, protocol
from airflow_provider_siliconflow.api.exceptions import (
    APIError,
    AuthenticationError,
    InsufficientBalanceError,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitedError,
    ServiceUnavailableError,
    UnexpectedAnswerError,
)

TRACE = {"x-siliconcloud-trace-id": "ti_7"}


def refuse(status: int, body: bytes, headers: dict[str, str] | None = None) -> Any:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the tests look at the class themselves
        protocol.get_batch("batch_1").answer(status, headers or {}, body)
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
        ("1e9", answers.RETRY_AFTER_LIMIT),
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


def test_a_text_that_was_cut_within_a_character_can_be_written() -> None:
    error = refuse(400, b'{"message":"no \\ud83d \\ud83d\\ude00"}')
    assert error.message.encode().decode() == "no \ufffd \U0001f600"
