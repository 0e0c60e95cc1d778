"""
`airflow tasks test` on a job that waits elsewhere: it pays for nothing again, and the job ends as if it had not been.

Airflow itself takes the task instance away from its trigger for it, and leaves it `queued` when it is broken off.
"""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.cluster.jobs import Jobs, OpenAccount

if TYPE_CHECKING:
    from scripts.live_airflow.cluster import LiveCluster

#: Seconds in which it has submitted, or taken up, all that there is, and waits.
SECONDS = 60.0


@pytest.mark.parametrize("broken_off", [True, False], ids=["broken-off", "to-its-end"])
def test_tasks_test_on_a_waiting_job_pays_for_nothing_again(
    cluster: LiveCluster,
    open_account: OpenAccount,
    tmp_path: Path,
    report: dict[str, object],
    broken_off: bool,
) -> None:
    jobs = Jobs(cluster, open_account, tmp_path, "one_job", 1, rows=40)
    jobs.wait_until_waiting()
    command = ("tasks", "test", jobs.dag_id, "job-0", jobs.run_id)
    with ThreadPoolExecutor() as pool:
        testing = pool.submit(cluster.run_cli_for, SECONDS if broken_off else 300, *command)
        if broken_off:
            testing.result()
        else:
            time.sleep(SECONDS)
        report["batches_meanwhile"] = len(jobs.batches())
        report["cancelled_meanwhile"] = len(jobs.cancellations())
        report["state"] = jobs.states()["job-0"]
        # The LocalExecutor cannot take back a task that stays queued, as others can. A scheduler that starts resets
        # what its predecessor queued.
        cluster.kill("scheduler", signal.SIGTERM)
        cluster.start("scheduler")
        state = jobs.finish()
        report["said"] = testing.result()[-1500:]
    jobs.check(state, report)
