"""The retry policy against the errors that the operators really raise."""

from __future__ import annotations

from datetime import timedelta

import pytest

from airflow_provider_siliconflow.api.exceptions import (
    BatchCancelledAtTimeoutError,
    BatchFailedError,
    BatchTimeoutError,
    NotSentError,
    RateLimitedError,
)
from airflow_provider_siliconflow.retry_policy import batch_retry_policy
from airflow_provider_siliconflow.task.state import airflow_version

pytestmark = pytest.mark.skipif(airflow_version() < (3, 3), reason="retry policies came with Airflow 3.3")


def test_delays_follow_what_went_wrong() -> None:
    policy = batch_retry_policy()
    delays = {
        type(error).__name__: policy.evaluate(error, 1, 3).retry_delay
        for error in (
            BatchTimeoutError("late"),
            BatchCancelledAtTimeoutError("late, and cancelled"),
            RateLimitedError("slow down", status_code=429),
            NotSentError("no route"),
            BatchFailedError("rejected"),
        )
    }
    assert delays == {
        "BatchTimeoutError": timedelta(minutes=1),
        "BatchCancelledAtTimeoutError": None,
        "RateLimitedError": timedelta(minutes=10),
        "NotSentError": timedelta(minutes=10),
        "BatchFailedError": None,
    }
    assert type(policy).deserialize(policy.serialize()).rules == policy.rules
