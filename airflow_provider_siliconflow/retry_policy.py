"""How long to wait before a retry, by the kind of error (Airflow 3.3+)."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import ExceptionRetryPolicy

_ERRORS = "airflow_provider_siliconflow.api.exceptions"


def batch_retry_policy() -> ExceptionRetryPolicy:
    """
    Return a ``retry_policy`` for this provider's operators and sensor.

    A wait that timed out continues after a minute, since its batch continues. If it cancelled its batch, the task's
    ``retry_delay`` applies, since a retry pays for another batch. After an overloaded or unreachable service the retry
    comes after ten minutes. Any other error follows ``retry_delay``; errors that a retry cannot fix are not retried.

    .. code-block:: python

        RunBatchOperator(..., retries=5, retry_policy=batch_retry_policy())
    """
    from airflow.providers.common.compat.sdk import ExceptionRetryPolicy, RetryAction, RetryRule

    return ExceptionRetryPolicy(
        rules=[
            RetryRule(
                exception=f"{_ERRORS}.BatchCancelledAtTimeoutError",
                action=RetryAction.DEFAULT,
                reason="The batch was cancelled at its timeout; a retry pays for another",
            ),
            RetryRule(
                exception=f"{_ERRORS}.BatchTimeoutError",
                action=RetryAction.RETRY,
                retry_delay=timedelta(minutes=1),
                reason="The batch continues, and a retry continues the wait at no extra cost",
            ),
            RetryRule(
                exception=[
                    f"{_ERRORS}.RateLimitedError",
                    f"{_ERRORS}.ServiceUnavailableError",
                    f"{_ERRORS}.TransportError",
                ],
                action=RetryAction.RETRY,
                retry_delay=timedelta(minutes=10),
                reason="The service is overloaded or unreachable",
            ),
        ]
    )
