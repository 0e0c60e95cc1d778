"""
### Extraction into a data frame

Reads support tickets from a CSV file and extracts a `Ticket` from each: a pydantic model of five fields. An answer that
is no `Ticket`, or that `plausible` does not accept, is sent again up to twice, and the model is shown what was wrong.
The last task joins the answers to the tickets in one data frame.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from airflow.providers.common.compat.sdk import DAG, Param, task
from pydantic import BaseModel, Field

if TYPE_CHECKING:
    from airflow_provider_siliconflow.api.models import BatchResult

TICKETS = Path(__file__).parent / "data" / "tickets.csv"

# For a first run. In production, use a bucket or a folder that all workers can reach.
RESULTS = Path(tempfile.gettempdir()) / "siliconflow_extraction"

# Batches take hours, so one poll a minute is enough. The local emulator is much faster.
POLL_SECONDS = float(os.environ.get("SILICONFLOW_POLL_SECONDS", "60"))


class Ticket(BaseModel):
    """What is extracted. The descriptions are part of the schema that the model is shown."""

    subject: Literal["delivery", "damage", "payment", "product", "other"]
    product: str | None = Field(description="The product in English, one or two words; null if none is named")
    amount: float | None = Field(description="The amount of money that is mentioned, without its currency")
    urgency: int = Field(ge=1, le=5, description="5: the customer needs an answer today")
    summary: str = Field(max_length=200, description="One sentence in English")


def plausible(result: BatchResult) -> bool | str:
    """Return whether an answer makes sense; the model is told the reason why not."""
    ticket: Ticket = result.parsed
    if ticket.amount is not None and ticket.amount < 0:
        return "amount is negative; it is the sum that the customer mentions, or null"
    return True


with DAG(
    dag_id="siliconflow_extraction",
    doc_md=__doc__,
    start_date=datetime(2026, 1, 1),
    schedule=None,
    catchup=False,
    default_args={"retries": 2, "retry_delay": timedelta(minutes=5)},
    tags=["siliconflow", "example"],
    params={
        "tickets": Param(str(TICKETS), type="string", description="CSV file with the columns id and text"),
        "model": Param("deepseek-ai/DeepSeek-V3", type="string"),
        "output_dir": Param(
            str(RESULTS), type="string", description="Path or URI of the folder for the results"
        ),
    },
):

    @task.siliconflow_batch(
        output_dir="{{ params.output_dir }}",
        model="{{ params.model }}",
        output_type=Ticket,
        # JSON mode, and an instruction with the schema. Some models have no JSON mode: "prompt" is for them.
        structured_output="json_object",
        accept=plausible,
        request_params={"temperature": 0, "max_tokens": 300},
        # The same question would get the same answer at temperature 0, and a long answer be cut off again.
        retry_params={"temperature": 0.7, "max_tokens": 1000},
        max_row_attempts=3,
        max_error_rate=0.05,
        deferrable=True,
        poll_interval=POLL_SECONDS,
    )
    def extract(params: Any = None) -> Iterator[dict[str, Any]]:
        """Yield one request per ticket."""
        import csv

        with open(params["tickets"], newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                yield {
                    "custom_id": row["id"],
                    "messages": [
                        {"role": "system", "content": "You read support tickets of a furniture shop."},
                        {"role": "user", "content": row["text"]},
                    ],
                }

    @task
    def tabulate(manifest: dict[str, Any], params: Any = None) -> str:
        """Write the tickets with what was extracted as CSV, the most urgent first, and return the path."""
        import pandas as pd

        from airflow_provider_siliconflow.results import to_frame

        tickets = pd.read_csv(params["tickets"], dtype={"id": str})
        # The prefix keeps the fields apart from the columns of the results and of the tickets.
        answers = to_frame(manifest, "pandas", output_type=Ticket, prefix="ticket_")
        columns = ["custom_id", "outcome", *(name for name in answers if name.startswith("ticket_"))]
        table = tickets.merge(answers[columns], left_on="id", right_on="custom_id", validate="one_to_one")
        table = table.drop(columns="custom_id").sort_values("ticket_urgency", ascending=False, kind="stable")
        print(table.groupby("ticket_subject", dropna=False)["ticket_urgency"].agg(["count", "mean"]))
        path = os.path.join(params["output_dir"], "tickets.csv")
        table.to_csv(path, index=False)
        return path

    tabulate(extract())
