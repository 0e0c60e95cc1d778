"""Answers of a type, invalid rows, models with parameters of their own, a cache and a budget, on a live Airflow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from answer_cases import MODELS, PRICES, Review

from airflow_provider_siliconflow.results import read_results
from tests.system.live import EXHAUSTIVE, OpenAccount, batches, eventually

if TYPE_CHECKING:
    from airflow_provider_siliconflow.emulator.server import Emulator
    from scripts.live_airflow import LiveAirflow

ROWS = 20_000 if EXHAUSTIVE else 600
CHANGED = ROWS // 20
#: Lines of the input that are no rows.
INVALID = ["{}", "7", '{"custom_id": "q0", "messages": [{"role": "user", "content": "Again"}]}']


@pytest.fixture(scope="module")
def account(open_account: OpenAccount) -> Emulator:
    bill = {
        model: {name: price for name, price in prices.items() if name != "thinking"}
        for model, prices in PRICES.items()
    }
    rates: dict[str, Any] = {"invalid_rate": 0.08, "truncated_rate": 0.02, "empty_rate": 0.01}
    return open_account("answers", speed=2000.0, prices=bill, **rates)


def write_night(path: Path, night: int, rows: int = ROWS) -> Path:
    """Write the rows of a night: most are those of the night before."""
    with path.open("w") as file:
        for number in range(night * CHANGED, night * CHANGED + rows):
            content = f"What do people say about the shop {number}?"
            row = {"custom_id": f"q{number}", "messages": [{"role": "user", "content": content}]}
            file.write(json.dumps(row) + "\n")
        file.writelines(line.replace("q0", f"q{night * CHANGED}") + "\n" for line in INVALID)
    return path


def start(airflow: LiveAirflow, requests: Path, output_dir: Path, **params: Any) -> str:
    return airflow.trigger(
        "answers", conf={"requests": str(requests), "output_dir": str(output_dir), **params}
    )


def sent(account: Emulator) -> int:
    """Return how many rows the account was sent, in all attempts."""
    return sum(batch["request_counts"]["total"] for batch in batches(account))


def test_three_nights_over_one_cache_killed_on_the_way(
    live_airflow: LiveAirflow, account: Emulator, tmp_path: Path
) -> None:
    cost = 0.0
    for night in range(3):
        before = sent(account)
        if night == 1:
            # The worker dies after the first batch exists, and before it knows.
            account.faults.add("POST /batches:hold-after")
        run_id = start(
            live_airflow,
            write_night(tmp_path / f"{night}.jsonl", night),
            tmp_path / str(night),
            cache_dir=str(tmp_path / "cache"),
        )
        if night == 1:
            eventually(lambda: account.held, 120)
            live_airflow.kill_task("answers", run_id, "run")
            account.release()
        assert live_airflow.wait_for_run("answers", run_id, timeout=900) == "success"
        manifest = live_airflow.xcom("answers", run_id, "run", "return_value")
        new = CHANGED if night else ROWS
        assert manifest["cached"]["rows"] == 2 * (ROWS - new)
        rows, rounds = manifest["rows"], manifest["rounds"]
        assert rows["ok"] + rows["invalid"] == 2 * ROWS
        assert (rows["error"], manifest["invalid_input"]) == (2 * len(INVALID), 2 * len(INVALID))
        # An answer is wrong at first only, so three attempts are enough.
        assert rows["invalid"] == 0
        assert rounds[0]["rows"] == 2 * new
        # What is sent again is what was wrong.
        assert [each["rows"] for each in rounds[1:]] == [
            before["rows"] - before["ok"] for before in rounds[:-1]
        ]
        assert sent(account) - before == sum(each["rows"] for each in rounds)
        cost += manifest["cost"]["total"]
        assert manifest["cost"]["total"] == pytest.approx(manifest["budget"]["spent"], abs=2e-6)
        for model in MODELS:
            found = [row for row in read_results(manifest, model=model, output_type=Review) if row.ok]
            assert len(found) == ROWS
            assert all(isinstance(row.parsed, Review) for row in found)
    assert cost == pytest.approx(float(account.bill.total), abs=1e-5)


def test_a_budget_is_kept(live_airflow: LiveAirflow, account: Emulator, tmp_path: Path) -> None:
    requests = write_night(tmp_path / "rows.jsonl", 100, rows=12)
    uploads = account.request_counts.get("POST /files", 0)
    run_id = start(live_airflow, requests, tmp_path / "nothing", max_cost=0)
    assert live_airflow.wait_for_run("answers", run_id) == "failed"
    assert "max_cost is 0 CNY" in live_airflow.task_log("answers", run_id, "run")
    assert account.request_counts.get("POST /files", 0) == uploads
    # A row may cost 0.0034 CNY, and costs a tenth of that: enough for all, and for one.
    for max_cost, is_enough in ((0.1, True), (0.0036, False)):
        before = float(account.bill.total)
        run_id = start(live_airflow, requests, tmp_path / str(max_cost), max_cost=max_cost)
        assert live_airflow.wait_for_run("answers", run_id, timeout=300) == "success"
        manifest = live_airflow.xcom("answers", run_id, "run", "return_value")
        budget, rows = manifest["budget"], manifest["rows"]
        assert float(account.bill.total) - before == pytest.approx(budget["spent"], abs=2e-6)
        assert budget["spent"] <= max_cost
        assert rows["ok"] > 0
        assert (rows["missing"] == 0) == is_enough
        # A row with a wrong answer is not sent again then, but has one.
        assert rows["missing"] <= budget["rows_not_sent"]
