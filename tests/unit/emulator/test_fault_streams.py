"""Answers that are rewritten, too big, too slow or without end, over HTTP."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import zlib
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
import requests

from airflow_provider_siliconflow.emulator import Emulator, running_emulator
from tests.unit.emulator.clients import Client

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    with running_emulator() as emulator:
        yield emulator


@pytest.fixture
def client(emulator: Emulator) -> Client:
    return Client(emulator)


class Wire:
    """One request on a socket of its own, since no HTTP client shows what these answers are made of."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self.socket = socket.create_connection((parts.hostname, parts.port or 80), timeout=20)
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        lines = [f"GET {target} HTTP/1.1", f"Host: {parts.netloc}", "Authorization: Bearer sk-test"]
        lines += ["Connection: close", "", ""]
        self.socket.sendall("\r\n".join(lines).encode())

    def read(self, size: int) -> bytes:
        """Return this many bytes, or fewer at the end."""
        got = bytearray()
        while len(got) < size and (part := self.socket.recv(min(size - len(got), 1 << 20))):
            got += part
        return bytes(got)

    def close(self) -> None:
        self.socket.close()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"merge": {"id": 12345}, "remove": ["status"]}, {"id": 12345, "status": "nothing"}),
        ({"rename": {"id": "batch_id"}}, {"id": "nothing"}),
        ({"envelope": True, "status": 201}, {"code": 20000, "id": "nothing"}),
        ({"merge": {"created_at": {"$digits": 400}}}, {"created_at": int("9" * 400)}),
        ({"merge": {"metadata": {"k": "\ud800"}}}, {"metadata": {"k": "\ud800"}}),
        ({"merge": {"metadata": {"k": "\u0000"}}}, {"metadata": {"k": "\u0000"}}),
        ({"merge": {"errors": [{"$text": 1_000_000}]}}, {"errors": ["x" * 1_000_000]}),
        ({"body": {"no": "batch"}}, {"no": "batch", "id": "nothing"}),
    ],
)
def test_answer_is_rewritten_after_the_work(
    client: Client, emulator: Emulator, change: dict[str, Any], expected: dict[str, Any]
) -> None:
    file_id = client.upload().json()["data"]["id"]
    # By the control API, which carries the odd values as well, and shows them again.
    client.control("POST", "faults", {"match": "POST /batches", "kind": "rewrite", **change})
    assert client.control("GET", "faults")[0]["kind"] == "rewrite"
    answer = client.create(file_id)
    assert answer.status_code == change.get("status", 200)
    body = answer.json()
    assert {name: body.get(name, "nothing") for name in expected} == expected
    (batch,) = emulator.service.state()["batches"]
    assert batch["input_file_id"] == file_id


def test_rewrite_reaches_into_lists_and_sends_text_as_it_is(client: Client, emulator: Emulator) -> None:
    batch = client.finished()
    client.create(batch["input_file_id"])
    emulator.faults.add(
        match="GET /batches",
        kind="rewrite",
        merge={"data.*.metadata": None, "data.1.status": "odd", "no.such.place": 1},
        remove=["data.*.input_file_id"],
    )
    first, second = client.call("GET", "/batches").json()["data"]
    assert not {"input_file_id"} & {*first, *second}
    assert (first["status"], second["status"], second["metadata"]) == ("in_queue", "odd", None)

    emulator.faults.add("GET /batches:rewrite=202,remove=data,remove=has_more")
    answer = client.call("GET", "/batches")
    assert (answer.status_code, set(answer.json())) == (202, {"object", "first_id", "last_id"})

    # A refusal that says it is none.
    emulator.faults.add(
        match="GET /batches", kind="status", status=200, body={"message": "\ud800", "data": None}
    )
    answer = client.call("GET", "/batches")
    assert (answer.status_code, answer.json()) == (200, {"message": "\ud800", "data": None})

    deep = 100_000
    emulator.faults.add(match="GET /batches/*", kind="rewrite", merge={"errors": {"$nested": deep}})
    assert f'"errors":{"[" * deep}{"]" * deep}' in client.call("GET", f"/batches/{batch['id']}").text

    emulator.faults.add(match="GET storage", kind="rewrite", raw="{not json\n")
    assert requests.get(batch["output_file_id"], timeout=20).text == "{not json\n"


@pytest.mark.parametrize("chunked", ["true", "false"])
def test_huge_answer_is_valid_json_of_that_size(client: Client, emulator: Emulator, chunked: str) -> None:
    batch = client.finished()
    emulator.faults.add(f"GET /batches/*:huge=3000000,chunked={chunked}")
    answer = client.call("GET", f"/batches/{batch['id']}")
    assert len(answer.content) == 3_000_000
    assert ("Content-Length" in answer.headers) == (chunked == "false")
    assert answer.json()["id"] == batch["id"]
    emulator.faults.add("GET /batches/*:huge=1000,fill=junk")
    assert client.call("GET", f"/batches/{batch['id']}").text == "x" * 1000
    emulator.faults.add("GET storage:huge=100000")
    lines = requests.get(batch["output_file_id"], timeout=20).content.splitlines()[:-1]
    assert {json.loads(line)["custom_id"] for line in lines} == {"r0", "r1", "r2"}


