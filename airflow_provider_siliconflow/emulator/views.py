"""What the API shows of a batch at a given time."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Any

from airflow_provider_siliconflow.emulator.rows import ENDPOINT
from airflow_provider_siliconflow.emulator.timeline import counts

if TYPE_CHECKING:
    from collections.abc import Callable

    from airflow_provider_siliconflow.emulator.config import EmulatorConfig
    from airflow_provider_siliconflow.emulator.records import BatchRecord, ResultKind


def batch_view(
    batch: BatchRecord, now: float, config: EmulatorConfig, reference: Callable[[str, ResultKind], str]
) -> dict[str, Any]:
    """
    Return a batch object.

    :param now: the service's clock in epoch seconds.
    :param reference: makes the value of ``output_file_id`` and ``error_file_id``.
    """
    timeline = batch.timeline
    results: dict[str, str | None] = {"output": None, "error": None}
    if now >= timeline.fate_at + config.late_output_seconds:
        for kind in result_kinds(batch, now):
            results[kind] = reference(batch.id, kind)
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": ENDPOINT,
        "errors": batch.errors,
        "input_file_id": batch.request["input_file_id"],
        "completion_window": batch.window,
        "status": timeline.status(now),
        "output_file_id": results["output"],
        "error_file_id": results["error"],
        **timeline.timestamps(now),
        "request_counts": counts(timeline, batch.failed_positions, now),
        "metadata": batch.request.get("metadata"),
    }


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
