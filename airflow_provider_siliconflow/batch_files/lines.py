"""Lines in and out of anything that opens like a path, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

from airflow_provider_siliconflow.api.sources import ByteReader, Source

#: Bytes asked for in one read: large enough for object stores, small enough not to matter in memory.
CHUNK_BYTES = 1 << 16

#: Bytes of the longest line that is held in memory. No model's context takes a longer request; a file without
#: any line end (a Parquet file given by mistake) must not fill the worker.
LONGEST_LINE = 128 << 20


class ByteWriter(Protocol):
    """A binary stream that writes."""

    def write(self, data: bytes, /) -> Any:
        """Write all of ``data``."""


class Target(Protocol):
    """A file to write."""

    def open(self, mode: Literal["wb"], /) -> AbstractContextManager[ByteWriter]:
        """Open for writing bytes, replacing what is there."""


class File(Source, Target, Protocol):
    """A file to write and read again."""

    def open(self, mode: Any, /) -> Any:
        """Open for reading or writing bytes."""


class Directory(Protocol):
    """A folder to write files into."""

    def __truediv__(self, name: str, /) -> File:
        """Return the file ``name`` in this folder."""


class Digest(Protocol):
    """What of ``hashlib`` is needed here."""

    def update(self, data: bytes, /) -> None:
        """Take in ``data``."""


class LineReader:
    """
    The lines of a stream, without their ``\\n``.

    ``None`` stands for a line longer than ``longest``; its bytes are passed over, not kept.

    :param stream: opened binary stream.
    :param longest: bytes of the longest line to return.
    :param digest: is fed every byte read.
    """

    def __init__(
        self, stream: ByteReader, *, longest: int = LONGEST_LINE, digest: Digest | None = None
    ) -> None:
        self._stream = stream
        self._longest = longest
        self._digest = digest
        #: Bytes read so far.
        self.bytes = 0
        #: Whether the stream, once read to its end, ended with a newline (or was empty).
        self.ends_with_newline = True

    def __iter__(self) -> Iterator[bytes | None]:
        longest = self._longest
        parts: list[bytes] = []
        held = 0
        while chunk := self._stream.read(CHUNK_BYTES):
            self.bytes += len(chunk)
            if self._digest is not None:
                self._digest.update(chunk)
            first, *lines = chunk.split(b"\n")
            held += len(first)
            if held <= longest:
                parts.append(first)
            else:
                parts.clear()
            if not lines:
                continue
            yield b"".join(parts) if held <= longest else None
            tail = lines.pop()
            if longest >= CHUNK_BYTES:
                yield from lines
            else:
                for line in lines:
                    yield line if len(line) <= longest else None
            held = len(tail)
            parts = [tail] if held <= longest else []
        if held:
            self.ends_with_newline = False
            yield b"".join(parts) if held <= longest else None
