"""A manual clear that reuses: what is answered is kept, only the rest is sent again, and a change is new work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_siliconflow.api.exceptions import BatchFailedError, InvalidInputError
from airflow_provider_siliconflow.emulator.server import Emulator
from tests.unit.jobs.whole_job import MODELS, Job, fail_first_of, options, posts, results, rows

pytestmark = pytest.mark.emulator(speed=2000.0)

#: A row that fails once for each model, with an error that no further attempt of the same job is made for.
FAILS_ONCE = "[[emulator:once=400]]"


def failing(*numbers: int, mark: str = FAILS_ONCE) -> Any:
    return lambda number: mark if number in numbers else ""


def sent_rows(emulator: Emulator) -> list[int]:
    """The rows of each batch, oldest first."""
    service = emulator.service
    return [
        service.open_content(batch["input_file_id"]).read_bytes().count(b"\n")
        for batch in service.state()["batches"]
    ]


def tokens_of(emulator: Emulator) -> int:
    """What the service bills: the tokens of all answers of all batches."""
    total = 0
    for batch in emulator.service.state()["batches"]:
        for line in emulator.service.open_results(batch["id"], "output").read_bytes().splitlines():
            total += json.loads(line)["response"]["body"]["usage"]["total_tokens"]
    return total


def test_a_clear_after_success_costs_nothing_and_changes_nothing(emulator: Emulator, tmp_path: Path) -> None:
    job = Job(emulator, tmp_path, rows(7))
    first = job.attempt()
    before = (tmp_path / "manifest.json").read_bytes()
    for _ in range(2):
        job.clear()
        assert job.attempt() == first
    assert posts(emulator) == (2, 4)
    assert (tmp_path / "manifest.json").read_bytes() == before


def test_a_clear_sends_only_the_rows_that_failed(emulator: Emulator, tmp_path: Path) -> None:
    job = Job(emulator, tmp_path, rows(13, failing(3, 11)))
    first = job.attempt()
    assert first["rows"]["error"] == 4
    answered = {row["custom_id"]: row["id"] for row in results(tmp_path) if row["error"] is None}
    created = len(sent_rows(emulator))
    job.clear()
    manifest = job.attempt()
    assert sent_rows(emulator)[created:] == [2, 2]
    assert (manifest["rows"]["total"], manifest["rows"]["ok"]) == (26, 26)
    assert [row["custom_id"] for row in results(tmp_path)] == [f"q{i}" for i in range(13)]
    assert answered.items() <= {row["custom_id"]: row["id"] for row in results(tmp_path)}.items()
    assert [(each["round"], each["rows"], each["ok"]) for each in manifest["rounds"]] == [
        (0, 26, 22),
        (1, 4, 4),
    ]
    named = {batch["id"] for each in manifest["models"] for batch in each["batches"]}
    assert named == {batch["id"] for batch in emulator.service.state()["batches"]}
    assert manifest["billed_usage"]["total_tokens"] == tokens_of(emulator)
    assert not (tmp_path / ".siliconflow").exists()
    job.clear()
    assert job.attempt() == manifest, "then everything is answered"


def test_rows_that_fail_every_time_are_sent_at_each_clear(emulator: Emulator, tmp_path: Path) -> None:
    job = Job(emulator, tmp_path, rows(4, failing(2, mark="[[emulator:error=400]]")), models=MODELS[:1])
    job.attempt()
    for number in (1, 2):
        job.clear()
        manifest = job.attempt()
        assert sent_rows(emulator) == [4, *[1] * number], "the same row in another batch"
        assert [each["round"] for each in manifest["rounds"]] == list(range(number + 1))
    assert manifest["rows"]["ok"] == 3
    # An automatic retry of the finished job does nothing.
    assert job.attempt() == manifest
    assert len(sent_rows(emulator)) == 3


def test_answers_that_were_not_accepted_are_judged_anew_and_the_rest_is_sent(
    emulator: Emulator, tmp_path: Path
) -> None:
    job = Job(emulator, tmp_path, rows(5), models=MODELS[:1])
    job.options = options(models=MODELS[:1], accept=lambda row: row.custom_id not in ("q1", "q3") or "not so")
    assert job.attempt()["rows"]["invalid"] == 2
    for rows_sent in ([5, 2], [5, 2, 2]):
        job.clear()
        manifest = job.attempt()
        assert manifest["rows"]["invalid"] == 2
        assert sent_rows(emulator) == rows_sent
    assert (tmp_path / "results.jsonl").read_text().count('"invalid"') == 2
    assert manifest["billed_usage"]["total_tokens"] == tokens_of(emulator)
    # The author is content with them now.
    job.options = options(models=MODELS[:1])
    job.clear()
    manifest = job.attempt()
    assert manifest["rows"]["ok"] == 5
    assert sent_rows(emulator) == [5, 2, 2]
    assert '"invalid"' not in (tmp_path / "results.jsonl").read_text()


def test_what_the_cache_answered_is_kept_like_any_answer(emulator: Emulator, tmp_path: Path) -> None:
    first = Job(emulator, tmp_path / "one", rows(3), models=MODELS[:1])
    first.cache_dir = tmp_path / "cache"
    first.attempt()
    job = Job(emulator, tmp_path / "two", rows(5, failing(4)), models=MODELS[:1])
    job.cache_dir, job.run_id = tmp_path / "cache", "run 2"
    assert job.attempt()["cached"]["rows"] == 3
    job.clear()
    manifest = job.attempt()
    assert (manifest["rows"]["ok"], manifest["cached"]["rows"]) == (5, 3)
    assert [(each["rows"], each["ok"]) for each in manifest["rounds"]] == [(2, 1), (1, 1)]
    assert sent_rows(emulator) == [3, 2, 1]


def test_other_limits_of_a_batch_are_no_other_rows(emulator: Emulator, tmp_path: Path) -> None:
    job = Job(emulator, tmp_path, rows(7, failing(1, 2, 6)), models=MODELS[:1])
    job.attempt()
    job.options = options(models=MODELS[:1], max_rows_per_batch=2)
    job.clear()
    assert job.attempt()["rows"]["ok"] == 7
    assert sent_rows(emulator) == [5, 2, 2, 1]


def test_a_clear_of_a_job_without_a_single_answer_sends_everything(
    emulator: Emulator, tmp_path: Path
) -> None:
    job = Job(emulator, tmp_path, rows(3, failing(0, 1, 2)), models=MODELS[:1])
    job.attempt()
    job.clear()
    assert job.attempt()["rows"]["ok"] == 3
    assert sent_rows(emulator) == [3, 3]


@pytest.mark.parametrize("what", ["prompt", "parameter", "model", "order"])
def test_what_was_changed_before_a_clear_is_new_work(emulator: Emulator, tmp_path: Path, what: str) -> None:
    job = Job(emulator, tmp_path, rows(3), models=MODELS[:1])
    first = job.attempt()
    changed = Job(
        emulator,
        tmp_path,
        {"prompt": rows(3, lambda i: "!" * i), "order": rows(3)[::-1]}.get(what, rows(3)),
        models=[MODELS[1]] if what == "model" else MODELS[:1],
        request_params={"temperature": 0} if what == "parameter" else None,
    )
    changed.tries, changed.clears = 1, 1
    manifest = changed.attempt()
    assert sent_rows(emulator) == [3, 3]
    assert manifest["rows"]["ok"] == 3
    # Back to what it was: its batch is still there.
    job.clears, job.tries = 2, 2
    again = job.attempt()
    assert again["models"][0]["batches"] == first["models"][0]["batches"]
    assert sent_rows(emulator) == [3, 3]


def test_a_change_between_automatic_tries_still_fails(emulator: Emulator, tmp_path: Path) -> None:
    job = Job(emulator, tmp_path, rows(3), models=MODELS[:1])
    job.next_try().start(lambda: rows(3), "requests", timeout=None)
    changed = rows(3, lambda i: "!" * i)
    with pytest.raises(InvalidInputError, match="was changed since an earlier try"):
        job.next_try().start(lambda: changed, "requests", timeout=None)
    assert sent_rows(emulator) == [3]
    # A clear makes it new work, and an automatic retry after it continues with that.
    job.clear()
    job.cancel_on_kill = False
    job.next_try().start(lambda: changed, "requests", timeout=None)
    assert sent_rows(emulator) == [3, 3]
    job.requests = changed
    assert job.attempt()["rows"]["ok"] == 3
    assert sent_rows(emulator) == [3, 3]
    assert not (tmp_path / ".siliconflow").exists(), "the batch of the old rows has ended as well"


@pytest.mark.parametrize("cancels", [True, False])
@pytest.mark.emulator(speed=0.001)
def test_batches_of_rows_that_a_clear_gave_up_are_cancelled(
    emulator: Emulator, tmp_path: Path, cancels: bool
) -> None:
    job = Job(emulator, tmp_path, rows(7), models=MODELS[:1])
    job.cancel_on_kill = cancels
    job.next_try().start(lambda: rows(7), "requests", timeout=None)
    changed = rows(7, lambda i: "!" if i == 6 else "")
    job.clear()
    wait = job.next_try().start(lambda: changed, "requests", timeout=None)
    first, given_up, new = emulator.service.state()["batches"]
    assert wait is not None
    assert set(wait.batch_ids) == {first["id"], new["id"]}, "a shard whose rows are the same keeps its batch"
    assert (given_up["status"] in ("cancelling", "cancelled")) == cancels
    assert first["status"] not in ("cancelling", "cancelled")


@pytest.mark.emulator(speed=0.001)
def test_a_clear_of_a_job_that_waits_continues_with_it(emulator: Emulator, tmp_path: Path) -> None:
    job = Job(emulator, tmp_path, rows(7))
    wait = job.next_try().start(lambda: job.requests, "requests", timeout=None)
    job.clear()
    assert job.next_try().start(lambda: job.requests, "requests", timeout=None) == wait
    emulator.service.configure({"speed": 2000.0})
    assert job.attempt()["rows"]["ok"] == 14
    assert posts(emulator) == (2, 4)
    assert emulator.request_counts.get("POST /batches/*/cancel", 0) == 0


def test_a_clear_of_an_unfinished_job_sends_what_a_retry_would(emulator: Emulator, tmp_path: Path) -> None:
    job = Job(emulator, tmp_path, rows(7), models=MODELS[:1])
    job.after = fail_first_of(emulator)
    with pytest.raises(BatchFailedError):
        job.attempt()
    job.clear()
    assert job.attempt()["rows"]["ok"] == 7
    assert sent_rows(emulator) == [5, 2, 5]


def test_results_that_are_gone_are_fetched_from_the_batches(emulator: Emulator, tmp_path: Path) -> None:
    job = Job(emulator, tmp_path, rows(7, failing(3)), models=MODELS[:1])
    job.attempt()
    (tmp_path / "results.jsonl").unlink()
    job.clear()
    manifest = job.attempt()
    assert manifest["rows"]["ok"] == 6
    assert sent_rows(emulator) == [5, 2], "nothing is paid again"
    (tmp_path / "results.jsonl").write_text((tmp_path / "results.jsonl").read_text().replace('"q2"', '"x2"'))
    job.clear()
    assert job.attempt()["rows"]["ok"] == 6
    assert sent_rows(emulator) == [5, 2]


def test_kept_answers_do_not_need_their_batches(emulator: Emulator, tmp_path: Path) -> None:
    job = Job(emulator, tmp_path, rows(7, failing(3)), models=MODELS[:1])
    job.attempt()
    old = {f"/v1/batches/{batch['id']}" for batch in emulator.service.state()["batches"]}
    job.clear()
    since = len(emulator.requests)
    assert job.attempt()["rows"]["ok"] == 7
    assert old.isdisjoint(request.path for request in emulator.requests[since:])


@pytest.mark.parametrize("crash", ["POST /files", "POST /batches", "GET /batches/*"])
def test_a_try_that_dies_after_a_clear_pays_for_no_row_twice(
    emulator: Emulator, tmp_path: Path, crash: str
) -> None:
    job = Job(emulator, tmp_path, rows(9, failing(0, 8)), models=MODELS[:1])
    job.attempt()
    job.clear()

    def die(name: str) -> None:
        if name == crash:
            job.after = lambda _: None
            raise KeyboardInterrupt

    job.after = die
    try:
        job.attempt()
    except KeyboardInterrupt:
        job.attempt()
    assert sent_rows(emulator) == [5, 4, 2]
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 9


# Runs ---------------------------------------------------------------------------------------------------------


def test_a_run_that_was_deleted_and_made_again_is_new_work(emulator: Emulator, tmp_path: Path) -> None:
    job = Job(emulator, tmp_path, rows(3), models=MODELS[:1])
    job.run_start = "2026-01-01T00:00:00+00:00"
    job.attempt()
    again = Job(emulator, tmp_path, rows(3), models=MODELS[:1])
    again.run_start = "2026-01-02T00:00:00+00:00"
    again.attempt()
    assert sent_rows(emulator) == [3, 3]
    # Its clears and retries are its own.
    again.clear()
    again.run_was_cleared, again.run_start = True, "2026-01-03T00:00:00+00:00"
    again.attempt()
    assert sent_rows(emulator) == [3, 3]


def test_a_retry_of_a_run_made_again_takes_nothing_of_the_deleted_one(
    emulator: Emulator, tmp_path: Path
) -> None:
    """Its first try died before it had recorded anything."""
    job = Job(emulator, tmp_path, rows(3), models=MODELS[:1])
    job.run_start = "2026-01-01T00:00:00+00:00"
    job.attempt()
    again = Job(emulator, tmp_path, rows(3), models=MODELS[:1])
    again.run_start, again.tries = "2026-01-02T00:00:00+00:00", 1
    again.attempt()
    assert sent_rows(emulator) == [3, 3]


def test_the_same_try_once_more_pays_nothing(emulator: Emulator, tmp_path: Path) -> None:
    """`airflow tasks test` on a finished task has its ids, its number and its run."""
    job = Job(emulator, tmp_path, rows(3), models=MODELS[:1])
    job.run_start = "2026-01-01T00:00:00+00:00"
    first = job.attempt()
    job.tries = 0
    assert job.attempt() == first
    assert sent_rows(emulator) == [3]
    job.tries, job.requests = 0, rows(3, lambda i: "!" * i)
    assert job.attempt()["rows"]["ok"] == 3
    assert sent_rows(emulator) == [3, 3]


def test_a_job_folder_that_a_finished_job_left_is_not_taken_up_after_a_clear(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process died between its manifest and the removal of its folder."""
    job = Job(emulator, tmp_path, rows(3, failing(1)), models=MODELS[:1])
    with monkeypatch.context() as patched:
        patched.setattr("airflow_provider_siliconflow.jobs.ledger.remove_tree", lambda _: None)
        job.attempt()
    assert (tmp_path / ".siliconflow").exists()
    job.clear()
    assert job.attempt()["rows"]["ok"] == 3
    assert sent_rows(emulator) == [3, 1]
    assert not (tmp_path / ".siliconflow").exists()


