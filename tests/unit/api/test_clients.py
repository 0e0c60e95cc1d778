"""The two clients, by the same tests wherever both have the call, and what they give away to whom."""

from __future__ import annotations

import json
import logging
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from airflow_provider_siliconflow.api import answers, arguments, protocol
from airflow_provider_siliconflow.api.client import SiliconFlowClient
from airflow_provider_siliconflow.api.exceptions import (
    APIError,
    AuthenticationError,
    CredentialLeakError,
    InvalidInputError,
    NoAnswerError,
    NotSentError,
    ServiceUnavailableError,
    UnexpectedAnswerError,
)
from airflow_provider_siliconflow.api.settings import ClientSettings

if TYPE_CHECKING:
    from airflow_provider_siliconflow.emulator import Emulator

BATCH = {"id": "batch_1", "status": "in_queue"}
SIGNED = "/results/out.jsonl?X-Amz-Credential=abc&X-Amz-Signature=SECRET"

Ask = Callable[[ClientSettings, Any], Any]
MakeSettings = Callable[..., ClientSettings]


@pytest.fixture
def batch_id(emulator: Emulator, rows: Any) -> str:
    file = emulator.service.add_file("rows.jsonl", "batch", [rows("Hi")])["data"]
    batch = emulator.service.create_batch(creation(file["id"]).payload)
    return str(batch["id"])


def creation(file_id: str) -> protocol.Call[Any]:
    return protocol.create_batch(
        input_file_id=file_id,
        endpoint=arguments.CHAT_COMPLETIONS,
        completion_window="24h",
        metadata={"团队": "评测"},
        replace=None,
    )


def count(emulator: Emulator, route: str) -> int:
    return emulator.request_counts.get(route, 0)


@pytest.mark.emulator(speed=1.0)
def test_a_batch_is_created_read_and_cancelled(
    ask: Ask, make_settings: MakeSettings, emulator: Emulator, rows: Any
) -> None:
    settings = make_settings(emulator.base_url)
    file = emulator.service.add_file("rows.jsonl", "batch", [rows("Hi")])["data"]
    batch = ask(settings, creation(file["id"]))
    assert batch.metadata == {"团队": "评测"}
    assert ask(settings, protocol.get_batch(batch.id)).input_file_id == file["id"]
    ask(settings, protocol.cancel_batch(batch.id))
    emulator.service.advance(100)
    assert ask(settings, protocol.get_batch(batch.id)).status == "cancelled"


@pytest.mark.parametrize(
    "fault",
    [
        "status=429",
        "status=500",
        "status=502",
        "status=503",
        "status=504",
        "status=408",
        "html=502",
        "html=200",
        "reset",
        "reset-after",
        "cut=20",
        "truncated-json",
        "empty",
    ],
)
def test_a_read_is_repeated(
    ask: Ask, make_settings: MakeSettings, emulator: Emulator, batch_id: str, fault: str
) -> None:
    emulator.faults.add(f"GET /batches/*:{fault},times=2")
    assert ask(make_settings(emulator.base_url), protocol.get_batch(batch_id)).id == batch_id
    assert count(emulator, "GET /batches/*") == 3


def test_a_read_is_not_repeated_for_ever(
    ask: Ask, make_settings: MakeSettings, emulator: Emulator, batch_id: str
) -> None:
    emulator.faults.add("GET /batches/*:status=502,times=-1")
    with pytest.raises(ServiceUnavailableError):
        ask(make_settings(emulator.base_url, max_retries=2), protocol.get_batch(batch_id))
    assert count(emulator, "GET /batches/*") == 3


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404])
def test_a_refusal_is_final(
    ask: Ask, make_settings: MakeSettings, emulator: Emulator, batch_id: str, status: int
) -> None:
    emulator.faults.add(f"* /batches/*:status={status},times=-1")
    with pytest.raises(APIError) as caught:
        ask(make_settings(emulator.base_url), protocol.get_batch(batch_id))
    assert caught.value.status_code == status
    assert count(emulator, "GET /batches/*") == 1


