"""What a trigger says to the task that resumes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from airflow_provider_siliconflow.api.exceptions import (
    BatchError,
    BatchTimeoutError,
    BatchWaitError,
    InvalidInputError,
    NoAnswerError,
    SiliconFlowError,
)
from airflow_provider_siliconflow.api.models import Batch
from airflow_provider_siliconflow.jobs.events import batches_of, encode, ended, failed


def test_ended_batches_travel_as_json_without_a_signature() -> None:
    found = Batch(
        id="batch_1",
        status="completed",
        output_file_id="https://h/o.jsonl?sig=SECRET",
        request_counts={"total": 2},
    )
    payload = json.loads(json.dumps(encode(ended([found]))))
    assert "SECRET" not in json.dumps(payload)
    (read,) = batches_of(payload)
    assert (read.id, read.status, read.request_counts.total) == ("batch_1", "completed", 2)
    assert read.output_file_id == "https://h/o.jsonl"


def test_a_job_of_many_batches_gets_only_what_it_asks_for() -> None:
    counts = {"total": 2, "completed": 1, "failed": 1}
    found = Batch(
        id="batch_1", status="failed", request_counts=counts, errors=["bad"], metadata={"m": "x" * 500}
    )
    payload = encode(ended([found]), counts_only=True)
    assert len(json.dumps(payload)) < 300
    (read,) = batches_of(payload)
    assert (read.status, read.request_counts.failed, read.error_messages) == ("failed", 1, ["bad"])


@pytest.mark.parametrize(
    ("error", "kind", "retryable"),
    [
        (BatchTimeoutError("too late"), BatchTimeoutError, True),
        (BatchTimeoutError("too late", retryable=False), BatchTimeoutError, False),
        (BatchWaitError("bad key"), BatchWaitError, False),
        (InvalidInputError("no connection of that name"), BatchWaitError, False),
        (NoAnswerError("lost"), BatchWaitError, True),
    ],
)
def test_errors_travel_as_json(error: SiliconFlowError, kind: type[BatchError], retryable: bool) -> None:
    payload = json.loads(json.dumps(encode(failed(error, ["batch_7"]))))
    with pytest.raises(kind, match=str(error)) as caught:
        batches_of(payload)
    assert type(caught.value) is kind
    assert (caught.value.batch_id, caught.value.retryable) == ("batch_7", retryable)


@pytest.mark.parametrize(
    "payload", [None, "success", {}, {"status": "ended?"}, ["ended"], {"status": "ended"}]
)
def test_an_event_that_is_none_of_ours_is_no_success(payload: Any) -> None:
    with pytest.raises(BatchError, match="event"):
        batches_of(payload)
