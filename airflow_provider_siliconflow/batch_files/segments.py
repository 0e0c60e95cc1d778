"""
Segments of an answer cache: immutable files with the answers of one job over one model, to be looked up by key.

A segment is one file, so that it is there as a whole or not at all::

    answers    result lines as the service sent them, but for an empty custom_id; JSONL
    prefixes   the first 8 bytes of each key, sorted
    records    the rest of each key, and where its line is; in the same order
    footer     number of keys by their first byte, facts about the segment, and the layout

The prefixes are compared in bulk, 256th by 256th of the keys, so that a lookup of any number of rows takes little
memory; the whole key is compared before a line is read, and the line is checked before it is used. What a segment says
is not trusted: it may be cut, damaged or of somebody else.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import stat
import struct
import sys
import zlib
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import msgspec

from airflow_provider_siliconflow.api.bounds import MAX_COUNT
from airflow_provider_siliconflow.api.exceptions import InvalidInputError
from airflow_provider_siliconflow.api.redaction import brief
from airflow_provider_siliconflow.batch_files.atomic_files import (
    local_path,
    make_private_folder,
    temporary_folder,
    write_whole,
)
from airflow_provider_siliconflow.batch_files.buckets import BUCKETS, Buckets
from airflow_provider_siliconflow.batch_files.custom_ids import custom_id_of

log = logging.getLogger(__name__)

#: Folder of the segments in the folder that the author names, which may hold anything else.
SEGMENTS_FOLDER = "siliconflow-answers"
#: Bytes of the longest answer that is kept.
LONGEST_ANSWER = 16 << 20

_NAME = re.compile(r"[0-9a-f]{32}-[0-9]{1,5}\.answers")
_MAGIC = b"SFANSW01"
_PREFIX_BYTES = 8
#: Rest of the key, offset and length of the line, where its custom_id is, and the line's checksum.
_RECORD = struct.Struct("<24sQIII")
_COUNTS = struct.Struct(f"<{BUCKETS}I")
#: Where the answers end, size of the facts, checksum of counts and facts, and the mark of a segment.
_TAIL = struct.Struct("<QII8s")
_MOST_FACTS = 1 << 16
#: What is read of a store at once: a gap of so many bytes between two answers is read as well, up to so many in all.
_GAP_BYTES, _FETCH_BYTES = 1 << 16, 8 << 20
_COPY_BYTES = 1 << 20
#: Files that are kept open at the same time.
_MOST_OPEN = 64

#: Without ways back, which would take a hundred bytes of memory per byte of a long text.
_CUSTOM_ID = re.compile(rb'"custom_id"[ \t\r]*+:[ \t\r]*+("(?:[^"\\]++|\\.)*+")')
#: Fields of that name that are tried in one line, each of which costs a pass over it.
_MOST_CUSTOM_IDS = 8
_EMPTY = b'""'


_NOT_JSON = (msgspec.DecodeError, ValueError, RecursionError)


class UnreadableSegmentError(ValueError):
    """A file is not a segment, or is damaged; the text says what is wrong."""


# Answers ----------------------------------------------------------------------------------------------------


def without_custom_id(line: bytes) -> tuple[bytes, int] | None:
    """
    Return a result line with an empty ``custom_id`` and the place of the latter; the rest is not changed.

    :returns: ``None`` if it cannot be cut out for certain, as it may be written in an odd way.
    """
    if len(line) > LONGEST_ANSWER or b"\n" in line:
        return None
    for found in islice(_CUSTOM_ID.finditer(line), _MOST_CUSTOM_IDS):
        begin, end = found.span(1)
        cut = line[:begin] + _EMPTY + line[end:]
        # An answer may contain a field of that name as well.
        with contextlib.suppress(*_NOT_JSON):
            if custom_id_of(line) and not custom_id_of(cut):
                return cut, begin
    return None


def with_custom_id(line: bytes, place: int, custom_id: str) -> bytes:
    """Return the line of a row that was answered before: the reverse of :func:`without_custom_id`."""
    return line[:place] + msgspec.json.encode(custom_id) + line[place + len(_EMPTY) :]


# Writing ----------------------------------------------------------------------------------------------------


def segments_folder(cache_dir: Any) -> Any:
    """Return the folder of the segments of a cache."""
    return cache_dir / SEGMENTS_FOLDER


def segment_name(job: str, number: int) -> str:
    """
    Return the name of a segment.

    :param job: identity of the job, 32 hexadecimal digits: a retry writes the same segment.
    :param number: index of the model in the job.
    """
    return f"{job[:32]}-{number}.answers"


class SegmentWriter:
    """
    Writes a segment; it appears when the block ends, unless the block raises.

    :param path: in a folder from :func:`segments_folder`.
    :param created: now, in epoch seconds.
    :param model: for people who list the cache.
    :param label: the job, likewise.
    """

    def __init__(self, path: Any, *, created: float, model: str | None, label: str) -> None:
        self._path = path
        self._facts = {"created": created, "model": model, "job": label}
        self._stack = ExitStack()
        self._offset = 0

    def __enter__(self) -> SegmentWriter:
        make_private_folder(self._path.parent)
        with ExitStack() as stack:
            self._entries = stack.enter_context(Buckets())
            self._stream = stack.enter_context(write_whole(self._path))
            self._stack = stack.pop_all()
        return self

    def add(self, key: bytes, line: bytes, place: int) -> None:
        """Add an answer, as :func:`without_custom_id` returned it."""
        self._stream.write(line)
        self._stream.write(b"\n")
        record = _RECORD.pack(key[_PREFIX_BYTES:], self._offset, len(line), place, zlib.crc32(line))
        self._entries.add(key[0], key[:_PREFIX_BYTES] + record)
        self._offset += len(line) + 1

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._stack:
            if kind is not None:
                self._stack.__exit__(kind, exc, traceback)
                return
            self._finish()

    def _finish(self) -> None:
        width = _PREFIX_BYTES + _RECORD.size
        counts: list[int] = []
        # Twice, since all prefixes come before all records; a bucket is small.
        for part in (slice(_PREFIX_BYTES), slice(_PREFIX_BYTES, None)):
            counts.clear()
            for number in range(BUCKETS):
                data = self._entries.records(number)
                entries = sorted(data[at : at + width] for at in range(0, len(data), width))
                self._stream.write(b"".join(entry[part] for entry in entries))
                counts.append(len(entries))
        facts = _COUNTS.pack(*counts) + json.dumps(self._facts).encode()
        self._stream.write(facts)
        size = len(facts) - _COUNTS.size
        self._stream.write(_TAIL.pack(self._offset, size, zlib.crc32(facts), _MAGIC))


# Reading ----------------------------------------------------------------------------------------------------


class Hit(NamedTuple):
    """
    An answer in a segment.

    :param segment: number of the segment.
    :param offset: where its line begins.
    :param length: bytes of the line.
    :param place: where the ``custom_id`` goes.
    :param checksum: of the line.
    """

    segment: int
    offset: int
    length: int
    place: int
    checksum: int


@dataclass(frozen=True, slots=True)
class Segment:
    """
    A segment that looks whole.

    :param path: the file.
    :param size: bytes.
    :param created: when its job wrote it, in epoch seconds, as it says itself.
    :param model: the model; ``None`` if the rows of the job named theirs.
    :param job: the job that wrote it.
    :param answers_end: where the lines end.
    :param begins: for each first byte of a key, how many keys are before those; with the number of all at the end.
    """

    path: Any
    size: int
    created: float
    model: str | None
    job: str
    answers_end: int
    begins: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name of the file."""
        return str(self.path.name)

    @property
    def answers(self) -> int:
        """Number of answers."""
        return self.begins[-1]

    @classmethod
    def read(cls, path: Any) -> Segment:
        """
        Read the footer of a segment.

        :raises UnreadableSegmentError: it is damaged, a link, or no segment.
        :raises FileNotFoundError: it is gone.
        """
        size, end = _read_end(path, _COUNTS.size + _MOST_FACTS + _TAIL.size)
        if len(end) < _COUNTS.size + _TAIL.size:
            raise UnreadableSegmentError("it is too short")
        answers_end, facts_size, checksum, magic = _TAIL.unpack(end[-_TAIL.size :])
        if magic != _MAGIC:
            raise UnreadableSegmentError("it is cut off, or not a segment of this version")
        footer = end[-_TAIL.size - facts_size - _COUNTS.size : -_TAIL.size]
        if facts_size > _MOST_FACTS or len(footer) != _COUNTS.size + facts_size:
            raise UnreadableSegmentError("its footer is damaged")
        if zlib.crc32(footer) != checksum:
            raise UnreadableSegmentError("its footer is damaged")
        begins = (0, *accumulate(_COUNTS.unpack(footer[: _COUNTS.size])))
        if answers_end + begins[-1] * (_PREFIX_BYTES + _RECORD.size) + len(footer) + _TAIL.size != size:
            raise UnreadableSegmentError("its size is not what its footer says")
        try:
            facts = msgspec.json.decode(footer[_COUNTS.size :], type=_Facts)
        except _NOT_JSON:
            raise UnreadableSegmentError("its footer is damaged") from None
        model = None if facts.model is None else _printable(facts.model, 256)
        return cls(path, size, facts.created, model, _printable(facts.job, 512), answers_end, begins)


