"""Tasks that the tests end by hand. `conf` has the file of rows, and an existing batch for the sensor."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from airflow.providers.common.compat.sdk import DAG

from airflow_provider_siliconflow.operators.batch import CreateBatchOperator
from airflow_provider_siliconflow.sensors.batch import BatchSensor

COMMON: dict[str, Any] = {
    "conn_id": "kills",
    "input_path": "{{ dag_run.conf['rows'] }}",
    "wait_for_completion": True,
    "poll_interval": 1,
    "cancel_on_kill": True,
}

with DAG(
    "kills",
    start_date=datetime(2026, 1, 1),
    schedule=None,
    default_args={"retries": 1, "retry_delay": timedelta(seconds=1)},
):
    for task_id in ("deferred-failed", "deferred-cleared"):
        CreateBatchOperator(task_id=task_id, deferrable=True, on_clear="resubmit", **COMMON)
    CreateBatchOperator(task_id="deferred-keep", deferrable=True, **COMMON | {"cancel_on_kill": False})
    for task_id in ("running-failed", "running-cleared", "running-evicted"):
        CreateBatchOperator(task_id=task_id, deferrable=False, on_clear="resubmit", **COMMON)
    CreateBatchOperator(task_id="running-keep", deferrable=False, **COMMON | {"cancel_on_kill": False})
    # The emulator holds a request of these tasks while they are marked failed.
    for task_id in ("posting-failed", "uploading-failed"):
        CreateBatchOperator(task_id=task_id, deferrable=False, **COMMON | {"conn_id": task_id})
    CreateBatchOperator.partial(task_id="mapped", deferrable=True, **COMMON).expand(
        completion_window=["24h", "24h"]
    )
    BatchSensor(
        task_id="sensor",
        conn_id="kills",
        batch_id="{{ dag_run.conf['batch_id'] }}",
        deferrable=True,
        poke_interval=1,
    )

for dag_id in ("twin-1", "twin-2"):
    with DAG(dag_id, start_date=datetime(2026, 1, 1), schedule=None):
        CreateBatchOperator(
            task_id="create",
            conn_id="kills",
            input_path="{{ dag_run.conf['rows'] }}",
            poll_interval=1,
            on_clear="resubmit",
        )
