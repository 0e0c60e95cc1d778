"""
What a trigger says to the task that resumes.

An event is one of three data classes, with one encoder and one decoder. Its payload holds all that is needed: the task
that resumes is a new object.
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

#: Bytes of the largest payload: it travels through Airflow's database and stays in the worker's memory.
MAX_BYTES = 1 << 20
#: Characters of a message, messages of a batch and characters of each, and ids of batches that a payload names.
_MESSAGE, _ERRORS, _ERROR, _IDS = 4000, 5, 500, 1000

#: Fields of a batch that travel, and those that a job of many batches asks for.
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
    Return the payload of an event, as JSON types that every encoder and database of Airflow's takes.

    A payload has at most :data:`MAX_BYTES`. Of too many batches it has less of each; a job gets as many of them as
    there is room for, since it waits for the others again.

    :param counts_only: of each batch only its id, status, counts and errors.
    """
    try:
        payload = _payload(event, counts_only=counts_only)
        if _size(payload) <= MAX_BYTES:
            return payload
        return _encode_failure(
            WaitFailed(
                f"The batches ended, but {len(payload['batches'])} are too many to be handed to the task in one event. "
                "They are untouched. Wait for fewer batches at once.",
                tuple(batch["id"] for batch in payload["batches"]),
                retryable=False,
            )
        )
    # Whatever a batch may hold that is not foreseen here, the wait must end with an event.
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
            "%d batches are too many for one event: it leaves out their metadata and times",
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
    """Return fields of a batch, bounded. Signed URLs lose their query."""
    counts = batch.request_counts
    found = {name: storable(shown(getattr(batch, name)), levels=0) for name in names}
    found["request_counts"] = storable(
        {"total": counts.total, "completed": counts.completed, "failed": counts.failed}
    )
    found["errors"] = [storable_text(message, _ERROR) for message in batch.error_messages[:_ERRORS]] or None
    if metadata:
        # The author's own; the service takes 16 pairs.
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
    Return the bytes of a payload as JSON, having proven that it encodes.

    :raises ValueError: it does not.
    """
    return len(json.dumps(payload, ensure_ascii=False, allow_nan=False).encode("utf-8"))


def decode(payload: Any) -> Event:
    """
    Return the event of a payload.

    :raises BatchError: it is none of ours.
    """
    status = payload.get("status") if isinstance(payload, dict) else None
    if status == "ended" and isinstance(payload.get("batches"), list):
        with contextlib.suppress(ValidationError):
            return BatchesEnded(tuple(map(Batch.model_validate, payload["batches"])))
    if status in ("timeout", "error"):
        message = storable_text(str(payload.get("message") or "the trigger gave no reason"), _MESSAGE)
        ids = payload.get("batch_ids")
        batch_ids = tuple(map(str, ids if isinstance(ids, list | tuple) else ()))
        if status == "timeout":
            return WaitTimedOut(message, batch_ids, bool(payload.get("retryable", True)))
        return WaitFailed(message, batch_ids, bool(payload.get("retryable", BatchWaitError.retryable)))
    raise BatchError(f"The trigger sent an event this version does not know: {brief(repr(payload))}")


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
