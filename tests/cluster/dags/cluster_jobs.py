"""Whole jobs, each over rows of its own. `conf` names the folder, the connection and the seconds between polls."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from airflow.providers.common.compat.sdk import DAG, task

from airflow_provider_siliconflow.operators.batch import RunBatchOperator

COMMON: dict[str, Any] = {
    "requests": "{{ dag_run.conf['folder'] }}/{{ ti.task_id }}.jsonl",
    "output_dir": "{{ dag_run.conf['folder'] }}/{{ ti.task_id }}",
    "conn_id": "{{ dag_run.conf['conn_id'] }}",
    "poll_interval": "{{ dag_run.conf['poll_interval'] }}",
    "model": "Qwen/Qwen3-32B",
    "deferrable": True,
    "cancel_on_kill": True,
    "retries": 3,
    "retry_delay": timedelta(seconds=10),
}


def jobs(dag_id: str, number: int, **arguments: Any) -> None:
    """Make a DAG of jobs `job-0`, `job-1`, ..."""
    with DAG(dag_id, start_date=datetime(2026, 1, 1), schedule=None, max_active_tasks=64):
        for index in range(number):
            RunBatchOperator(task_id=f"job-{index}", **COMMON | arguments)


jobs("sixteen_jobs", 16, max_rows_per_batch=20, max_in_flight=4)
jobs("five_jobs", 5, max_rows_per_batch=20, max_in_flight=4)
jobs("two_jobs", 2, max_rows_per_batch=20, max_in_flight=4)
# All of its ten batches are sent at once.
jobs("one_job", 1, max_rows_per_batch=4)

with DAG("crowded", start_date=datetime(2026, 1, 1), schedule=None):
    # The only slot of the pool is taken while the job waits in the triggerer: woken, it has to queue.
    @task(pool="narrow", priority_weight=100)
    def occupy(**context: Any) -> None:
        import time
        from pathlib import Path

        while not (Path(context["dag_run"].conf["folder"]) / "leave").exists():
            time.sleep(0.5)

    RunBatchOperator(task_id="job-0", pool="narrow", max_rows_per_batch=20, max_in_flight=2, **COMMON) >> []
    occupy()
