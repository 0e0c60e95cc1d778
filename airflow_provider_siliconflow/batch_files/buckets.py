"""Sorting more records than fit into memory, by buckets in a temporary file."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Sequence
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
        self._spilled = Spill()

    def __enter__(self) -> Buckets:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._spilled.close()

    def add(self, number: int, record: bytes) -> None:
        """Add a record to a bucket."""
        self._buckets[number] += record
        self._held += len(record)
        if self._held >= self._most:
            self._spilled.write(self._buckets)
            self._held = 0

    def records(self, number: int) -> bytes:
        """Return all records of a bucket, in the order in which they were added."""
        return self._spilled.read(number) + self._buckets[number]


class Spill:
    """Buckets that were emptied into a temporary file, any number of times."""

    def __init__(self) -> None:
        self._file: BinaryIO | None = None
        #: Where each bucket begins in the file, for each time that they were emptied into it.
        self._begins: list[list[int]] = []

    def write(self, buckets: Sequence[bytearray | array[int]]) -> None:
        """Empty buckets into the file; always the same number of them."""
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="siliconflow-")  # noqa: SIM115 - lives as long as this
        begins = [self._file.seek(0, 2)]
        for bucket in buckets:
            self._file.write(bucket)
            begins.append(self._file.tell())
            del bucket[:]
        self._begins.append(begins)

    def read(self, number: int) -> bytes:
        """Return what a bucket had each time, the earliest first."""
        parts = []
        for begins in self._begins:
            assert self._file is not None
            self._file.seek(begins[number])
            parts.append(self._file.read(begins[number + 1] - begins[number]))
        return b"".join(parts)

    def close(self) -> None:
        """Remove the file."""
        if self._file is not None:
            self._file.close()
