"""The emulator over HTTP, as a client meets it."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

import pytest
import requests

from airflow_provider_siliconflow.emulator import Emulator, Fault, running_emulator
from tests.unit.emulator.clients import Client

if TYPE_CHECKING:
    from collections.abc import Iterator

TRACE = "x-siliconcloud-trace-id"


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    with running_emulator() as emulator:
        yield emulator


@pytest.fixture
def client(emulator: Emulator) -> Client:
    return Client(emulator)


def test_file_answers_have_the_documented_envelopes(client: Client, emulator: Emulator) -> None:
    answer = client.upload()
    uploaded = answer.json()
    assert answer.headers[TRACE]
    file = uploaded.pop("data")
    assert uploaded == {"code": 20000, "message": "Ok", "status": True}
    assert set(file) == {"id", "object", "bytes", "createdAt", "filename", "purpose"}
    (listed,) = client.call("GET", "/files?purpose=batch").json()["data"]["data"]
    assert listed == {
        "id": file["id"],
        "object": "file",
        "bytes": file["bytes"],
        "created_at": file["createdAt"],
        "filename": "requests.jsonl",
        "purpose": "batch",
        "line_count": 3,
    }
    assert client.call("GET", "/files").status_code == 400
    assert len(client.call("GET", f"/files/{file['id']}/content").content) == file["bytes"]

    emulator.service.configure({"flat_files": True})
    assert {"id", "created_at", "filename"} < set(client.upload().json())


@pytest.mark.parametrize(
    ("header", "body"),
    [
        (None, "Invalid token"),
        ("Bearer ", "Invalid token"),
        ("Basic sk-test", "Invalid token"),
        ("Bearer sk-invalid-1", "Api key is invalid"),
    ],
)
def test_key_is_checked(client: Client, header: str | None, body: str) -> None:
    client.headers = {} if header is None else {"Authorization": header}
    answer = client.call("GET", "/user/info")
    assert (answer.status_code, answer.json()) == (401, body)
    assert answer.headers[TRACE]


def test_unknown_path_and_method_answer_as_the_service_does(client: Client) -> None:
    for method, path in (("GET", "/nothing"), ("PUT", "/batches")):
        answer = client.call(method, path)
        assert (answer.status_code, answer.json()) == (404, "404 page not found")


def test_results_come_from_another_origin_without_the_key(client: Client, emulator: Emulator) -> None:
    batch = client.finished(rows=20)
    url = batch["output_file_id"]
    assert url.startswith(f"http://localhost:{emulator.storage_url.rpartition(':')[2]}/")
    whole = requests.get(url, timeout=20)
    assert len(whole.content.splitlines()) == 20
    assert emulator.service.authorization_leaks == 0
    assert requests.get(url, headers=client.headers, timeout=20).content == whole.content
    assert client.control("GET", "state")["authorization_leaks"] == 1


def test_download_can_be_resumed(client: Client, emulator: Emulator) -> None:
    url = client.finished(rows=20)["output_file_id"]
    whole = requests.get(url, timeout=20)
    emulator.faults.add("GET storage:cut=1000,times=2")
    for start in (0, 500):
        part = requests.get(url, headers={"Range": f"bytes={start}-"}, stream=True, timeout=20)
        assert part.status_code == 206
        assert part.headers["ETag"] == whole.headers["ETag"]
        assert part.raw.read(1000) == whole.content[start : start + 1000]
        size = len(whole.content)
        assert part.headers["Content-Range"] == f"bytes {start}-{size - 1}/{size}"
        assert int(part.headers["Content-Length"]) == len(whole.content) - start
    rest = requests.get(url, headers={"Range": "bytes=1500-"}, timeout=20)
    assert rest.content == whole.content[1500:]
    assert rest.headers["ETag"] == whole.headers["ETag"]


def test_result_url_ages_and_a_new_one_works(client: Client, emulator: Emulator) -> None:
    emulator.service.configure({"url_ttl_seconds": 60})
    batch = client.finished()
    emulator.service.advance(59)
    assert requests.get(batch["output_file_id"], timeout=20).status_code == 200
    emulator.service.advance(3)
    refused = requests.get(batch["output_file_id"], timeout=20)
    assert (refused.status_code, refused.headers["Content-Type"]) == (403, "application/xml; charset=utf-8")
    assert "Request has expired" in refused.text
    fresh = client.call("GET", f"/batches/{batch['id']}").json()["output_file_id"]
    assert requests.get(fresh, timeout=20).status_code == 200
    forged = requests.get(fresh.replace("Expires=60", "Expires=99999"), timeout=20)
    assert "SignatureDoesNotMatch" in forged.text


def test_results_can_be_file_ids(client: Client, emulator: Emulator) -> None:
    emulator.service.configure({"results_as_file_ids": True})
    file_id = client.finished()["output_file_id"]
    assert file_id.startswith("file-")
    assert len(client.call("GET", f"/files/{file_id}/content").content.splitlines()) == 3


@pytest.mark.parametrize(
    ("fault", "status", "body", "made"),
    [
        ("status=429,retry-after=7", 429, "TPM limit reached", 0),
        ("status=503", 503, "50505", 0),
        ("status-after=502", 502, "<html>", 1),
        ("html", 502, "<html>", 0),
        ("truncated-json", 200, '{"id":"batch_', 1),
        ("empty", 200, "", 1),
        ("redirect=http://elsewhere.invalid/", 302, "", 0),
        ("slow=0.01", 200, '"in_queue"', 1),
        ("reset", None, "", 0),
        ("reset-after", None, "", 1),
        ("cut=10", None, "", 1),
    ],
)
def test_fault_hits_once_with_or_without_the_work_done(
    client: Client, emulator: Emulator, fault: str, status: int | None, body: str, made: int
) -> None:
    file_id = client.upload().json()["data"]["id"]
    emulator.faults.add(f"POST /batches:{fault}")
    if status is None:
        with pytest.raises((requests.ConnectionError, requests.exceptions.ChunkedEncodingError)):
            client.create(file_id)
    else:
        answer = client.create(file_id)
        assert answer.status_code == status
        assert body in answer.text
        assert ("Retry-After" in answer.headers) == ("retry-after" in fault)
        assert ("Location" in answer.headers) == (status == 302)
        if fault == "truncated-json":
            with pytest.raises(ValueError, match=r"."):
                answer.json()
    assert len(client.call("GET", "/batches").json()["data"]) == made
    assert client.create(file_id).json()["status"] == "in_queue"


def test_fault_skips_and_matches_by_path(client: Client, emulator: Emulator) -> None:
    batch = client.finished()
    client.control("POST", "faults", {"match": "GET /batches/*", "kind": "status", "skip": 1, "times": 2})
    polls = [client.call("GET", f"/batches/{batch['id']}").status_code for _ in range(4)]
    assert polls == [200, 503, 503, 200]
    emulator.faults.clear()
    emulator.faults.add("GET /v1/batches:status=500,times=-1")
    assert client.call("GET", f"/batches/{batch['id']}").status_code == 200
    assert [client.call("GET", "/batches").status_code for _ in range(3)] == [500] * 3
    client.control("DELETE", "faults")
    assert client.call("GET", "/batches").status_code == 200


def test_star_is_one_part_of_the_path() -> None:
    fault = Fault("* /batches/*", "reset")
    assert fault.fits("GET", "/batches/batch_a")
    assert not fault.fits("POST", "/batches/batch_a/cancel")
    assert not fault.fits("GET", "/batches")
    assert Fault("POST /batches/*/cancel", "reset").fits("POST", "/batches/batch_a/cancel")


@pytest.mark.parametrize(("kind", "made_meanwhile"), [("hold", 0), ("hold-after", 1)])
def test_held_request_goes_on_when_released(
    client: Client, emulator: Emulator, kind: str, made_meanwhile: int
) -> None:
    file_id = client.upload().json()["data"]["id"]
    emulator.faults.add(match="POST /batches", kind=kind)
    answers: list[requests.Response] = []
    held = threading.Thread(target=lambda: answers.append(client.create(file_id)))
    held.start()
    while not emulator.held:
        pass
    state = client.control("GET", "state")
    assert (state["batch_count"], state["held"]) == (made_meanwhile, ["POST /v1/batches"])
    assert client.control("POST", "release") == {"released": 1}
    held.join(timeout=20)
    assert answers[0].status_code == 200
    assert emulator.held == []


@pytest.mark.parametrize(
    "spec",
    ["POST /batches", "POST /batches:explode", "batches:reset", "GET /files:reset=3", "GET /files:cut=x",
     "GET /files:redirect", "GET /files:status=500,when=now", '{"match": "GET /files"}', "{"],
)  # fmt: skip
def test_wrong_fault_is_refused(emulator: Emulator, spec: str) -> None:
    with pytest.raises(ValueError, match=r"fault"):
        emulator.faults.add(spec)
    assert emulator.faults.rules == []


def test_control_tells_what_was_asked(client: Client, emulator: Emulator) -> None:
    batch = client.finished()
    state = client.control("GET", "state")
    assert state["batches"][0]["request"]["input_file_id"] == batch["input_file_id"]
    assert state["request_counts"] == {"POST /files": 1, "POST /batches": 1, "GET /batches/*": 1}
    assert [(one.method, one.route, one.status) for one in emulator.requests] == [
        ("POST", "/files", 200),
        ("POST", "/batches", 200),
        ("GET", "/batches/*", 200),
    ]
    assert client.control("GET", "requests")[0]["path"] == "/v1/files"
    assert client.control("POST", "config", {"speed": 60})["speed"] == 60
    assert client.control("POST", f"batches/{batch['id']}/status", {"status": "odd"})["status"] == "odd"
    assert client.control("POST", "seed", {"foreign_batches": 30})["batch_count"] == 31
    now = client.control("POST", "clock", {"advance": 10})["now"]
    assert now >= emulator.service.now() - 5
    for path, body in (("config", {"sped": 1}), ("config", {"speed": 0}), ("clock", {}), ("faults", {})):
        refused = requests.post(f"{emulator.control_url}/{path}", json=body, timeout=20)
        assert (refused.status_code, list(refused.json())) == (400, ["error"])


def test_refused_upload_is_answered_and_leaves_nothing(client: Client, emulator: Emulator) -> None:
    emulator.service.configure({"max_file_bytes": 1_000_000})
    big = {"file": ("big.jsonl", b"x" * 8_000_000)}
    answer = client.call("POST", "/files", data={"purpose": "batch"}, files=big)
    assert (answer.status_code, answer.json()["code"]) == (400, 20015)
    client.headers = {}
    assert client.call("POST", "/files", data={"purpose": "batch"}, files=big).status_code == 401
    client.headers = {"Authorization": "Bearer sk-test"}
    forms: list[dict[str, Any]] = [{"data": {"purpose": "batch"}}, {"files": big}, {"json": {}}]
    for form in forms:
        assert client.call("POST", "/files", **form).status_code == 400
    assert client.control("GET", "state")["files"] == []


def test_closed_emulator_frees_its_port_and_thread() -> None:
    faults = ["GET /models:hold", "GET /batches:slow=600"]
    # Another test's emulator may still be there.
    before = set(threading.enumerate())
    with running_emulator(speed=1000, faults=faults) as emulator:
        client = Client(emulator)

        def call(path: str) -> None:
            with contextlib.suppress(requests.ConnectionError):
                client.call("GET", path)

        stuck = [threading.Thread(target=call, args=(path,)) for path in ("/models", "/batches")]
        for thread in stuck:
            thread.start()
        while not (emulator.held and emulator.faults.rules[1].hits):
            pass
    for thread in stuck:
        thread.join(timeout=20)
    assert not any(thread.is_alive() for thread in stuck)
    with pytest.raises(requests.ConnectionError):
        client.call("GET", "/models")
    emulator.close()
    left = set(threading.enumerate()) - before
    assert "siliconflow-emulator" not in {thread.name for thread in left}


def test_taken_port_is_an_error(emulator: Emulator) -> None:
    taken = int(emulator.storage_url.rpartition(":")[2])
    with pytest.raises(OSError, match=r"in use"), running_emulator(port=taken):
        pass
