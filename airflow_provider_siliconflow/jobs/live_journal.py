"""
The journal of a live phase: a line for every answer, and for every question that may cost money.

An answer counts once its line is here, so a later process asks only what has no line. Each process writes files of its
own, since two tries may be alive at once. A local file is appended to; a store that cannot append gets a file for each
write. What a killed process left of its last line is dropped.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

import msgspec

from airflow_provider_siliconflow.batch_files.atomic_files import (
    local_path,
    make_folder,
    open_own,
    write_whole,
)
from airflow_provider_siliconflow.batch_files.custom_ids import custom_id_of
from airflow_provider_siliconflow.batch_files.lines import LineReader
from airflow_provider_siliconflow.batch_files.verdicts import UnreadableLineError, read_verdict
from airflow_provider_siliconflow.jobs.folder import names_in
from airflow_provider_siliconflow.jobs.plan import Piece

log = logging.getLogger(__name__)

#: What a file of a journal contains: result lines, or the custom ids of rows that were about to be asked, as JSON.
Kind = Literal["answers", "asked"]

#: Most files of one shard: a store that cannot append gets one for each write.
_MOST_FILES = 1_000_000


@dataclass(frozen=True, slots=True)
class Entry:
    """
    A line to write.

    :param piece: the rows that it belongs to.
    :param kind: what it is.
    :param line: the line, without its newline.
    """

    piece: Piece
    kind: Kind
    line: bytes


class LiveJournal:
    """
    The journal of a job's live rounds, as one process writes it and every later one reads it.

    :param folder: the job's folder.
    """

    def __init__(self, folder: Any) -> None:
        self._folder = folder
        self._token = secrets.token_hex(8)
        self._written = 0
        self._made: set[str] = set()
        #: Whether lines can be appended to a file. Otherwise fewer and larger writes are better.
        self.appends = local_path(folder) is not None

    # Writing ----------------------------------------------------------------------------------------------

    def append(self, entries: list[Entry]) -> None:
        """
        Write lines; when this returns they survive a crash of the machine.

        :param entries: those that are written are removed from it.
        :raises OSError: what is left cannot be written, and does not count; call this again with it.
        """
        grouped: dict[tuple[str, Kind], list[Entry]] = {}
        for entry in entries:
            grouped.setdefault((_folder_of(entry.piece), entry.kind), []).append(entry)
        try:
            for (name, kind), of_file in grouped.items():
                self._write(name, kind, b"".join(entry.line + b"\n" for entry in of_file))
                done = set(map(id, of_file))
                entries[:] = [entry for entry in entries if id(entry) not in done]
        except BaseException:
            # A line of which only a part was written must stay the last one of its file.
            self._token = secrets.token_hex(8)
            raise

    def _write(self, name: str, kind: Kind, data: bytes) -> None:
        folder = self._folder / name
        if name not in self._made:
            make_folder(folder)
            self._made.add(name)
        local = local_path(folder)
        if local is None:
            self._written += 1
            with write_whole(folder / f"{self._token}-{self._written:07d}.{kind}") as stream:
                stream.write(data)
            return
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(local / f"{self._token}.{kind}", flags, 0o600)
        try:
            size = os.fstat(descriptor).st_size
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(descriptor, view) :]
                os.fdatasync(descriptor)
            except BaseException:
                # All of it is written again, and a line that is there twice would count as billed twice.
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)

    # Reading ----------------------------------------------------------------------------------------------

    def answers(self, piece: Piece) -> Iterator[tuple[str, bytes]]:
        """Yield the custom id and line of each answer to the rows of a piece. A row may have several."""
        for line in self._lines(piece, "answers"):
            if (custom_id := _row_of(line)) is not None:
                yield custom_id, line
            else:
                log.warning("A line of the journal in %s is damaged; its row is asked again", self._folder)

    def asked(self, piece: Piece) -> Mapping[str, int]:
        """Return how often each row of a piece was asked without a certain outcome, by custom id."""
        counts: Counter[str] = Counter()
        for line in self._lines(piece, "asked"):
            try:
                counts[msgspec.json.decode(line, type=str)] += 1
            except (msgspec.DecodeError, UnicodeDecodeError):
                log.warning("A line of the journal in %s is damaged; it is left out", self._folder)
        return counts

    def copy_answers(self, piece: Piece, target: BinaryIO) -> bool:
        """Write the lines of all answers to the rows of a piece; return whether there are any."""
        found = False
        for _, line in self.answers(piece):
            target.write(line + b"\n")
            found = True
        return found

    def _lines(self, piece: Piece, kind: Kind) -> Iterator[bytes]:
        folder = self._folder / _folder_of(piece)
        for name in names_in(folder, most=_MOST_FILES):
            if not name.endswith(f".{kind}"):
                continue
            with open_own(folder / name) as stream:
                reader = LineReader(stream)
                for line in reader:
                    # A line without its end was being written when its process died.
                    if line and reader.ends_with_newline:
                        yield line


def _row_of(line: bytes) -> str | None:
    """Return the custom id of a line; ``None`` if it is damaged. What only an answer says wrongly does not matter."""
    try:
        return custom_id_of(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        try:
            verdict = read_verdict(line)
        except UnreadableLineError:
            return None
        return None if verdict is None else verdict.custom_id


def _folder_of(piece: Piece) -> str:
    # The identity contains the rows, the model and the round, so answers to other rows are never taken for theirs.
    return f"live-{piece.round}/{piece.work_key[:32]}"