@pytest.mark.parametrize(
    "fault",
    ["status-after=502", "html=502", "html=503", "reset", "reset-after", "cut=20", "truncated-json", "empty"],
)
def test_a_creation_is_never_sent_again_while_its_effect_is_open(
    ask: Ask, make_settings: MakeSettings, emulator: Emulator, rows: Any, fault: str
) -> None:
    file = emulator.service.add_file("rows.jsonl", "batch", [rows("Hi")])["data"]
    emulator.faults.add(f"POST /batches:{fault}")
    with pytest.raises(Exception) as caught:  # noqa: PT011 - its kind is the fault's
        ask(make_settings(emulator.base_url), creation(file["id"]))
    assert protocol.leaves_effect_open(caught.value)
    assert count(emulator, "POST /batches") == 1


@pytest.mark.parametrize("status", [429, 503])
def test_a_creation_that_was_refused_is_sent_again(
    ask: Ask, make_settings: MakeSettings, emulator: Emulator, rows: Any, status: int
) -> None:
    file = emulator.service.add_file("rows.jsonl", "batch", [rows("Hi")])["data"]
    emulator.faults.add(f"POST /batches:status={status},times=2")
    ask(make_settings(emulator.base_url), creation(file["id"]))
    assert emulator.service.state()["batch_count"] == 1


def test_a_refused_connection_is_known_to_have_had_no_effect(
    ask: Ask, make_settings: MakeSettings, dead_url: str
) -> None:
    with pytest.raises(NotSentError):
        ask(make_settings(f"{dead_url}/v1", max_retries=1), creation("file-1"))


def test_an_unknown_host_is_known_to_have_had_no_effect(ask: Ask, make_settings: MakeSettings) -> None:
    with pytest.raises(NotSentError):
        ask(make_settings("http://no-such-host.invalid/v1", max_retries=0), creation("file-1"))


def test_an_answer_that_takes_too_long(
    ask: Ask, make_settings: MakeSettings, emulator: Emulator, rows: Any
) -> None:
    file = emulator.service.add_file("rows.jsonl", "batch", [rows("Hi")])["data"]
    emulator.faults.add("POST /batches:hold-after")
    began = time.monotonic()
    with pytest.raises(NoAnswerError):
        ask(make_settings(emulator.base_url, timeout=0.3), creation(file["id"]))
    assert time.monotonic() - began < 5
    assert count(emulator, "POST /batches") == 1


def test_an_answer_that_cannot_be_read_was_an_answer(
    ask: Ask, make_settings: MakeSettings, recorder: Any
) -> None:
    """Two lengths that differ are refused by the HTTP library, in words that sound like a request not sent."""
    recorder.answer = lambda seen: recorder.Answer(200, b"{}", {"content-length": "7"})
    with pytest.raises(NoAnswerError):
        ask(make_settings(f"{recorder.url}/v1"), creation("file-1"))
    assert len(recorder.seen) == 1


def test_a_cut_answer_is_told_with_its_trace_id(ask: Ask, make_settings: MakeSettings, recorder: Any) -> None:
    recorder.answer = lambda seen: recorder.Answer(200, b"{", {answers.TRACE_ID_HEADER: "ti_7"}, announce=9)
    with pytest.raises(NoAnswerError, match="ti_7"):
        ask(make_settings(f"{recorder.url}/v1", max_retries=0), protocol.get_batch("b"))


# Where the key goes -----------------------------------------------------------------------------------------


def test_a_redirect_does_not_take_the_key_away(
    ask: Ask, make_settings: MakeSettings, emulator: Emulator, recorder: Any
) -> None:
    emulator.faults.add(match="GET /batches/*", kind="redirect", location=f"{recorder.url}/v1/batches/b")
    with pytest.raises(UnexpectedAnswerError, match="redirect"):
        ask(make_settings(emulator.base_url, max_retries=0), protocol.get_batch("b"))
    assert recorder.seen == []


def test_a_download_that_is_redirected_leaves_the_key_behind(
    make_settings: MakeSettings, emulator: Emulator, recorder: Any
) -> None:
    recorder.always(b"whole")
    emulator.faults.add(match="GET /files/*/content", kind="redirect", location=recorder.url + SIGNED)
    with SiliconFlowClient(make_settings(emulator.base_url, headers={"X-Team": "nlp"})) as client:
        assert b"".join(client.iter_file("file-results", lambda: None)) == b"whole"
    (seen,) = recorder.seen
    assert seen.target == SIGNED
    assert not {"authorization", "x-team"} & set(seen.headers)


