"""What counts as success, and the sentences that say so."""

from __future__ import annotations

from typing import Any

import pytest

from airflow_provider_siliconflow.api.exceptions import (
    BatchCancelledError,
    BatchError,
    BatchExpiredError,
    BatchFailedError,
    BatchPartialFailureError,
)
from airflow_provider_siliconflow.api.models import Batch
from airflow_provider_siliconflow.jobs.outcome import judge_batch


def batch(status: str, **fields: Any) -> Batch:
    return Batch(id="batch_1", status=status, **fields)


URL = {"output_file_id": "https://h/o"}
ERRORS = {"error_file_id": "https://h/e"}


def numbers(total: int, completed: int, failed: int) -> dict[str, Any]:
    return {"request_counts": {"total": total, "completed": completed, "failed": failed}}


def judged(found: Batch, **options: Any) -> str | None:
    return judge_batch(found, **({"fail_on_partial_error": False} | options))


def test_flawless() -> None:
    assert judged(batch("completed", **numbers(3, 3, 0), **URL), fail_on_partial_error=True) is None


@pytest.mark.parametrize("counts", [None, {}, {"total": 0, "completed": 0, "failed": 0}])
def test_a_completed_batch_without_counts(counts: Any) -> None:
    assert judged(batch("completed", request_counts=counts, **URL)) is None
    with pytest.raises(BatchFailedError, match="states no counts and no result file"):
        judged(batch("completed", request_counts=counts, **ERRORS))


@pytest.mark.parametrize(
    ("found", "kind", "retryable", "words"),
    [
        (batch("failed", errors=["line 3: no messages"]), BatchFailedError, True, "line 3: no messages"),
        (batch("cancelled", **numbers(9, 4, 0)), BatchCancelledError, True, "4 of 9 rows"),
        (batch("expired", **numbers(9, 0, 9)), BatchExpiredError, False, "0 of 9 rows"),
        (batch("expired"), BatchExpiredError, True, "longer completion_window"),
        (batch("completed", **numbers(9, 0, 9), **ERRORS), BatchFailedError, False, "0 of 9 rows"),
    ],
)
def test_failures_say_why_and_whether_a_retry_helps(
    found: Batch, kind: type[BatchError], retryable: bool, words: str
) -> None:
    with pytest.raises(kind, match=words) as caught:
        judged(found, reason="TPM limit reached (9 rows)")
    assert (caught.value.batch_id, caught.value.retryable) == ("batch_1", retryable)
    assert "TPM limit reached (9 rows)" in str(caught.value)


@pytest.mark.parametrize("status", ["completed", "expired"])
def test_a_partial_failure_is_a_warning_unless_the_author_says_otherwise(status: str) -> None:
    found = batch(status, **numbers(9, 7, 2), **URL)
    assert "7 of 9 rows succeeded, 2 did not; most often: TPM" in (judged(found, reason="TPM") or "")
    with pytest.raises(BatchPartialFailureError, match="7 of 9 rows") as caught:
        judged(found, fail_on_partial_error=True)
    assert not caught.value.retryable


@pytest.mark.parametrize("status", ["completed", "expired"])
def test_all_rows_may_fail_where_the_author_allows_it(status: str) -> None:
    assert "0 of 9 rows" in (judged(batch(status, **numbers(9, 0, 9)), allow_all_failed=True) or "")


def test_rows_that_nobody_counted_as_failed_did_not_succeed_either() -> None:
    assert "7 of 9 rows succeeded, 2 did not" in (judged(batch("completed", **numbers(9, 7, 0), **URL)) or "")
