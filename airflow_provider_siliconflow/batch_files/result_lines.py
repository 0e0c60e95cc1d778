"""Reading result lines."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from airflow_provider_siliconflow.api.exceptions import IncompleteResultsError
from airflow_provider_siliconflow.api.models import BatchResult
from airflow_provider_siliconflow.api.sources import Source
from airflow_provider_siliconflow.batch_files.lines import ChunkReader, LineReader
from airflow_provider_siliconflow.batch_files.output_types import AnswerType, UnacceptableAnswerError
from airflow_provider_siliconflow.batch_files.verdicts import UnreadableLineError, read_result

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Lines of a file that may be blank, or the result of no row. Reading gigabytes of them would take days.
_MOST_IDLE_LINES = 1_000_000

#: Called with the problem of a line that cannot be read.
OnUnreadable = Callable[[str], None]


def read_lines(
    lines: LineReader,
    read: Callable[[bytes], T | None],
    *,
    name: str,
    batch_id: str | None = None,
    on_unreadable: OnUnreadable | None = None,
) -> Iterator[tuple[int, int, bytes, T | None]]:
    """
    Read the lines of a result file; blank lines are skipped.

    :param lines: the file.
    :param read: reads one line: :func:`~.verdicts.read_verdict` or :func:`~.verdicts.read_result`.
    :param name: the file, for messages.
    :param batch_id: the batch it belongs to, for messages.
    :param on_unreadable: called with the problem of a line that cannot be read; the following lines are still read.
        Without it, such a line is an error.
    :return: the line's number (from 1), its offset in bytes, the line, and the result of ``read``: ``None`` for JSON
        that is not a result of any row, about which one warning is logged at the end.
    :raises IncompleteResultsError: a line is not JSON or too long, and there is no ``on_unreadable``.
    :raises IncompleteResultsError: a million lines are the result of no row.
    """
    where = f"{name} of batch {batch_id}" if batch_id else name

    def refuse(number: int, problem: str) -> None:
        if on_unreadable is None:
            raise _unreadable(f"line {number} of {where} {problem}", batch_id)
        on_unreadable(f"line {number} of {where} {problem}")

    offset = skipped = odd = first_odd = results = 0
    for number, line in enumerate(lines, 1):
        if number - results > _MOST_IDLE_LINES:
            raise _unreadable(f"{where} has {_MOST_IDLE_LINES} lines that are the result of no row", batch_id)
        start = offset
        if line is None:
            offset += lines.skipped_bytes - skipped + 1
            skipped = lines.skipped_bytes
            refuse(number, f"is longer than {lines.longest} bytes")
            continue
        offset += len(line) + 1
        try:
            found = read(line)
        except UnreadableLineError as exc:
            if line.strip():
                refuse(number, str(exc))
            continue
        if found is None:
            odd += 1
            first_odd = first_odd or number
        else:
            results += 1
        yield number, start, line, found
    if odd:
        log.warning(
            "%s: %d lines are not results of any row and were left out; the first is line %d",
            where,
            odd,
            first_odd,
        )


def _unreadable(problem: str, batch_id: str | None) -> IncompleteResultsError:
    cause = "the file was cut, or is not a result file"
    if batch_id is not None:
        cause += ". The results are still with the service; a retry downloads them again and submits nothing"
    return IncompleteResultsError(f"{problem}: {cause}.", batch_id=batch_id)


def read_results(source: Source, answers: AnswerType | None = None) -> Iterator[BatchResult]:
    """
    Read a result file (``results.jsonl``, ``errors.jsonl`` or one of the service's own) row by row.

    :param answers: the type as which the answers of rows that are ok are read, see :attr:`BatchResult.parsed`.
    :raises IncompleteResultsError: a line is not JSON.
    """
    with source.open("rb") as stream:
        results = _results(LineReader(stream), str(getattr(source, "name", source)), None, None)
        yield from results if answers is None else (_parsed(result, answers) for result in results)


def _parsed(result: BatchResult, answers: AnswerType) -> BatchResult:
    if not result.ok:
        return result
    with contextlib.suppress(UnacceptableAnswerError):
        result = result.with_parsed(answers.read(result.text or ""))
    return result


def results_in(
    chunks: Iterable[bytes],
    *,
    name: str,
    batch_id: str | None = None,
    on_unreadable: OnUnreadable | None = None,
) -> Iterator[BatchResult]:
    """
    Read a result file row by row while it is downloaded.

    :param chunks: its bytes.
    :param name: the file, for messages.
    :param batch_id: the batch it belongs to, for messages.
    :param on_unreadable: as for :func:`read_lines`.
    :raises IncompleteResultsError: a line is not JSON or too long, and there is no ``on_unreadable``.
    """
    return _results(LineReader(ChunkReader(chunks)), name, batch_id, on_unreadable)


def _results(
    lines: LineReader, name: str, batch_id: str | None, on_unreadable: OnUnreadable | None
) -> Iterator[BatchResult]:
    for _, _, _, result in read_lines(
        lines, read_result, name=name, batch_id=batch_id, on_unreadable=on_unreadable
    ):
        if result is not None:
            yield result
