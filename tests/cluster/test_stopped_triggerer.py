"""A triggerer is stopped for longer than Airflow waits for its heartbeat, and goes on: that is nobody's kill either."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.cluster.conftest import TRIGGERER_THRESHOLD
from tests.cluster.jobs import POLL_INTERVALS, Jobs, OpenAccount

if TYPE_CHECKING:
    from scripts.live_airflow.cluster import LiveCluster

#: Seconds, least and most, between the other one's taking over and the stopped one's going on: the tasks that the other
#: one has woken are queued, running or waiting again by then.
AFTER_HANDOVER = (3.0, 9.0)
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
    seconds = TRIGGERER_THRESHOLD + chance.uniform(*AFTER_HANDOVER)
    ((holder, held),) = cluster.triggers_of().most_common(1)
    report |= {"triggers": held, "stopped_for_seconds": round(seconds, 1)}
    with cluster.frozen(holder):
        began = time.monotonic()
        for moment, name in sorted((chance.uniform(0, seconds), name) for name in jobs.names):
            time.sleep(max(0.0, began + moment - time.monotonic()))
            jobs.end_batch(name)
        time.sleep(max(0.0, began + seconds - time.monotonic()))
    returned = time.time()
    time.sleep(AFTERMATH)
    cluster.wait_until_settled(jobs.dag_id, jobs.run_id)
    report["cancelled_after_seconds"] = [round(at - returned, 1) for at in jobs.cancellations()]
    jobs.check(jobs.finish(), report)
