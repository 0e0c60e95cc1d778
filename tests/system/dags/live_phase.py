"""Jobs whose rows are asked one by one when the time has come. `conf` has the file of rows and the folders."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from airflow.providers.common.compat.sdk import DAG

from airflow_provider_siliconflow.operators.batch import RunBatchOperator

COMMON: dict[str, Any] = {
    "requests": "{{ dag_run.conf['rows'] }}",
    "output_dir": "{{ dag_run.conf['output_dir'] }}/{{ task.task_id }}",
    "models": ["deepseek-ai/DeepSeek-V3", "Qwen/Qwen3-8B"],
    "request_params": {"max_tokens": 100, "enable_thinking": False},
    "prices": {
        "deepseek-ai/DeepSeek-V3": {
            "prompt": 1,
            "completion": 4,
            "thinking": 0,
            "live": {"prompt": 2, "completion": 8},
        },
        "Qwen/Qwen3-8B": {
            "prompt": 0.7,
            "completion": 2.9,
            "thinking": 0,
            "live": {"prompt": 1.4, "completion": 5.8},
        },
    },
    "deferrable": True,
    "poll_interval": 1,
    "retries": 40,
    "retry_delay": timedelta(seconds=1),
}

with DAG("by_morning", start_date=datetime(2026, 1, 1), schedule=None):
    RunBatchOperator(
        task_id="run",
        conn_id="by_morning",
        live_after="{{ dag_run.conf['results_by'] }}",
        live_concurrency=32,
        max_rows_per_batch="{{ dag_run.conf['max_rows_per_batch'] }}",
        max_cost=100,
        **COMMON,
    )

for name in ("failed", "cleared", "killed"):
    with DAG(f"asked_live_{name}", start_date=datetime(2026, 1, 1), schedule=None):
        RunBatchOperator(task_id="run", conn_id=f"live-{name}", live_after=0, live_concurrency=8, **COMMON)
