"""
Two tries of a job are alive at once: the first one's worker is suspended while it submits, and goes on later.

Airflow loses its heartbeat meanwhile and begins the second try, which takes the job over.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.cluster.conftest import TASK_THRESHOLD
from tests.cluster.jobs import Jobs, OpenAccount, eventually

if TYPE_CHECKING:
    from scripts.live_airflow.cluster import LiveCluster

#: Seconds after which Airflow has ended whatever is left of the first try.
AFTERMATH = 30.0
BATCHES = 10


@pytest.mark.parametrize("held", ["hold", "hold-after"])
@pytest.mark.parametrize("second", ["submits", "waits", "is-done"])
def test_two_tries_alive_at_once_pay_once(
    cluster: LiveCluster,
    open_account: OpenAccount,
    tmp_path: Path,
    report: dict[str, object],
    second: str,
    held: str,
) -> None:
    """
    :param second: what the second try does when the first one goes on.
    :param held: whether the first one's fourth batch is created while it is suspended, or was just before.
    """
    jobs = Jobs(cluster, open_account, tmp_path, "one_job", 1, rows=40)
    emulator, run = jobs.emulator, (jobs.dag_id, jobs.run_id, "job-0")
    emulator.faults.add(match="POST /batches", kind=held, skip=3)
    eventually(lambda: emulator.held, timeout=120)
    assert cluster.try_numbers(*run[:2])["job-0"] == 1
    with cluster.frozen_task(*run):
        emulator.faults.clear()
        # What it sent was sent; the answer waits for it.
        emulator.release()
        eventually(lambda: not emulator.held and len(jobs.batches()) == 4, timeout=30)
        if second == "submits":
            emulator.faults.add(match="POST /batches", kind="hold", skip=2)
            eventually(lambda: emulator.held, timeout=TASK_THRESHOLD + 180)
        else:
            cluster.wait_for_task(*run, "deferred", try_number=2, timeout=TASK_THRESHOLD + 180)
        if second == "is-done":
            assert jobs.finish() == "success"
        report["batches_when_the_first_goes_on"] = len(jobs.batches())
    time.sleep(3)
    emulator.faults.clear()
    emulator.release()
    time.sleep(AFTERMATH)
    report["batches_after"] = len(jobs.batches())
    report["tries"] = cluster.try_numbers(*run[:2])["job-0"]
    state = jobs.finish()
    jobs.check(state, report)
    assert len(jobs.batches()) == BATCHES
