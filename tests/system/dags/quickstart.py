"""DAGs for every Airflow version: the quickstart example, and tasks that die once."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

from airflow.providers.common.compat.sdk import DAG
from dying import DyingCreate

EXAMPLE = Path(__file__).parents[3] / "example_dags" / "siliconflow_batch_quickstart.py"
exec(compile(EXAMPLE.read_text(), str(EXAMPLE), "exec"))

with DAG(
    "crash_and_retry",
    start_date=datetime(2026, 1, 1),
    schedule=None,
    default_args={"retries": 2, "retry_delay": timedelta(seconds=1)},
):
    for point in ("after-post", "before-defer"):
        DyingCreate(
            task_id=point,
            dies_at=point,
            input_path="{{ dag_run.conf['rows'] }}",
            wait_for_completion=True,
            deferrable=True,
            poll_interval=1,
        )
