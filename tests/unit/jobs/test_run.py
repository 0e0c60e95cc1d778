"""Whole jobs against the emulator, over HTTP."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_siliconflow.api import protocol
from airflow_provider_siliconflow.api.exceptions import (
    BatchFailedError,
    BatchPartialFailureError,
    IncompleteResultsError,
    InsufficientBalanceError,
    InvalidInputError,
    InvalidRequestError,
    InvalidRequestFileError,
)
from airflow_provider_siliconflow.emulator.server import Emulator
from airflow_provider_siliconflow.jobs.identity import WORK_LABEL, WORK_SUBMITTER, Submitter
from airflow_provider_siliconflow.jobs.outcome import judge_run
from airflow_provider_siliconflow.jobs.plan import estimate
from tests.unit.jobs.whole_job import MODELS, Job, fail_first_of, options, posts, results, rows

pytestmark = pytest.mark.emulator(speed=2000.0)


def test_one_upload_serves_every_model_and_rows_keep_their_order(emulator: Emulator, tmp_path: Path) -> None:
    manifest = Job(emulator, tmp_path, rows(23)).attempt()
    assert posts(emulator) == (5, 10)
    assert [row["custom_id"] for row in results(tmp_path, MODELS[1])] == [f"q{i}" for i in range(23)]
    assert manifest["rows"] == {"total": 46, "ok": 46, "error": 0, "invalid": 0, "expired": 0, "missing": 0}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["manifest.json", *(model.replace("/", "--") for model in MODELS)]
    )


def test_batches_of_a_job_say_whose_they_are(emulator: Emulator, tmp_path: Path) -> None:
    Job(emulator, tmp_path, rows(3), models=MODELS[:1], metadata={"team": "evals"}).attempt()
    (batch,) = emulator.service.state()["batches"]
    submitter = Submitter("dag", "run", "task", -1, 5)
    marks = {WORK_LABEL: submitter.label, WORK_SUBMITTER: submitter.mark, "team": "evals"}
    assert batch["metadata"].items() >= marks.items()


def test_only_rows_worth_it_are_sent_again(emulator: Emulator, tmp_path: Path) -> None:
    marks = {3: "[[emulator:once=429]]", 11: "[[emulator:error=400]]", 12: "[[emulator:once=expire]]"}
    job = Job(emulator, tmp_path, rows(13, lambda i: marks.get(i, "")), models=MODELS[:1], max_row_attempts=3)
    manifest = job.attempt()
    assert [each["rows"] for each in manifest["rounds"]] == [13, 2]
    assert (manifest["rows"]["ok"], manifest["rows"]["error"]) == (12, 1)
    found = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["custom_id"] for row in found] == [f"q{i}" for i in range(13)]
    assert json.loads((tmp_path / "errors.jsonl").read_text())["custom_id"] == "q11"


def test_a_row_that_another_attempt_may_mend_is_told(emulator: Emulator, tmp_path: Path) -> None:
    marks = {3: "[[emulator:once=429]]", 4: "[[emulator:error=400]]"}
    job = Job(emulator, tmp_path, rows(6, lambda i: marks.get(i, "")), models=MODELS[:1])
    assert "1 of them failed for a transient reason; with max_row_attempts above 1" in (
        judge_run(job.attempt(), job.options) or ""
    )


def test_a_failed_batch_is_the_only_one_a_retry_submits(emulator: Emulator, tmp_path: Path) -> None:
    job = Job(emulator, tmp_path, rows(10), models=MODELS[:1])
    job.after = fail_first_of(emulator)
    with pytest.raises(BatchFailedError, match="1 of 2 batches failed"):
        job.attempt()
    assert job.attempt()["rows"]["ok"] == 10
    assert posts(emulator) == (2, 3)


def test_rows_of_a_failed_batch_go_into_the_next_round(emulator: Emulator, tmp_path: Path) -> None:
    job = Job(emulator, tmp_path, rows(10), models=MODELS[:1], max_row_attempts=2)
    job.after = fail_first_of(emulator)
    manifest = job.attempt()
    assert manifest["rows"]["ok"] == 10
    assert [each["rows"] for each in manifest["rounds"]] == [10, 5]


def test_an_empty_account_keeps_what_was_submitted_for_a_retry(emulator: Emulator, tmp_path: Path) -> None:
    job = Job(emulator, tmp_path, rows(15), models=MODELS[:1])
    emulator.faults.add("POST /batches:status=402,skip=2")
    with pytest.raises(BatchFailedError, match="HTTP 402, Sorry, your account balance") as caught:
        job.attempt()
    assert caught.value.retryable
    found = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["error"] is None for row in found] == [True] * 10 + [False] * 5, "what was paid is there"
    assert job.attempt()["rows"]["ok"] == 15
    assert posts(emulator) == (3, 4)


def test_an_empty_account_ends_the_rounds(emulator: Emulator, tmp_path: Path) -> None:
    """Rows fail for a transient reason as well, but who sends them again pays for nothing but refusals."""
    marks = {3: "[[emulator:once=429]]", 4: "[[emulator:once=402]]"}
    job = Job(emulator, tmp_path, rows(6, lambda i: marks.get(i, "")), models=MODELS[:1], max_row_attempts=3)
    manifest = job.attempt()
    assert [each["rows"] for each in manifest["rounds"]] == [6]
    assert (manifest["rows"]["ok"], manifest["rows"]["error"]) == (4, 2)


def test_a_wait_says_how_many_batches_must_end_and_until_when(emulator: Emulator, tmp_path: Path) -> None:
    job = Job(emulator, tmp_path, rows(60), models=MODELS[:1], max_in_flight=8)
    job.timeout = 3600.0
    before = time.time()
    assert job.attempt()["rows"]["ok"] == 60
    first, *_, last = job.waits
    assert (len(first.batch_ids), first.min_ended) == (8, 2), (
        "a quarter, so that 12 batches do not wake 12 times"
    )
    assert last.min_ended is None, "nothing is left to be sent"
    assert {wait.deadline for wait in job.waits} == {first.deadline}
    assert first.deadline is not None
    assert before + 3600 <= first.deadline <= time.time() + 3600


def test_each_try_has_a_deadline_of_its_own(emulator: Emulator, tmp_path: Path) -> None:
    job = Job(emulator, tmp_path, rows(10), models=MODELS[:1])
    job.after = fail_first_of(emulator)
    job.timeout = 60.0
    with pytest.raises(BatchFailedError):
        job.attempt()
    job.timeout = None
    job.attempt()
    assert job.waits[0].deadline is not None
    assert job.waits[-1].deadline is None


def test_bad_rows_are_refused_before_anything_is_sent(emulator: Emulator, tmp_path: Path) -> None:
    bad = [*rows(3), {"custom_id": "q1", "messages": [{"role": "user", "content": "again"}]}]
    with pytest.raises(InvalidRequestFileError, match=r"line 4 .*'q1'"):
        Job(emulator, tmp_path, bad).attempt()
    with pytest.raises(InvalidInputError, match="3 of 3 rows name no model"):
        Job(emulator, tmp_path, rows(3), models=None).attempt()
    assert not posts(emulator)[0]
    assert not list(tmp_path.iterdir()), "and nothing is left of the attempt"


def test_verdicts_come_after_the_results(emulator: Emulator, tmp_path: Path) -> None:
    requests = rows(10, lambda i: "[[emulator:error=400]]" if i < 3 else "")
    job = Job(emulator, tmp_path, requests, max_error_rate=0.2)
    manifest = job.attempt()
    with pytest.raises(BatchPartialFailureError, match=r"30\.00% is more than max_error_rate"):
        judge_run(manifest, job.options)
    assert len(results(tmp_path)) == 10
    assert "3 failed" in (judge_run(manifest, options(max_error_rate=0.3)) or "").replace(
        "6 failed", "3 failed"
    )


def test_a_dry_run_sends_nothing_and_prices_the_prompts(tmp_path: Path) -> None:
    found = estimate(
        rows(12), name="requests", options=options(prices={MODELS[0]: {"prompt": 2.0, "completion": 8.0}})
    )
    assert (found["rows"], found["shards"], found["batches"]) == (12, 3, 6)
    first = found["models"][0]
    assert first["prompt_cost"] == pytest.approx(first["prompt_tokens"] * 2e-6)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": "a", "models": ["b"]}, "model"),
        ({"models": "Qwen/Qwen3-32B"}, "models"),
        ({"models": ["a", "a"]}, "twice"),
        ({"max_rows_per_batch": 5001}, "max_rows_per_batch"),
        ({"max_in_flight": 0}, "max_in_flight"),
        ({"max_row_attempts": True}, "max_row_attempts"),
        ({"max_error_rate": 1.5}, "max_error_rate"),
        ({"prices": {"a": 3}}, "prices"),
        ({"metadata": {str(i): "" for i in range(16)}}, "metadata"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidInputError, match=named):
        options(**changes)


def test_metadata_that_renders_anew_pays_nothing_again(emulator: Emulator, tmp_path: Path) -> None:
    job = Job(emulator, tmp_path, rows(10), models=MODELS[:1], metadata={"at": "first"})
    job.after = fail_first_of(emulator)
    with pytest.raises(BatchFailedError):
        job.attempt()
    job.options = options(models=MODELS[:1], metadata={"at": "second"})
    job.attempt()
    # The failed batch is the only one that was submitted again, and as it was first asked for.
    assert posts(emulator) == (2, 3)
    assert {batch["metadata"]["at"] for batch in emulator.service.state()["batches"]} == {"first"}


def test_an_empty_account_after_batches_that_ended_leaves_a_retry(emulator: Emulator, tmp_path: Path) -> None:
    job = Job(emulator, tmp_path, rows(15), models=MODELS[:1], max_in_flight=1)
    emulator.faults.add("POST /batches:status=402,skip=2")
    with pytest.raises(BatchFailedError, match="HTTP 402") as caught:
        job.attempt()
    assert caught.value.retryable
    assert job.attempt()["rows"]["ok"] == 15
    assert posts(emulator) == (3, 4)


def test_a_batch_that_ended_before_it_was_adopted_makes_room(emulator: Emulator, tmp_path: Path) -> None:
    job = Job(emulator, tmp_path, rows(15), models=MODELS[:1], max_in_flight=1)
    died: list[str] = []

    def die_once(name: str) -> None:
        if name == "POST /batches" and not died:
            died.append(name)
            raise KeyboardInterrupt

    job.after = die_once
    with pytest.raises(KeyboardInterrupt):
        job.attempt()
    emulator.service.advance(10)
    assert job.attempt()["rows"]["ok"] == 15
    assert posts(emulator) == (3, 3)


def test_map_indexes_do_not_write_over_each_other(emulator: Emulator, tmp_path: Path) -> None:
    first, second = (Job(emulator, tmp_path, rows(3), models=MODELS[:1]) for _ in range(2))
    first.map_index, second.map_index = 0, 1
    first.attempt()
    sent = posts(emulator)
    with pytest.raises(InvalidInputError, match="results of map index 0"):
        second.attempt()
    assert posts(emulator) == sent


def test_an_account_that_is_empty_from_the_start_is_told_at_once(emulator: Emulator, tmp_path: Path) -> None:
    emulator.service.configure({"balance": 0.0})
    with pytest.raises(InsufficientBalanceError):
        Job(emulator, tmp_path, rows(15)).attempt()
    assert posts(emulator) == (1, 1)


def test_a_model_that_is_refused_stops_no_other(emulator: Emulator, tmp_path: Path) -> None:
    job = Job(emulator, tmp_path, rows(10), models=[MODELS[0], "nope/none"])
    for _ in range(2):
        words = "2 of 4 batches were refused, for nope/none: HTTP 400, Model does not exist"
        with pytest.raises(BatchFailedError, match=words) as caught:
            job.attempt()
        assert caught.value.retryable
        assert [row["error"] for row in results(tmp_path)] == [None] * 10
        refused = results(tmp_path, "nope/none")
        assert [row["custom_id"] for row in refused] == [f"q{i}" for i in range(10)]
        assert all("Model does not exist" in row["error"]["message"] for row in refused)
        assert len(emulator.service.state()["batches"]) == 2, "what was taken is paid once"
    assert posts(emulator) == (2, 6)
    with pytest.raises(InvalidRequestError, match="Model does not exist"):
        Job(emulator, tmp_path / "all", rows(10), models=["nope/none"]).attempt()


def test_a_refused_model_of_many_shards_is_not_asked_for_each(emulator: Emulator, tmp_path: Path) -> None:
    job = Job(emulator, tmp_path, rows(50), models=[MODELS[0], "nope/none"], max_in_flight=4)
    with pytest.raises(BatchFailedError, match="10 of 20 batches were refused"):
        job.attempt()
    assert posts(emulator) == (10, 13)
    assert len(results(tmp_path, "nope/none")) == 50


def test_rows_of_a_cancelled_batch_outlive_a_worse_replacement(emulator: Emulator, tmp_path: Path) -> None:
    emulator.service.configure({"speed": 1.0, "queue_seconds": 0.0, "rows_per_second": 100.0})
    job = Job(emulator, tmp_path, rows(20), models=MODELS[:1], max_rows_per_batch=20)
    ends = iter(["cancelled", "expired"])

    def end(call: str) -> None:
        if call == "POST /batches":
            status = next(ends)
            emulator.service.advance(0.1 if status == "cancelled" else 0.0)
            emulator.service.force_status(emulator.service.state()["batches"][-1]["id"], status)

    job.after = end
    with pytest.raises(BatchFailedError, match="cancelled"):
        job.attempt()
    found = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    done = sum(not row["error"] for row in found)
    assert 0 < done < 20
    manifest = job.attempt()
    assert manifest["rows"]["ok"] >= done
    assert [batch["status"] for batch in manifest["models"][0]["batches"]] == ["cancelled", "expired"]


def test_a_damaged_shard_fails_the_job_rather_than_lose_rows(emulator: Emulator, tmp_path: Path) -> None:
    job = Job(emulator, tmp_path, rows(10), models=MODELS[:1])

    def damage(call: str) -> None:
        for shard in tmp_path.glob(".siliconflow/*/round-0/shard-00001.jsonl"):
            if call.startswith("GET /batches/"):
                shard.write_bytes(b"")

    job.after = damage
    with pytest.raises(IncompleteResultsError, match="has 0 rows, but 5 were planned"):
        job.attempt()
    assert list(tmp_path.glob(".siliconflow/*/plan.json")), "what a person needs to mend it is kept"


@pytest.mark.parametrize("name", ["plan.json", "ledger.json", "round-1.json"])
@pytest.mark.parametrize("cut", [True, False])
def test_a_file_of_the_job_that_is_cut_or_lost_blocks_nothing_and_costs_nothing(
    emulator: Emulator, tmp_path: Path, name: str, cut: bool
) -> None:
    requests = rows(10, lambda row: "[[emulator:once=429]]" if row == 3 else "")
    job = Job(emulator, tmp_path, requests, models=MODELS[:1], max_row_attempts=2)
    sent = 0

    def die(call: str) -> None:
        nonlocal sent
        sent += call == "POST /batches"
        if call == "POST /batches" and sent == 3:
            raise KeyboardInterrupt

    job.after = die
    with pytest.raises(KeyboardInterrupt):
        job.attempt()
    (path,) = tmp_path.glob(f".siliconflow/*/{name}")
    if cut:
        path.write_text(path.read_text()[:20])
    else:
        path.unlink()
    assert job.attempt()["rows"]["ok"] == 10
    assert len(emulator.service.state()["batches"]) == 3


def test_a_new_run_under_an_old_run_id_gets_its_own_rows(emulator: Emulator, tmp_path: Path) -> None:
    Job(emulator, tmp_path, rows(3), models=MODELS[:1]).attempt()
    unfinished = Job(emulator, tmp_path, rows(4), models=MODELS[:1])
    unfinished.after = fail_first_of(emulator)
    with pytest.raises(BatchFailedError):
        unfinished.attempt()
    new = Job(emulator, tmp_path, rows(5), models=MODELS[:1])
    assert new.attempt()["rows"] == {
        "total": 5,
        "ok": 5,
        "error": 0,
        "invalid": 0,
        "expired": 0,
        "missing": 0,
    }


def test_another_name_of_the_host_pays_nothing_again(emulator: Emulator, tmp_path: Path) -> None:
    job = Job(emulator, tmp_path, rows(10), models=MODELS[:1])
    job.after = fail_first_of(emulator)
    with pytest.raises(BatchFailedError):
        job.attempt()
    job.host = emulator.base_url.replace("127.0.0.1", "localhost")
    assert job.attempt()["rows"]["ok"] == 10
    assert posts(emulator) == (2, 3)


def test_a_crash_in_a_job_larger_than_the_listing_is_taken_up(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol.list_batches, "__defaults__", (None, 4))
    emulator.service.configure({"ignore_cursor": True})
    job = Job(emulator, tmp_path, rows(60), models=MODELS[:1])
    sent = 0

    def die(call: str) -> None:
        nonlocal sent
        sent += call == "POST /batches"
        if call == "POST /batches" and sent in (8, 10):
            raise KeyboardInterrupt

    job.after = die
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            job.attempt()
    assert job.attempt()["rows"]["ok"] == 60
    assert len(emulator.service.state()["batches"]) == 12


def test_a_batch_that_died_unseen_keeps_its_rows_and_stops_no_other(
    emulator: Emulator, tmp_path: Path
) -> None:
    """Cancelled while nobody waited: by a time-out, a clear, or at the console."""
    emulator.service.configure({"speed": 1.0, "queue_seconds": 0.0, "rows_per_second": 100.0})
    job = Job(emulator, tmp_path, rows(20), models=MODELS, max_rows_per_batch=20)

    def die(call: str) -> None:
        if call == "POST /batches" and len(emulator.service.state()["batches"]) == 2:
            emulator.service.advance(0.1)
            first, second = emulator.service.state()["batches"]
            emulator.service.force_status(first["id"], "cancelled")
            emulator.service.force_status(second["id"], "completed")
            raise KeyboardInterrupt

    job.after = die
    with pytest.raises(KeyboardInterrupt):
        job.attempt()
    job.after = lambda _: None
    emulator.faults.add("POST /batches:status=402")
    with pytest.raises(BatchFailedError, match="HTTP 402"):
        job.attempt()
    first, second = (sum(not row["error"] for row in results(tmp_path, model)) for model in MODELS)
    assert (0 < first < 20, second) == (True, 20), "what is paid is there, of both"
    emulator.service.configure({"speed": 100_000.0})
    manifest = job.attempt()
    assert manifest["rows"]["ok"] == 40
    assert [batch["status"] for batch in manifest["models"][0]["batches"]] == ["cancelled", "completed"]


def test_a_404_for_one_model_stops_no_other(emulator: Emulator, tmp_path: Path) -> None:
    job = Job(emulator, tmp_path, rows(3))
    emulator.faults.add("POST /batches:status=404,skip=1")
    with pytest.raises(BatchFailedError, match="HTTP 404"):
        job.attempt()
    assert [row["error"] for row in results(tmp_path)] == [None] * 3
    assert job.attempt()["rows"]["ok"] == 6


def test_rows_that_are_sent_again_as_they_were_are_one_upload_and_known_to_the_next_try(
    emulator: Emulator, tmp_path: Path
) -> None:
    """A file's name is a part of the proof that a batch over it is ours."""
    job = Job(emulator, tmp_path, rows(10), models=MODELS[:1], max_row_attempts=2)
    job.after = fail_first_of(emulator)
    run = job.next_try()
    wait = run.start(lambda: job.requests, "requests", timeout=None)
    assert wait is not None
    wait = run.resume(job.wait(wait))
    assert wait is not None
    assert posts(emulator) == (2, 3)
    assert job.attempt()["rows"]["ok"] == 10
    assert posts(emulator) == (2, 3)