def _printable(text: str, limit: int) -> str:
    """Return the start of a text that a terminal shows: others may write into the folder."""
    return "".join(each if each.isprintable() else "\ufffd" for each in brief(text, limit))


class _Facts(msgspec.Struct):
    created: float
    model: str | None
    job: str


def _read_end(path: Any, most: int) -> tuple[int, bytes]:
    """Return the size of a file, and its last bytes."""
    local = local_path(path)
    if local is None:
        path.fs.invalidate_cache(path.parent.path)
        size = int(path.fs.info(path.path)["size"])
        return size, path.fs.cat_file(path.path, start=max(size - most, 0), end=size)
    descriptor = _opened(local)
    try:
        size = os.fstat(descriptor).st_size
        return size, os.pread(descriptor, most, max(size - most, 0))
    finally:
        os.close(descriptor)


def _opened(local: Path) -> int:
    """
    Open a local file for reading.

    :raises UnreadableSegmentError: it is a link, or no file.
    """
    try:
        # Without O_NONBLOCK, opening a pipe would block.
        descriptor = os.open(local, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as exc:
        if local.is_symlink():
            raise UnreadableSegmentError("it is a link, and links are not followed") from None
        raise UnreadableSegmentError(f"it cannot be opened: {exc}") from exc
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnreadableSegmentError("it is not a file")
    return descriptor


def segment_paths(folder: Any) -> list[Any]:
    """
    Return the files in a folder that are named like segments, sorted.

    :param folder: from :func:`segments_folder`.
    :raises InvalidInputError: it is a link.
    :raises FileNotFoundError: there is no such folder.
    """
    local = local_path(folder)
    if local is not None:
        if local.is_symlink():
            raise InvalidInputError(f"{local} is a link, and is not followed")
        names = os.listdir(local)
    else:
        folder.fs.invalidate_cache(folder.path)
        found = folder.fs.ls(folder.path, detail=False)
        names = [str(path).rstrip("/").rpartition("/")[2] for path in found]
    return [folder / name for name in sorted(names) if _NAME.fullmatch(name)]


def read_segments(folder: Any) -> tuple[list[Segment], dict[str, str]]:
    """
    Read the footers of all segments, newest first.

    :param folder: from :func:`segments_folder`.
    :raises FileNotFoundError: there is no such folder.
    :returns: the segments; and what is named like one but cannot be used, with the reason.
    """
    found = []
    unreadable: dict[str, str] = {}
    for path in segment_paths(folder):
        try:
            found.append(Segment.read(path))
        except UnreadableSegmentError as exc:
            unreadable[str(path.name)] = str(exc)
        except FileNotFoundError:
            # Somebody tidies up.
            continue
    return sorted(found, key=lambda segment: (-segment.created, segment.name)), unreadable


class Segments:
    """
    The segments of a cache, to be looked up within a ``with`` block.

    :param segments: those to use; of two that have the same key, the first is used.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments
        self._stack = ExitStack()
        self._skipped: set[int] = set()
        self._damaged: set[int] = set()
        self._is_local = bool(segments) and local_path(segments[0].path) is not None
        self._copies: dict[tuple[int, int], Path] = {}
        self._open: dict[Path, int] = {}

    def __enter__(self) -> Segments:
        self._folder = self._stack.enter_context(temporary_folder())
        self._stack.callback(self._close)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def find(self, first: int, wanted: dict[int, list[bytes]]) -> Iterator[tuple[bytes, Hit]]:
        """
        Look up keys.

        :param first: the first byte of all of them.
        :param wanted: the keys by their first 8 bytes as a number.
        :returns: the keys that are there, each once, with their answers.
        """
        open_keys = set(wanted)
        answered: set[bytes] = set()
        for number, segment in enumerate(self._segments):
            begin, end = segment.begins[first : first + 2]
            if begin == end or number in self._skipped or not open_keys:
                continue
            try:
                prefixes = self._prefixes(number, begin, end)
                records: bytes | None = None
                at = 0
                for prefix in sorted(open_keys.intersection(prefixes)):
                    if records is None:
                        records = self._records(number, begin, end)
                    at = bisect_left(prefixes, prefix, at)
                    for key, hit in self._matches(number, prefixes, records, at, wanted[prefix]):
                        if key not in answered:
                            answered.add(key)
                            yield key, hit
                    if answered.issuperset(wanted[prefix]):
                        open_keys.discard(prefix)
            except (UnreadableSegmentError, FileNotFoundError) as exc:
                self.skip(number, str(exc))

    def _matches(
        self, number: int, prefixes: array[int], records: bytes, at: int, keys: list[bytes]
    ) -> Iterator[tuple[bytes, Hit]]:
        prefix = prefixes[at]
        while at < len(prefixes) and prefixes[at] == prefix:
            rest, offset, length, place, checksum = _RECORD.unpack_from(records, at * _RECORD.size)
            at += 1
            for key in keys:
                if key.endswith(rest) and self._is_within(number, offset, length, place):
                    yield key, Hit(number, offset, length, place, checksum)

    def _is_within(self, number: int, offset: int, length: int, place: int) -> bool:
        end = self._segments[number].answers_end
        return place + len(_EMPTY) <= length <= LONGEST_ANSWER and offset + length <= end

    def lines(self, hits: Sequence[Hit]) -> Iterator[bytes | None]:
        """
        Read answers, in the order given; ``None`` for one that is damaged.

        :param hits: from :meth:`find`.
        """
        block: list[Hit] = []
        size = 0
        for hit in hits:
            if block and size + hit.length > _FETCH_BYTES:
                yield from self._block(block)
                block, size = [], 0
            block.append(hit)
            size += hit.length
        yield from self._block(block)

    def _block(self, hits: list[Hit]) -> Iterator[bytes | None]:
        found: dict[tuple[int, int], bytes] = {}
        for hit in hits if self._is_local else ():
            if (hit.segment, hit.offset) not in found and hit.segment not in self._skipped:
                try:
                    found[hit.segment, hit.offset] = self._pread(hit.segment, hit.offset, hit.length)
                except (UnreadableSegmentError, FileNotFoundError) as exc:
                    self.skip(hit.segment, str(exc))
        if not self._is_local:
            found = self._fetched(hits)
        for hit in hits:
            line = found.get((hit.segment, hit.offset))
            yield line if line is not None and zlib.crc32(line) == hit.checksum else None

    def _fetched(self, hits: list[Hit]) -> dict[tuple[int, int], bytes]:
        """Read answers from a store, neighbours in one request."""
        found: dict[tuple[int, int], bytes] = {}
        spans: list[list[Hit]] = []
        for hit in sorted(set(hits)):
            last = spans[-1][-1] if spans else None
            if last is None or last.segment != hit.segment or hit.offset > _end(last) + _GAP_BYTES:
                spans.append([])
            spans[-1].append(hit)
        for span in spans:
            number, begin = span[0].segment, span[0].offset
            if number in self._skipped:
                continue
            path = self._segments[number].path
            try:
                data = path.fs.cat_file(path.path, start=begin, end=max(map(_end, span)))
            except FileNotFoundError as exc:
                self.skip(number, str(exc))
                continue
            for hit in span:
                found[number, hit.offset] = data[hit.offset - begin : _end(hit) - begin]
        return found

    def skip(self, number: int, reason: str) -> None:
        """Use a segment no more."""
        if number not in self._skipped:
            self._skipped.add(number)
            log.warning(
                "The cached answers in %s are not used: %s", self._segments[number].path, brief(reason)
            )

    def report_damage(self, number: int) -> None:
        """Log, once, that an answer in a segment is damaged; the others are used."""
        if number not in self._skipped | self._damaged:
            self._damaged.add(number)
            log.warning("An answer in %s is damaged and not used", self._segments[number].path)

    # Columns of the index -----------------------------------------------------------------------------------

    def _prefixes(self, number: int, begin: int, end: int) -> array[int]:
        prefixes = array("Q")
        prefixes.frombytes(self._column(number, 0, _PREFIX_BYTES, begin, end))
        if sys.byteorder == "little":
            prefixes.byteswap()
        return prefixes

    def _records(self, number: int, begin: int, end: int) -> bytes:
        return self._column(number, 1, _RECORD.size, begin, end)

    def _column(self, number: int, column: int, width: int, begin: int, end: int) -> bytes:
        segment = self._segments[number]
        start = segment.answers_end + column * _PREFIX_BYTES * segment.answers
        begin, size = begin * width, (end - begin) * width
        if self._is_local:
            return self._pread(number, start + begin, size)
        path = self._copies.get((number, column))
        if path is None:
            path = self._copies[number, column] = self._folder / f"{number}-{column}"
            _copy_range(segment.path, path, start, start + width * segment.answers)
        return self._read(path, begin, size)

    def _pread(self, number: int, offset: int, size: int) -> bytes:
        local = local_path(self._segments[number].path)
        assert local is not None
        return self._read(local, offset, size, whole=self._segments[number].size)

    def _read(self, path: Path, offset: int, size: int, *, whole: int | None = None) -> bytes:
        descriptor = self._open.get(path)
        if descriptor is None:
            if len(self._open) >= _MOST_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            descriptor = _opened(path)
            self._open[path] = descriptor
            if whole is not None and os.fstat(descriptor).st_size != whole:
                raise UnreadableSegmentError("it was replaced while it was read")
        data = os.pread(descriptor, size, offset)
        if len(data) != size:
            raise UnreadableSegmentError("it was cut off while it was read")
        return data

    def _close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


def _end(hit: Hit) -> int:
    return hit.offset + hit.length


def _copy_range(source: Any, target: Path, begin: int, end: int) -> None:
    with target.open("wb") as stream:
        for start in range(begin, end, _COPY_BYTES):
            stream.write(source.fs.cat_file(source.path, start=start, end=min(start + _COPY_BYTES, end)))


def remove(segment: Segment) -> bool:
    """Remove a segment; return whether it was there. Jobs that read it go on, or send the rows themselves."""
    local = local_path(segment.path)
    try:
        if local is not None:
            local.unlink()
        else:
            segment.path.fs.rm_file(segment.path.path)
    except FileNotFoundError:
        return False
    return True


def age(segment: Segment, now: float) -> float:
    """
    Return how many seconds ago a segment was written, as it says itself or as its store does: whichever is less.

    :param now: epoch seconds.
    """
    newest = segment.created
    local = local_path(segment.path)
    with contextlib.suppress(Exception):
        if local is not None:
            newest = max(newest, local.stat(follow_symlinks=False).st_mtime)
        else:
            newest = max(newest, segment.path.fs.modified(segment.path.path).timestamp())
    return now - min(newest, float(MAX_COUNT))