def test_a_changed_type_judges_answers_anew_although_all_were_ok(emulator: Emulator, tmp_path: Path) -> None:
    """Rows with a ``response_format`` of their own stay the same rows, whatever type is asked for."""
    answers = {"type": "json_object"}
    given = [{**row, "response_format": answers} for row in rows(5)]
    limits: dict[str, Any] = {"models": MODELS[:1], "structured_output": "json_schema"}
    job = Job(emulator, tmp_path, given, **limits, output_type={"type": "object"})
    assert job.attempt()["rows"]["ok"] == 5
    job.options = options(**limits, output_type={"type": "object", "required": ["nowhere"]})
    job.clear()
    manifest = job.attempt()
    assert manifest["rows"]["invalid"] == 5
    assert sent_rows(emulator) == [5, 5]


PRICE = {MODELS[0]: {"prompt": 1, "completion": 4, "thinking": 0}}


@pytest.mark.emulator(speed=2000.0, prices={MODELS[0]: {"prompt": 1, "completion": 4}})
def test_what_was_spent_before_a_clear_counts_towards_max_cost(emulator: Emulator, tmp_path: Path) -> None:
    given = [{**row, "max_tokens": 100} for row in rows(40, failing(*range(20)))]
    limits: dict[str, Any] = {"models": MODELS[:1], "prices": PRICE}
    job = Job(emulator, tmp_path, given, **limits, max_cost=1)
    spent = job.attempt()["budget"]["spent"]
    assert spent > 0
    job.clear()
    job.options = options(**limits, max_cost=spent)
    with pytest.raises(InvalidInputError, match=r"of which .* are spent by the job that was cleared"):
        job.attempt()
    job.options = options(**limits, max_cost=1)
    manifest = job.attempt()
    assert manifest["rows"]["ok"] == 40
    bill = float(emulator.bill.total)
    assert manifest["budget"]["spent"] == pytest.approx(bill, abs=1e-5)
    assert manifest["budget"]["spent"] >= bill
    assert manifest["cost"]["total"] == pytest.approx(bill, abs=1e-5)


def test_what_max_cost_left_out_is_sent_by_a_clear_with_a_higher_one(
    emulator: Emulator, tmp_path: Path
) -> None:
    given = [{**row, "max_tokens": 5} for row in rows(40)]
    limits: dict[str, Any] = {"models": MODELS[:1], "prices": {MODELS[0]: {**PRICE[MODELS[0]], "prompt": 0}}}
    job = Job(emulator, tmp_path, given, **limits, max_cost=0.0004)
    assert 0 < job.attempt()["budget"]["rows_not_sent"] < 40
    job.options = options(**limits, max_cost=0.001)
    job.clear()
    manifest = job.attempt()
    assert (manifest["rows"]["ok"], manifest["budget"]["rows_not_sent"]) == (40, 0)
    assert sum(sent_rows(emulator)) == 40
