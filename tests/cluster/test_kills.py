"""What must not be mistaken for a kill must not keep a real one from being carried out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.cluster.jobs import Jobs, OpenAccount, eventually

if TYPE_CHECKING:
    from scripts.live_airflow.cluster import LiveCluster

#: Seconds in which a person who ends a task may expect its batches to be asked to stop.
SECONDS = 10.0


def are_cancelled(jobs: Jobs, batches: list[dict[str, Any]]) -> bool:
    stopped = {one["id"] for one in jobs.batches() if one["cancelling_at"]}
    return {one["id"] for one in batches} <= stopped


@pytest.mark.parametrize("action", ["mark_failed", "clear"])
def test_a_person_who_ends_a_waiting_job_cancels_its_batches_and_no_others(
    cluster: LiveCluster,
    open_account: OpenAccount,
    tmp_path: Path,
    report: dict[str, object],
    action: str,
) -> None:
    jobs = Jobs(cluster, open_account, tmp_path, "two_jobs", 2, rows=160)
    jobs.wait_until_waiting()
    mine, others = jobs.open_batches("job-0"), jobs.open_batches("job-1")
    assert len(mine) == len(others) == 4
    began = time.monotonic()
    getattr(cluster, action)(jobs.dag_id, jobs.run_id, "job-0")
    eventually(lambda: are_cancelled(jobs, mine), timeout=60)
    report["seconds"] = round(time.monotonic() - began, 1)
    assert time.monotonic() - began < SECONDS
    time.sleep(5)
    stopped = {one["id"] for one in jobs.batches() if one["cancelling_at"]}
    assert stopped == {one["id"] for one in mine}
    assert not stopped & {one["id"] for one in others}
    # The neighbour goes on undisturbed, and a job that was cleared runs to its end.
    state = jobs.finish()
    assert set(jobs.incomplete()) == ({"job-0"} if action == "mark_failed" else set())
    assert state == ("failed" if action == "mark_failed" else "success")


def test_a_job_that_is_marked_failed_while_it_queues_leaves_no_batch_behind(
    cluster: LiveCluster, open_account: OpenAccount, tmp_path: Path, report: dict[str, object]
) -> None:
    """Woken, it waits for a slot; there is no trigger then to be told, and no worker yet."""
    jobs = Jobs(cluster, open_account, tmp_path, "crowded", 1, rows=160)
    jobs.wait_until_waiting()
    occupier = cluster.trigger("occupier", conf={"folder": str(tmp_path)})
    cluster.wait_for_task("occupier", occupier, "occupy", "running")
    jobs.end_batch("job-0")
    cluster.wait_for_task("crowded", jobs.run_id, "job-0", {"scheduled", "queued"})
    mine = jobs.open_batches("job-0")
    assert mine
    cluster.mark_failed("crowded", jobs.run_id, "job-0")
    began = time.monotonic()
    (tmp_path / "leave").touch()
    while not are_cancelled(jobs, mine) and time.monotonic() < began + 30:
        time.sleep(0.5)
    report["cancelled_by_a_callback"] = are_cancelled(jobs, mine)
    if not are_cancelled(jobs, mine):
        # The next thing that runs for it has to, or goes on with them.
        cluster.clear("crowded", jobs.run_id, "job-0")
        cluster.wait_for_task("crowded", jobs.run_id, "job-0", "deferred", timeout=180)
        time.sleep(SECONDS)
        awaited = " ".join(one["kwargs"] for one in cluster.trigger_rows())
        orphans = [
            one["id"]
            for one in jobs.open_batches("job-0")
            if not one["cancelling_at"] and one["id"] not in awaited
        ]
        report["orphans"] = len(orphans)
        assert not orphans
