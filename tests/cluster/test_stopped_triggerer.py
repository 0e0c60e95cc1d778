"""A triggerer is stopped for longer than Airflow waits for its heartbeat, and goes on: that is nobody's kill either."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.cluster.conftest import TRIGGERER_THRESHOLD
from tests.cluster.jobs import POLL_INTERVALS, Jobs, OpenAccount, eventually

if TYPE_CHECKING:
    from scripts.live_airflow.cluster import LiveCluster

#: Seconds that the service takes for a new batch, so that a task that was woken is at work for so long.
SLOW = 8.0
AFTERMATH = 30.0


def test_a_stopped_triggerer_cancels_nothing_and_pays_nothing_again(
    cluster: LiveCluster,
    open_account: OpenAccount,
    tmp_path: Path,
    report: dict[str, object],
    repetition: int,
) -> None:
    chance = random.Random(repetition)
    jobs = Jobs(
        cluster,
        open_account,
        tmp_path,
        "five_jobs",
        5,
        rows=160,
        poll_interval=POLL_INTERVALS[repetition % 2],
    )
    jobs.wait_until_waiting()
    ((holder, _),) = cluster.triggers_of().most_common(1)
    held = cluster.tasks_of(holder, jobs.dag_id, jobs.run_id)
    slow = jobs.emulator.faults.add(match="POST /batches", kind="slow", seconds=SLOW, times=-1)
    with cluster.frozen(holder):
        began = time.monotonic()
        for name in jobs.names:
            jobs.end_batch(name)
        # The other triggerer takes its waits over and wakes the tasks.
        eventually(lambda: len(jobs.awake(held)) > len(held) / 2, timeout=TRIGGERER_THRESHOLD + 60)
        time.sleep(chance.uniform(0, SLOW / 2))
        report |= {"held": len(held), "awake": len(jobs.awake(held))}
        report["stopped_for_seconds"] = round(time.monotonic() - began, 1)
    returned = time.time()
    time.sleep(AFTERMATH)
    slow.times = 0
    cluster.wait_until_settled(jobs.dag_id, jobs.run_id)
    report["cancelled_after_seconds"] = [round(at - returned, 1) for at in jobs.cancellations()]
    jobs.check(jobs.finish(), report)
