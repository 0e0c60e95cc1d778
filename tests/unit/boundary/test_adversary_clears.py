"""Clears of jobs whose folder, input or budget is not what it was: no wrong answers, and nothing is paid twice."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_siliconflow.api.exceptions import InvalidInputError
from airflow_provider_siliconflow.emulator.server import Emulator
from airflow_provider_siliconflow.jobs.plan import MOST_ROUNDS
from tests.unit.jobs.test_finished import PRICE, failing, sent_rows, tokens_of
from tests.unit.jobs.whole_job import MODELS, Job, options, rows

pytestmark = pytest.mark.emulator(speed=2000.0)


def answers(folder: Path) -> list[str]:
    return [row["response"]["body"]["choices"][0]["message"]["content"] for row in one_model(folder)]


def one_model(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def rewrite_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


# Whose results these are ------------------------------------------------------------------------------------


def between_two_rounds(job: Job) -> None:
    """Let a try of a job die after it has written the results of its first round."""
    run = job.next_try()
    wait = run.start(lambda: job.requests, "requests", timeout=None)
    assert wait is not None
    ended = job.wait(wait)
    # The batches of the second round do not end.
    job.emulator.service.configure({"speed": 0.001})
    assert run.resume(ended) is not None


def test_a_cleared_job_does_not_return_what_another_run_has_written_since(
    emulator: Emulator, tmp_path: Path
) -> None:
    """Both use one folder, and the other one is between two rounds."""
    first = Job(emulator, tmp_path, rows(3, lambda _: "one"), models=MODELS[:1])
    first.attempt()
    other = Job(
        emulator,
        tmp_path,
        rows(3, failing(0, mark="two [[emulator:once=503]]")),
        models=MODELS[:1],
        max_row_attempts=2,
    )
    other.run_id = "run 2"
    between_two_rounds(other)
    first.clear()
    with pytest.raises(InvalidInputError, match="run 2 is running there"):
        first.attempt()
    emulator.service.configure({"speed": 2000.0})
    assert other.attempt()["rows"]["ok"] == 3
    first.attempt()
    assert all("one" in answer for answer in answers(tmp_path))
    assert sent_rows(emulator) == [3, 3, 1], "its batches are still there"


def test_answers_to_changed_rows_are_not_taken_for_those_to_the_rows_before(
    emulator: Emulator, tmp_path: Path
) -> None:
    """The changed rows were on their way when the author changed his mind, and their record is lost."""
    mark = "[[emulator:once=503]]"
    job = Job(emulator, tmp_path, rows(3, lambda _: "one"), models=MODELS[:1])
    job.attempt()
    job.clear()
    changed = rows(3, failing(0, mark=f"two {mark}"))
    job.requests, job.options = changed, options(models=MODELS[:1], max_row_attempts=2)
    between_two_rounds(job)
    (folder,) = (tmp_path / ".siliconflow").iterdir()
    (folder / "plan.json").unlink()
    emulator.service.configure({"speed": 2000.0})
    job.clear()
    job.requests = rows(3, lambda _: "one")
    job.attempt()
    assert all("one" in answer for answer in answers(tmp_path))
    assert sent_rows(emulator) == [3, 3, 1]


@pytest.mark.parametrize("all_ok", [True, False])
def test_a_manifest_that_does_not_say_of_which_rows_it_is_proves_nothing(
    emulator: Emulator, tmp_path: Path, all_ok: bool
) -> None:
    job = Job(emulator, tmp_path, rows(3, failing(*([] if all_ok else [1]))), models=MODELS[:1])
    job.attempt()
    rewrite_manifest(tmp_path, lambda manifest: manifest["input"].update(shard_rows="three"))
    job.clear()
    job.requests = rows(3, lambda _: "changed")
    job.attempt()
    assert all("changed" in answer for answer in answers(tmp_path))
    # The same rows as they were: their batch is still there.
    job.clear()
    job.requests = rows(3, failing(*([] if all_ok else [1])))
    job.attempt()
    assert sent_rows(emulator) == [3, 3]


def test_another_file_of_the_same_size_and_time_is_new_work(emulator: Emulator, tmp_path: Path) -> None:
    """An archive that is unpacked gives its files times of whole seconds."""
    job = Job(emulator, tmp_path / "out", None, models=MODELS[:1])
    for word in ("one", "two"):
        job.requests = tmp_path / f"{word}.jsonl"
        job.requests.write_text("".join(json.dumps(row) + "\n" for row in rows(3, lambda _: word)))  # noqa: B023
        os.utime(job.requests, (1_700_000_000, 1_700_000_000))
        job.attempt()
        assert all(word in answer for answer in answers(tmp_path / "out"))
        job.clear()


def test_rows_that_no_longer_fit_into_a_batch_do_not_lose_their_answers(
    emulator: Emulator, tmp_path: Path
) -> None:
    given = rows(4, failing(0))
    given[2]["messages"][0]["content"] += "x" * 500
    limits: dict[str, Any] = {"models": MODELS[:1], "on_invalid_row": "report"}
    job = Job(emulator, tmp_path, given, **limits)
    job.attempt()
    job.clear()
    job.options = options(**limits, max_bytes_per_batch=400)
    with pytest.raises(InvalidInputError, match="max_bytes_per_batch"):
        job.attempt()
    job.options = options(**limits)
    assert job.attempt()["rows"]["ok"] == 4
    assert sent_rows(emulator) == [4, 1]


@pytest.mark.parametrize("number", [MOST_ROUNDS, 2**53, 10**30])
def test_a_manifest_of_very_many_rounds_takes_no_memory(
    emulator: Emulator, tmp_path: Path, number: int
) -> None:
    job = Job(emulator, tmp_path, rows(3, failing(1)), models=MODELS[:1])
    job.attempt()
    rewrite_manifest(tmp_path, lambda manifest: manifest["rounds"][0].update(round=number))
    job.clear()
    assert job.attempt()["rows"]["total"] == 3
    assert sent_rows(emulator) == [3]


@pytest.mark.parametrize("content", [None, b'{"shards": {"0"', b'{"shards": {"7": []}}'])
def test_rows_that_a_clear_sends_are_not_forgotten_with_their_record(
    emulator: Emulator, tmp_path: Path, content: bytes | None
) -> None:
    job = Job(emulator, tmp_path, rows(9, failing(0, 8)), models=MODELS[:1])
    job.attempt()
    job.clear()
    job.next_try().start(lambda: job.requests, "requests", timeout=None)
    (folder,) = (tmp_path / ".siliconflow").iterdir()
    (folder / "round-1.json").unlink()
    if content is not None:
        (folder / "round-1.json").write_bytes(content)
    manifest = job.attempt()
    assert manifest["rows"]["ok"] == 9
    assert manifest["billed_usage"]["total_tokens"] == tokens_of(emulator)
    assert sent_rows(emulator) == [5, 4, 2]


# max_cost ---------------------------------------------------------------------------------------------------

priced = pytest.mark.emulator(speed=2000.0, prices={MODELS[0]: {"prompt": 1, "completion": 4}})


@priced
def test_a_clear_that_sends_nothing_is_not_refused_for_its_cost(emulator: Emulator, tmp_path: Path) -> None:
    """The answers are judged anew and are right now, and the whole budget is spent."""
    given = [{**row, "max_tokens": 100} for row in rows(4)]
    limits: dict[str, Any] = {"models": MODELS[:1], "prices": PRICE}
    job = Job(emulator, tmp_path, given, **limits, max_cost=1, accept=lambda row: row.custom_id != "q1")
    spent = job.attempt()["budget"]["spent"]
    job.clear()
    job.options = options(**limits, max_cost=spent)
    assert job.attempt()["rows"]["ok"] == 4
    assert sent_rows(emulator) == [4]


@priced
def test_parameters_of_a_model_are_no_prompts(emulator: Emulator, tmp_path: Path) -> None:
    """They were estimated like more text in the messages, so that prompts seemed to cost more than max_cost."""
    given = [{**row, "max_tokens": 10} for row in rows(4)]
    params = {"logit_bias": {str(token): 1 for token in range(3000)}}
    job = Job(emulator, tmp_path, given, models={MODELS[0]: params}, prices=PRICE, max_cost=0.0006)
    assert job.attempt()["rows"]["ok"] == 4
    assert float(emulator.bill.total) < 0.0006
