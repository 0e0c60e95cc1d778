"""What happens to the batch when a task is ended or cleared by hand, and that similar tasks do not share batches."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from tests.system.live import AIRFLOW, OpenAccount, add_batch, batches, eventually

if TYPE_CHECKING:
    from airflow_provider_siliconflow.emulator.server import Emulator
    from scripts.live_airflow import LiveAirflow

DEFERRED = ("deferred-failed", "deferred-cleared", "deferred-keep", "sensor")
RUNNING = ("running-failed", "running-cleared", "running-keep", "running-evicted")

needs_killed_triggers = pytest.mark.skipif(
    AIRFLOW < (3, 3), reason="before Airflow 3.3 a trigger is not notified of a kill, and the batch continues"
)


class Kills:
    """One run of the DAG `kills`, with every task in the state in which a test ends it."""

    def __init__(self, airflow: LiveAirflow, account: Emulator, run_id: str, foreign: str) -> None:
        self.airflow, self.account, self.run_id, self.foreign = airflow, account, run_id, foreign

    def batches(self, task_id: str, account: Emulator | None = None) -> list[dict[str, Any]]:
        """Return the batches of a task, oldest first."""
        label = f"kills/{task_id}/{self.run_id}"
        found = batches(account or self.account)
        return [batch for batch in found if (batch["metadata"] or {}).get("airflow_task") == label]

    def statuses(self, task_id: str) -> list[str]:
        return [batch["status"] for batch in self.batches(task_id)]

    def state(self, task_id: str) -> str | None:
        return self.airflow.task_state("kills", self.run_id, task_id)

    def cancelled(self, task_id: str) -> bool:
        return self.statuses(task_id)[0] in ("cancelling", "cancelled")


@pytest.fixture(scope="module")
def posting(open_account: OpenAccount) -> Emulator:
    """An account that holds the request for a batch before it carries it out."""
    account = open_account("posting-failed")
    account.faults.add(match="POST /batches", kind="hold")
    return account


@pytest.fixture(scope="module")
def uploading(open_account: OpenAccount) -> Emulator:
    """An account that holds the response to an upload."""
    account = open_account("uploading-failed")
    account.faults.add(match="POST /files", kind="hold-after")
    return account


@pytest.fixture(scope="module")
def kills(
    live_airflow: LiveAirflow, open_account: OpenAccount, posting: Emulator, uploading: Emulator, rows: Path
) -> Kills:
    # Batches queue for half an hour, so they end only if they are cancelled.
    account = open_account("kills", speed=1.0, queue_seconds=1800.0, cancelling_seconds=2.0)
    foreign = add_batch(account, rows)
    run_id = live_airflow.trigger("kills", conf={"rows": str(rows), "batch_id": foreign})
    kills = Kills(live_airflow, account, run_id, foreign)
    for task_id in DEFERRED:
        live_airflow.wait_for_task("kills", run_id, task_id, "deferred", timeout=120)
    # The first poll proves that the trigger or the task is waiting.
    eventually(lambda: all(kills.batches(task_id) for task_id in RUNNING), 60)
    eventually(lambda: uploading.held and posting.held, 60)
    polled = [kills.batches(task_id)[0]["id"] for task_id in (*DEFERRED[:-1], *RUNNING)] + [foreign]

    def all_polled() -> bool:
        paths = {request.path for request in account.requests if request.method == "GET"}
        return all(f"/v1/batches/{batch_id}" in paths for batch_id in polled)

    eventually(all_polled, 60)
    return kills


def _runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


TERMINATING = "Terminating instance" if AIRFLOW < (3, 0) else "Terminating process"


def test_killing_a_task_during_its_post_cancels_the_batch(kills: Kills, posting: Emulator) -> None:
    (held,) = posting.held
    assert held == "POST /v1/batches"
    kills.airflow.mark_failed("kills", kills.run_id, "posting-failed")
    # The terminating task searches for its batch, which does not exist yet.
    eventually(lambda: posting.request_counts.get("GET /batches", 0) > 0)
    assert batches(posting) == []
    posting.release()
    eventually(lambda: batches(posting) and batches(posting)[0]["status"] in ("cancelling", "cancelled"))
    assert len(batches(posting)) == 1


def test_killing_a_task_during_its_upload_creates_no_batch(kills: Kills, uploading: Emulator) -> None:
    pid = kills.airflow.task_pids("kills", kills.run_id, "uploading-failed").task
    kills.airflow.mark_failed("kills", kills.run_id, "uploading-failed")
    # From here, Airflow leaves the task five seconds.
    eventually(lambda: TERMINATING in kills.airflow.task_log("kills", kills.run_id, "uploading-failed"))
    uploading.release()
    eventually(lambda: not psutil.pid_exists(pid))
    assert uploading.request_counts["POST /files"] == 1
    assert "POST /batches" not in uploading.request_counts


@needs_killed_triggers
def test_marking_a_deferred_task_failed_cancels_its_batch(kills: Kills) -> None:
    kills.airflow.mark_failed("kills", kills.run_id, "deferred-failed")
    eventually(lambda: kills.cancelled("deferred-failed"))
    assert kills.state("deferred-failed") == "failed"
    assert len(kills.batches("deferred-failed")) == 1


@needs_killed_triggers
def test_clearing_a_deferred_task_cancels_its_batch_and_creates_another(kills: Kills) -> None:
    kills.airflow.clear("kills", kills.run_id, "deferred-cleared")
    eventually(lambda: kills.cancelled("deferred-cleared"))
    eventually(lambda: len(kills.batches("deferred-cleared")) == 2, 60)
    eventually(lambda: kills.statuses("deferred-cleared") == ["cancelled", "in_queue"])
    old, new = kills.batches("deferred-cleared")
    assert old["metadata"]["airflow_work"] != new["metadata"]["airflow_work"]


@pytest.mark.skipif(AIRFLOW >= (3, 3), reason="from Airflow 3.3 on the batch is cancelled")
def test_before_airflow_3_3_the_batch_of_a_deferred_task_continues(kills: Kills) -> None:
    airflow, account = kills.airflow, kills.account
    airflow.mark_failed("kills", kills.run_id, "deferred-failed")
    airflow.mark_failed("kills", kills.run_id, "mapped", 1)
    airflow.clear("kills", kills.run_id, "deferred-cleared")
    airflow.wait_for_task("kills", kills.run_id, "deferred-failed", "failed")
    eventually(lambda: len(kills.batches("deferred-cleared")) == 2, 60)
    (failed,), (old, new) = kills.batches("deferred-failed"), kills.batches("deferred-cleared")
    assert old["metadata"]["airflow_work"] != new["metadata"]["airflow_work"]
    # A cancellation would take two seconds.
    time.sleep(6)
    for task_id in ("deferred-failed", "deferred-cleared", "mapped[1]"):
        assert set(kills.statuses(task_id)) == {"in_queue"}
    # Nothing polls them any more.
    since = len(account.requests)
    eventually(lambda: f"/v1/batches/{new['id']}" in {one.path for one in account.requests[since:]})
    left = {f"/v1/batches/{batch['id']}" for batch in (failed, old)}
    assert left.isdisjoint(one.path for one in account.requests[since:])


def test_cancel_on_kill_can_be_turned_off(kills: Kills) -> None:
    kills.airflow.mark_failed("kills", kills.run_id, "deferred-keep")
    kills.airflow.mark_failed("kills", kills.run_id, "running-keep")
    kills.airflow.wait_for_task("kills", kills.run_id, "deferred-keep", "failed")
    eventually(
        lambda: (
            "is not cancelled; it continues" in kills.airflow.task_log("kills", kills.run_id, "running-keep")
        )
    )
    # A cancellation would take two seconds.
    time.sleep(6)
    assert kills.statuses("deferred-keep") == ["in_queue"]
    assert kills.statuses("running-keep") == ["in_queue"]


def test_ending_a_sensor_never_cancels(kills: Kills) -> None:
    kills.airflow.mark_failed("kills", kills.run_id, "sensor")
    kills.airflow.wait_for_task("kills", kills.run_id, "sensor", "failed")
    time.sleep(6)
    assert kills.account.service.get_batch(kills.foreign)["status"] == "in_queue"


def test_marking_a_running_task_failed_cancels_its_batch(kills: Kills) -> None:
    kills.airflow.mark_failed("kills", kills.run_id, "running-failed")
    eventually(lambda: kills.cancelled("running-failed"))
    assert kills.state("running-failed") == "failed"


def test_clearing_a_running_task_cancels_its_batch_and_creates_another(kills: Kills) -> None:
    kills.airflow.clear("kills", kills.run_id, "running-cleared")
    eventually(lambda: kills.cancelled("running-cleared"))
    if AIRFLOW == (3, 0):
        # On Airflow 3.0 the task stays `restarting` forever.
        eventually(lambda: kills.statuses("running-cleared") == ["cancelled"])
        eventually(lambda: kills.state("running-cleared") == "restarting")
        kills.airflow.mark_failed("kills", kills.run_id, "running-cleared")
        return
    eventually(lambda: kills.statuses("running-cleared") == ["cancelled", "in_queue"], 90)


def test_stopping_a_worker_cancels_nothing(kills: Kills) -> None:
    """A deployment or an eviction sends the same signal as a manual kill, but nobody ended the task."""
    task_id = "running-evicted"
    pids = kills.airflow.task_pids("kills", kills.run_id, task_id)
    os.kill(pids.supervisor, signal.SIGTERM)
    if AIRFLOW >= (3, 3) or AIRFLOW < (3, 0):
        eventually(
            lambda: (
                "Nothing is cancelled; a retry continues with the batches"
                in kills.airflow.task_log("kills", kills.run_id, task_id)
            )
        )
    else:
        # The worker ends without stopping its task, which continues alone.
        eventually(lambda: not _runs(pids.supervisor))
    # A deployment kills what is still running after a grace period. On Airflow 2 the task ends by itself.
    with suppress(ProcessLookupError):
        os.kill(pids.task, signal.SIGKILL)
    eventually(lambda: kills.airflow.try_numbers("kills", kills.run_id)[task_id] == 2, 60)
    eventually(lambda: "Adopting batch" in kills.airflow.task_log("kills", kills.run_id, task_id), 60)
    assert kills.statuses(task_id) == ["in_queue"]


def test_mapped_tasks_over_one_file_have_separate_batches(kills: Kills) -> None:
    found = [kills.batches(f"mapped[{index}]") for index in (0, 1)]
    assert [len(of_one) for of_one in found] == [1, 1]
    assert found[0][0]["id"] != found[1][0]["id"]


@needs_killed_triggers
def test_ending_a_mapped_task_cancels_only_its_own_batch(kills: Kills) -> None:
    kills.airflow.mark_failed("kills", kills.run_id, "mapped", 0)
    eventually(lambda: kills.cancelled("mapped[0]"))
    time.sleep(2)
    # The other mapped task continues.
    assert kills.statuses("mapped[1]") == ["in_queue"]


def test_two_dags_and_two_runs_over_one_file_have_separate_batches(kills: Kills, rows: Path) -> None:
    airflow = kills.airflow
    runs = [
        (dag_id, airflow.trigger(dag_id, conf={"rows": str(rows)}))
        for dag_id in ("twin-1", "twin-2", "twin-1")
    ]
    for dag_id, run_id in runs:
        assert airflow.wait_for_run(dag_id, run_id) == "success"
    ids = [airflow.xcom(dag_id, run_id, "create") for dag_id, run_id in runs]
    assert len(set(ids)) == 3
    # With "resubmit", a manual clear creates a new batch even after a success.
    dag_id, run_id = runs[0]
    airflow.clear(dag_id, run_id, "create")
    eventually(lambda: airflow.xcom(dag_id, run_id, "create") not in (None, ids[0]), 60)
