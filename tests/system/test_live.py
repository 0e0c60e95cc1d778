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
    from airflow_provider_siliconflow.emulator.server import Emulator
    from scripts.live_airflow import LiveAirflow

V3, QWEN = "deepseek-ai/DeepSeek-V3", "Qwen/Qwen3-8B"
PRICES: dict[str, Any] = {
    V3: {"prompt": 1, "completion": 4, "live": {"prompt": 2, "completion": 8}},
    QWEN: {"prompt": 0.7, "completion": 2.9, "live": {"prompt": 1.4, "completion": 5.8}},
}
#: Rows that the tests of kills ask.
ASKED = 400
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


@pytest.fixture(scope="module")
def asked_live(
    live_airflow: LiveAirflow, open_account: OpenAccount, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, dict[str, Emulator]]:
    """A run of the DAG `asked_live`, whose tasks ask rows."""
    folder = tmp_path_factory.mktemp("asked")
    names = ("failed", "cleared", "killed")
    accounts = {
        name: open_account(f"live-{name}", prices=PRICES, live_latency=0.5, live_jitter=0.5) for name in names
    }
    conf = {"rows": str(write_requests(folder / "rows.jsonl", ASKED)), "output_dir": str(folder)}
    run_id = live_airflow.trigger("asked_live", conf=conf)
    eventually(lambda: all(account.live.answered > 10 for account in accounts.values()), 120)
    return run_id, folder, accounts


def test_a_task_that_is_marked_failed_stops_asking(
    live_airflow: LiveAirflow, asked_live: tuple[str, Path, dict[str, Emulator]]
) -> None:
    run_id, _, accounts = asked_live
    check_stops(live_airflow, run_id, "failed", accounts["failed"], live_airflow.mark_failed)
    assert accounts["failed"].live.answered < 2 * ASKED


def test_a_task_that_is_cleared_stops_asking_and_the_next_try_asks_the_rest(
    live_airflow: LiveAirflow, asked_live: tuple[str, Path, dict[str, Emulator]]
) -> None:
    run_id, folder, accounts = asked_live
    account = accounts["cleared"]
    if account.live.asked < 2 * ASKED:
        live_airflow.clear("asked_live", run_id, "cleared")
    if AIRFLOW == (3, 0):
        return
    eventually(lambda: account.live.asked == 2 * ASKED, 240)
    eventually(lambda: live_airflow.task_state("asked_live", run_id, "cleared") == "success", 120)
    assert check_results(folder / "cleared", ASKED) == 2 * ASKED
    # Those under way when it was cleared.
    assert account.live.asked_again <= 8


def test_a_killed_worker_asks_at_most_what_was_under_way_again(
    live_airflow: LiveAirflow, asked_live: tuple[str, Path, dict[str, Emulator]]
) -> None:
    run_id, folder, accounts = asked_live
    account = accounts["killed"]
    kills, most = 0, 30 if EXHAUSTIVE else 2
    draw = random.Random(7)
    while kills < most and account.live.asked < 2 * ASKED - 30:
        wanted = account.live.answered + draw.randrange(2, 25)
        while account.live.answered < wanted:
            time.sleep(0.05)
        if live_airflow.task_state("asked_live", run_id, "killed") == "running":
            live_airflow.kill_task("asked_live", run_id, "killed")
            kills += 1
    eventually(lambda: live_airflow.task_state("asked_live", run_id, "killed") == "success", 300)
    assert check_results(folder / "killed", ASKED) == 2 * ASKED
    assert account.live.asked == 2 * ASKED
    assert account.live.asked_again <= 8 * kills
    print(f"{kills} kills: {account.live.asked_again} rows asked twice, at most {8 * kills} were under way")


def check_stops(airflow: LiveAirflow, run_id: str, task_id: str, account: Emulator, end: Any) -> None:
    """End a task and check that no request leaves two seconds after its process is told to end."""
    end("asked_live", run_id, task_id)
    eventually(lambda: TERMINATING in airflow.task_log("asked_live", run_id, task_id), 60)
    time.sleep(2)
    sent = account.request_counts[CHAT]
    time.sleep(4)
    assert account.request_counts[CHAT] == sent
