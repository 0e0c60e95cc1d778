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

# Woken, it has to wait for a slot in its pool, of which there is one.
jobs("crowded", 1, max_rows_per_batch=20, max_in_flight=2, pool="narrow")

with DAG("occupier", start_date=datetime(2026, 1, 1), schedule=None):

    @task(pool="narrow")
    def occupy(**context: Any) -> None:
        """Keep the slot until there is a file `leave`."""
        import time
        from pathlib import Path

        while not (Path(context["dag_run"].conf["folder"]) / "leave").exists():
            time.sleep(0.5)

    occupy()