def test_gzip_bomb_is_small_on_the_wire_and_valid_inside(client: Client, emulator: Emulator) -> None:
    batch = client.finished()
    emulator.faults.add("GET /batches/*:gzip-bomb=50000000")
    url = f"{emulator.base_url}/batches/{batch['id']}"
    headers = {**client.headers, "Accept-Encoding": "identity"}
    with requests.get(url, headers=headers, stream=True, timeout=20) as answer:
        packed = answer.raw.read(decode_content=False)
    assert answer.headers["Content-Encoding"] == "gzip"
    assert len(packed) < 200_000
    plain = zlib.decompress(packed, wbits=31)
    assert len(plain) == 50_000_000
    assert json.loads(plain)["id"] == batch["id"]


@pytest.mark.parametrize("where", ["poll", "download"])
def test_endless_answer_goes_on_until_the_client_leaves(
    client: Client, emulator: Emulator, where: str
) -> None:
    batch = client.finished()
    match, url = "GET storage", batch["output_file_id"]
    if where == "poll":
        match, url = "GET /batches/*", f"{emulator.base_url}/batches/{batch['id']}"
    emulator.faults.add(f"{match}:endless=600")
    wire = Wire(url)
    assert len(wire.read(50_000_000)) == 50_000_000
    # Others are answered meanwhile.
    assert client.call("GET", f"/batches/{batch['id']}").json()["id"] == batch["id"]
    wire.close()
    while emulator.requests[-1].fault != "endless":
        time.sleep(0.01)
    assert emulator.requests[-1].status == 0


def test_endless_answer_ends_in_time_as_valid_json(client: Client, emulator: Emulator) -> None:
    batch = client.finished()
    emulator.faults.add("GET /batches/*:endless=0.2")
    assert client.call("GET", f"/batches/{batch['id']}").json()["id"] == batch["id"]


@pytest.mark.parametrize("fault", ["drip=0.003", "drip-headers=0.003"])
def test_dripping_answer_is_whole_but_slow(client: Client, emulator: Emulator, fault: str) -> None:
    emulator.faults.add(f"GET /user/info:{fault},times=2")
    wire = Wire(f"{emulator.base_url}/user/info")
    parts, started = 0, time.monotonic()
    while wire.socket.recv(1 << 20):
        parts += 1
    wire.close()
    assert parts > 80
    assert time.monotonic() - started > 0.2
    assert client.call("GET", "/user/info").json()["code"] == 20000


def test_continues_without_end_come_before_the_answer(client: Client, emulator: Emulator) -> None:
    emulator.faults.add("GET /user/info:endless-continue=0.2")
    wire = Wire(f"{emulator.base_url}/user/info")
    got = b""
    while b"chargeBalance" not in got[-2000:]:
        got += wire.read(1)
        got += wire.socket.recv(1 << 20)
    wire.close()
    interim, final = got[: got.index(b"HTTP/1.1 200")], got[got.index(b"HTTP/1.1 200") :]
    assert interim.count(b"HTTP/1.1 100 Continue\r\n\r\n") * 25 == len(interim) > 100_000
    assert final.partition(b"\r\n\r\n")[2].startswith(b'{"code":20000')

    emulator.faults.add("GET /user/info:endless-continue=600")
    wire = Wire(f"{emulator.base_url}/user/info")
    assert len(wire.read(10_000_000)) == 10_000_000
    wire.close()


def test_many_headers_are_sent_in_one_answer(client: Client, emulator: Emulator) -> None:
    emulator.faults.add("GET /user/info:many-headers=100000")
    wire = Wire(f"{emulator.base_url}/user/info")
    head, _, body = wire.read(1 << 24).partition(b"\r\n\r\n")
    wire.close()
    assert len(re.findall(rb"\r\nx-emulator-\d+: 0", head)) == 100_000
    length = re.search(rb"\r\nContent-Length: (\d+)", head)
    assert length is not None
    assert int(length[1]) == len(body)
    assert json.loads(body)["code"] == 20000


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_emulator_stays_small_whatever_it_sends() -> None:
    faults = ["GET /models:huge=400000000", "GET /user/info:gzip-bomb=400000000", "GET /files:endless=600"]
    faults += ["GET /batches:many-headers=1000000", "GET /batches/*:endless-continue=600"]
    options = [part for fault in faults for part in ("--fault", fault)]
    process = subprocess.Popen(
        [sys.executable, "-m", "airflow_provider_siliconflow.emulator", "--port", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=dict(os.environ),
    )

    def peak() -> int:
        with open(f"/proc/{process.pid}/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[4]
        requests.get(f"{url}/user/elsewhere", timeout=20)
        before = peak()
        for path, size in {
            "models": 400_000_000,
            "user/info": 100_000_000,
            "files?purpose=batch": 200_000_000,
            "batches": 1_000_000_000,
            "batches/batch_x": 50_000_000,
        }.items():
            wire = Wire(f"{url}/{path}")
            left = size
            # One that reads slowly at first: what is not taken must not pile up.
            time.sleep(0.2)
            while left > 0 and (got := len(wire.socket.recv(1 << 20))):
                left -= got
            wire.close()
        assert peak() - before < 16 * 1024
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=20)


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "huge", "bytes": -1},
        {"kind": "endless", "fill": "sand"},
        {"kind": "rewrite", "merge": [1]},
        {"kind": "rewrite", "body": {"x": object()}},
        "GET /batches:many-headers=some",
    ],
)
def test_wrong_stream_fault_is_refused(emulator: Emulator, spec: Any) -> None:
    given = spec if isinstance(spec, str) else {"match": "GET /batches", **spec}
    with pytest.raises(ValueError, match=r"fault"):
        emulator.faults.add(given)
    assert emulator.faults.rules == []
