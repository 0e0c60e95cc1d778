"""What a trigger tells the task that resumes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from airflow_provider_siliconflow.api.exceptions import (
    BatchError,
    BatchTimeoutError,
    BatchWaitError,
    SiliconFlowError,
)
from airflow_provider_siliconflow.api.models import Batch

# Events -----------------------------------------------------------------------------------------------------
# What a trigger tells the task. The payload holds all that is needed: the task that resumes is a new object.


def ended_event(batches: Iterable[Batch], *, brief: bool = False) -> dict[str, Any]:
    """
    Return the payload of a wait that reached its goal.

    :param brief: leave out what a job of many batches does not ask for: a payload travels through Airflow's
        database and stays in the worker's memory.
    """
    found = (batch.to_json_dict() for batch in batches)
    if brief:
        found = ({name: batch[name] for name in _BRIEF} for batch in found)
    return {"status": "ended", "batches": list(found)}


_BRIEF = ("id", "status", "request_counts", "errors")


def error_event(error: SiliconFlowError, batch_ids: Sequence[str]) -> dict[str, Any]:
    """Return the payload of a wait that did not."""
    status = "timeout" if isinstance(error, BatchTimeoutError) else "error"
    return {
        "status": status,
        "message": str(error),
        "batch_ids": list(batch_ids),
        "retryable": error.retryable,
    }


def read_event(event: Any) -> list[Batch]:
    """
    Return the batches a trigger's event carries.

    :raises BatchTimeoutError: the wait timed out.
    :raises BatchError: the wait failed, or the event is none of ours.
    """
    status = event.get("status") if isinstance(event, dict) else None
    if status == "ended" and isinstance(event.get("batches"), list):
        return [Batch.model_validate(batch) for batch in event["batches"]]
    if status in ("timeout", "error"):
        batch_ids = event.get("batch_ids") or [None]
        kind = BatchTimeoutError if status == "timeout" else BatchWaitError
        message = event.get("message") or "the trigger gave no reason"
        retryable = bool(event.get("retryable", kind.retryable))
        raise kind(message, batch_id=batch_ids[0], retryable=retryable)
    raise BatchError(f"The trigger sent an event this version does not know: {event!r}")
