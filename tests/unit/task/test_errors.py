"""The one rule for errors: what fails at once, what is left to retries, and what a task that has paid does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from airflow.providers.common.compat.sdk import (
    AirflowFailException,
    AirflowSensorTimeout,
    AirflowSkipException,
)

from airflow_provider_siliconflow.api.exceptions import (
    BatchCancelledAtTimeoutError,
    BatchExpiredError,
    BatchFailedError,
    BatchPartialFailureError,
    BatchTimeoutError,
    BatchWaitError,
    InvalidInputError,
    SiliconFlowError,
    TransportError,
)
from airflow_provider_siliconflow.task.errors import PaidWork, task_errors


def raised(error: Exception, **rule: Any) -> BaseException:
    try:
        with task_errors(**{"fail_fast": True} | rule):
            raise error
    except Exception as exc:  # noqa: BLE001
        return exc
    pytest.fail("the error was swallowed")


def paid(*batch_ids: str, possible: bool = False) -> PaidWork:
    return PaidWork(lambda: batch_ids, possible=possible)


@pytest.mark.parametrize("fail_fast", [True, False])
@pytest.mark.parametrize(
    "error", [InvalidInputError("x"), BatchPartialFailureError("x"), TransportError("x")]
)
def test_what_no_retry_can_change_fails_at_once_if_told_to(error: SiliconFlowError, fail_fast: bool) -> None:
    found = raised(error, fail_fast=fail_fast)
    final = fail_fast and not error.retryable
    assert isinstance(found, AirflowFailException) == final
    assert (found.__cause__ if final else found) is error


@pytest.mark.parametrize(
    "error",
    [
        InvalidInputError("x"),
        BatchWaitError("x", batch_id="batch_1"),
        SiliconFlowError("x", retryable=False),
    ],
)
@pytest.mark.parametrize("work", [paid("batch_1"), paid(possible=True)])
def test_work_that_is_paid_for_is_left_to_a_retry(
    error: SiliconFlowError, work: PaidWork, caplog: pytest.LogCaptureFixture
) -> None:
    args, retryable = error.args, error.retryable
    assert raised(error, paid=work) is error
    (note,) = error.__notes__
    assert ("batch_1" in note) == bool(work.batch_ids())
    assert "at no extra cost" in note
    assert note in caplog.text, "Airflow's UI shows no notes"
    assert (error.args, error.retryable) == (args, retryable), "nothing of the error itself is changed"
    del error.__notes__


@pytest.mark.parametrize(
    "error",
    [
        BatchPartialFailureError("x"),
        BatchFailedError("x", retryable=False),
        BatchExpiredError("x", retryable=False),
    ],
)
def test_a_verdict_on_what_is_paid_for_is_final(error: SiliconFlowError) -> None:
    assert isinstance(raised(error, paid=paid("batch_1")), AirflowFailException)


def test_what_is_not_paid_for_fails_at_once() -> None:
    assert isinstance(raised(InvalidInputError("x"), paid=paid()), AirflowFailException)


def test_many_batches_are_not_all_named() -> None:
    error = InvalidInputError("x")
    raised(error, paid=paid(*(f"batch_{n}" for n in range(300))))
    assert len(error.__notes__[0]) < 500
    assert "batch_0, batch_1" in error.__notes__[0]
    assert "and 295 more" in error.__notes__[0]


def test_a_store_that_cannot_be_read_hides_no_error() -> None:
    def read() -> Sequence[str]:
        raise OSError("the store is away")

    error = InvalidInputError("x")
    assert raised(error, paid=PaidWork(read, possible=True)) is error


@pytest.mark.parametrize("open_batches", [["batch_1", "batch_2"], []])
def test_a_wait_that_timed_out_cancels_what_is_open_if_told_to(open_batches: list[str]) -> None:
    error = BatchTimeoutError("late", batch_id="batch_1")
    found = raised(error, paid=paid("batch_1", "batch_2"), cancel_at_timeout=lambda: open_batches)
    if open_batches:
        assert isinstance(found, BatchCancelledAtTimeoutError)
        assert found.__cause__ is error
        assert "batch_1, batch_2" in str(found)
    else:
        assert found is error
    assert raised(error, cancel_at_timeout=None) is error
    other = TransportError("x")
    assert raised(other, cancel_at_timeout=lambda: pytest.fail("nothing timed out")) is other


def test_a_sensor_times_out_as_every_sensor_does_and_skips_if_told_to() -> None:
    error = BatchTimeoutError("late")
    assert isinstance(raised(error, timeout_error=AirflowSensorTimeout), AirflowSensorTimeout)
    assert isinstance(
        raised(InvalidInputError("x"), timeout_error=AirflowSensorTimeout), AirflowFailException
    )
    for each in (error, InvalidInputError("x"), TransportError("x")):
        found = raised(each, soft_fail=True, timeout_error=AirflowSensorTimeout)
        assert isinstance(found, AirflowSkipException)
        assert found.__cause__ is each


def test_an_error_of_somebody_else_passes() -> None:
    error = OSError("disk full")
    assert raised(error, paid=paid("batch_1"), soft_fail=True) is error
