"""
Invalid rows that are reported in the results: a file of them, and their lines between those of the other rows.

The results have one line per line of the input. So the number of its line says where the line of an invalid row goes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TypeVar

import msgspec

from airflow_provider_siliconflow.api.exceptions import IncompleteResultsError, LineProblem
from airflow_provider_siliconflow.api.redaction import brief
from airflow_provider_siliconflow.api.sources import Source
from airflow_provider_siliconflow.batch_files.atomic_files import create_file, open_own, sync
from airflow_provider_siliconflow.batch_files.custom_ids import numbered_id
from airflow_provider_siliconflow.batch_files.lines import ByteWriter, Directory, LineReader
from airflow_provider_siliconflow.batch_files.rules import MAX_PROBLEMS, Problems
from airflow_provider_siliconflow.batch_files.tally import MESSAGE_CHARACTERS, ModelTally

#: The file of the invalid rows, beside the shards.
INVALID_ROWS = "invalid.jsonl"
#: The error code of their result lines.
INVALID_INPUT = "invalid_input"

T = TypeVar("T")

#: Characters of the longest custom id that is kept of an invalid row.
_LONGEST_ID = 512


class InvalidRow(msgspec.Struct, gc=False):
    """
    One invalid row.

    :param line: its line in the file, or its position in a list, counted from 1.
    :param custom_id: its own, or one made from its position.
    :param reason: what is wrong with it.
    """

    line: int
    custom_id: str
    reason: str


class ReportedProblems(Problems):
    """
    The problems of an input whose invalid rows are reported: they are written to a file, and stop nothing.

    :param name: the file, or the argument with the rows, as the author knows it.
    :param work_dir: an existing folder for the file; it is not created if no row is invalid.
    :param on_id: gets the ``custom_id`` under which a row is reported.
    """

    def __init__(self, name: str, work_dir: Directory, on_id: Callable[[str], None]) -> None:
        super().__init__(name)
        self._path = work_dir / INVALID_ROWS
        self._on_id = on_id
        self._digest = hashlib.sha256()
        self._opened: AbstractContextManager[ByteWriter] | None = None
        self._count = 0

    @property
    def count(self) -> int:
        """How many rows were refused so far."""
        return self._count

    @property
    def sha256(self) -> str:
        """Hex digest of the file; empty if there is none."""
        return self._digest.hexdigest() if self.count else ""

    def add(self, line: int, reason: str, custom_id: str | None = None) -> None:
        """Report a row. Lines come in order."""
        if len(self._found) < MAX_PROBLEMS:
            self._found.append(LineProblem(line, reason, custom_id))
        if not custom_id or len(custom_id) > _LONGEST_ID or not _can_be_written(custom_id):
            custom_id = numbered_id(line)
        self._on_id(custom_id)
        self._count += 1
        data = msgspec.json.encode(InvalidRow(line, custom_id, brief(reason, MESSAGE_CHARACTERS))) + b"\n"
        if self._opened is None:
            self._opened = create_file(self._path)
            self._stream = self._opened.__enter__()
        self._digest.update(data)
        self._stream.write(data)

    def fail_if_all(self) -> None:
        """:raises InvalidRequestFileError: there are problems, and no row is valid."""
        if self.count:
            self.fail(more=self.count > len(self._found))

    def __enter__(self) -> ReportedProblems:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._opened is not None:
            if kind is None:
                sync(self._stream)
            opened, self._opened = self._opened, None
            opened.__exit__(kind, exc, traceback)


def _can_be_written(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_decode_row = msgspec.json.Decoder(InvalidRow).decode


def read_invalid_rows(path: Source) -> Iterator[InvalidRow]:
    """
    Yield the rows that :class:`ReportedProblems` wrote.

    :raises IncompleteResultsError: the file is gone or damaged.
    """
    try:
        with open_own(path) as stream:
            for line in LineReader(stream):
                yield _decode_row(line or b"")
    except (FileNotFoundError, msgspec.DecodeError, ValueError, RecursionError) as exc:
        raise IncompleteResultsError(
            f"the record of the invalid rows, {path}, is damaged or gone. The batches and their results at the service "
            "are untouched"
        ) from exc


def of_valid_rows(lines: Iterator[T], invalid: InvalidLines) -> Iterator[T]:
    """Yield those of a job's results that are not of invalid rows."""
    while True:
        for _ in invalid.before_next():
            next(lines, None)
        try:
            yield next(lines)
        except StopIteration:
            return


class InvalidLines:
    """
    The result lines of the invalid rows, between those of the other rows.

    :param path: the file that :class:`ReportedProblems` wrote; ``None`` if no row is invalid.
    :param tally: gets their figures.
    :param rows: how many there are.
    """

    def __init__(self, path: Source | None, tally: ModelTally, *, rows: int) -> None:
        self._path, self._count = path, rows
        self._rows = read_invalid_rows(path) if path is not None else iter(())
        self._next = next(self._rows, None)
        self._tally = tally
        self._line = 0

    def before_next(self) -> Iterator[bytes]:
        """Yield the lines that go before that of the next valid row, without newlines."""
        while self._next is not None and self._next.line <= self._line + 1:
            yield self._take(self._next)
        self._line += 1

    def rest(self) -> Iterator[bytes]:
        """
        Yield the lines that go after that of the last valid row.

        :raises IncompleteResultsError: there were more rows or fewer than planned.
        """
        while self._next is not None:
            yield self._take(self._next)
        if self._tally.invalid_input != self._count:
            raise IncompleteResultsError(
                f"{self._path} has {self._tally.invalid_input} invalid rows, but {self._count} were planned: the "
                "file is damaged. The batches and their results at the service are untouched"
            )

    def _take(self, row: InvalidRow) -> bytes:
        tally = self._tally
        tally.rows += 1
        tally.error += 1
        tally.invalid_input += 1
        tally.add_message(row.reason)
        self._line = max(row.line, self._line)
        self._next = next(self._rows, None)
        error = {"code": INVALID_INPUT, "message": f"line {row.line}: {row.reason}"}
        line = {"id": None, "custom_id": row.custom_id, "response": None, "error": error}
        return msgspec.json.encode(line)
