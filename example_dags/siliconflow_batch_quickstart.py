"""Upload a file of requests, create a batch on it, wait without a worker, fetch the results."""

from __future__ import annotations

from datetime import datetime

from airflow.providers.common.compat.sdk import DAG, Param

from airflow_provider_siliconflow.operators.batch import (
    CreateBatchOperator,
    DownloadBatchResultsOperator,
    UploadBatchFileOperator,
)
from airflow_provider_siliconflow.sensors.batch import BatchSensor

with DAG(
    dag_id="siliconflow_batch_quickstart",
    start_date=datetime(2026, 1, 1),
    schedule=None,
    catchup=False,
    tags=["siliconflow", "example"],
    params={
        "input_path": Param("", type="string", description="Path or URI of a JSONL file of requests"),
        "output_dir": Param("", type="string", description="Path or URI of the folder for the results"),
        "model": Param("Qwen/Qwen3-32B", type="string"),
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
