"""Batches that are waited for in every way; files and folder come with the run's conf."""

from __future__ import annotations

from datetime import datetime

from airflow.providers.common.compat.sdk import DAG, Param

from airflow_provider_siliconflow.operators.batch import (
    CreateBatchOperator,
    DownloadBatchResultsOperator,
    UploadBatchFileOperator,
)
from airflow_provider_siliconflow.sensors.batch import BatchSensor

COMMON = {"start_date": datetime(2026, 1, 1), "schedule": None, "catchup": False}
PARAMS = {"input_path": Param("", type="string"), "output_dir": Param("", type="string")}

with DAG("waits", params=PARAMS, **COMMON):
    upload = UploadBatchFileOperator(task_id="upload", input_path="{{ params.input_path }}")
    create = CreateBatchOperator.partial(task_id="create", input_file_id=upload.output).expand(
        replace=[{"model": "Qwen/Qwen3-32B"}, {"model": "Qwen/Qwen3-8B"}]
    )
    finish = CreateBatchOperator(
        task_id="finish",
        input_file_id=upload.output,
        wait_for_completion=True,
        deferrable=True,
        poll_interval=0.5,
    )
    poke = BatchSensor(task_id="poke", batch_id=create.output, mode="poke", poke_interval=0.5)
    reschedule = BatchSensor(
        task_id="reschedule", batch_id=create.output, mode="reschedule", poke_interval=0.5, deferrable=False
    )
    each = BatchSensor.partial(task_id="each", deferrable=True, poke_interval=0.5).expand(
        batch_id=create.output
    )
    download = DownloadBatchResultsOperator.partial(
        task_id="download", output_dir="{{ params.output_dir }}/{{ ti.map_index }}"
    ).expand(batch_id=create.output)
    [poke, reschedule, each, finish] >> download

with DAG("waits_in_vain", params=PARAMS, **COMMON):
    CreateBatchOperator(
        task_id="create",
        input_path="{{ params.input_path }}",
        wait_for_completion=True,
        deferrable=True,
        poll_interval=0.5,
    )
