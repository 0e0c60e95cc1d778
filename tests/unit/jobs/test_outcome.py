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
from airflow_provider_siliconflow.jobs.options import RunOptions
from airflow_provider_siliconflow.jobs.outcome import is_flawless, judge_batch, judge_run, refuse_partial


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


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        ("failed", BatchFailedError, "rejected as a whole; a retry submits a new one"),
        ("cancelled", BatchCancelledError, "can be downloaded for 30 days. A retry submits a new batch"),
    ],
)
def test_a_batch_that_died_is_a_failure_whatever_it_answered_and_whatever_the_author_allows(
    status: str, kind: type[BatchError], words: str
) -> None:
    for counts in (numbers(9, 4, 5), numbers(9, 9, 0), {}):
        with pytest.raises(kind, match=words) as caught:
            judged(batch(status, **counts, **URL), allow_all_failed=True)
        assert caught.value.retryable


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


@pytest.mark.parametrize(
    ("found", "flawless"),
    [
        (batch("completed", **numbers(3, 3, 0)), True),
        (batch("completed", **numbers(3, 4, 0)), True),
        (batch("completed", **numbers(3, 2, 0)), False),
        (batch("completed", **numbers(3, 3, 1)), False),
        (batch("completed", **numbers(0, 0, 0)), False),
        (batch("completed"), False),
        (batch("expired", **numbers(3, 3, 0)), False),
    ],
)
def test_a_batch_is_flawless_only_if_its_counts_say_so(found: Batch, flawless: bool) -> None:
    assert is_flawless(found) == flawless


def test_a_batch_that_expired_after_its_last_row_is_a_warning_all_the_same() -> None:
    assert "3 of 3 rows succeeded" in (judged(batch("expired", **numbers(3, 3, 0), **URL)) or "")


def test_counts_that_may_not_be_those_of_every_row_leave_a_retry() -> None:
    for status, kind in (("completed", BatchFailedError), ("expired", BatchExpiredError)):
        with pytest.raises(kind) as caught:
            judged(batch(status, **numbers(9, 0, 9)), certain=False)
        assert caught.value.retryable


# Jobs ---------------------------------------------------------------------------------------------------------


def manifest(ok: int, *, worth: int = 0, total: int = 10) -> dict[str, Any]:
    return {
        "rows": {"total": total, "ok": ok, "error": total - ok, "invalid": 0, "expired": 0, "missing": 0},
        "errors": {"TPM limit": 3, "other": 1} if ok < total else {},
        "paths": {"output_dir": "/out"},
        "worth_another_attempt": worth,
    }


@pytest.mark.parametrize(
    ("ok", "options", "passes"),
    [
        (7, {}, True),
        (7, {"max_error_rate": 0.3}, True),
        (6, {"max_error_rate": 0.3}, False),
        (9, {"fail_on_partial_error": True}, False),
        # The rate takes its place.
        (9, {"fail_on_partial_error": True, "max_error_rate": 0.5}, True),
        (0, {}, False),
        (0, {"max_error_rate": 1.0}, False),
        (0, {"allow_all_failed": True}, True),
        (1, {"allow_all_failed": False}, True),
    ],
)
def test_whether_a_job_passes_is_up_to_its_options(ok: int, options: dict[str, Any], passes: bool) -> None:
    if passes:
        story = judge_run(manifest(ok), RunOptions(**options)) or ""
        assert f"{ok} of 10 rows succeeded ({10 - ok} failed, 0 expired, 0 missing)" in story
        assert "most often: TPM limit (3 rows)" in story
        assert "other" not in story
        assert "/out" in story
    else:
        with pytest.raises(BatchPartialFailureError, match=rf"{ok} of 10 rows succeeded.*/out"):
            judge_run(manifest(ok), RunOptions(**options))


def test_a_job_says_what_another_attempt_would_have_been_worth() -> None:
    assert judge_run(manifest(10), RunOptions()) is None
    story = judge_run(manifest(7, worth=2), RunOptions(max_row_attempts=3)) or ""
    assert "2 of them failed for a transient reason; with max_row_attempts above 3" in story
    assert "transient" not in (judge_run(manifest(7), RunOptions()) or "")


def test_a_download_is_refused_only_if_a_row_failed() -> None:
    refuse_partial(manifest(10), "Batch batch_1")
    with pytest.raises(BatchPartialFailureError, match=r"Batch batch_1: 9 of 10 rows.*/out"):
        refuse_partial(manifest(9), "Batch batch_1")
