"""One task per crash, all at once: `conf` names the file of rows, file ids and batch ids by task, and a folder."""

from __future__ import annotations

from datetime import datetime, timedelta

from airflow.providers.common.compat.sdk import DAG
from crash_cases import CRASH_CASES, DOWNLOAD_POINTS
from dying import DyingCreate, DyingDownload

with DAG(
    "crashes",
    start_date=datetime(2026, 1, 1),
    schedule=None,
    default_args={"retries": 2, "retry_delay": timedelta(seconds=1)},
):
    for case in CRASH_CASES:
        DyingCreate(
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
            # With a hook for afterwards the task has to end on a worker, which then can die there.
            post_execute=(lambda context, result=None: None) if case.point == "resumed" else None,
        )
    for point in DOWNLOAD_POINTS:
        DyingDownload(
            task_id=point,
            conn_id=point,
            dies_at=point,
            batch_id="{{ dag_run.conf['batches'][ti.task_id] }}",
            output_dir="{{ dag_run.conf['output_dir'] }}/{{ ti.task_id }}",
        )
