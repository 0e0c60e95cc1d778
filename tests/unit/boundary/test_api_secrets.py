"""The key, headers' values and proxies' passwords are shown nowhere, in whichever form an answer repeats them."""

from __future__ import annotations

import base64
import contextlib
import html
import json
import logging
import re
import traceback
from urllib.parse import quote

import pytest

from airflow_provider_siliconflow.api import protocol, redaction
from airflow_provider_siliconflow.api.exceptions import SiliconFlowError
from airflow_provider_siliconflow.api.models import Batch, BatchResult, Outcome
from airflow_provider_siliconflow.api.redaction import brief, redact, shown, shown_word
from airflow_provider_siliconflow.api.settings import ClientSettings
from airflow_provider_siliconflow.jobs.events import encode, ended
from tests.unit.boundary.hostile import KEY, Ask, answer, make_settings, serving

pytestmark = pytest.mark.usefixtures("no_proxies", "own_secrets")

TEAM = "x-team-secret-123456"
HEADER = 'te/am&"<token>" 0123456789'
PASSWORD = "pä:ss/w@rd"
GET = protocol.get_batch("batch_1")


@pytest.fixture(autouse=True)
def known(own_secrets: None) -> ClientSettings:
    proxy = f"http://me:{quote(PASSWORD, safe='')}@proxy.example:3128"
    return ClientSettings(KEY, headers={"X-Team": HEADER}, proxies={"all": proxy})


def forms(secret: str) -> list[str]:
    in_json = json.dumps(secret)[1:-1]
    return [
        secret,
        in_json,
        json.dumps(secret, ensure_ascii=False)[1:-1],
        in_json.replace("/", "\\/"),
        in_json.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"),
        quote(secret),
        quote(secret, safe=""),
        re.sub("%[0-9A-F]{2}", lambda found: found[0].lower(), quote(secret, safe="")),
        html.escape(secret),
    ]


@pytest.mark.parametrize("secret", [KEY, HEADER, PASSWORD])
def test_a_secret_is_hidden_in_every_form(secret: str) -> None:
    for form in forms(secret):
        for text in (form, f"before {form} after", f'{{"x": "{form}"}}', f"/path/{form}/more"):
            assert form not in redact(text), text


@pytest.mark.parametrize("around", ["", "x", "xy", "xyz"])
@pytest.mark.parametrize("secret", [KEY, TEAM, "ä/?>~~~~~~~~~~~~~~~"])
def test_a_long_secret_is_hidden_in_base64_and_in_other_cases(secret: str, around: str) -> None:
    ClientSettings(KEY, headers={"X-Team": TEAM})
    redaction.remember_secrets(secret)
    for as_base64 in (base64.b64encode, base64.urlsafe_b64encode):
        shown_of_it = redact(as_base64(f"{around}{secret}{around}".encode()).decode())
        found = re.split(r"\*+", shown_of_it)
        assert max(map(len, found)) <= 8, shown_of_it
    for form in (secret.upper(), secret.lower()):
        assert form not in redact(f"x {form} y")


def test_a_proxys_credentials_are_hidden_as_they_are_sent() -> None:
    basic = base64.b64encode(f"me:{PASSWORD}".encode()).decode()
    assert basic.rstrip("=") not in redact(f"Proxy-Authorization: Basic {basic}")


def test_the_last_word_of_a_header_is_a_secret_by_itself() -> None:
    ClientSettings(KEY, headers={"X-Auth": "Token abcdefghijk"})
    assert "abcdefghijk" not in redact("who is abcdefghijk?")


@pytest.mark.parametrize("before", range(980, 1003))
def test_no_part_of_a_secret_is_left_where_a_text_is_cut(before: int) -> None:
    assert KEY[:6] not in brief("x" * before + KEY)


@pytest.mark.parametrize("before", range(1970, 2003))
def test_no_part_of_a_secret_is_left_where_reading_stops(before: int) -> None:
    """What is redacted before may make room for what was read last."""
    shrinks = f"https://h/p?{'q' * (before - 13)} "
    assert len(shrinks) == before
    assert KEY[:4] not in brief(shrinks + KEY + " " * 100)


def test_a_short_word_is_no_secret() -> None:
    ClientSettings("k", headers={"X-Team": "nlp"})
    assert redact("ok, nlp") == "ok, nlp"


def test_a_word_in_a_header_changes_no_id() -> None:
    """Airflow rebuilds the batch out of the event: its ids must go on to work."""
    ClientSettings(KEY, headers={"X-Kind": "batch", "X-State": "completed"})
    data = Batch(id="batch_1", status="completed", errors=["no batch"]).to_json_dict()
    assert (data["id"], data["status"], data["errors"]) == ("batch_1", "completed", ["no ***"])
    assert shown("batch_1") == shown_word("batch_1") == "batch_1"
    assert BatchResult(custom_id="r", error={"code": "batch_expired"}).outcome is Outcome.EXPIRED


