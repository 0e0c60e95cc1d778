"""Counts and files that come later than the status: nothing is paid twice, no row is lost, nothing fails for good."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_siliconflow.api.exceptions import BatchFailedError, IncompleteResultsError
from airflow_provider_siliconflow.emulator.server import Emulator
from airflow_provider_siliconflow.jobs.settled import SETTLE_LIMIT, SETTLE_PATIENCE
from tests.unit.jobs.whole_job import MODELS, Job, rows

pytestmark = pytest.mark.emulator(speed=2000.0)

#: A year: the service never gives counts.
NEVER = 365 * 86400.0
COUNTS = ["zeros", "null", "empty"]


def written(folder: Path, name: str = "results") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def batches(emulator: Emulator) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = emulator.service.state()["batches"]
    return found


@pytest.mark.parametrize("settle_as", COUNTS)
@pytest.mark.parametrize("settle_seconds", [20.0, SETTLE_PATIENCE + 60, NEVER])
@pytest.mark.parametrize(
    "late",
    [
        {"late_output_seconds": 30.0},
        {"partial_output_seconds": 30.0},
        {"late_error_seconds": 30.0},
        {"late_output_seconds": 15.0, "partial_output_seconds": 75.0},
    ],
    ids=lambda late: "+".join(late),
)
def test_what_comes_late_is_waited_for(
    emulator: Emulator, tmp_path: Path, settle_as: str, settle_seconds: float, late: dict[str, float]
) -> None:
    emulator.service.configure({"settle_as": settle_as, "settle_seconds": settle_seconds, **late})
    requests = rows(12, lambda i: "[[emulator:error=400]]" if i == 4 else "")
    job = Job(emulator, tmp_path, requests, models=MODELS[:1], max_row_attempts=2, max_rows_per_batch=6)
    manifest = job.attempt()
    assert manifest["rows"] == {"total": 12, "ok": 11, "error": 1, "invalid": 0, "expired": 0, "missing": 0}
    assert len(batches(emulator)) == 2, "no row was paid for twice"


@pytest.mark.parametrize("late", ["late_output_seconds", "partial_output_seconds"])
def test_files_that_stay_behind_counts_that_add_up_fail_the_try_and_cost_nothing(
    emulator: Emulator, tmp_path: Path, late: str
) -> None:
    emulator.service.configure({late: 1800.0})
    job = Job(emulator, tmp_path, rows(12), models=MODELS[:1], max_row_attempts=2, max_rows_per_batch=12)
    with pytest.raises(IncompleteResultsError, match="cannot be read") as caught:
        job.attempt()
    assert caught.value.retryable
    job.clock.sleep(1800.0)
    assert job.attempt()["rows"]["ok"] == 12
    assert len(batches(emulator)) == 1


@pytest.mark.parametrize(("settle_seconds", "sent_again"), [(0.0, 0), (NEVER, 1)])
def test_a_row_that_never_comes_is_missing_after_an_hour_and_sent_again_only_if_nobody_counted_it(
    emulator: Emulator, tmp_path: Path, settle_seconds: float, sent_again: int
) -> None:
    emulator.service.configure({"settle_as": "null", "settle_seconds": settle_seconds})
    requests = rows(6, lambda i: "[[emulator:missing-once]]" if i == 4 else "")
    job = Job(emulator, tmp_path, requests, models=MODELS[:1], max_row_attempts=2, max_rows_per_batch=6)
    began = job.clock.time()
    manifest = None
    while manifest is None:
        with contextlib.suppress(IncompleteResultsError):
            manifest = job.attempt()
        job.clock.sleep(300.0)
    assert job.clock.time() - began >= SETTLE_LIMIT
    assert (manifest["rows"]["missing"], len(batches(emulator))) == (1 - sent_again, 1 + sent_again)


def end_first(emulator: Emulator, status: str, done: float) -> Callable[[str], None]:
    """Let the first batch end when this share of its rows is done."""
    ended: list[str] = []

    def end(call: str) -> None:
        if call == "POST /batches" and not ended:
            ended.append(batches(emulator)[0]["id"])
            emulator.service.advance(done / 10.0)
            emulator.service.force_status(ended[0], status)

    return end


@pytest.mark.emulator(speed=1.0, queue_seconds=0.0, rows_per_second=200.0)
@pytest.mark.parametrize("settle_as", COUNTS)
@pytest.mark.parametrize("late", ["late_output_seconds", "settle_seconds"])
def test_a_cancelled_batch_is_not_replaced_before_what_it_answered_is_known(
    emulator: Emulator, tmp_path: Path, settle_as: str, late: str
) -> None:
    emulator.service.configure({"settle_as": settle_as, late: 100.0})
    job = Job(emulator, tmp_path, rows(20), models=MODELS[:1], max_row_attempts=2, max_rows_per_batch=20)
    job.after = end_first(emulator, "cancelled", done=0.5)
    with pytest.raises(BatchFailedError, match="cancelled"):
        job.attempt()
    answered = {row["custom_id"] for row in written(tmp_path) if not row["error"]}
    assert 0 < len(answered) < 20
    emulator.service.configure({"speed": 1000.0, late: 0.0})
    assert job.attempt()["rows"]["ok"] == 20
    first, rest = batches(emulator)
    assert rest["request_counts"]["total"] == 20 - len(answered)
    assert first["status"] == "cancelled"


def test_a_batch_that_is_not_settled_keeps_no_other_from_being_sent(
    emulator: Emulator, tmp_path: Path
) -> None:
    emulator.service.configure({"settle_seconds": NEVER, "partial_output_seconds": 1000.0})
    job = Job(
        emulator,
        tmp_path,
        rows(12),
        models=MODELS[:1],
        max_rows_per_batch=4,
        max_in_flight=1,
        max_row_attempts=2,
    )
    assert job.attempt()["rows"]["ok"] == 12
    sent = [len(wait.batch_ids) for wait in job.waits]
    assert max(sent) == 3, "those that wait for their counts are not in flight"
    assert len(batches(emulator)) == 3


def test_what_cannot_be_read_for_an_hour_is_named_and_not_waited_for_longer(
    emulator: Emulator, tmp_path: Path
) -> None:
    emulator.service.configure({"settle_seconds": NEVER, "settle_as": "null"})
    emulator.faults.add("GET storage:status=404,times=-1")
    job = Job(emulator, tmp_path, rows(4), models=MODELS[:1])
    began = job.clock.time()
    with pytest.raises(IncompleteResultsError, match="cannot be read"):
        job.attempt()
    assert SETTLE_LIMIT <= job.clock.time() - began <= 1.2 * SETTLE_LIMIT
    emulator.faults.clear()
    assert job.attempt()["rows"]["ok"] == 4
    assert len(batches(emulator)) == 1
