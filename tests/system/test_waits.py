"""Waits survive their triggerer, and how many worker starts a wait costs."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.system.live import (
    AIRFLOW,
    EXHAUSTIVE,
    ROWS,
    OpenAccount,
    add_batch,
    batches,
    cancellations,
    eventually,
    worker_starts,
    write_rows,
)

if TYPE_CHECKING:
    from airflow_provider_siliconflow.emulator.server import Emulator
    from scripts.live_airflow import LiveAirflow

#: On older versions a wait always begins and ends on a worker.
TRIGGERS_DO_IT = AIRFLOW >= (3, 3)
#: A worker that begins a wait also ends it if the batch has already ended.
STARTS_OF_SENSOR = (1,) if TRIGGERS_DO_IT else (1, 2)

WAITS = 50 if EXHAUSTIVE else 10


def triggers(airflow: LiveAirflow, account: Emulator) -> dict[int, tuple[str, Any]]:
    """Return the decrypted trigger rows of the waits: arguments and triggerer by trigger id."""
    ids = [batch["id"] for batch in batches(account)]
    rows = [row for row in airflow.trigger_rows() if any(one in row["kwargs"] for one in ids)]
    return {row["id"]: (row["kwargs"], row["triggerer_id"]) for row in rows}


def polled_by_all(account: Emulator, since: int) -> bool:
    paths = {request.path for request in account.requests[since:]}
    return all(f"/v1/batches/{batch['id']}" in paths for batch in batches(account))


def test_waits_survive_the_loss_of_their_triggerer(
    live_airflow: LiveAirflow, open_account: OpenAccount, rows: Path
) -> None:
    airflow = live_airflow
    account = open_account("waits", speed=1.0, queue_seconds=36000.0)
    wanted = [add_batch(account, rows) for _ in range(WAITS)]
    run_id = airflow.trigger("waits", conf={"batches": wanted, "rows": str(rows)})
    names = [*(f"wait-{number}" for number in range(WAITS)), "create"]
    for name in names:
        airflow.wait_for_task("waits", run_id, name, "deferred", timeout=300)
    eventually(lambda: polled_by_all(account, 0), 60)
    before = triggers(airflow, account)
    assert len(before) == len(names) == len(batches(account))
    assert all('"deadline": 1' in kwargs or "'deadline': 1" in kwargs for kwargs, _ in before.values())
    deadlines = {
        name: airflow.query(
            "select trigger_timeout from task_instance where run_id = ? and task_id = ?", (run_id, name)
        )
        for name in names
    }

    # The triggerer is killed and started again.
    airflow.kill("triggerer")
    since = len(account.requests)
    airflow.start("triggerer")
    eventually(lambda: polled_by_all(account, since), 90)
    after = triggers(airflow, account)
    assert {one: kwargs for one, (kwargs, _) in after.items()} == {
        one: kwargs for one, (kwargs, _) in before.items()
    }
    assert {triggerer for _, triggerer in after.values()} != {triggerer for _, triggerer in before.values()}

    # With two triggerers, the one that runs the waits is stopped or, in the exhaustive run, killed.
    airflow.start_extra_triggerer()
    airflow.kill("triggerer", signal.SIGKILL if EXHAUSTIVE else signal.SIGTERM)
    since = len(account.requests)
    eventually(lambda: polled_by_all(account, since), 90)
    assert {one: kwargs for one, (kwargs, _) in triggers(airflow, account).items()} == {
        one: kwargs for one, (kwargs, _) in before.items()
    }
    for name in names:
        found = airflow.query(
            "select trigger_timeout from task_instance where run_id = ? and task_id = ?", (run_id, name)
        )
        assert found == deadlines[name]
    if EXHAUSTIVE:
        # The first triggerer comes back while the second continues.
        airflow.start("triggerer")

    account.service.advance(40000)
    assert airflow.wait_for_run("waits", run_id, timeout=400) == "success"
    assert cancellations(account) == 0
    assert len(batches(account)) == len(names)
    for name, batch_id in zip(names, wanted, strict=False):
        assert airflow.xcom("waits", run_id, name)["id"] == batch_id
        # A worker began it once and ended it once, although its trigger ran three times.
        assert worker_starts(airflow, "waits", run_id, name) == 2
        assert airflow.try_numbers("waits", run_id)[name] == 1
        log = airflow.task_log("waits", run_id, name)
        assert len(re.findall(f"Batch {batch_id} has ended", log)) == 1
    assert worker_starts(airflow, "waits", run_id, "create") == (1 if TRIGGERS_DO_IT else 2)


@pytest.fixture(scope="module")
def started(
    live_airflow: LiveAirflow, live_emulator: Emulator, rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A finished run of the DAG `starts`: its id and its output folder."""
    folder = tmp_path_factory.mktemp("starts")
    imperfect = write_rows(folder / "imperfect.jsonl", "[[emulator:error=400]]")
    conf = {
        "rows": str(rows),
        "imperfect_rows": str(imperfect),
        "output_dir": str(folder),
        "batches": [add_batch(live_emulator, rows) for _ in range(3)],
    }
    run_id = live_airflow.trigger("starts", conf=conf)
    assert live_airflow.wait_for_run("starts", run_id) == "success"
    return run_id, folder


