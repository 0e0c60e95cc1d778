"""Result files: written on the first request, and kept on disk only for the last few batches."""

from __future__ import annotations

import os
import secrets
import shutil
import threading
from collections import OrderedDict
from itertools import islice
from typing import TYPE_CHECKING

from airflow_provider_siliconflow.emulator.answers import AnswerStyle, error_line, expired_line
from airflow_provider_siliconflow.emulator.records import RESULT_KINDS
from airflow_provider_siliconflow.emulator.rows import decode_row, decode_row_name
from airflow_provider_siliconflow.emulator.timeline import FinishOrder

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from airflow_provider_siliconflow.emulator.answers import Answerer
    from airflow_provider_siliconflow.emulator.records import BatchRecord, ResultKind

_HALF = ".half.jsonl"


class ResultStore:
    """
    The result files on disk. Safe to use from any thread.

    :param folder: emptied at the start, since every file in it can be written again.
    :param kept: batches whose files stay.
    """

    def __init__(self, folder: Path, kept: int) -> None:
        self.kept = kept
        self._folder = folder
        self._lock = threading.Lock()
        self._used: OrderedDict[str, threading.Lock] = OrderedDict()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    def get(
        self, batch_id: str, kind: ResultKind, write: Callable[[Path, Path], None], modified: int
    ) -> Path:
        """
        Return the path of a result file.

        :param write: writes the output and the error file if they do not exist.
        :param modified: their time of modification in epoch seconds.
        """
        with self._lock:
            writing = self._used.setdefault(batch_id, threading.Lock())
            self._used.move_to_end(batch_id)
            self._drop_oldest()
        path = self._path(batch_id, kind)
        with writing:
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                # A batch may be dropped and requested again while it is still being written: do not share partial
                # files.
                parts = [path.parent / f"{one}.{secrets.token_hex(4)}" for one in RESULT_KINDS]
                write(*parts)
                for one, part in zip(RESULT_KINDS, parts, strict=True):
                    os.utime(part, (modified, modified))
                    os.replace(part, self._path(batch_id, one))
        return path

    def get_half(
        self, batch_id: str, kind: ResultKind, write: Callable[[Path, Path], None], modified: int
    ) -> Path:
        """Return the path of a file with the first half of the lines; the arguments are those of :meth:`get`."""
        whole = self.get(batch_id, kind, write, modified)
        half = self._path(batch_id, kind, _HALF)
        if not half.exists():
            part = half.with_name(f"half.{secrets.token_hex(4)}")
            with whole.open("rb", buffering=1 << 20) as lines, part.open("wb", buffering=1 << 20) as kept:
                count = sum(1 for _ in lines)
                lines.seek(0)
                kept.writelines(islice(lines, count // 2))
            os.utime(part, (modified, modified))
            os.replace(part, half)
        return half

    def forget(self, batch_id: str) -> None:
        """Drop the files of a batch, so that they are written again."""
        with self._lock:
            if self._used.pop(batch_id, None) is not None:
                self._remove(batch_id)

    def _drop_oldest(self) -> None:
        while len(self._used) > self.kept:
            batch_id, writing = next(iter(self._used.items()))
            if writing.locked():
                return
            del self._used[batch_id]
            self._remove(batch_id)

    def _remove(self, batch_id: str) -> None:
        for kind in RESULT_KINDS:
            self._path(batch_id, kind).unlink(missing_ok=True)
            self._path(batch_id, kind, _HALF).unlink(missing_ok=True)

    def _path(self, batch_id: str, kind: ResultKind, suffix: str = ".jsonl") -> Path:
        return self._folder / batch_id / f"{kind}{suffix}"


def write_results(
    batch: BatchRecord,
    content: Path,
    offsets: array[int],
    answerer: Answerer,
    output_path: Path,
    error_path: Path,
) -> None:
    """
    Write both result files in one pass over the input; memory holds one line and two buffers.

    :param content: the input file.
    :param offsets: the offsets of its lines, followed by its size.
    """
    timeline, style = batch.timeline, style_of(batch)
    replace = batch.request.get("replace") or {}
    done = timeline.rows_done(timeline.fate_at)
    last = timeline.total if timeline.fate == "expired" else done
    with (
        output_path.open("wb", buffering=1 << 20) as output,
        error_path.open("wb", buffering=1 << 20) as error,
    ):
        for position, (row, line) in enumerate(finished_rows(batch, content, offsets, 0, last)):
            outcome = batch.outcomes.get(row) if position < done else "expire"
            if outcome is None:
                request = decode_row(line)
                body = {**request.body, **replace}
                written, twice = answerer.output_line(request.custom_id, body, batch.flaws.get(row), style)
                output.write(written)
                if twice:
                    output.write(written)
            elif outcome == "expire":
                error.write(expired_line(decode_row_name(line).custom_id))
            elif outcome != "missing":
                error.write(error_line(decode_row_name(line).custom_id, outcome))


def finished_rows(
    batch: BatchRecord, content: Path, offsets: array[int], start: int, stop: int
) -> Iterator[tuple[int, bytes]]:
    """Yield rows in the order in which they finish, from one place in it up to another: number and line."""
    order = FinishOrder(batch.timeline.total)
    with content.open("rb", buffering=0) as rows:
        for position in range(start, stop):
            row = order.row_at(position)
            rows.seek(offsets[row])
            yield row, rows.read(offsets[row + 1] - offsets[row])


def style_of(batch: BatchRecord) -> AnswerStyle:
    """Return how the rows of a batch are answered."""
    return AnswerStyle(batch.cached_share, batch.thinking_tokens)
