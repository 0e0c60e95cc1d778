"""Batches that died, cannot be read, or find the account full: a retry pays only for what has no answer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_siliconflow.api.exceptions import (
    BatchFailedError,
    IncompleteResultsError,
    RateLimitedError,
    ServiceUnavailableError,
)
from airflow_provider_siliconflow.emulator.server import Emulator
from tests.unit.jobs.whole_job import MODELS, Job, rows

pytestmark = pytest.mark.emulator(speed=1.0, queue_seconds=0.0, rows_per_second=100.0)

FAST = {"speed": 1000.0}


def written(folder: Path, name: str = "results") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def batches(emulator: Emulator) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = emulator.service.state()["batches"]
    return found


def billed(emulator: Emulator) -> Counter[tuple[str, str]]:
    """Count how often each row was answered, by ``custom_id`` and model: that is what is paid."""
    found: Counter[tuple[str, str]] = Counter()
    for batch in batches(emulator):
        if batch["output_file_id"]:
            for line in emulator.service.open_results(batch["id"], "output").read_bytes().splitlines():
                answer = json.loads(line)
                found[answer["custom_id"], answer["response"]["body"]["model"]] += 1
    return found


def tokens(emulator: Emulator) -> int:
    """Return the tokens of all answers that the service gave."""
    return sum(
        json.loads(line)["response"]["body"]["usage"]["total_tokens"]
        for batch in batches(emulator)
        if batch["output_file_id"]
        for line in emulator.service.open_results(batch["id"], "output").read_bytes().splitlines()
    )


def ending(emulator: Emulator, *ends: tuple[str, float]) -> Callable[[str], None]:
    """Let the batches end one after another as they are created: with a status, when so many seconds passed."""
    left = list(ends)

    def end(call: str) -> None:
        if call == "POST /batches" and left:
            status, seconds = left.pop(0)
            emulator.service.advance(seconds)
            emulator.service.force_status(batches(emulator)[-1]["id"], status)
            if not left:
                emulator.service.configure(FAST)

    return end


def one_batch(emulator: Emulator, folder: Path, count: int = 20, **changes: Any) -> Job:
    return Job(emulator, folder, rows(count), **({"models": MODELS[:1], "max_rows_per_batch": 20} | changes))


def test_a_retry_sends_only_the_rows_that_a_cancelled_batch_did_not_answer(
    emulator: Emulator, tmp_path: Path
) -> None:
    job = one_batch(emulator, tmp_path, 30)
    job.after = ending(emulator, ("cancelled", 0.12), ("cancelled", 0.03))
    with pytest.raises(BatchFailedError, match="2 of 2 batches failed or were cancelled"):
        job.attempt()
    done = [row["custom_id"] for row in written(tmp_path) if not row["error"]]
    assert 0 < len(done) < 30
    manifest = job.attempt()
    assert manifest["rows"] == {"total": 30, "ok": 30, "error": 0, "invalid": 0, "expired": 0, "missing": 0}
    assert [row["custom_id"] for row in written(tmp_path)] == [f"q{i}" for i in range(30)]
    assert set(billed(emulator).values()) == {1}, "no row is paid for twice"
    assert manifest["billed_usage"]["total_tokens"] == tokens(emulator)
    assert len(manifest["models"][0]["batches"]) == 4
    assert sum(batch["request_counts"]["total"] for batch in batches(emulator)[2:]) == 30 - len(done)


def test_what_a_replacement_did_not_answer_is_replaced_again(emulator: Emulator, tmp_path: Path) -> None:
    job = one_batch(emulator, tmp_path)
    job.after = ending(emulator, ("cancelled", 0.05), ("cancelled", 0.05), ("failed", 0.0))
    for _ in range(3):
        with pytest.raises(BatchFailedError):
            job.attempt()
    manifest = job.attempt()
    assert manifest["rows"]["ok"] == 20
    assert set(billed(emulator).values()) == {1}
    first, second, third, fourth = (batch["request_counts"] or {} for batch in batches(emulator))
    assert fourth["total"] == 20 - first["completed"] - second["completed"]
    assert not third, "the batch that failed as a whole is replaced as a whole"


def test_a_cancelled_batch_that_answered_every_row_costs_nothing_more(
    emulator: Emulator, tmp_path: Path
) -> None:
    job = one_batch(emulator, tmp_path)

    def die(call: str) -> None:
        if call == "POST /batches":
            emulator.service.advance(0.3)
            emulator.service.force_status(batches(emulator)[0]["id"], "cancelled")
            raise KeyboardInterrupt

    job.after = die
    with pytest.raises(KeyboardInterrupt):
        job.attempt()
    job.after = lambda _: None
    assert job.attempt()["rows"]["ok"] == 20
    assert len(batches(emulator)) == 1


def test_a_batch_cancelled_on_the_console_with_every_row_done_is_a_success_at_once(
    emulator: Emulator, tmp_path: Path
) -> None:
    job = one_batch(emulator, tmp_path)
    job.after = ending(emulator, ("cancelled", 0.3))
    assert job.attempt()["rows"]["ok"] == 20
    assert len(batches(emulator)) == 1


def test_a_batch_cancelled_on_the_console_is_not_replaced_in_the_same_try(
    emulator: Emulator, tmp_path: Path
) -> None:
    """Also if its rows have attempts left; those of the others are not sent again before its own are there."""
    requests = rows(40, lambda i: "[[emulator:once=429]]" if i == 30 else "")
    job = Job(emulator, tmp_path, requests, models=MODELS[:1], max_rows_per_batch=20, max_row_attempts=2)
    job.after = ending(emulator, ("cancelled", 0.1), ("completed", 1.0))
    with pytest.raises(BatchFailedError, match="1 of 2 batches failed or were cancelled") as caught:
        job.attempt()
    assert caught.value.retryable
    assert batches(emulator)[0]["id"] in str(caught.value)
    assert len(batches(emulator)) == 2
    manifest = job.attempt()
    assert manifest["rows"]["ok"] == 40
    assert set(billed(emulator).values()) == {1}
    assert [each["batches"] for each in manifest["rounds"]] == [3, 1]


def test_a_dead_batch_that_was_never_recorded_counts_in_the_bill(emulator: Emulator, tmp_path: Path) -> None:
    job = one_batch(emulator, tmp_path)

    def die(call: str) -> None:
        if call == "POST /batches":
            emulator.service.advance(0.1)
            emulator.service.force_status(batches(emulator)[0]["id"], "cancelled")
            emulator.service.configure(FAST)
            raise KeyboardInterrupt

    job.after = die
    with pytest.raises(KeyboardInterrupt):
        job.attempt()
    job.after = lambda _: None
    for ledger in tmp_path.glob(".siliconflow/*/ledger.json"):
        ledger.unlink()
    manifest = job.attempt()
    assert manifest["rows"]["ok"] == 20
    assert [batch["status"] for batch in manifest["models"][0]["batches"]] == ["cancelled", "completed"]
    assert set(billed(emulator).values()) == {1}
    assert manifest["billed_usage"]["total_tokens"] == tokens(emulator)


def test_a_retry_after_a_kill_takes_what_was_answered_and_pays_for_the_rest(
    emulator: Emulator, tmp_path: Path
) -> None:
    """The batches are cancelled by the kill, and their end is not recorded by anybody."""
    job = one_batch(emulator, tmp_path, 40)

    def kill(call: str) -> None:
        if len(batches(emulator)) == 2 and call.startswith("GET /batches"):
            emulator.service.advance(0.1)
            for batch in batches(emulator):
                emulator.service.cancel_batch(batch["id"])
            emulator.service.advance(6.0)
            emulator.service.configure(FAST)
            raise KeyboardInterrupt

    job.after = kill
    with pytest.raises(KeyboardInterrupt):
        job.attempt()
    job.after = lambda _: None
    assert job.attempt()["rows"]["ok"] == 40
    assert set(billed(emulator).values()) == {1}


# One spoilt batch -------------------------------------------------------------------------------------------


@pytest.mark.emulator(speed=2000.0)
@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "status", "status": 404},
        {"kind": "rewrite", "raw": "<html>no such file</html>"},
        {"kind": "redirect", "location": "http://169.254.169.254/latest"},
    ],
    ids=lambda fault: str(fault["kind"]),
)
def test_a_batch_that_cannot_be_read_costs_its_own_rows_alone(
    emulator: Emulator, tmp_path: Path, fault: dict[str, Any]
) -> None:
    job = one_batch(emulator, tmp_path, 15, max_rows_per_batch=5, max_row_attempts=2)
    emulator.faults.add({"match": "GET storage", "times": -1, "skip": 1, **fault})
    spoilt: list[str] = []

    def stop_faults(call: str) -> None:
        if call == "POST /batches":
            spoilt.append(batches(emulator)[-1]["id"])

    job.after = stop_faults
    with pytest.raises(IncompleteResultsError, match="cannot be read") as caught:
        job.attempt()
    assert caught.value.retryable
    assert spoilt[1] in str(caught.value)
    found = written(tmp_path)
    assert [row["custom_id"] for row in found] == [f"q{i}" for i in range(15)]
    assert [row["error"] is None for row in found] == [True] * 5 + [False] * 10
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert "unfinished" in manifest
    assert [batch["id"] for batch in manifest["models"][0]["batches"] if "spoilt" in batch] == spoilt[1:]
    emulator.faults.clear()
    assert job.attempt()["rows"]["ok"] == 15
    assert len(batches(emulator)) == 3, "nothing was paid for twice"


@pytest.mark.emulator(speed=2000.0)
def test_no_row_is_sent_again_while_a_batch_cannot_be_read(emulator: Emulator, tmp_path: Path) -> None:
    """Another round would use up an attempt of rows that are not there yet."""
    requests = rows(10, lambda i: "[[emulator:once=429]]" if i == 1 else "")
    job = Job(emulator, tmp_path, requests, models=MODELS[:1], max_row_attempts=2)
    # Output and errors of the first batch are read, and the output of the second is not.
    emulator.faults.add("GET storage:status=404,skip=2,times=-1")
    with pytest.raises(IncompleteResultsError):
        job.attempt()
    assert len(batches(emulator)) == 2
    emulator.faults.clear()
    assert job.attempt()["rows"]["ok"] == 10
    assert len(batches(emulator)) == 3


@pytest.mark.emulator(speed=2000.0)
def test_a_storage_that_is_away_fails_the_try_without_asking_for_every_file(
    emulator: Emulator, tmp_path: Path
) -> None:
    job = one_batch(emulator, tmp_path, 40, max_rows_per_batch=4)
    emulator.faults.add("GET storage:status=503,times=-1")
    with pytest.raises(ServiceUnavailableError) as caught:
        job.attempt()
    asked = emulator.request_counts["GET storage"]
    emulator.faults.clear()
    assert caught.value.retryable
    assert asked <= 4 * 8
    assert job.attempt()["rows"]["ok"] == 40


# A full account ---------------------------------------------------------------------------------------------


@pytest.mark.emulator(speed=2000.0, max_open_batches=3)
def test_an_account_that_is_full_is_waited_for_while_batches_of_ours_run(
    emulator: Emulator, tmp_path: Path
) -> None:
    job = one_batch(emulator, tmp_path, 40, max_rows_per_batch=5)
    sat_out: list[float] = []
    real_sleep = job.clock.sleep

    def sleep(seconds: float) -> None:
        sat_out.append(seconds)
        real_sleep(seconds)

    job.clock.sleep = sleep  # type: ignore[method-assign]
    emulator.service.configure({"speed": 1.0})

    def go_on(call: str) -> None:
        if len(batches(emulator)) == 3 and call.startswith("GET /batches/"):
            emulator.service.configure({"speed": 2000.0})

    job.after = go_on
    assert job.attempt()["rows"]["ok"] == 40
    assert len(batches(emulator)) == 8
    assert job.waits[0].min_ended == 1
    assert sum(sat_out) < 120, "a worker does not sit a full account out"


@pytest.mark.emulator(speed=2000.0)
def test_a_full_account_that_says_when_to_come_back_keeps_no_worker_until_then(
    emulator: Emulator, tmp_path: Path
) -> None:
    """The client by itself would do as it is told, in real time."""
    job = one_batch(emulator, tmp_path, 10, max_rows_per_batch=5)
    emulator.faults.add(
        match="POST /batches", kind="status", status=429, skip=1, headers={"Retry-After": "600"}
    )
    began = job.clock.time()
    assert job.attempt()["rows"]["ok"] == 10
    assert job.waits[0].min_ended == 1
    assert len(batches(emulator)) == 2
    assert job.clock.time() - began < 600


@pytest.mark.emulator(speed=2000.0)
def test_an_account_that_others_filled_is_sat_out(emulator: Emulator, tmp_path: Path) -> None:
    job = one_batch(emulator, tmp_path)
    emulator.faults.add("POST /batches:status=429,times=12")
    began = job.clock.time()
    assert job.attempt()["rows"]["ok"] == 20
    assert 60 < job.clock.time() - began < 900
    emulator.faults.add("POST /batches:status=429,times=-1")
    with pytest.raises(RateLimitedError):
        one_batch(emulator, tmp_path / "other").attempt()
