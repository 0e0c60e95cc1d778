"""How long to wait before a retry, by what went wrong (Airflow 3.3+)."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import ExceptionRetryPolicy

_ERRORS = "airflow_provider_siliconflow.api.exceptions"


def batch_retry_policy() -> ExceptionRetryPolicy:
    """
    Return a ``retry_policy`` for this provider's operators and sensor.

    A wait that timed out goes on after a minute, since its batch does; one that cancelled its batch follows
    ``retry_delay``, since a retry pays for another. An overloaded or unreachable service gets ten minutes. Anything
    else follows the task's own ``retry_delay``; errors that a retry cannot fix never get here.

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
                reason="The batch goes on, and so does the wait; nothing is paid again",
            ),
            RetryRule(
                exception=[
                    f"{_ERRORS}.RateLimitedError",
                    f"{_ERRORS}.ServiceUnavailableError",
                    f"{_ERRORS}.TransportError",
                ],
                action=RetryAction.RETRY,
                retry_delay=timedelta(minutes=10),
                reason="The service is overloaded or out of reach",
            ),
        ]
    )
