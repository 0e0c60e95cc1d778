"""
### Large classification

Classifies customer reviews, 100,000 by default: far more than a batch takes. The function yields the rows one at a
time; they are cut into shards of 5,000, of which a few are open at once, and come back as one file in order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

from airflow.providers.common.compat.sdk import DAG, Param, task

SYSTEM = (
    "Name the subject of the review: delivery, price, quality or service. "
    'Answer as JSON: {"answer": "<subject>"}'
)

# A batch takes hours, and a look at it costs nothing but the look. A local emulator is quicker.
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
        "rows": Param(100_000, type="integer", minimum=1, description="Reviews to make up and classify"),
        "model": Param("Qwen/Qwen3-8B", type="string"),
        "output_dir": Param("", type="string", description="Path or URI of the folder for the results"),
    },
):

    @task.siliconflow_batch(
        output_dir="{{ params.output_dir }}",
        model="{{ params.model }}",
        # For every row: nothing but the label, and the same label every time.
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
        """Yield a request per review; yours would come from a query or a file."""
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
        """Count the labels; the results are read as a stream, whatever their number."""
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
