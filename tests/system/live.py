"""Helpers shared by the system tests."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from airflow_provider_siliconflow.emulator.server import Emulator
    from scripts.live_airflow import LiveAirflow

#: Airflow's major and minor version.
AIRFLOW = tuple(map(int, version("apache-airflow").split(".")[:2]))
#: Whether to run the tests that take too long to run for every change.
EXHAUSTIVE = bool(os.environ.get("EXHAUSTIVE"))
#: Unique enough to be found wherever it leaks. Every emulator accepts only this key.
KEY = "sk-systemtest7Jq2vX9mLr4T"
ROWS = 5


class OpenAccount(Protocol):
    def __call__(self, name: str, *, extra: dict[str, Any] | None = None, **settings: Any) -> Emulator: ...


def connect(airflow: LiveAirflow, name: str, host: str, extra: dict[str, Any] | None = None) -> None:
    """Create a connection through the REST API, or on Airflow 2 in the file of `secrets_file`."""
    if airflow.is_airflow_2:
        path = Path(
            json.loads(airflow.environment["AIRFLOW__SECRETS__BACKEND_KWARGS"])["connections_file_path"]
        )
        made = {"conn_type": "siliconflow", "host": host, "password": KEY, "extra": extra or {}}
        part = path.with_suffix(".part.json")
        part.write_text(json.dumps(json.loads(path.read_text()) | {name: made}))
        # Replaced in one step, because triggers and tasks read it at the same time.
        part.replace(path)
        return
    body = {"connection_id": name, "conn_type": "siliconflow", "host": host, "password": KEY}
    airflow.api("POST", "/connections", body | {"extra": json.dumps(extra or {})})


def secrets_file(folder: Path) -> dict[str, str]:
    """Settings for a file of connections, because the test setup of Airflow 2 has no REST API to create them."""
    path = folder / "connections.json"
    path.write_text("{}")
    return {
        "AIRFLOW__SECRETS__BACKEND": "airflow.secrets.local_filesystem.LocalFilesystemBackend",
        "AIRFLOW__SECRETS__BACKEND_KWARGS": json.dumps({"connections_file_path": str(path)}),
    }


def write_rows(path: Path, *first: str) -> Path:
    """Write a file of rows; the given texts are the prompts of the first rows."""
    prompts = [*first, *(f"What is {number} + {number}?" for number in range(ROWS - len(first)))]
    with path.open("w") as file:
        for number, prompt in enumerate(prompts):
            body = {"model": "Qwen/Qwen3-8B", "messages": [{"role": "user", "content": prompt}]}
            line = {
                "custom_id": f"row-{number}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": body,
            }
            file.write(json.dumps(line) + "\n")
    return path


def batches(emulator: Emulator) -> list[dict[str, Any]]:
    """All batches of the account, oldest first, each with the request that created it."""
    return list(emulator.service.state()["batches"])


def files(emulator: Emulator) -> list[dict[str, Any]]:
    """All files of the account."""
    return list(emulator.service.state()["files"])


def cancellations(emulator: Emulator) -> int:
    """Return the number of cancel requests that the account received."""
    return emulator.request_counts.get("POST /batches/*/cancel", 0)


def eventually(look: Callable[[], Any], timeout: float = 30.0) -> Any:
    """What `look` returns as soon as it is true; fails when it is not in time."""
    deadline = time.monotonic() + timeout
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {timeout:.0f} s"
        time.sleep(0.1)


def worker_starts(airflow: LiveAirflow, dag_id: str, run_id: str, task_id: str, map_index: int = -1) -> int:
    """Count how often a worker started or resumed a task, from the audit log or, on 3.0 and 3.1, the task log."""
    if (3, 0) <= AIRFLOW < (3, 2):
        return airflow.task_log(dag_id, run_id, task_id, map_index).count('"DAG bundles loaded')
    found = airflow.query(
        "select count(*) from log where event = 'running' and dag_id = ? and run_id = ? and task_id = ?"
        " and coalesce(map_index, -1) = ?",
        (dag_id, run_id, task_id, map_index),
    )
    return int(found[0][0])


def add_batch(emulator: Emulator, rows: Path) -> str:
    """Upload a file, create a batch directly in the emulated account and return its id."""
    added = emulator.service.add_file("rows.jsonl", "batch", [rows.read_bytes()])
    request = {"input_file_id": added.get("data", added)["id"], "endpoint": "/v1/chat/completions"}
    return str(emulator.service.create_batch(request | {"completion_window": "24h"})["id"])
