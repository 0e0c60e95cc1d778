"""A triggerer is stopped for longer than Airflow waits for its heartbeat, and goes on: that is nobody's kill either."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.cluster.conftest import TRIGGERER_THRESHOLD
from tests.cluster.jobs import Jobs, OpenAccount

if TYPE_CHECKING:
    from scripts.live_airflow.cluster import LiveCluster

#: Seconds that it stands still: the other one has taken its triggers over by then, and woken their tasks.
SECONDS = TRIGGERER_THRESHOLD + 15.0
AFTERMATH = 30.0


def test_a_stopped_triggerer_cancels_nothing_and_pays_nothing_again(
    cluster: LiveCluster,
    open_account: OpenAccount,
    tmp_path: Path,
    report: dict[str, object],
    repetition: int,
) -> None:
    jobs = Jobs(cluster, open_account, tmp_path, "five_jobs", 5, rows=160)
    jobs.wait_until_waiting()
    chance = random.Random(repetition)
    ((holder, held),) = cluster.triggers_of().most_common(1)
    report["triggers"] = held
    with cluster.frozen(holder):
        began = time.monotonic()
        # Seen by the one that takes over; the task is woken before the stopped one goes on, or just after.
        for moment, name in sorted((chance.uniform(SECONDS - 15, SECONDS), name) for name in jobs.names):
            time.sleep(max(0.0, began + moment - time.monotonic()))
            jobs.end_batch(name)
        time.sleep(max(0.0, began + SECONDS - time.monotonic()))
    returned = time.time()
    time.sleep(AFTERMATH)
    cluster.wait_until_settled(jobs.dag_id, jobs.run_id)
    report["cancelled_after_seconds"] = [round(at - returned, 1) for at in jobs.cancellations()]
    jobs.check(jobs.finish(), report)
