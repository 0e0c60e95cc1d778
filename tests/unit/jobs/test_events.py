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


def test_an_event_has_these_keys_and_no_others() -> None:
    found = Batch(
        id="batch_1",
        status="completed",
        in_progress_at=7,
        request_counts={"total": 3, "completed": 2, "failed": 1},
        metadata={f"k{n:02}": "v" for n in range(20)},
        errors=[f"error {n}" for n in range(9)],
    )
    counts_only = {
        "id": "batch_1",
        "status": "completed",
        "in_progress_at": 7,
        "request_counts": {"total": 3, "completed": 2, "failed": 1},
        "errors": [f"error {n}" for n in range(5)],
    }
    assert encode(ended([found]), counts_only=True) == {"status": "ended", "batches": [counts_only]}
    (whole,) = encode(ended([found]))["batches"]
    assert whole.items() >= counts_only.items()
    assert list(whole["metadata"]) == [f"k{n:02}" for n in range(16)]
    assert encode(ended([Batch(id="b", status="completed")]))["batches"][0]["errors"] is None
    assert encode(failed(BatchTimeoutError("late"), ["batch_1"])) == {
        "status": "timeout",
        "message": "late",
        "batch_ids": ["batch_1"],
        "retryable": True,
    }
    assert encode(failed(BatchWaitError("bad key"), []))["status"] == "error"


def test_what_an_event_says_is_bounded() -> None:
    payload = encode(failed(BatchWaitError("x" * 5000), [f"batch_{n}" for n in range(1001)]))
    assert len(payload["message"]) == 4000
    assert len(payload["batch_ids"]) == 1000
    (batch,) = encode(ended([Batch(id="b", status="failed", errors=["x" * 600])]))["batches"]
    assert len(batch["errors"][0]) == 500


@pytest.mark.parametrize(
    ("payload", "kind", "retryable"),
    [
        ({"status": "timeout"}, BatchTimeoutError, True),
        ({"status": "error"}, BatchWaitError, False),
        ({"status": "error", "retryable": True}, BatchWaitError, True),
    ],
)
def test_an_event_of_another_version_may_say_less(
    payload: dict[str, Any], kind: type[BatchError], retryable: bool
) -> None:
    with pytest.raises(kind, match="The trigger gave no reason") as caught:
        batches_of(payload)
    assert (caught.value.batch_id, caught.value.retryable) == (None, retryable)
