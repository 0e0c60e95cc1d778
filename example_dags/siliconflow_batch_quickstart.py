"""Upload a file of requests, create a batch from it, wait without a worker slot, and download the results."""

from __future__ import annotations

import tempfile
from datetime import datetime, timedelta
from pathlib import Path

from airflow.providers.common.compat.sdk import DAG, Param

from airflow_provider_siliconflow.operators.batch import (
    CreateBatchOperator,
    DownloadBatchResultsOperator,
    UploadBatchFileOperator,
)
from airflow_provider_siliconflow.sensors.batch import BatchSensor

# Defaults for a first run. In production, use a bucket or a folder that all workers can reach.
REQUESTS = Path(__file__).parent / "data" / "requests.jsonl"
RESULTS = Path(tempfile.gettempdir()) / "siliconflow_quickstart"

with DAG(
    dag_id="siliconflow_batch_quickstart",
    start_date=datetime(2026, 1, 1),
    schedule=None,
    catchup=False,
    # A retry reuses the file and the batch of the previous try and does not pay again.
    default_args={"retries": 2, "retry_delay": timedelta(minutes=1)},
    tags=["siliconflow", "example"],
    params={
        "input_path": Param(
            str(REQUESTS), type="string", description="Path or URI of a JSONL file of requests"
        ),
        "output_dir": Param(
            str(RESULTS), type="string", description="Path or URI of the folder for the results"
        ),
        "model": Param("deepseek-ai/DeepSeek-V3", type="string"),
    },
):
    upload = UploadBatchFileOperator(task_id="upload", input_path="{{ params.input_path }}")
    create = CreateBatchOperator(
        task_id="create",
        input_file_id=upload.output,
        replace={"model": "{{ params.model }}"},
    )
    wait = BatchSensor(task_id="wait", batch_id=create.output, deferrable=True, poke_interval=10)
    download = DownloadBatchResultsOperator(
        task_id="download", batch_id=create.output, output_dir="{{ params.output_dir }}"
    )

    wait >> download
