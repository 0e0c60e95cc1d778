"""The results of one batch whose request file is not at hand: judged and copied in the service's order."""

from __future__ import annotations

from airflow_provider_siliconflow.api.models import Outcome
from airflow_provider_siliconflow.batch_files.results import (
    BatchFiles,
    LineBlock,
    count_row,
    incomplete_file,
)
from airflow_provider_siliconflow.batch_files.sources import ByteWriter, LineReader
from airflow_provider_siliconflow.batch_files.tally import ModelTally
from airflow_provider_siliconflow.batch_files.verdicts import read_verdict


def copy_batch(
    batch: BatchFiles, results: ByteWriter, errors: ByteWriter, *, rows: int, model: str | None = None
) -> ModelTally:
    """
    Copy the result lines of a batch, output file first, and judge them.

    :param batch: the downloaded files.
    :param results: takes every line, one per row.
    :param errors: takes the lines of the rows that are not ok.
    :param rows: rows the batch itself counts; those without a line are missing.
    :param model: the model asked of the whole batch, where it is known.
    :raises IncompleteResultsError: a file holds a line that is no result.
    """
    tally = ModelTally()
    seen: set[str] = set()
    to_results, to_errors = LineBlock(results), LineBlock(errors)
    for path in (batch.output, batch.errors):
        if path is None:
            continue
        with path.open("rb") as stream:
            for number, line in enumerate(LineReader(stream), 1):
                if line is not None and not line.strip():
                    continue
                verdict = read_verdict(line) if line is not None else None
                if line is None or verdict is None:
                    raise incomplete_file(path.name, number, batch.batch_id)
                if verdict.custom_id in seen:
                    tally.duplicates += 1
                    continue
                seen.add(verdict.custom_id)
                verdict.add_usage_to(tally.billed)
                count_row(verdict, model, batch.round, tally)
                to_results.add(line)
                if verdict.outcome is not Outcome.OK:
                    to_errors.add(line)
    to_results.flush()
    to_errors.flush()
    tally.rows = max(rows, len(seen))
    for _ in range(tally.rows - len(seen)):
        count_row(None, model, batch.round, tally)
    return tally