def test_storage_gets_neither_the_key_nor_a_wish_for_compression(
    make_settings: MakeSettings, emulator: Emulator, recorder: Any
) -> None:
    recorder.always(b"whole")
    with SiliconFlowClient(make_settings(emulator.base_url, headers={"X-Team": "nlp"})) as client:
        assert b"".join(client.iter_file(recorder.url + SIGNED, lambda: None)) == b"whole"
    (seen,) = recorder.seen
    assert not {"authorization", "x-team", "cookie"} & set(seen.headers)
    assert seen.headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("redirected", [False, True])
def test_a_url_that_urllib3_reads_in_another_way_than_we_do_gets_no_key(
    make_settings: MakeSettings, emulator: Emulator, recorder: Any, redirected: bool
) -> None:
    # To urlsplit the host is the API's; what connects goes to the recorder.
    url = f"{recorder.url}\\@{emulator.base_url.removeprefix('http://')}"
    if redirected:
        emulator.faults.add(match="GET /files/*/content", kind="redirect", location=url)
    with SiliconFlowClient(make_settings(emulator.base_url)) as client:
        list(client.iter_file("file-results" if redirected else url, lambda: None))
    assert "authorization" not in recorder.seen[0].headers


def test_the_key_is_held_back_should_we_be_wrong_about_a_url(
    make_settings: MakeSettings, emulator: Emulator, recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ClientSettings, "owns", lambda settings, url: True)
    with (
        SiliconFlowClient(make_settings(emulator.base_url)) as client,
        pytest.raises(CredentialLeakError) as caught,
    ):
        list(client.iter_file(recorder.url + SIGNED, lambda: None))
    assert recorder.seen == []
    assert "SECRET" not in "".join(traceback.format_exception(caught.value))


@pytest.fixture
def netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "netrc"
    path.write_text("machine 127.0.0.1 login me password other\nmachine localhost login me password other\n")
    path.chmod(0o600)
    monkeypatch.setenv("NETRC", str(path))


@pytest.mark.usefixtures("netrc")
def test_a_netrc_file_changes_nothing_for_the_api(
    ask: Ask, make_settings: MakeSettings, recorder: Any
) -> None:
    recorder.always(json.dumps(BATCH).encode())
    settings = make_settings(f"{recorder.url}/v1")
    assert ask(settings, protocol.get_batch("batch_1")).id == "batch_1"
    assert recorder.seen[0].headers["authorization"] == f"Bearer {settings.api_key}"


@pytest.mark.usefixtures("netrc")
def test_a_netrc_file_changes_nothing_for_the_storage(
    make_settings: MakeSettings, emulator: Emulator, recorder: Any
) -> None:
    recorder.always(b"whole")
    with SiliconFlowClient(make_settings(emulator.base_url)) as client:
        assert b"".join(client.iter_file(recorder.url + SIGNED, lambda: None)) == b"whole"
    assert "authorization" not in recorder.seen[0].headers


# Proxies and certificates -----------------------------------------------------------------------------------


@pytest.mark.parametrize("named", ["all", "http"])
@pytest.mark.parametrize("key", ["http", "all", "http://api.invalid", "all://api.invalid"])
def test_the_connections_proxy_wins_over_the_environments(
    ask: Ask,
    make_settings: MakeSettings,
    recorder: Any,
    dead_url: str,
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    named: str,
) -> None:
    monkeypatch.setenv(f"{named}_proxy", dead_url)
    recorder.always(json.dumps(BATCH).encode())
    settings = make_settings("http://api.invalid/v1", proxies={key: recorder.url}, max_retries=0)
    assert ask(settings, protocol.get_batch("batch_1")).id == "batch_1"
    assert recorder.seen[0].target == "http://api.invalid/v1/batches/batch_1"


