"""The records of a file, of a batch and of the service."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from airflow_provider_siliconflow.emulator.rows import ENDPOINT, FileScan
from airflow_provider_siliconflow.emulator.timeline import Timeline

if TYPE_CHECKING:
    from collections.abc import Container

LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Not the generator of random: tests seed it, and ids must still differ between emulators.
_random = random.SystemRandom()

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
    #: The service has lost the file, but its list still shows it.
    still_listed: bool = False


class BatchRecord(msgspec.Struct, kw_only=True):
    """A batch: the request, the times, and which rows are special."""

    id: str
    seq: int
    request: dict[str, Any]
    file_name: str
    window: str
    timeline: Timeline
    errors: list[str] | None = None
    #: Row index to ``"missing"``, ``"expire"``, the status the row fails with, or why its parameters are refused.
    outcomes: dict[int, str] = {}
    #: Row index to what is wrong with its answer, beside what its markers ask for.
    flaws: dict[int, str] = {}
    #: ``(custom_id, model)`` of rows that are answered wrongly here and may be answered rightly in a later batch.
    first_flaws: list[tuple[str, str]] = []
    #: The settings of these names when the batch was created.
    cached_share: float = 0.0
    thinking_tokens: int = 0
    #: ``(custom_id, model)`` of rows that fail here and succeed in a later batch.
    first_failures: list[tuple[str, str]] = []
    #: Sorted places in the finish order.
    failed_positions: list[int] = []
    missing_positions: list[int] = []
    foreign: bool = False

    @classmethod
    def of_another_user(cls, batch_id: str, seq: int, created: float) -> BatchRecord:
        """Return a completed batch without results of another user of the account."""
        return cls(
            id=batch_id,
            seq=seq,
            request={
                "input_file_id": "file-foreignxyz",
                "endpoint": ENDPOINT,
                "completion_window": "24h",
            },
            file_name="foreign.jsonl",
            window="24h",
            timeline=Timeline.plan(
                created=created, window=86400.0, queue=0.0, processing=0.0, finalizing=0.0, total=1
            ),
            missing_positions=[0],
            foreign=True,
        )

    def sort_key(self) -> tuple[float, int, str]:
        return (self.timeline.created, self.seq, self.id)


class SavedState(msgspec.Struct):
    """The state that outlives a restart, other than files and batches."""

    secret: str
    clock_offset: float = 0.0


def new_id(prefix: str, taken: Container[str] = ()) -> str:
    """Return a random id that is not taken."""
    while True:
        new = prefix + "".join(_random.choices(LETTERS, k=10))
        if new not in taken:
            return new
