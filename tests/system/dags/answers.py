"""A job with all that makes its answers usable and its bill predictable, over several nights."""

from __future__ import annotations

from datetime import datetime, timedelta

from airflow.providers.common.compat.sdk import DAG
from answer_cases import MODELS, PRICES, Review

from airflow_provider_siliconflow.api.models import BatchResult
from airflow_provider_siliconflow.operators.batch import RunBatchOperator


def has_a_topic(row: BatchResult) -> bool | str:
    return bool(row.parsed.topic) or "it has no topic"


with DAG(
    "answers",
    start_date=datetime(2026, 1, 1),
    schedule=None,
    params={"requests": "", "output_dir": "", "cache_dir": "", "max_cost": 1000},
):
    RunBatchOperator(
        task_id="run",
        requests="{{ params.requests }}",
        output_dir="{{ params.output_dir }}",
        cache_dir="{{ params.cache_dir }}",
        conn_id="answers",
        models=MODELS,
        request_params={"max_tokens": 300},
        output_type=Review,
        structured_output="json_schema",
        accept=has_a_topic,
        retry_params={"max_tokens": 600},
        max_row_attempts=3,
        prices=PRICES,
        max_cost="{{ params.max_cost }}",
        on_invalid_row="report",
        deferrable=True,
        poll_interval=1,
        retries=10,
        retry_delay=timedelta(seconds=1),
    )
