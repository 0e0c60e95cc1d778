"""Tasks whose connection uses a proxy. `conf` has the file of rows and a folder."""

from __future__ import annotations

from datetime import datetime, timedelta

from airflow.providers.common.compat.sdk import DAG

from airflow_provider_siliconflow.operators.batch import CreateBatchOperator, RunBatchOperator

with DAG(
    "behind_proxy",
    start_date=datetime(2026, 1, 1),
    schedule=None,
    default_args={"retries": 5, "retry_delay": timedelta(seconds=3), "conn_id": "behind_proxy"},
):
    for number in range(6):
        CreateBatchOperator(
            task_id=f"create-{number}",
            input_path="{{ dag_run.conf['rows'] }}",
            wait_for_completion=True,
            deferrable=number % 2 == 0,
            poll_interval=1,
        )
    RunBatchOperator(
        task_id="run",
        requests="{{ dag_run.conf['rows'] }}",
        output_dir="{{ dag_run.conf['folder'] }}",
        max_rows_per_batch=1,
        max_in_flight=2,
        deferrable=True,
        poll_interval=1,
    )
