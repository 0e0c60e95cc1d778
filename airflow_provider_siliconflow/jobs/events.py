"""
What a trigger says to the task that resumes.

An event is one of three data classes, with one encoder and one decoder. Its payload holds all that is needed: the task
that resumes is a new object.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from airflow_provider_siliconflow.api.exceptions import (
    BatchError,
    BatchTimeoutError,
    BatchWaitError,
    SiliconFlowError,
)
from airflow_provider_siliconflow.api.models import Batch


@dataclass(frozen=True, slots=True)
class BatchesEnded:
    """
    The wait reached its goal.

    :param batches: the batches that ended.
    """

    batches: tuple[Batch, ...]


@dataclass(frozen=True, slots=True)
class WaitTimedOut:
    """
    The wait's deadline came first.

    :param message: the whole story.
    :param batch_ids: what was waited for.
    :param retryable: whether a retry of the task can succeed.
    """

    message: str
    batch_ids: tuple[str, ...]
    retryable: bool = True


@dataclass(frozen=True, slots=True)
class WaitFailed:
    """
    The wait could not go on.

    :param message: the whole story.
    :param batch_ids: what was waited for.
    :param retryable: whether a retry of the task can succeed.
    """

    message: str
    batch_ids: tuple[str, ...]
    retryable: bool


Event: TypeAlias = BatchesEnded | WaitTimedOut | WaitFailed

#: What a job of many batches asks for: a payload travels through Airflow's database and stays in the worker's memory.
_COUNTS_ONLY = ("id", "status", "request_counts", "errors")


def ended(batches: Iterable[Batch]) -> BatchesEnded:
    """Return the event of a wait that reached its goal."""
    return BatchesEnded(tuple(batches))


def failed(error: SiliconFlowError, batch_ids: Sequence[str]) -> WaitTimedOut | WaitFailed:
    """Return the event of a wait that did not."""
    kind = WaitTimedOut if isinstance(error, BatchTimeoutError) else WaitFailed
    return kind(str(error), tuple(batch_ids), error.retryable)


def encode(event: Event, *, counts_only: bool = False) -> dict[str, Any]:
    """
    Return the payload of an event, as JSON types.

    :param counts_only: of each batch only its id, status, counts and errors.
    """
    if isinstance(event, BatchesEnded):
        found = [batch.to_json_dict() for batch in event.batches]
        if counts_only:
            found = [{name: batch[name] for name in _COUNTS_ONLY} for batch in found]
        return {"status": "ended", "batches": found}
    return {
        "status": "timeout" if isinstance(event, WaitTimedOut) else "error",
        "message": event.message,
        "batch_ids": list(event.batch_ids),
        "retryable": event.retryable,
    }


def decode(payload: Any) -> Event:
    """
    Return the event of a payload.

    :raises BatchError: it is none of ours.
    """
    status = payload.get("status") if isinstance(payload, dict) else None
    if status == "ended" and isinstance(payload.get("batches"), list):
        return BatchesEnded(tuple(map(Batch.model_validate, payload["batches"])))
    if status in ("timeout", "error"):
        message = payload.get("message") or "the trigger gave no reason"
        batch_ids = tuple(payload.get("batch_ids") or ())
        if status == "timeout":
            return WaitTimedOut(message, batch_ids, bool(payload.get("retryable", True)))
        return WaitFailed(message, batch_ids, bool(payload.get("retryable", BatchWaitError.retryable)))
    raise BatchError(f"The trigger sent an event this version does not know: {payload!r}")


def batches_of(payload: Any) -> list[Batch]:
    """
    Return the batches of a wait that reached its goal.

    :param payload: what :func:`encode` returned.
    :raises BatchTimeoutError: the wait timed out.
    :raises BatchWaitError: the wait could not go on.
    :raises BatchError: the event is none of ours.
    """
    event = decode(payload)
    if isinstance(event, BatchesEnded):
        return list(event.batches)
    kind = BatchTimeoutError if isinstance(event, WaitTimedOut) else BatchWaitError
    batch_id = event.batch_ids[0] if event.batch_ids else None
    raise kind(event.message, batch_id=batch_id, retryable=event.retryable)