def test_the_environments_proxy_is_used_where_it_says_so(
    ask: Ask, make_settings: MakeSettings, recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder.always(json.dumps(BATCH).encode())
    monkeypatch.setenv("http_proxy", recorder.url)
    settings = make_settings("http://api.invalid/v1", max_retries=0)
    assert ask(settings, protocol.get_batch("batch_1")).id == "batch_1"
    monkeypatch.setenv("no_proxy", "api.invalid")
    with pytest.raises(NotSentError):
        ask(settings, protocol.get_batch("batch_1"))


@pytest.mark.parametrize("name", ["missing.pem", "no.pem"])
def test_a_ca_bundle_that_is_none_is_the_connections_fault(
    ask: Ask, make_settings: MakeSettings, tmp_path: Path, name: str
) -> None:
    (tmp_path / "no.pem").write_text("a certificate")
    with pytest.raises(InvalidInputError, match="verify"):
        ask(make_settings("https://127.0.0.1:9/v1", verify=str(tmp_path / name)), protocol.get_batch("b"))


def test_a_folder_of_certificates_is_as_good(
    ask: Ask, make_settings: MakeSettings, recorder: Any, tmp_path: Path
) -> None:
    recorder.always(json.dumps(BATCH).encode())
    settings = make_settings(f"{recorder.url}/v1", verify=str(tmp_path))
    assert ask(settings, protocol.get_batch("batch_1")).id == "batch_1"


# What is told -----------------------------------------------------------------------------------------------


def test_a_key_that_the_service_repeats_is_not_shown(
    ask: Ask, make_settings: MakeSettings, recorder: Any
) -> None:
    settings = make_settings(f"{recorder.url}/v1")
    recorder.always(json.dumps(f"no account for {settings.api_key}").encode(), 401)
    with pytest.raises(AuthenticationError, match="no account for") as caught:
        ask(settings, protocol.get_batch("b"))
    assert settings.api_key not in "".join(traceback.format_exception(caught.value))


def test_no_signature_is_told_when_storage_cannot_be_reached(
    make_settings: MakeSettings, emulator: Emulator, dead_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        SiliconFlowClient(make_settings(emulator.base_url, max_retries=1)) as client,
        pytest.raises(NotSentError, match=dead_url.removeprefix("http://")) as caught,
    ):
        list(client.iter_file(dead_url + SIGNED, lambda: None))
    # Airflow prints the causes of an error as well.
    assert "SECRET" not in "".join(traceback.format_exception(caught.value))
    assert "SECRET" not in caplog.text


def test_no_signature_is_told_of_headers_that_cannot_be_read(
    make_settings: MakeSettings, emulator: Emulator, recorder: Any, caplog: pytest.LogCaptureFixture
) -> None:
    recorder.answer = lambda seen: recorder.Answer(200, b"whole", {"X No Name": "x"})
    with SiliconFlowClient(make_settings(emulator.base_url)) as client:
        list(client.iter_file(recorder.url + SIGNED, lambda: None))
    assert "Failed to parse headers" in caplog.text
    assert "SECRET" not in caplog.text


def test_no_password_of_a_proxy_is_told(ask: Ask, make_settings: MakeSettings, recorder: Any) -> None:
    # The recorder refuses to be a tunnel, in words that libraries repeat with the whole URL.
    proxy = recorder.url.replace("://", "://me:SECRET@")
    settings = make_settings("https://api.invalid/v1", proxies={"https": proxy}, max_retries=0)
    with pytest.raises((NotSentError, NoAnswerError)) as caught:
        ask(settings, protocol.get_batch("b"))
    assert "SECRET" not in "".join(traceback.format_exception(caught.value))


def test_no_signature_is_told_at_log_level_debug(
    make_settings: MakeSettings, emulator: Emulator, recorder: Any, caplog: pytest.LogCaptureFixture
) -> None:
    recorder.always(b"whole")
    with caplog.at_level(logging.DEBUG), SiliconFlowClient(make_settings(emulator.base_url)) as client:
        list(client.iter_file(recorder.url + SIGNED, lambda: None))
    assert "/results/out.jsonl" in caplog.text
    assert "SECRET" not in caplog.text


def test_listing_reads_page_after_page_and_ends_when_the_cursor_is_ignored(
    make_settings: MakeSettings, emulator: Emulator
) -> None:
    emulator.service.seed_foreign_batches(2 * protocol.PAGE_SIZE + 1)
    with SiliconFlowClient(make_settings(emulator.base_url)) as client:
        assert len({batch.id for batch in client.list_batches()}) == 2 * protocol.PAGE_SIZE + 1
        assert next(client.list_batches()).id
        # Only what is asked for is read: one page for one batch.
        assert count(emulator, "GET /batches") == 4
        emulator.service.configure({"ignore_cursor": True})
        assert len(list(client.list_batches())) == protocol.PAGE_SIZE
