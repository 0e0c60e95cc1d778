"""
The events that a trigger sends to the task that resumes.

An event is one of three data classes, with one encoder and one decoder. Its payload contains everything that is needed,
since the task that resumes is a new object.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from pydantic import ValidationError

from airflow_provider_siliconflow.api.exceptions import (
    BatchError,
    BatchTimeoutError,
    BatchWaitError,
    SiliconFlowError,
)
from airflow_provider_siliconflow.api.models import Batch
from airflow_provider_siliconflow.api.redaction import brief, shown, without_secrets
from airflow_provider_siliconflow.jobs.states import MAX_ID
from airflow_provider_siliconflow.jobs.storable import storable, storable_text

log = logging.getLogger(__name__)


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
    The wait reached its deadline first.

    :param message: the full error message.
    :param batch_ids: the batches of the wait.
    :param retryable: whether a retry of the task can succeed.
    """

    message: str
    batch_ids: tuple[str, ...]
    retryable: bool = True


@dataclass(frozen=True, slots=True)
class WaitFailed:
    """
    The wait could not continue.

    :param message: the full error message.
    :param batch_ids: the batches of the wait.
    :param retryable: whether a retry of the task can succeed.
    """

    message: str
    batch_ids: tuple[str, ...]
    retryable: bool


Event: TypeAlias = BatchesEnded | WaitTimedOut | WaitFailed

#: Most bytes of a payload: it passes through Airflow's database and stays in the worker's memory.
MAX_BYTES = 1 << 20
#: Most characters of a message, messages per batch, characters of each of those, and batch ids of a failure.
_MESSAGE, _ERRORS, _ERROR, _IDS = 4000, 5, 500, 1000

#: Fields of a batch in a payload: usually, for a job of many batches, and if the payload would be too large.
_FIELDS = tuple(name for name in Batch.model_fields if name not in ("request_counts", "errors", "metadata"))
_COUNTS_ONLY = ("id", "status", "in_progress_at")
_SLIM = (*_COUNTS_ONLY, "output_file_id", "error_file_id")


def ended(batches: Iterable[Batch]) -> BatchesEnded:
    """Return the event of a wait that reached its goal."""
    return BatchesEnded(tuple(batches))


def failed(error: SiliconFlowError, batch_ids: Sequence[str]) -> WaitTimedOut | WaitFailed:
    """Return the event of a wait that did not."""
    kind = WaitTimedOut if isinstance(error, BatchTimeoutError) else WaitFailed
    return kind(str(error), tuple(batch_ids), error.retryable)


def encode(event: Event, *, counts_only: bool = False) -> dict[str, Any]:
    """
    Return the payload of an event, as JSON types that every encoder and database of Airflow takes.

    A payload has at most :data:`MAX_BYTES`. With too many batches, each has fewer fields. A job gets as many batches as
    there is room for, and waits for the others again.

    :param counts_only: whether to include only the id, status, counts and errors of each batch, for a job.
    """
    try:
        payload = _payload(event, counts_only=counts_only)
        if _size(payload) <= MAX_BYTES:
            return payload
        return _encode_failure(
            WaitFailed(
                f"The batches ended, but {len(payload['batches'])} batches are too many for one event to the task. "
                "They are untouched. Wait for fewer batches at once.",
                tuple(batch["id"] for batch in payload["batches"]),
                retryable=False,
            )
        )
    # The wait must end with an event, even if a batch contains something unforeseen.
    except Exception as exc:  # noqa: BLE001
        batches = event.batches if isinstance(event, BatchesEnded) else ()
        ids = tuple(batch.id for batch in batches) or getattr(event, "batch_ids", ())
        message = (
            f"The event of this wait cannot be encoded ({type(exc).__name__}). The batches are untouched."
        )
        return _encode_failure(WaitFailed(message, ids, retryable=True))


