"""
### Large classification

Classifies customer reviews, 100,000 by default: far more than one batch takes. The function yields the rows one at a
time. The provider splits them into shards of 5,000, keeps a few batches open at once and writes all results to one
file, in input order.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from airflow.providers.common.compat.sdk import DAG, Param, task

SYSTEM = (
    "Name the subject of the review: delivery, price, quality or service. "
    'Answer as JSON: {"answer": "<subject>"}'
)

# For a first run. In production, use a bucket or a folder that all workers can reach.
RESULTS = Path(tempfile.gettempdir()) / "siliconflow_classification"

# Batches take hours, so one poll a minute is enough. The local emulator is much faster.
POLL_SECONDS = float(os.environ.get("SILICONFLOW_POLL_SECONDS", "60"))

with DAG(
    dag_id="siliconflow_classification",
    doc_md=__doc__,
    start_date=datetime(2026, 1, 1),
    schedule=None,
    catchup=False,
    default_args={"retries": 2, "retry_delay": timedelta(minutes=5)},
    tags=["siliconflow", "example"],
    params={
        "rows": Param(
            100_000, type="integer", minimum=1, description="Number of reviews to generate and classify"
        ),
        "model": Param("deepseek-ai/DeepSeek-V3", type="string"),
        "output_dir": Param(
            str(RESULTS), type="string", description="Path or URI of the folder for the results"
        ),
    },
):

    @task.siliconflow_batch(
        output_dir="{{ params.output_dir }}",
        model="{{ params.model }}",
        # For every row: a short JSON answer that is the same every time. Some models have no JSON mode: remove
        # response_format for them.
        request_params={
            "temperature": 0,
            "max_tokens": 32,
            "response_format": {"type": "json_object"},
        },
        max_in_flight=8,
        max_row_attempts=3,
        max_error_rate=0.01,
        deferrable=True,
        poll_interval=POLL_SECONDS,
    )
    def classify(params: Any = None) -> Iterator[dict[str, Any]]:
        """Yield one request per review. In a real DAG the reviews come from a query or a file."""
        for number in range(params["rows"]):
            subject = ("parcel", "bill", "fabric", "helpline")[number % 4]
            review = f"Order {number}: the {subject} was {'not ' * (number % 3 == 0)}what I expected."
            yield {
                "custom_id": f"review-{number:07}",
                "messages": [
                    {"role": "system", "content": SYSTEM},
                    {"role": "user", "content": review},
                ],
            }

    @task
    def summarise(manifest: dict[str, Any]) -> dict[str, Any]:
        """Count the labels. The results are streamed, so their number does not matter."""
        from collections import Counter
        from typing import Literal

        from pydantic import BaseModel, ValidationError

        from airflow_provider_siliconflow.results import read_results

        class Label(BaseModel):
            answer: Literal["delivery", "price", "quality", "service"]

        labels: Counter[str] = Counter()
        for row in read_results(manifest):
            try:
                labels[row.parse(Label).answer if row.ok else "(no answer)"] += 1
            except ValidationError:
                labels["(not a label)"] += 1
        summary = {
            "rows": manifest["rows"],
            "batches": len(manifest["models"][0]["batches"]),
            "tokens": manifest["usage"]["total_tokens"],
            "labels": dict(labels.most_common()),
        }
        print(summary)
        return summary

    summarise(classify())
