"""A create task is killed before each line of its code in turn: after the retry there is one batch and one file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import ROOT, MakeEmulator
from tests.system.live import EXHAUSTIVE, KEY, batches, files


@pytest.mark.parametrize("store", ["store", "nostore"])
def test_a_kill_before_any_line_pays_once(
    make_emulator: MakeEmulator, rows: Path, tmp_path: Path, store: str
) -> None:
    account = make_emulator(speed=100_000.0, keys=(KEY,))
    # 23 is a prime, so that kills in a loop do not always hit the same line.
    command = [sys.executable, "-m", "tests.system.every_line", str(tmp_path), str(rows)]
    command += ["1" if EXHAUSTIVE else "23", store]
    env = os.environ | {
        "AIRFLOW_CONN_SILICONFLOW_DEFAULT": account.airflow_connection,
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        command, env=env, cwd=ROOT, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *crashes, end = map(json.loads, (tmp_path / "crashes.jsonl").read_text().splitlines())
    assert end["lines"] > 150
    assert len(crashes) >= (end["lines"] - 1 if EXHAUSTIVE else end["lines"] // 23)
    made = Counter(batch["metadata"]["airflow_task"] for batch in batches(account))
    stored = Counter(file["filename"] for file in files(account))
    by_id = {batch["id"]: batch for batch in batches(account)}
    for crash in crashes:
        assert crash["status"] == 0, (crash, done.stderr[-3000:])
        label = f"dag/create/{crash['run_id']}"
        assert made[label] == 1, crash
        assert by_id[crash["batch_id"]]["metadata"]["airflow_task"] == label
    # The last run, which is not killed, also has a batch and a file.
    assert len(made) == len(stored) == len(crashes) + 1
    assert set(stored.values()) == {1}
