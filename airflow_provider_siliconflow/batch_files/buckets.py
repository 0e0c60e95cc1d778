"""Sorting more records than fit into memory, by buckets in a temporary file."""

from __future__ import annotations

import tempfile
from types import TracebackType
from typing import BinaryIO

#: Number of buckets.
BUCKETS = 256
#: Bytes that are kept in memory until all buckets are written to the disk.
_HELD_BYTES = 4 << 20


class Buckets:
    """
    Records in 256 buckets, in memory that grows little with their number.

    :param held: bytes to keep in memory.
    """

    def __init__(self, held: int = _HELD_BYTES) -> None:
        self._buckets = [bytearray() for _ in range(BUCKETS)]
        self._most = held
        self._held = 0
        self._spilled: BinaryIO | None = None
        #: Where each bucket begins in the file, for each time that they were emptied into it.
        self._begins: list[list[int]] = []

    def __enter__(self) -> Buckets:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._spilled is not None:
            self._spilled.close()

    def add(self, number: int, record: bytes) -> None:
        """Add a record to a bucket."""
        self._buckets[number] += record
        self._held += len(record)
        if self._held >= self._most:
            self._spill()

    def records(self, number: int) -> bytes:
        """Return all records of a bucket, in the order in which they were added."""
        parts = []
        for begins in self._begins:
            assert self._spilled is not None
            self._spilled.seek(begins[number])
            parts.append(self._spilled.read(begins[number + 1] - begins[number]))
        parts.append(bytes(self._buckets[number]))
        return b"".join(parts)

    def _spill(self) -> None:
        if self._spilled is None:
            self._spilled = tempfile.TemporaryFile(prefix="siliconflow-")  # noqa: SIM115 - closed by __exit__
        begins = [self._spilled.seek(0, 2)]
        for bucket in self._buckets:
            self._spilled.write(bucket)
            begins.append(begins[-1] + len(bucket))
            bucket.clear()
        self._begins.append(begins)
        self._held = 0