def test_creating_and_waiting_costs_one_worker_start(
    live_airflow: LiveAirflow, started: tuple[str, Path]
) -> None:
    run_id, folder = started
    assert worker_starts(live_airflow, "starts", run_id, "create") == (1 if TRIGGERS_DO_IT else 2)
    batch_id = live_airflow.xcom("starts", run_id, "create")
    assert re.fullmatch(r"batch_\w+", batch_id)
    assert live_airflow.xcom("starts", run_id, "create", key="batch_id") == batch_id
    # Downstream tasks can use either XCom.
    for name in ("by-return-value", "by-batch-id"):
        assert live_airflow.xcom("starts", run_id, name)["rows"]["ok"] == ROWS
        assert len((folder / name / "results.jsonl").read_text().splitlines()) == ROWS


def test_a_batch_with_failed_rows_is_judged_on_a_worker(
    live_airflow: LiveAirflow, started: tuple[str, Path]
) -> None:
    run_id, _ = started
    assert worker_starts(live_airflow, "starts", run_id, "imperfect") == 2
    assert f"{ROWS - 1} of {ROWS} rows succeeded" in live_airflow.task_log("starts", run_id, "imperfect")


def test_a_sensor_begins_without_a_worker(live_airflow: LiveAirflow, started: tuple[str, Path]) -> None:
    run_id, _ = started
    # The only worker start is at the end, to push the return value.
    assert worker_starts(live_airflow, "starts", run_id, "sensor") in STARTS_OF_SENSOR
    assert live_airflow.xcom("starts", run_id, "sensor")["status"] == "completed"


def test_a_mapped_sensor_begins_without_a_worker(
    live_airflow: LiveAirflow, started: tuple[str, Path]
) -> None:
    run_id, _ = started
    wanted = live_airflow.xcom("starts", run_id, "ids")
    for index, batch_id in enumerate(wanted):
        assert worker_starts(live_airflow, "starts", run_id, "mapped", index) in STARTS_OF_SENSOR
        assert live_airflow.xcom("starts", run_id, "mapped", map_index=index)["id"] == batch_id


def test_a_sensor_begins_on_a_worker_if_the_triggerer_cannot_render_its_template(
    live_airflow: LiveAirflow, started: tuple[str, Path]
) -> None:
    run_id, _ = started
    assert worker_starts(live_airflow, "starts", run_id, "unfit") >= 1
    wanted = live_airflow.xcom("starts", run_id, "submit")
    assert live_airflow.xcom("starts", run_id, "unfit")["id"] == wanted
    assert live_airflow.xcom("starts", run_id, "sensor")["id"] == wanted
