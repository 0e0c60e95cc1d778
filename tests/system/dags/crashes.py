"""One task per crash, all in parallel. `conf` has the file of rows, file and batch ids by task, and a folder."""

from __future__ import annotations

from datetime import datetime, timedelta

from airflow.providers.common.compat.sdk import DAG
from crash_cases import CRASH_CASES, DOWNLOAD_POINTS
from dying import DyingCreate, DyingDownload, DyingWhenResumed

with DAG(
    "crashes",
    start_date=datetime(2026, 1, 1),
    schedule=None,
    max_active_tasks=20,
    default_args={"retries": 5, "retry_delay": timedelta(seconds=3)},
):
    for case in CRASH_CASES:
        operator = DyingWhenResumed if case.point == "resumed" else DyingCreate
        operator(
            task_id=case.name,
            conn_id=case.name,
            dies_at=case.point,
            store=case.store,
            input_path="{{ dag_run.conf['rows'] }}" if case.source == "path" else None,
            input_file_id="{{ dag_run.conf['files'][ti.task_id] }}" if case.source == "id" else None,
            replace={"model": "Qwen/Qwen3-32B"},
            wait_for_completion=case.wait != "none",
            deferrable=case.wait == "deferrable",
            poll_interval=1,
        )
    for point in DOWNLOAD_POINTS:
        DyingDownload(
            task_id=point,
            conn_id=point,
            dies_at=point,
            batch_id="{{ dag_run.conf['batches'][ti.task_id] }}",
            output_dir="{{ dag_run.conf['output_dir'] }}/{{ ti.task_id }}",
        )
