"""Two ways to use an emulator in a test: by its methods, with a clock of our own, and over HTTP."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import requests

from airflow_provider_siliconflow.emulator import EmulatedService, Emulator, EmulatorConfig

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

MODEL = "Qwen/Qwen3-32B"


class Clock:
    def __init__(self) -> None:
        self.time = 1_741_685_413.25

    def __call__(self) -> float:
        return self.time


class Account:
    """A service with a clock that only we move."""

    def __init__(self, folder: Path, *, persistent: bool = False, **settings: Any) -> None:
        self.clock = Clock()
        self.folder = folder
        self.service = EmulatedService(EmulatorConfig(**settings), folder, self.clock, persistent=persistent)

    def upload(self, lines: Iterable[dict[str, Any] | bytes]) -> str:
        chunks = [line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines]
        file = self.service.add_file("requests.jsonl", "batch", chunks)
        return str(file["data"]["id"])

    def create(self, file_id: str, **request: Any) -> dict[str, Any]:
        return self.service.create_batch(
            {
                "input_file_id": file_id,
                "endpoint": "/v1/chat/completions",
                "completion_window": "24h",
                **request,
            }
        )

    def run(self, rows: list[dict[str, Any]], **request: Any) -> dict[str, Any]:
        batch = self.create(self.upload(rows), **request)
        self.clock.time += 10_000
        return self.service.get_batch(batch["id"])

    def lines(self, batch: dict[str, Any], kind: Any) -> list[dict[str, Any]]:
        path = self.service.open_results(batch["id"], kind)
        return [json.loads(line) for line in path.read_bytes().splitlines()]

    def ids(self, batch: dict[str, Any], kind: Any) -> list[str]:
        return [line["custom_id"] for line in self.lines(batch, kind)]


def row(custom_id: str, text: str = "What is a batch?", **body: Any) -> dict[str, Any]:
    return {
        "custom_id": custom_id,
        "body": {"model": MODEL, "messages": [{"role": "user", "content": text}], **body},
    }


def rows(count: int) -> list[dict[str, Any]]:
    return [row(f"r{number}") for number in range(count)]


class Client:
    """Calls as a client makes them; knows the emulator's addresses and nothing of its insides."""

    def __init__(self, emulator: Emulator) -> None:
        self.emulator = emulator
        self.headers = {"Authorization": "Bearer sk-test"}

    def call(self, method: str, path: str, **arguments: Any) -> requests.Response:
        return requests.request(
            method,
            self.emulator.base_url + path,
            headers=self.headers,
            timeout=20,
            allow_redirects=False,
            **arguments,
        )

    def control(self, method: str, path: str, body: Any = None) -> Any:
        answer = requests.request(
            method,
            f"{self.emulator.control_url}/{path}",
            data=None if body is None else json.dumps(body),
            headers={"Content-Type": "application/json"},
            timeout=20,
        )
        assert answer.status_code == 200, answer.text
        return answer.json()

    def upload(self, rows: int = 3) -> requests.Response:
        lines = [
            {
                "custom_id": f"r{n}",
                "body": {"model": "Qwen/Qwen3-32B", "messages": [{"role": "user", "content": "Hi"}]},
            }
            for n in range(rows)
        ]
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        return self.call(
            "POST", "/files", data={"purpose": "batch"}, files={"file": ("requests.jsonl", content)}
        )

    def create(self, file_id: str) -> requests.Response:
        body = {
            "input_file_id": file_id,
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
        }
        return self.call("POST", "/batches", json=body)

    def finished(self, rows: int = 3) -> dict[str, Any]:
        batch = self.create(self.upload(rows).json()["data"]["id"]).json()
        self.emulator.service.advance(1000)
        finished: dict[str, Any] = self.call("GET", f"/batches/{batch['id']}").json()
        return finished