def _payload(event: Event, *, counts_only: bool) -> dict[str, Any]:
    if not isinstance(event, BatchesEnded):
        return _encode_failure(event)
    if counts_only:
        return _as_many_as_fit([_described(batch, _COUNTS_ONLY) for batch in event.batches])
    payload = {
        "status": "ended",
        "batches": [_described(batch, _FIELDS, metadata=True) for batch in event.batches],
    }
    if _size(payload) > MAX_BYTES:
        log.warning(
            "%d batches are too many for one event; it leaves out their metadata and times",
            len(event.batches),
        )
        payload["batches"] = [_described(batch, _SLIM) for batch in event.batches]
    return payload


def _as_many_as_fit(described: list[dict[str, Any]]) -> dict[str, Any]:
    room = MAX_BYTES - 1000
    for number, batch in enumerate(described):
        room -= _size(batch) + 2
        if room < 0:
            log.info(
                "The event has room for %d of %d batches; the task waits for the others again",
                number,
                len(described),
            )
            return {"status": "ended", "batches": described[:number]}
    return {"status": "ended", "batches": described}


def _described(batch: Batch, names: Sequence[str], *, metadata: bool = False) -> dict[str, Any]:
    """Return fields of a batch, within limits. Signed URLs lose their query."""
    counts = batch.request_counts
    found = {name: storable(shown(getattr(batch, name)), levels=0) for name in names}
    found["request_counts"] = storable(
        {"total": counts.total, "completed": counts.completed, "failed": counts.failed}
    )
    found["errors"] = [storable_text(message, _ERROR) for message in batch.error_messages[:_ERRORS]] or None
    if metadata:
        # Written by the DAG's author; the service takes at most 16 pairs.
        found["metadata"] = storable(without_secrets(dict(list(batch.metadata.items())[:16])))
    return found


def _encode_failure(event: WaitTimedOut | WaitFailed) -> dict[str, Any]:
    return {
        "status": "timeout" if isinstance(event, WaitTimedOut) else "error",
        "message": storable_text(event.message, _MESSAGE),
        "batch_ids": [storable_text(str(batch_id), MAX_ID) for batch_id in event.batch_ids[:_IDS]],
        "retryable": bool(event.retryable),
    }


def _size(payload: Any) -> int:
    """
    Return the size of a payload as JSON, in bytes, which also proves that it can be encoded.

    :raises ValueError: it cannot be encoded.
    """
    return len(json.dumps(payload, ensure_ascii=False, allow_nan=False).encode("utf-8"))


def decode(payload: Any) -> Event:
    """
    Return the event of a payload.

    :raises BatchError: it is not one of the known events.
    """
    status = payload.get("status") if isinstance(payload, dict) else None
    if status == "ended" and isinstance(payload.get("batches"), list):
        with contextlib.suppress(ValidationError):
            return BatchesEnded(tuple(map(Batch.model_validate, payload["batches"])))
    if status in ("timeout", "error"):
        message = storable_text(str(payload.get("message") or "The trigger gave no reason."), _MESSAGE)
        ids = payload.get("batch_ids")
        batch_ids = tuple(map(str, ids if isinstance(ids, list | tuple) else ()))
        if status == "timeout":
            return WaitTimedOut(message, batch_ids, bool(payload.get("retryable", True)))
        return WaitFailed(message, batch_ids, bool(payload.get("retryable", BatchWaitError.retryable)))
    raise BatchError(f"The trigger sent an event that this version does not know: {brief(repr(payload))}")


def batches_of(payload: Any) -> list[Batch]:
    """
    Return the batches of a wait that reached its goal.

    :param payload: what :func:`encode` returned.
    :raises BatchTimeoutError: the wait timed out.
    :raises BatchWaitError: the wait could not continue.
    :raises BatchError: the event is not one of the known events.
    """
    event = decode(payload)
    if isinstance(event, BatchesEnded):
        return list(event.batches)
    kind = BatchTimeoutError if isinstance(event, WaitTimedOut) else BatchWaitError
    batch_id = event.batch_ids[0] if event.batch_ids else None
    raise kind(event.message, batch_id=batch_id, retryable=event.retryable)
