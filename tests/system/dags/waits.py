"""Many parallel waits, and tasks whose worker starts are counted. `conf` has batches and files."""

from __future__ import annotations

import os
from datetime import datetime, timedelta

from airflow.providers.common.compat.sdk import DAG, task
from airflow.triggers.base import StartTriggerArgs

from airflow_provider_siliconflow.operators.batch import CreateBatchOperator, DownloadBatchResultsOperator
from airflow_provider_siliconflow.sensors.batch import BatchSensor

#: Each wait costs one worker start at its beginning and one at its end.
WAITS = 50 if os.environ.get("EXHAUSTIVE") else 10
RETRIES = {"retries": 2, "retry_delay": timedelta(seconds=1)}

with DAG("waits", start_date=datetime(2026, 1, 1), schedule=None, default_args=RETRIES):
    for number in range(WAITS):
        BatchSensor(
            task_id=f"wait-{number}",
            conn_id="waits",
            batch_id=f"{{{{ dag_run.conf['batches'][{number}] }}}}",
            deferrable=True,
            poke_interval=1,
            timeout=1800,
        )
    # A manual kill would cancel its batch; the loss of its triggerer must not.
    CreateBatchOperator(
        task_id="create",
        conn_id="waits",
        input_path="{{ dag_run.conf['rows'] }}",
        wait_for_completion=True,
        deferrable=True,
        cancel_on_kill=True,
        poll_interval=1,
        timeout=1800,
    )

with DAG("starts", start_date=datetime(2026, 1, 1), schedule=None, default_args=RETRIES):
    create = CreateBatchOperator(
        task_id="create",
        input_path="{{ dag_run.conf['rows'] }}",
        wait_for_completion=True,
        deferrable=True,
        poll_interval=1,
    )
    DownloadBatchResultsOperator(
        task_id="by-return-value",
        batch_id=create.output,
        output_dir="{{ dag_run.conf['output_dir'] }}/by-return-value",
    )
    create >> DownloadBatchResultsOperator(
        task_id="by-batch-id",
        batch_id="{{ ti.xcom_pull(task_ids='create', key='batch_id') }}",
        output_dir="{{ dag_run.conf['output_dir'] }}/by-batch-id",
    )
    CreateBatchOperator(
        task_id="imperfect",
        input_path="{{ dag_run.conf['imperfect_rows'] }}",
        wait_for_completion=True,
        deferrable=True,
        poll_interval=1,
    )
    submit = CreateBatchOperator(task_id="submit", input_path="{{ dag_run.conf['rows'] }}")
    BatchSensor(
        task_id="sensor", batch_id=submit.output, deferrable=True, start_from_trigger=True, poke_interval=1
    )

    # The triggerer of 3.3.2 would hang on this template, so a worker must begin the wait.
    BatchSensor(
        task_id="unfit",
        batch_id="{{ ti.xcom_pull(task_ids='submit') }}",
        start_from_trigger=True,
        poke_interval=1,
    ).set_upstream(submit)

    @task
    def ids(dag_run=None):  # type: ignore[no-untyped-def]
        return dag_run.conf["batches"]

    # Values of `expand` do not reach a trigger that starts without a worker, but templates do.
    BatchSensor.partial(
        task_id="mapped",
        deferrable=True,
        start_from_trigger=True,
        start_trigger_args=StartTriggerArgs(
            trigger_cls="airflow_provider_siliconflow.triggers.batch.BatchTrigger",
            trigger_kwargs={
                "batch_id": "{{ ti.xcom_pull(task_ids='ids', map_indexes=-1)[ti.map_index] }}",
                "conn_id": "siliconflow_default",
                "poll_interval": 1,
            },
            next_method="execute_complete",
        ),
    ).expand(batch_id=ids())
