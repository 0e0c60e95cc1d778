"""What opens for reading: a path, a URI of an object store, or anything else that opens alike."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal, Protocol


class ByteReader(Protocol):
    """A binary stream that reads."""

    def read(self, size: int = ..., /) -> bytes:
        """Return at most ``size`` bytes, ``b""`` at the end."""


class Source(Protocol):
    """A file to read: ``pathlib.Path``, Airflow's ``ObjectStoragePath`` or anything else that opens alike."""

    def open(self, mode: Literal["rb"], /) -> AbstractContextManager[ByteReader]:
        """Open for reading bytes from the start."""
