"""Two hundred tasks behind a proxy that loses any answer at random: a batch each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from airflow_provider_siliconflow.operators.batch import CreateBatchOperator
from tests.support.proxies import proxied
from tests.support.tries import QuickClock, Task

if TYPE_CHECKING:
    from airflow_provider_siliconflow.emulator import Emulator

TASKS = 200


def test_tasks_whose_answers_are_lost_at_random_have_a_batch_each(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any answer may be lost, also that to a search; a try may fail of it, the task in the end does not."""
    QuickClock(monkeypatch)
    path = tmp_path / "requests.jsonl"
    messages = [{"role": "user", "content": "Say a"}]
    row = {"custom_id": "a", "body": {"model": "Qwen/Qwen3-32B", "messages": messages}}
    path.write_text(json.dumps(row) + "\n")

    def task(number: int) -> Task:
        # Every other one on an Airflow without a task state store.
        return Task(
            lambda: CreateBatchOperator(task_id=f"task-{number}", input_path=str(path)),
            store=number % 2 == 0,
        )

    with proxied(emulator.base_url, tmp_path / "certificates") as tunnel:
        monkeypatch.setenv("AIRFLOW_CONN_SILICONFLOW_DEFAULT", tunnel.connection())
        losses = [
            tunnel.lose(".*", chance=0.08, ending=ending, seed=seed)
            for seed, ending in enumerate(("close", "reset", "half", "gateway-timeout"))
        ]
        created = [task(number).run() for number in range(TASKS)]
    found = [batch["id"] for batch in emulator.service.state()["batches"]]
    assert sorted(created) == sorted(found), f"{len(found)} batches for {TASKS} tasks"
    for loss in losses:
        assert loss.lost.count("POST /v1/batches") >= 5
