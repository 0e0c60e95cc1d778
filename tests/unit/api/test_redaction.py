"""Redaction: no secret is shown, in whichever form it comes, and the rest is."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_provider_siliconflow.api.redaction import redact
from airflow_provider_siliconflow.api.settings import ClientSettings

SETTINGS = ClientSettings("sk-secret-key")


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
    assert "sk-secret" not in redact(text)


piece = st.text(alphabet="a/.:?#=&@ \\\"'<", max_size=6)


@given(piece, piece, piece, piece)
def test_no_signature_survives_whatever_is_around_it(before: str, path: str, key: str, after: str) -> None:
    path, key = (re.sub(r"[\s\"'<>]", "", part) for part in (path, key))
    assert "SECRET" not in redact(f"{before}https://h{path}?{key}=SECRET{after}")


def test_redaction_of_a_long_text_takes_no_time() -> None:
    """A refused picture is repeated in base64, which is full of slashes."""
    began = time.process_time()
    redact("/a" * 100_000 + "/a?" * 100_000 + "https://" * 100_000 + "?")
    assert time.process_time() - began < 2


def test_redaction_keeps_the_rest() -> None:
    said = redact('<a href="https://h/p?sig=1">10 tokens/s? yes, a=b</a>')
    assert said == '<a href="https://h/p">10 tokens/s? yes, a=b</a>'
