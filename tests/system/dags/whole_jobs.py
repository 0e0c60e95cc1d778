"""A job with several shards and models, which tests kill."""

from __future__ import annotations

from datetime import datetime, timedelta

from airflow.providers.common.compat.sdk import DAG

from airflow_provider_siliconflow.operators.batch import RunBatchOperator

with DAG(
    "whole_jobs",
    start_date=datetime(2026, 1, 1),
    schedule=None,
    catchup=False,
    params={"conn_id": "", "requests": "", "output_dir": ""},
):
    RunBatchOperator(
        task_id="run",
        requests="{{ params.requests }}",
        output_dir="{{ params.output_dir }}",
        conn_id="{{ params.conn_id }}",
        models=["Qwen/Qwen3-32B", "THUDM/GLM-4-9B-0414"],
        max_row_attempts=2,
        deferrable=True,
        poll_interval=1,
        retries=10,
        retry_delay=timedelta(seconds=1),
    )
