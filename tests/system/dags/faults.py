"""One task per account with faulty responses, all in parallel. `conf` has the file of rows and batches to wait for."""

from __future__ import annotations

from datetime import datetime, timedelta

from airflow.providers.common.compat.sdk import DAG
from fault_cases import LOST_ANSWERS, REFUSALS, WAITS

from airflow_provider_siliconflow.operators.batch import CreateBatchOperator
from airflow_provider_siliconflow.sensors.batch import BatchSensor

with DAG(
    "faults",
    start_date=datetime(2026, 1, 1),
    schedule=None,
    default_args={"retries": 2, "retry_delay": timedelta(seconds=1)},
):
    for name in LOST_ANSWERS | REFUSALS:
        CreateBatchOperator(task_id=name, conn_id=name, input_path="{{ dag_run.conf['rows'] }}")
    for name in WAITS:
        BatchSensor(
            task_id=name,
            conn_id=name,
            batch_id="{{ dag_run.conf['batches'][ti.task_id] }}",
            deferrable=name.endswith("deferred"),
            mode="reschedule" if name.endswith("reschedule") else "poke",
            # If a task is rescheduled faster than the scheduler polls, Airflow treats it as killed.
            poke_interval=5 if name.endswith("reschedule") else 1,
        )
