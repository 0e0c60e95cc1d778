"""The results of one batch whose request file is not at hand: judged and copied in the service's order."""

from __future__ import annotations

from collections.abc import Iterator

from airflow_provider_siliconflow.api.models import Outcome
from airflow_provider_siliconflow.batch_files.lines import ByteWriter, LineReader
from airflow_provider_siliconflow.batch_files.merge import BatchFiles, LineBlock, count_row
from airflow_provider_siliconflow.batch_files.result_lines import OddLines, incomplete_file
from airflow_provider_siliconflow.batch_files.tally import ModelTally
from airflow_provider_siliconflow.batch_files.verdicts import NotJSONError, Verdict, read_verdict


def copy_batch(
    batch: BatchFiles, results: ByteWriter, errors: ByteWriter, *, rows: int, model: str | None = None
) -> ModelTally:
    """
    Copy the result lines of a batch, output file first, and judge them.

    A row gets one line: the first that is ok, else its first. JSON that is no result is not copied, and counts as
    foreign.

    :param batch: the downloaded files.
    :param results: takes every line, one per row.
    :param errors: takes the lines of the rows that are not ok.
    :param rows: rows the batch itself counts; those without a line are missing.
    :param model: the model asked of the whole batch, where it is known.
    :raises IncompleteResultsError: a file holds a line that is not JSON.
    """
    tally = ModelTally()
    # The files are read twice: which line of a row to copy is known when all of them were seen.
    answered = {
        verdict.custom_id for _, verdict in _judged(batch) if verdict and verdict.outcome is Outcome.OK
    }
    seen: set[str] = set()
    to_results, to_errors = LineBlock(results), LineBlock(errors)
    for line, verdict in _judged(batch, warn=True):
        if verdict is None:
            tally.foreign += 1
            continue
        ok = verdict.outcome is Outcome.OK
        if verdict.custom_id in seen or (not ok and verdict.custom_id in answered):
            tally.duplicates += 1
            continue
        seen.add(verdict.custom_id)
        verdict.add_usage_to(tally.billed)
        count_row(verdict, model, batch.round, tally)
        to_results.add(line)
        if not ok:
            to_errors.add(line)
    to_results.flush()
    to_errors.flush()
    tally.rows = max(rows, len(seen))
    for _ in range(tally.rows - len(seen)):
        count_row(None, model, batch.round, tally)
    return tally


def _judged(batch: BatchFiles, *, warn: bool = False) -> Iterator[tuple[bytes, Verdict | None]]:
    """Return the lines of a batch but for blank ones, and what each says of its row, ``None`` if of none."""
    for path in (batch.output, batch.errors):
        if path is None:
            continue
        odd = OddLines(path.name, batch.batch_id)
        with path.open("rb") as stream:
            for number, line in enumerate(LineReader(stream), 1):
                if line is None:
                    raise incomplete_file(path.name, number, batch.batch_id)
                if not line.strip():
                    continue
                try:
                    verdict = read_verdict(line)
                except NotJSONError:
                    raise incomplete_file(path.name, number, batch.batch_id) from None
                if verdict is None:
                    odd.add(number)
                yield line, verdict
        if warn:
            odd.warn()
