"""Rows that batches did not answer in time are asked one by one, on a live Airflow."""

from __future__ import annotations

import json
import random
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.system.live import AIRFLOW, EXHAUSTIVE, OpenAccount, batches, eventually, worker_starts

if TYPE_CHECKING:
    from scripts.live_airflow import LiveAirflow

V3, QWEN = "deepseek-ai/DeepSeek-V3", "Qwen/Qwen3-8B"
PRICES: dict[str, Any] = {
    V3: {"prompt": 1, "completion": 4, "live": {"prompt": 2, "completion": 8}},
    QWEN: {"prompt": 0.7, "completion": 2.9, "live": {"prompt": 1.4, "completion": 5.8}},
}
#: Rows that the tests of kills ask.
ASKED = 400 if EXHAUSTIVE else 240
CHAT = "POST /chat/completions"
TERMINATING = "Terminating instance" if AIRFLOW < (3, 0) else "Terminating process"


def write_requests(path: Path, count: int) -> Path:
    with path.open("w") as file:
        for number in range(count):
            row = {"custom_id": f"q{number}", "messages": [{"role": "user", "content": f"Say {number}"}]}
            file.write(json.dumps(row) + "\n")
    return path


def check_results(folder: Path, count: int) -> int:
    """Check that both models have a result for each row, in their order; return how many were asked live."""
    live = 0
    for model in (V3, QWEN):
        with (folder / model.replace("/", "--") / "results.jsonl").open() as file:
            rows = [json.loads(line) for line in file]
        assert [row["custom_id"] for row in rows] == [f"q{n}" for n in range(count)]
        assert all(row["response"]["body"]["choices"] for row in rows)
        live += sum(row.get("route") == "live" for row in rows)
    return live


def test_a_deferred_job_is_finished_live_by_the_morning(
    live_airflow: LiveAirflow, open_account: OpenAccount, tmp_path: Path
) -> None:
    count, seconds = (3000, 60) if EXHAUSTIVE else (200, 25)
    # A batch that was stopped in its middle takes two minutes to settle; one that has not begun takes none.
    slow: dict[str, Any] = {"rows_per_second": count * 0.6 / 45} if EXHAUSTIVE else {"queue_seconds": 3600.0}
    account = open_account(
        "by_morning", speed=1.0, prices=PRICES, live_latency=0.1, cancelling_seconds=1.0, **slow
    )
    by = datetime.now(UTC) + timedelta(seconds=seconds)
    run_id = live_airflow.trigger(
        "by_morning",
        conf={
            "rows": str(write_requests(tmp_path / "rows.jsonl", count)),
            "output_dir": str(tmp_path),
            "results_by": by.isoformat(),
            "max_rows_per_batch": count if EXHAUSTIVE else 40,
        },
    )
    live_airflow.wait_for_task("by_morning", run_id, "run", "deferred", timeout=120)
    if not EXHAUSTIVE:
        for batch in batches(account)[:6]:
            account.service.force_status(batch["id"], "completed")
    assert account.live.answered == 0
    assert live_airflow.wait_for_run("by_morning", run_id, timeout=400) == "success"
    ended = datetime.now(UTC)
    manifest = live_airflow.xcom("by_morning", run_id, "run", "return_value")
    live = check_results(tmp_path / "run", count)
    assert manifest["rows"]["ok"] == 2 * count
    assert manifest["live"]["rows"] == live == account.live.answered
    assert live == 2 * count - account.bill.rows(V3, "batch") - account.bill.rows(QWEN, "batch")
    assert 0 < live < 2 * count
    assert account.live.asked_again == 0
    assert manifest["cost"]["total"] == pytest.approx(float(account.bill.total), abs=2e-6)
    assert manifest["budget"]["spent"] == pytest.approx(float(account.bill.total), abs=2e-6)
    # Deferred until then: one start, and resumptions at that time and after the cancellations.
    assert worker_starts(live_airflow, "by_morning", run_id, "run") <= 5
    assert (ended - by).total_seconds() < (200 if EXHAUSTIVE else 90)
    print(
        f"{live} of {2 * count} rows live; finished {(ended - by).total_seconds():.0f} s after the time given"
    )


class Asking:
    """A run of a DAG whose task asks rows for 30 seconds."""

    def __init__(self, name: str, airflow: LiveAirflow, open_account: OpenAccount, folder: Path) -> None:
        self.airflow, self.folder, self.dag_id = airflow, folder, f"asked_live_{name}"
        self.account = open_account(f"live-{name}", prices=PRICES, live_latency=0.5, live_jitter=0.5)
        conf = {"rows": str(write_requests(folder / "rows.jsonl", ASKED)), "output_dir": str(folder)}
        self.run_id = airflow.trigger(self.dag_id, conf=conf)
        eventually(lambda: self.account.live.answered > 10, 120)

    @property
    def state(self) -> str | None:
        return self.airflow.task_state(self.dag_id, self.run_id, "run")

    def check_stops(self) -> None:
        """Check that no request leaves two seconds after the process of the task is told to end."""
        eventually(lambda: TERMINATING in self.airflow.task_log(self.dag_id, self.run_id, "run"), 60)
        time.sleep(2)
        sent = self.account.request_counts[CHAT]
        time.sleep(4)
        assert self.account.request_counts[CHAT] == sent < 2 * ASKED

    def check_ends(self) -> None:
        """Check that every row is answered in the end."""
        eventually(lambda: self.state == "success", 300)
        assert check_results(self.folder / "run", ASKED) == 2 * ASKED
        assert self.account.live.asked == 2 * ASKED


def test_a_task_that_is_marked_failed_stops_asking(
    live_airflow: LiveAirflow, open_account: OpenAccount, tmp_path: Path
) -> None:
    asking = Asking("failed", live_airflow, open_account, tmp_path)
    live_airflow.mark_failed(asking.dag_id, asking.run_id, "run")
    asking.check_stops()


def test_a_task_that_is_cleared_stops_asking_and_the_next_try_asks_the_rest(
    live_airflow: LiveAirflow, open_account: OpenAccount, tmp_path: Path
) -> None:
    asking = Asking("cleared", live_airflow, open_account, tmp_path)
    live_airflow.clear(asking.dag_id, asking.run_id, "run")
    if AIRFLOW == (3, 0):
        # On Airflow 3.0 the task stays `restarting` forever.
        asking.check_stops()
        return
    asking.check_ends()
    # Those under way when it was cleared.
    assert asking.account.live.asked_again <= 8


def test_a_killed_worker_asks_at_most_what_was_under_way_again(
    live_airflow: LiveAirflow, open_account: OpenAccount, tmp_path: Path
) -> None:
    asking = Asking("killed", live_airflow, open_account, tmp_path)
    account, draw = asking.account, random.Random(7)
    kills, most = 0, 30 if EXHAUSTIVE else 2
    while kills < most:
        wanted = account.live.answered + draw.randrange(2, 25)
        while account.live.answered < wanted:
            time.sleep(0.05)
        live_airflow.kill_task(asking.dag_id, asking.run_id, "run")
        kills += 1
    asking.check_ends()
    assert account.live.asked_again <= 8 * kills
    print(f"{kills} kills: {account.live.asked_again} rows asked twice, at most {8 * kills} were under way")
