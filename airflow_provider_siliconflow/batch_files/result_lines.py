"""The one reader of result lines."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

from airflow_provider_siliconflow.api.exceptions import IncompleteResultsError
from airflow_provider_siliconflow.api.models import BatchResult
from airflow_provider_siliconflow.api.sources import Source
from airflow_provider_siliconflow.batch_files.lines import LineReader
from airflow_provider_siliconflow.batch_files.verdicts import (
    NotJSONError,
    read_result,
)

log = logging.getLogger(__name__)


class OddLines:
    """
    Lines of a result file that are JSON, but no results: they are left out, and told of.

    :param name: the file, for the message.
    """

    def __init__(self, name: str, batch_id: str | None = None) -> None:
        self._where = f"{name} of batch {batch_id}" if batch_id else name
        self._first = self._count = 0

    def add(self, line: int) -> None:
        """Note a line by its number."""
        self._first = self._first or line
        self._count += 1

    def warn(self) -> None:
        """Tell of the lines noted, if there are any."""
        if self._count:
            log.warning(
                "%s: %d lines are no results of any row and were left out, the first of them line %d",
                self._where,
                self._count,
                self._first,
            )


def incomplete_file(name: str, line: int, batch_id: str | None) -> IncompleteResultsError:
    """Return the error for a line of a downloaded file that is not JSON."""
    of_batch = f" of batch {batch_id}" if batch_id else ""
    return IncompleteResultsError(
        f"line {line} of {name}{of_batch} is not JSON: the download was cut, or this is not a result file. "
        "The results are still with the service; a retry downloads them again and submits nothing.",
        batch_id=batch_id,
    )


def read_results(source: Source) -> Iterator[BatchResult]:
    """
    Read a result file (``results.jsonl``, ``errors.jsonl`` or one of the service's own) row by row.

    :raises IncompleteResultsError: a line is not JSON.
    """
    with source.open("rb") as stream:
        yield from results_of(LineReader(stream), str(getattr(source, "name", source)))


def results_of(
    lines: Iterable[bytes | None], name: str, batch_id: str | None = None
) -> Iterator[BatchResult]:
    """
    Read the lines of a result file; blank ones, and JSON that is no result, are passed over.

    :param lines: ``None`` stands for one too long to read.
    :param name: the file, for messages.
    :raises IncompleteResultsError: a line is not JSON.
    """
    odd = OddLines(name, batch_id)
    for number, line in enumerate(lines, 1):
        if line is None:
            raise incomplete_file(name, number, batch_id)
        if not line.strip():
            continue
        try:
            result = read_result(line)
        except NotJSONError:
            raise incomplete_file(name, number, batch_id) from None
        if result is None:
            odd.add(number)
        else:
            yield result
    odd.warn()
