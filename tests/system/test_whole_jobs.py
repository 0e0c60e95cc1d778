"""A job of 12,003 rows over two models on a live Airflow: once undisturbed, once killed at random moments."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.system.live import OpenAccount, eventually

if TYPE_CHECKING:
    from airflow_provider_siliconflow.emulator.server import Emulator
    from scripts.live_airflow import LiveAirflow

MODELS = ["Qwen--Qwen3-32B", "THUDM--GLM-4-9B-0414"]
ROWS = 12_003


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("job") / "requests.jsonl"
    with path.open("w") as file:
        for number in range(ROWS):
            mark = {
                7: "[[emulator:once=429]]",
                5001: "[[emulator:error=400]]",
                12_000: "[[emulator:once=expire]]",
            }
            content = f"What is {number} + {number}? {mark.get(number, '')}"
            row = {"custom_id": f"q{number}", "messages": [{"role": "user", "content": content}]}
            file.write(json.dumps(row) + "\n")
    return path


def run_job(airflow: LiveAirflow, account: str, requests: Path, output_dir: Path) -> str:
    conf = {"conn_id": account, "requests": str(requests), "output_dir": str(output_dir)}
    return airflow.trigger("whole_jobs", conf=conf)


def contents(folder: Path) -> dict[str, bytes]:
    names = [f"{model}/{name}.jsonl" for model in MODELS for name in ("results", "errors")]
    return {name: (folder / name).read_bytes() for name in names}


def sent(account: Emulator) -> tuple[int, int]:
    counts = account.request_counts
    return counts.get("POST /files", 0), counts.get("POST /batches", 0)


def test_a_killed_job_has_the_same_results_as_an_undisturbed_one(
    live_airflow: LiveAirflow, open_account: OpenAccount, requests: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"speed": 60.0, "rows_per_second": 50.0}
    calm = open_account("calm_job", **settings)
    run_id = run_job(live_airflow, "calm_job", requests, tmp_path / "calm")
    assert live_airflow.wait_for_run("whole_jobs", run_id, timeout=180) == "success"
    # Three shards, then one shard with the two rows to send again; one batch per shard and model.
    assert sent(calm) == (4, 8)
    expected = contents(tmp_path / "calm")
    for model in MODELS:
        found = [json.loads(line)["custom_id"] for line in expected[f"{model}/results.jsonl"].splitlines()]
        assert found == [f"q{number}" for number in range(ROWS)]
        assert [json.loads(line)["custom_id"] for line in expected[f"{model}/errors.jsonl"].splitlines()] == [
            "q5001"
        ]
    manifest = live_airflow.xcom("whole_jobs", run_id, "run", "return_value")
    assert manifest["rows"] == {
        "total": 2 * ROWS,
        "ok": 2 * ROWS - 2,
        "error": 2,
        "invalid": 0,
        "expired": 0,
        "missing": 0,
    }

    hurt = open_account("killed_job", **settings)
    faults = [
        f"{match}:{kind},skip={skip}"
        for match, most in (("POST /files", 3), ("POST /batches", 7), ("GET storage", 12))
        for kind in ("hold", "hold-after")
        for skip in range(most)
    ]
    # The faults hit one after another, because each retry continues where the previous try stopped.
    for fault in random.Random(7).sample(faults, 4):
        hurt.faults.add(fault)
    run_id = run_job(live_airflow, "killed_job", requests, tmp_path / "killed")
    killed = 0
    while live_airflow.run_state("whole_jobs", run_id) in ("queued", "running"):
        if not hurt.held:
            time.sleep(0.05)
            continue
        # The task is stopped during a request and dies before the response.
        live_airflow.kill_task("whole_jobs", run_id, "run")
        hurt.release()
        eventually(lambda: not hurt.held)
        killed += 1
    assert live_airflow.wait_for_run("whole_jobs", run_id, timeout=240) == "success"
    assert killed >= 2, "too few kills hit a running task"
    assert sent(hurt) == sent(calm)
    assert contents(tmp_path / "killed") == expected
    assert not list((tmp_path / "killed").glob(".siliconflow"))
