"""
The database hangs for a minute, as in a failover, while whole jobs wait: nobody takes that for a person's kill.

Both triggerers miss their heartbeats, the waits move, and tasks are woken by batches that ended meanwhile.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.cluster.jobs import POLL_INTERVALS, Jobs, OpenAccount

if TYPE_CHECKING:
    from scripts.live_airflow.cluster import LiveCluster

SECONDS = 60.0
HANGS = int(os.environ.get("HANGS", "3"))
#: Seconds after the database's return in which whatever takes it for a kill has acted.
AFTERMATH = 45.0


def test_a_database_that_hangs_cancels_nothing_and_pays_nothing_again(
    cluster: LiveCluster,
    open_account: OpenAccount,
    tmp_path: Path,
    report: dict[str, object],
    repetition: int,
) -> None:
    jobs = Jobs(
        cluster,
        open_account,
        tmp_path,
        "sixteen_jobs",
        16,
        rows=160,
        poll_interval=POLL_INTERVALS[repetition % 2],
    )
    jobs.wait_until_waiting()
    chance = random.Random(repetition)
    restarts = len(cluster.restarts)
    cancelled = []
    for _ in range(HANGS):
        with cluster.database.hanging():
            began = time.monotonic()
            for moment, name in sorted((chance.uniform(1, SECONDS), name) for name in jobs.names):
                time.sleep(max(0.0, began + moment - time.monotonic()))
                jobs.end_batch(name)
            time.sleep(max(0.0, began + SECONDS - time.monotonic()))
        returned = time.time()
        time.sleep(AFTERMATH)
        # Woken, each has sent its next batch and waits again, but for those that a cancelled batch has upset.
        cluster.wait_until_settled(jobs.dag_id, jobs.run_id)
        cancelled.append([round(at - returned, 1) for at in jobs.cancellations() if at >= returned])
    report["cancelled_after_seconds"] = cancelled
    report["restarts"] = [one.component for one in cluster.restarts[restarts:]]
    jobs.check(jobs.finish(timeout=900), report)