@pytest.mark.parametrize("status", [200, 400, 401, 500, 302])
def test_an_answer_that_repeats_what_was_sent_shows_no_secret(
    ask: Ask, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    echoed = {f"f{number}": form for number, form in enumerate([*forms(KEY), *forms(TEAM)])}
    body = {
        "code": 20015,
        "message": f"who is Bearer {KEY}, {forms(HEADER)}?",
        "error": {"message": KEY},
        **echoed,
    }
    headers = {"x_siliconcloud_trace_id": KEY, "Location": f"https://h/{KEY}"}
    with serving(answer(body, status, **headers)) as server, pytest.raises(SiliconFlowError) as caught:
        ask(make_settings(server.url, headers={"X-Team": TEAM}, max_retries=1), GET)
    told = "".join(traceback.format_exception(caught.value)) + caplog.text + repr(vars(caught.value))
    for secret in (KEY, TEAM, HEADER):
        assert secret not in told


def test_a_batch_that_repeats_what_was_sent_shows_no_secret(ask: Ask) -> None:
    body = {
        "id": "batch_1",
        "status": KEY,
        "errors": [f"bad key {KEY}", {"message": KEY, "line": KEY}],
        "metadata": {KEY: KEY},
        "file_name": KEY,
        KEY: {KEY: [KEY]},
        "output_file_id": f"https://h/{KEY}",
    }
    with serving(answer(body)) as server:
        batch = ask(make_settings(server.url), GET)
    assert KEY not in repr(batch) + str(batch.to_json_dict()) + str(batch.error_messages) + batch.status


def test_a_head_that_cannot_be_parsed_is_not_logged_with_its_secrets(
    ask: Ask, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    body = json.dumps({"id": "batch_1"}).encode()
    head = (
        f"HTTP/1.1 200 X\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
        f"no header {KEY} {TEAM}\r\n{KEY}: 1\r\n\r\n"
    )
    with serving(head.encode() + body) as server, contextlib.suppress(SiliconFlowError):
        ask(make_settings(server.url, headers={"X-Team": TEAM}), GET)
    told = "".join(map(logging.Formatter().format, caplog.records))
    assert KEY not in told
    assert TEAM not in told


LOST = {
    "no head": b"",
    "a cut body": answer(b"{", Content_Length="500"),
    "a wrong chunk": answer(b"zz\r\n", Transfer_Encoding="chunked"),
    "no batch": answer({"status": "completed"}),
    "a wrong head": b"HTTP/1.1 x\r\n\r\n",
}


@pytest.mark.parametrize("how", LOST)
@pytest.mark.parametrize("proxied", [False, True])
def test_an_error_drags_no_request_along(ask: Ask, how: str, proxied: bool) -> None:
    """What reports errors follows __context__ too; there lay the request with its key, and the proxy's URL."""
    with serving(LOST[how]) as server:
        proxies = {"http": f"http://me:{TEAM}@127.0.0.1:{server.port}"} if proxied else None
        settings = make_settings("http://api.invalid" if proxied else server.url, proxies=proxies)
        with pytest.raises(SiliconFlowError) as caught:
            ask(settings, GET)
    assert caught.value.__context__ is None


def test_metadata_that_spells_the_key_in_another_way_shows_no_secret(ask: Ask) -> None:
    """It is parsed as JSON in any encoding, in which the key cannot be found before."""
    for body in (
        json.dumps({"id": "batch_1", "metadata": {"who": KEY, KEY: "x"}}).encode("utf-16"),
        b'{"id": "batch_1", "metadata": {"who": "%s"}}' % "".join(f"\\u{ord(c):04x}" for c in KEY).encode(),
    ):
        with serving(answer(body)) as server:
            batch = ask(make_settings(server.url), GET)
        assert KEY not in json.dumps(batch.to_json_dict()) + json.dumps(encode(ended([batch]))) + repr(batch)


def test_the_authors_own_metadata_keeps_its_urls() -> None:
    metadata = {"source": "https://example.com/input?version=3#top"}
    batch = Batch(id="batch_1", metadata=metadata)
    assert batch.to_json_dict()["metadata"] == encode(ended([batch]))["batches"][0]["metadata"] == metadata


def test_a_row_that_repeats_what_was_sent_shows_no_secret() -> None:
    row = BatchResult(custom_id="r", error={"code": KEY, "message": f"bad key {KEY}"})
    assert KEY not in f"{row.error_code}{row.error_message}"


def test_the_environments_proxy_keeps_its_password(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://me:env-password@127.0.0.1:9")
    with pytest.raises(SiliconFlowError):
        ask(make_settings("http://api.invalid"), GET)
    assert "env-password" not in redact("proxy me:env-password is not there")


def test_the_environments_proxy_needs_no_scheme_to_keep_its_password(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "me:env-password@127.0.0.1:9")
    with pytest.raises(SiliconFlowError):
        ask(make_settings("http://api.invalid"), GET)
    assert "env-password" not in redact("proxy me:env-password is not there")


def test_secrets_are_not_remembered_without_end() -> None:
    for number in range(1100):
        redaction.remember_secrets(f"secret-{number:06d}")
    assert "secret-001099" not in redact("secret-001099")
    assert len(redaction._SECRETS._known) <= 1000
