"""The quickstart DAG, and a crash with a retry, on a live Airflow of the installed version."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.system.live import ROWS, batches, files

if TYPE_CHECKING:
    from airflow_provider_siliconflow.emulator.server import Emulator
    from scripts.live_airflow import LiveAirflow

pytestmark = pytest.mark.every_airflow

QUICKSTART = "siliconflow_batch_quickstart"


def test_the_quickstart_succeeds(live_airflow: LiveAirflow, rows: Path, tmp_path: Path) -> None:
    conf = {"input_path": str(rows), "output_dir": str(tmp_path / "results")}
    run_id = live_airflow.trigger(QUICKSTART, conf=conf)
    assert live_airflow.wait_for_run(QUICKSTART, run_id, timeout=300) == "success"
    manifest = live_airflow.xcom(QUICKSTART, run_id, "download")
    assert manifest["rows"]["ok"] == manifest["rows"]["total"] == ROWS
    assert len((tmp_path / "results" / "results.jsonl").read_text().splitlines()) == ROWS


def test_a_retry_after_a_crash_adopts_the_batch(
    live_airflow: LiveAirflow, live_emulator: Emulator, rows: Path
) -> None:
    known = {file["id"] for file in files(live_emulator)}
    run_id = live_airflow.trigger("crash_and_retry", conf={"rows": str(rows)})
    assert live_airflow.wait_for_run("crash_and_retry", run_id, timeout=300) == "success"
    tries = live_airflow.try_numbers("crash_and_retry", run_id)
    assert all(number == 2 for number in tries.values()), tries
    for task_id in tries:
        label = f"crash_and_retry/{task_id}/{run_id}"
        made = [one for one in batches(live_emulator) if (one["metadata"] or {}).get("airflow_task") == label]
        assert len(made) == 1
        assert live_airflow.xcom("crash_and_retry", run_id, task_id) == made[0]["id"]
    # One file per task: the contents are equal, but the identities in the file names differ.
    assert len({file["id"] for file in files(live_emulator)} - known) == len(tries)
