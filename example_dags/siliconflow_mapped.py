"""
### A batch job per file

One mapped task for each file or language, made with `.expand()`: the jobs wait side by side, fail and retry each by
itself, and their manifests come together in the last task.

Within one job no mapping is needed: `RunBatchOperator` cuts any number of rows into batches by itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

from airflow.providers.common.compat.sdk import DAG, Param, task

from airflow_provider_siliconflow.operators.batch import RunBatchOperator

# A batch takes hours, and a look at it costs nothing but the look. A local emulator is quicker.
POLL_SECONDS = float(os.environ.get("SILICONFLOW_POLL_SECONDS", "60"))

with DAG(
    dag_id="siliconflow_mapped",
    doc_md=__doc__,
    start_date=datetime(2026, 1, 1),
    schedule=None,
    catchup=False,
    default_args={"retries": 2, "retry_delay": timedelta(minutes=5)},
    tags=["siliconflow", "example"],
    params={
        "input_dir": Param("", type="string", description="Path or URI of a folder with a JSONL file each"),
        "output_dir": Param("", type="string", description="Path or URI of the folder for the results"),
        "languages": Param(["German", "French", "Japanese"], type="array", items={"type": "string"}),
        "model": Param("Qwen/Qwen3-8B", type="string"),
    },
):
    common = {
        "model": "{{ params.model }}",
        "max_row_attempts": 3,
        "deferrable": True,
        "poll_interval": POLL_SECONDS,
    }

    # The operator: a job per customer file.

    @task
    def customer_files(params: Any = None) -> list[dict[str, str]]:
        """Find the files of today, and say where the results of each go."""
        from airflow.providers.common.compat.sdk import ObjectStoragePath

        files = sorted(ObjectStoragePath(params["input_dir"]).glob("*.jsonl"), key=str)
        return [
            {"requests": str(file), "output_dir": f"{params['output_dir']}/customers/{file.stem}"}
            for file in files
        ]

    per_customer = RunBatchOperator.partial(task_id="per_customer", **common).expand_kwargs(customer_files())

    # The decorator: a job per language, over sentences that an upstream task returned.

    @task
    def sentences() -> list[str]:
        """Return what is to be translated; few enough for XCom."""
        return ["The parcel has arrived.", "When does the shop open?", "Please send the bill by mail."]

    @task
    def languages(params: Any = None) -> list[str]:
        """Return the languages of the run's parameters."""
        return list(params["languages"])

    @task.siliconflow_batch(
        output_dir="{{ params.output_dir }}/languages/{{ ti.map_index }}",
        request_params={"temperature": 0, "max_tokens": 200},
        **common,
    )
    def translate(language: str, sentences: list[str]) -> Iterator[str]:
        """Yield a prompt per sentence; rows without a `custom_id` are numbered."""
        for sentence in sentences:
            yield f"Translate into {language}, and write the translation only: {sentence}"

    per_language = translate.partial(sentences=sentences()).expand(language=languages())

    @task(trigger_rule="none_failed")
    def summarise(customers: Any, translations: Any) -> dict[str, int]:
        """Add up what came back; without any customer file the first job is skipped."""
        manifests = [*(customers or []), *(translations or [])]
        return {
            "jobs": len(manifests),
            "rows": sum(manifest["rows"]["total"] for manifest in manifests),
            "ok": sum(manifest["rows"]["ok"] for manifest in manifests),
        }

    summarise(per_customer.output, per_language)
