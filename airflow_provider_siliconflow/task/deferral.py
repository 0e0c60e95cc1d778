"""How a task defers: the one way for the operators and the sensor."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import BaseOperator
    from airflow.triggers.base import BaseTrigger

#: Airflow's own limit on a deferral comes this many seconds after the trigger's deadline. It is a backstop: the trigger
#: ends with an event that says what happened, and Airflow's limit with an error that does not.
_BACKSTOP = 900.0


def defer(operator: BaseOperator, trigger: BaseTrigger, *, deadline: float | None) -> Any:
    """
    Hand the wait over to the triggerer; ``execute_complete`` resumes.

    :param deadline: epoch seconds at which the trigger ends the wait; ``None`` if that follows from the batches.
    :raises TaskDeferred: always.
    """
    operator.defer(trigger=trigger, method_name="execute_complete", timeout=backstop(deadline))
    raise AssertionError("unreachable")


def backstop(deadline: float | None) -> timedelta:
    """Return Airflow's limit on a deferral that ends at a deadline."""
    from airflow_provider_siliconflow.api.arguments import MAX_WINDOW_HOURS
    from airflow_provider_siliconflow.jobs.waiting import EXPIRY_MARGIN

    if deadline is None:
        # The trigger waits until a while after the batches expire.
        return timedelta(hours=MAX_WINDOW_HOURS, seconds=EXPIRY_MARGIN + _BACKSTOP)
    return timedelta(seconds=max(deadline - time.time(), 0.0) + _BACKSTOP)
