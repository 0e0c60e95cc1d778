"""
### One batch job per file

One mapped task per file or language, created with `.expand()`. The jobs wait in parallel and fail and retry
independently. The last task collects their manifests.

A single job needs no mapping: `RunBatchOperator` splits any number of rows into batches.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from airflow.providers.common.compat.sdk import DAG, Param, task

from airflow_provider_siliconflow.operators.batch import RunBatchOperator

# For a first run. In production, use a bucket or a folder that all workers can reach.
RESULTS = Path(tempfile.gettempdir()) / "siliconflow_mapped"

# Batches take hours, so one poll a minute is enough. The local emulator is much faster.
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
        "input_dir": Param(
            None,
            # The trigger form takes an empty field for such a parameter, and then passes None.
            type=["null", "string"],
            description="Path or URI of a folder of JSONL files, one per customer; empty: no customers",
        ),
        "output_dir": Param(
            str(RESULTS), type="string", description="Path or URI of the folder for the results"
        ),
        "languages": Param(["German", "French", "Japanese"], type="array", items={"type": "string"}),
        "model": Param("deepseek-ai/DeepSeek-V3", type="string"),
    },
):
    common = {
        "model": "{{ params.model }}",
        "max_row_attempts": 3,
        "deferrable": True,
        "poll_interval": POLL_SECONDS,
    }

    # With the operator: one job per customer file.

    @task
    def customer_files(params: Any = None) -> list[dict[str, str]]:
        """Return the arguments of each job: a file of requests and a folder for its results."""
        from airflow.providers.common.compat.sdk import ObjectStoragePath

        if not params["input_dir"]:
            return []
        files = sorted(ObjectStoragePath(params["input_dir"]).glob("*.jsonl"), key=str)
        return [
            {"requests": str(file), "output_dir": f"{params['output_dir']}/customers/{file.stem}"}
            for file in files
        ]

    per_customer = RunBatchOperator.partial(task_id="per_customer", **common).expand_kwargs(customer_files())

    # With the decorator: one job per language, over sentences from an upstream task.

    @task
    def sentences() -> list[str]:
        """Return the sentences to translate. They are few enough for XCom."""
        return ["The parcel has arrived.", "When does the shop open?", "Please send the bill by mail."]

    @task
    def languages(params: Any = None) -> list[str]:
        """Return the languages from the run's parameters."""
        return list(params["languages"])

    @task.siliconflow_batch(
        output_dir="{{ params.output_dir }}/languages/{{ ti.map_index }}",
        request_params={"temperature": 0, "max_tokens": 200},
        **common,
    )
    def translate(language: str, sentences: list[str]) -> Iterator[str]:
        """Yield one prompt per sentence. Rows without a `custom_id` are numbered."""
        for sentence in sentences:
            yield f"Translate into {language} and reply with the translation only: {sentence}"

    per_language = translate.partial(sentences=sentences()).expand(language=languages())

    @task(trigger_rule="none_failed")
    def summarise(customers: Any, translations: Any) -> dict[str, int]:
        """Add up the results. If there are no customer files, the first job is skipped."""
        manifests = [*(customers or []), *(translations or [])]
        return {
            "jobs": len(manifests),
            "rows": sum(manifest["rows"]["total"] for manifest in manifests),
            "ok": sum(manifest["rows"]["ok"] for manifest in manifests),
        }

    summarise(per_customer.output, per_language)
