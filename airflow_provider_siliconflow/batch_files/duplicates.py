"""Rows that share a ``custom_id``, where such a row is reported and the others run."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from airflow_provider_siliconflow.api.sources import Source
from airflow_provider_siliconflow.batch_files.atomic_files import open_own
from airflow_provider_siliconflow.batch_files.custom_ids import numbered_id
from airflow_provider_siliconflow.batch_files.invalid_rows import (
    INVALID_ROWS,
    InvalidRow,
    ReportedProblems,
    read_invalid_rows,
)
from airflow_provider_siliconflow.batch_files.lines import CHUNK_BYTES, Directory, File
from airflow_provider_siliconflow.batch_files.reader import RequestRow, read_rows
from airflow_provider_siliconflow.batch_files.rules import Problems


class Duplicates:
    """
    The rows whose ``custom_id`` an earlier row has, among those that are written.

    Such a row is reported under an id made from its position, and so is an invalid row with the id of a valid one: an
    error must not stand under the id of a row that has an answer.

    Memory grows with the number of these ids.

    :param paths: the shards with the rows that are written.
    :param work_dir: the folder of the shards, and of the invalid rows so far.
    :param problems: the invalid rows so far.
    :param suspects: hashes of ids that occur more than once.
    :param folder: a local folder for copies.
    :param max_bytes: most bytes of a row.
    """

    def __init__(
        self,
        paths: Sequence[File],
        work_dir: Directory,
        problems: ReportedProblems,
        suspects: Collection[int],
        folder: Path,
        *,
        max_bytes: int,
    ) -> None:
        self._paths = paths
        self._max_bytes = max_bytes
        self._folder = folder
        self._invalid = folder / INVALID_ROWS
        if problems.count:
            _copy(work_dir / INVALID_ROWS, self._invalid)
        else:
            self._invalid.touch()
        self._first: dict[str, int] = {}
        duplicates = False
        rows = (row for path in paths for row in self._read(path))
        for number, row in zip(self._numbers(), rows, strict=False):
            if hash(row.custom_id) in suspects:
                duplicates |= self._first.setdefault(row.custom_id, number) != number
        #: Whether there are any.
        self.found = duplicates or any(
            row.custom_id in self._first for row in read_invalid_rows(self._invalid)
        )

    def _numbers(self) -> Iterator[int]:
        """Return the line numbers of the rows that are written."""
        invalid = (row.line for row in read_invalid_rows(self._invalid))
        refused = next(invalid, None)
        for number in itertools.count(1):
            if number == refused:
                refused = next(invalid, None)
            else:
                yield number

    def _read(self, path: Source) -> Iterator[RequestRow]:
        return read_rows(path, Problems(str(path)), max_bytes=self._max_bytes)

    def other_rows(self, problems: ReportedProblems) -> Iterator[RequestRow]:
        """
        Yield the rows that are no duplicates, and report all others.

        The rows may be written over the shards: those that were read are no longer needed, and each row goes into the
        same shard as before, or an earlier one.
        """
        invalid = read_invalid_rows(self._invalid)
        earlier = next(invalid, None)
        numbers = self._numbers()
        for path in self._paths:
            copy = self._folder / "shard.jsonl"
            _copy(path, copy)
            for row in self._read(copy):
                number = next(numbers)
                while earlier is not None and earlier.line < number:
                    self._report(earlier, problems)
                    earlier = next(invalid, None)
                first = self._first.get(row.custom_id, number)
                if first == number:
                    yield row
                else:
                    reason = (
                        f"line {first} has the same custom_id {row.custom_id[:100]!r}; each must be unique"
                    )
                    problems.add(number, reason, _other_id(number))
        while earlier is not None:
            self._report(earlier, problems)
            earlier = next(invalid, None)

    def _report(self, row: InvalidRow, problems: ReportedProblems) -> None:
        taken = row.custom_id in self._first
        problems.add(row.line, row.reason, _other_id(row.line) if taken else row.custom_id)


def _other_id(line: int) -> str:
    """Return an id that no valid row has: of the others, only those that occur more than once are known."""
    return f"{numbered_id(line)}-invalid"


def _copy(source: Source, target: Path) -> None:
    with open_own(source) as stream, target.open("wb") as copy:
        shutil.copyfileobj(stream, copy, CHUNK_BYTES)
