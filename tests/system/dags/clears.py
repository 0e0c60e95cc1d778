"""
Tasks that the tests clear.

`conf` has the folder of a run; what is asked is in its file `<task>.jsonl`, which a test may change before it clears.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from airflow.providers.common.compat.sdk import DAG, task

from airflow_provider_siliconflow.operators.batch import CreateBatchOperator, RunBatchOperator

FOLDER = "{{ dag_run.conf['folder'] }}"
JOB: dict[str, Any] = {
    "requests": FOLDER + "/{{ task.task_id }}.jsonl",
    "output_dir": FOLDER + "/{{ task.task_id }}",
    "poll_interval": 1,
}
CREATE: dict[str, Any] = {
    "input_path": FOLDER + "/{{ task.task_id }}.jsonl",
    "wait_for_completion": True,
    "poll_interval": 1,
}

with DAG(
    "clears",
    start_date=datetime(2026, 1, 1),
    schedule=None,
    default_args={"retries": 1, "retry_delay": timedelta(seconds=1), "conn_id": "clears"},
):

    @task(retries=0)
    def downstream(manifest: dict[str, Any]) -> int:
        return int(manifest["rows"]["ok"])

    for name in ("success", "partial", "changed", "resubmit"):
        RunBatchOperator(
            task_id=f"job-{name}",
            deferrable=True,
            on_clear="resubmit" if name == "resubmit" else "reuse",
            **JOB,
        )
    downstream(RunBatchOperator(task_id="job-twice", deferrable=True, **JOB).output)
    for name in ("success", "changed", "resubmit", "nothing"):
        CreateBatchOperator(
            task_id=f"create-{name}",
            deferrable=True,
            allow_all_failed=True,
            on_clear="resubmit" if name == "resubmit" else "reuse",
            **CREATE,
        )

with DAG(
    "clears-under-way",
    start_date=datetime(2026, 1, 1),
    schedule=None,
    default_args={"retries": 1, "retry_delay": timedelta(seconds=1), "conn_id": "clears-under-way"},
):
    for deferrable, name in ((True, "deferred"), (False, "running")):
        RunBatchOperator(task_id=f"job-{name}", deferrable=deferrable, **JOB)
        CreateBatchOperator(task_id=f"create-{name}", deferrable=deferrable, **CREATE)
