"""Honest waits beside waits for accounts that answer each poll with something hostile. `conf` has the batches."""

from __future__ import annotations

from datetime import datetime

from airflow.providers.common.compat.sdk import DAG
from hostile_cases import HOSTILE, WAITS

from airflow_provider_siliconflow.sensors.batch import BatchSensor

with DAG("hostile", start_date=datetime(2026, 1, 1), schedule=None):
    for number in range(WAITS):
        BatchSensor(
            task_id=f"honest-{number}",
            conn_id="honest",
            batch_id=f"{{{{ dag_run.conf['honest'][{number}] }}}}",
            deferrable=True,
            start_from_trigger=True,
            poke_interval=1,
            timeout=1800,
        )
    for name in HOSTILE:
        BatchSensor(
            task_id=name,
            conn_id=name,
            batch_id=f"{{{{ dag_run.conf['{name}'] }}}}",
            deferrable=True,
            start_from_trigger=True,
            poke_interval=1,
            # Those that never get an answer that they can read end by this.
            timeout=75,
        )
