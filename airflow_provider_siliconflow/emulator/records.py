"""What the service keeps of a file and of a batch."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from airflow_provider_siliconflow.emulator.rows import FileScan
from airflow_provider_siliconflow.emulator.timeline import Timeline

ResultKind = Literal["output", "error"]
RESULT_KINDS: tuple[ResultKind, ...] = ("output", "error")


class FileRecord(msgspec.Struct, kw_only=True):
    """An uploaded file."""

    id: str
    bytes: int
    created: float
    filename: str
    purpose: str
    scan: FileScan
    deleted: bool = False


class BatchRecord(msgspec.Struct, kw_only=True):
    """A batch: what was asked, when it does what, and which rows do not simply succeed."""

    id: str
    seq: int
    request: dict[str, Any]
    file_name: str
    window: str
    timeline: Timeline
    errors: list[str] | None = None
    #: Row index to ``"missing"``, ``"expire"`` or the status the row fails with.
    outcomes: dict[int, str] = {}
    #: ``(custom_id, model)`` of rows that fail here and succeed in a later batch.
    first_failures: list[tuple[str, str]] = []
    #: Sorted places in the finish order.
    failed_positions: list[int] = []
    missing_positions: list[int] = []
    foreign: bool = False

    def sort_key(self) -> tuple[float, int, str]:
        return (self.timeline.created, self.seq, self.id)
