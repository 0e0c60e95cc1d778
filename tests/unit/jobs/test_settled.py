"""The one rule of when a batch is settled, case by case."""

from __future__ import annotations

from typing import Any

import pytest

from airflow_provider_siliconflow.api.models import Batch
from airflow_provider_siliconflow.jobs.settled import Held, Settled, is_settled, judge_files


def batch(status: str, counts: tuple[int, int, int] | None = None, **fields: Any) -> Batch:
    """A batch; counts are of all rows, of answered and of failed ones."""
    stated = None if counts is None else dict(zip(("total", "completed", "failed"), counts, strict=True))
    return Batch(id="batch_1", status=status, request_counts=stated, **fields)


@pytest.mark.parametrize(
    ("found", "settled"),
    [
        (batch("completed", (3, 2, 1)), True),
        (batch("completed", (3, 2, 0)), False),
        (batch("completed", (3, 3, 1)), False),
        (batch("completed", (0, 0, 0)), False),
        (batch("completed"), False),
        (batch("expired", (0, 0, 0)), False),
        # Stopped before any row ran.
        (batch("cancelled", (3, 0, 0)), True),
        (batch("failed"), True),
        (batch("cancelled", (3, 1, 0)), False),
        (batch("cancelled", (3, 0, 1)), False),
        (batch("cancelled", (3, 0, 0), output_file_id="o"), False),
        (batch("cancelled", (3, 0, 0), error_file_id="e"), False),
        (batch("cancelled", (3, 0, 0), in_progress_at=1), False),
    ],
)
def test_without_its_files(found: Batch, settled: bool) -> None:
    assert is_settled(found) == settled


@pytest.mark.parametrize(
    ("found", "output", "errors", "rows", "settled"),
    [
        # What is promised is there.
        (batch("completed", (3, 2, 1)), 2, 1, 3, Settled.YES),
        (batch("completed", (3, 2, 1)), 1, 1, 3, Settled.NO),
        (batch("completed", (3, 2, 1)), 2, 0, 3, Settled.NO),
        (batch("completed", (3, 2, 1)), 1, 2, None, Settled.YES),
        # Every row that was sent is answered, whatever the counts say.
        (batch("completed", (3, 1, 0)), 2, 1, 3, Settled.YES),
        # The counts may be those of the rows so far.
        (batch("completed", (2, 2, 0)), 2, 0, 3, Settled.PERHAPS),
        (batch("completed", (2, 1, 0)), 1, 0, 3, Settled.NO),
        (batch("completed"), 3, 0, 3, Settled.YES),
        (batch("completed"), 2, 0, 3, Settled.NO),
        (batch("completed", (3, 0, 0)), 3, 0, None, Settled.YES),
        # Nobody knows how many rows there are.
        (batch("completed"), 2, 0, None, Settled.PERHAPS),
        (batch("completed"), 0, 2, None, Settled.NO),
        (batch("completed"), 0, 0, None, Settled.NO),
        (batch("expired"), 0, 2, None, Settled.PERHAPS),
        (batch("expired"), 0, 0, None, Settled.NO),
        # A batch that was stopped may never answer some rows.
        (batch("cancelled", (9, 2, 1), in_progress_at=1), 2, 1, 9, Settled.PERHAPS),
        (batch("expired", (9, 2, 0)), 2, 0, 9, Settled.PERHAPS),
        (batch("expired", (9, 2, 0)), 3, 0, 9, Settled.NO),
        (batch("expired", (9, 2, 0)), 2, 1, 9, Settled.NO),
        (batch("expired", (9, 2, 0)), 1, 1, 9, Settled.NO),
        (batch("expired", (9, 0, 0)), 0, 0, 9, Settled.NO),
        # Rejected as a whole.
        (batch("failed", (9, 0, 0), in_progress_at=1), 0, 0, 9, Settled.PERHAPS),
        (batch("failed", (9, 0, 0), in_progress_at=1), 0, 1, 9, Settled.NO),
        (batch("failed", (9, 0, 0)), 0, 0, 9, Settled.YES),
    ],
)
def test_by_its_files(found: Batch, output: int, errors: int, rows: int | None, settled: Settled) -> None:
    assert judge_files(found, Held(output, errors, lambda: output + errors), rows) is settled


def test_a_row_that_has_two_lines_does_not_make_up_for_one_that_has_none() -> None:
    found = batch("completed", (3, 1, 0))
    assert judge_files(found, Held(3, 0, lambda: 2), 3) is Settled.NO
    assert judge_files(found, Held(2, 0, lambda: pytest.fail("too few lines to be read")), 3) is Settled.NO
