"""The emulator's own calls: no web page may make them, and tests may do what a user of the service does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import requests

from airflow_provider_siliconflow.emulator import Emulator, running_emulator
from tests.unit.emulator.clients import Client

if TYPE_CHECKING:
    from collections.abc import Iterator

JSON = {"Content-Type": "application/json"}
PATHS = [
    ("POST", "faults"),
    ("DELETE", "faults"),
    ("POST", "release"),
    ("POST", "clock"),
    ("POST", "config"),
    ("POST", "seed"),
    ("POST", "batches/batch_x/status"),
    ("POST", "batches/batch_x/cancel"),
    ("POST", "files/file-x/forget"),
]


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    with running_emulator() as emulator:
        yield emulator


FORMS = [
    None,
    "text/plain",
    "application/x-www-form-urlencoded",
    "multipart/form-data",
    "text/plain;application/json",
]


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_a_call_that_a_web_form_can_make_is_refused(emulator: Emulator, method: str, path: str) -> None:
    emulator.faults.add("GET /models:reset")
    for content_type in FORMS:
        headers = {} if content_type is None else {"Content-Type": content_type}
        answer = requests.request(
            method, f"{emulator.control_url}/{path}", data=b"{}", headers=headers, timeout=20
        )
        assert answer.status_code == 415, content_type
        assert "Content-Type: application/json" in answer.json()["error"]
    assert len(emulator.faults.rules) == 1


@pytest.mark.parametrize(("method", "path"), [*PATHS, ("GET", "state"), ("GET", "requests")])
def test_a_name_that_merely_leads_here_is_refused(emulator: Emulator, method: str, path: str) -> None:
    for host in ("evil.example", "evil.example:8787", "localhost.evil.example", "192.0.2.1", "a[b"):
        answer = requests.request(
            method, f"{emulator.control_url}/{path}", headers={"Host": host, **JSON}, timeout=20
        )
        assert (answer.status_code, list(answer.json())) == (403, ["error"]), host
        assert "loopback Host" in answer.json()["error"]


def test_loopback_names_are_taken(emulator: Emulator) -> None:
    for host in ("localhost", "localhost:1", "127.0.0.1", "127.9.9.9:80", "[::1]", "[::1]:8787"):
        headers = {"Host": host, "Content-Type": "application/json; charset=utf-8"}
        answer = requests.post(f"{emulator.control_url}/release", headers=headers, timeout=20)
        assert answer.status_code == 200, host


def test_what_a_user_and_the_service_do_by_themselves(emulator: Emulator) -> None:
    client = Client(emulator)
    batch = client.create(client.upload().json()["data"]["id"]).json()
    assert client.control("POST", f"batches/{batch['id']}/cancel")["status"] == "cancelling"
    other = client.create(batch["input_file_id"]).json()
    assert client.control("POST", f"batches/{other['id']}/cancel", {"at_once": True})["status"] == "cancelled"
    client.control("POST", f"files/{batch['input_file_id']}/forget", {"still_listed": True})
    assert client.create(batch["input_file_id"]).status_code == 404
    assert len(client.call("GET", "/files?purpose=batch").json()["data"]["data"]) == 1
    assert "POST /batches/*/cancel" not in emulator.request_counts
    settled = client.control("POST", "config", {"settle_as": "null", "late_error_seconds": 3})
    assert (settled["settle_as"], settled["late_error_seconds"]) == ("null", 3)


def test_clock_that_is_off_shows_in_the_date_header(emulator: Emulator) -> None:
    client = Client(emulator)
    emulator.service.configure({"clock_offset_seconds": -365 * 86400})
    year = int(client.call("GET", "/models").headers["Date"].split()[3])
    emulator.service.configure({"clock_offset_seconds": 0})
    assert int(client.call("GET", "/models").headers["Date"].split()[3]) == year + 1
