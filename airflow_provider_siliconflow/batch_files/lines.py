"""Reading and writing lines of anything that opens like a path, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

from airflow_provider_siliconflow.api.sources import ByteReader, Source

#: Bytes per read: enough for object stores, and little memory.
CHUNK_BYTES = 1 << 16

#: Bytes of the longest line that is kept in memory. No model's context is larger, and a file without line ends (such
#: as a Parquet file given by mistake) must not fill the worker's memory.
LONGEST_LINE = 128 << 20


class ByteWriter(Protocol):
    """A binary stream to write to."""

    def write(self, data: bytes, /) -> Any:
        """Write all of ``data``."""


class Target(Protocol):
    """A file to write."""

    def open(self, mode: Literal["wb"], /) -> AbstractContextManager[ByteWriter]:
        """Open for writing bytes, replacing the content."""


class File(Source, Target, Protocol):
    """A file to write and to read again."""

    def open(self, mode: Any, /) -> Any:
        """Open for reading or writing bytes."""


class Directory(Protocol):
    """A folder to write files into."""

    def __truediv__(self, name: str, /) -> File:
        """Return the file ``name`` in this folder."""


class Digest(Protocol):
    """The needed part of a ``hashlib`` object."""

    def update(self, data: bytes, /) -> None:
        """Add ``data``."""


class ChunkReader:
    """
    A stream over chunks of bytes, such as those of a download.

    :param chunks: chunks of any size. Small ones are joined, so that a line that arrives byte by byte takes little
        memory.
    """

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)

    def read(self, size: int = CHUNK_BYTES, /) -> bytes:
        """Return at least ``size`` bytes, the rest if there are fewer, and ``b""`` at the end."""
        parts = []
        held = 0
        for chunk in self._chunks:
            parts.append(chunk)
            held += len(chunk)
            if held >= size:
                break
        return b"".join(parts)


class LineReader:
    """
    The lines of a stream, without their ``\\n``.

    A line longer than ``longest`` is skipped, and ``None`` is yielded in its place.

    :param stream: opened binary stream.
    :param longest: bytes of the longest line to return.
    :param digest: gets every byte that is read.
    """

    def __init__(
        self, stream: ByteReader, *, longest: int = LONGEST_LINE, digest: Digest | None = None
    ) -> None:
        self._stream = stream
        self._digest = digest
        #: Bytes of the longest line that is returned.
        self.longest = longest
        #: Bytes read so far.
        self.bytes = 0
        #: Bytes of the lines skipped so far, without their ``\n``.
        self.skipped_bytes = 0
        #: Whether the stream, once read to its end, ended with a newline (or was empty).
        self.ends_with_newline = True

    def __iter__(self) -> Iterator[bytes | None]:
        longest = self.longest
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
            yield self._joined(parts, held)
            tail = lines.pop()
            # A chunk of a download may be of any size.
            if longest >= len(chunk):
                yield from lines
            else:
                for line in lines:
                    yield self._joined([line], len(line))
            held = len(tail)
            parts = [tail] if held <= longest else []
        if held:
            self.ends_with_newline = False
            yield self._joined(parts, held)

    def _joined(self, parts: list[bytes], size: int) -> bytes | None:
        if size <= self.longest:
            return b"".join(parts)
        self.skipped_bytes += size
        return None
