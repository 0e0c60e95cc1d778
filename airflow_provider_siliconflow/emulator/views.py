"""A batch as the API shows it at a given time."""

from __future__ import annotations

import json
from bisect import bisect_left
from typing import TYPE_CHECKING, Any

from airflow_provider_siliconflow.emulator.rows import ENDPOINT
from airflow_provider_siliconflow.emulator.timeline import counts

if TYPE_CHECKING:
    from collections.abc import Callable

    from airflow_provider_siliconflow.emulator.config import EmulatorConfig, MetadataForm
    from airflow_provider_siliconflow.emulator.records import BatchRecord, ResultKind


def batch_view(
    batch: BatchRecord,
    now: float,
    config: EmulatorConfig,
    reference: Callable[[str, ResultKind], str],
    metadata: MetadataForm,
) -> dict[str, Any]:
    """
    Return a batch object.

    :param now: the service's clock in epoch seconds.
    :param reference: returns the value of ``output_file_id`` and ``error_file_id``.
    :param metadata: how the metadata is shown.
    """
    timeline = batch.timeline
    late = {"output": config.late_output_seconds, "error": config.late_output_seconds}
    if config.late_error_seconds is not None:
        late["error"] = config.late_error_seconds
    results: dict[str, str | None] = {"output": None, "error": None}
    for kind in result_kinds(batch, now):
        if now >= timeline.fate_at + late[kind]:
            results[kind] = reference(batch.id, kind)
    view = {
        "id": batch.id,
        "object": "batch",
        "endpoint": ENDPOINT,
        "errors": batch.errors,
        "input_file_id": batch.request["input_file_id"],
        "completion_window": batch.window,
        "status": timeline.status(now),
        "output_file_id": results["output"],
        "error_file_id": results["error"],
        **{name: stated_time(at, config) for name, at in timeline.timestamps(now).items()},
        "request_counts": _counts(batch, now, config),
        "metadata": _metadata(batch.request.get("metadata"), metadata),
    }
    if metadata == "missing":
        del view["metadata"]
    return view


def stated_time(at: float | None, config: EmulatorConfig) -> int | None:
    """Return a time as the service states it, in whole epoch seconds of its own clock."""
    return None if at is None else int(at + config.clock_offset_seconds)


def _counts(batch: BatchRecord, now: float, config: EmulatorConfig) -> dict[str, int] | None:
    true = counts(batch.timeline, batch.failed_positions, now)
    settled = batch.timeline.ended(now) and now >= batch.timeline.fate_at + config.settle_seconds
    if true is None or settled or not config.settle_seconds:
        return true
    if config.settle_as == "zeros":
        return {"total": true["total"], "completed": 0, "failed": 0}
    return None if config.settle_as == "null" else {}


def _metadata(metadata: dict[str, str] | None, form: MetadataForm) -> object:
    if metadata is None or form == "null":
        return None
    if form == "text":
        return json.dumps(metadata)
    return [[name, value] for name, value in metadata.items()] if form == "pairs" else metadata


def result_kinds(batch: BatchRecord, now: float) -> list[ResultKind]:
    """Return which result files a batch has."""
    timeline = batch.timeline
    if not timeline.ended(now) or timeline.fate == "failed":
        return []
    done = timeline.rows_done(now)
    failed = bisect_left(batch.failed_positions, done)
    missing = bisect_left(batch.missing_positions, done)
    kinds: list[ResultKind] = []
    if done > failed + missing:
        kinds.append("output")
    if failed or (timeline.fate == "expired" and done < timeline.total):
        kinds.append("error")
    return kinds
