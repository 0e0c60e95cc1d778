"""What is in an output folder: earlier tries, tries that are alive, other jobs, changed rows, what others wrote."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_siliconflow.api.exceptions import (
    BatchFailedError,
    InvalidInputError,
    JobTakenOverError,
    SiliconFlowError,
)
from airflow_provider_siliconflow.emulator.server import Emulator
from airflow_provider_siliconflow.jobs.run import BatchRun, Wait
from tests.unit.jobs.whole_job import MODELS, Job, fail_first_of, options, posts, rows

pytestmark = pytest.mark.emulator(speed=1.0, queue_seconds=0.0, rows_per_second=0.001)

FAST = {"speed": 1e6}


def batches(emulator: Emulator) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = emulator.service.state()["batches"]
    return found


def started(job: Job, run: BatchRun | None = None) -> tuple[BatchRun, Wait]:
    """Begin a try of a job whose batches go on; return the driver and what it waits for."""
    run = run or job.next_try()
    wait = run.start(lambda: job.requests, "requests", timeout=None)
    assert wait is not None
    return run, wait


def small(emulator: Emulator, folder: Path, count: int = 10, **changes: Any) -> Job:
    return Job(emulator, folder, rows(count), **({"models": MODELS[:1]} | changes))


# Tries ------------------------------------------------------------------------------------------------------


def test_a_first_try_beside_a_live_job_takes_it_up_and_pays_nothing(
    emulator: Emulator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`airflow tasks test` on a task that waits: its try number is 1 as well."""
    job = small(emulator, tmp_path)
    _, waiting = started(job)
    caplog.clear()
    test = job.process(try_id="test")
    _, wait = started(job, test)
    assert set(wait.batch_ids) == set(waiting.batch_ids)
    assert "although this is the first try" in caplog.text
    # The one that waited wakes up, finds that the job was taken from it, and leaves it alone.
    emulator.service.configure(FAST)
    ended = job.wait(waiting)
    with pytest.raises(JobTakenOverError) as caught:
        job.process().resume(ended)
    assert caught.value.retryable
    assert job.carry_out(test, wait)["rows"]["ok"] == 10
    # And when it is done, the one that waited has nothing left to do but to take the manifest.
    assert job.process().resume(ended) is None
    assert posts(emulator) == (2, 2)


def test_an_older_try_that_is_still_alive_sends_and_writes_nothing_more(
    emulator: Emulator, tmp_path: Path
) -> None:
    job = small(emulator, tmp_path, 30, max_in_flight=2)
    older, _ = started(job)
    newer, wait = started(job)
    emulator.service.configure(FAST)
    ended = job.wait(wait)
    with pytest.raises(JobTakenOverError):
        older.resume(ended)
    assert older.stop(cancels=True) == (), "what the newer try waits for is not the older one's to cancel"
    assert not (tmp_path / "results.jsonl").exists()
    assert job.carry_out(newer, newer.resume(ended))["rows"]["ok"] == 30
    with pytest.raises(SiliconFlowError):
        older.finish()
    assert posts(emulator) == (6, 6)
    assert json.loads((tmp_path / "manifest.json").read_text())["run"]


def test_results_of_an_older_try_get_no_names(emulator: Emulator, tmp_path: Path) -> None:
    """It was stopped between the downloads and the end of the merge."""
    job = small(emulator, tmp_path)
    older, wait = started(job)
    emulator.service.configure(FAST)
    ended = job.wait(wait)
    taken: list[BatchRun] = []

    def take_over(call: str) -> None:
        if call.startswith("GET /batches/") and not taken:
            job.after = lambda _: None
            taken.append(job.next_try())
            taken[0].start(lambda: job.requests, "requests", timeout=None)

    job.after = take_over
    (tmp_path / "results.jsonl").write_text("the newer try's")
    with pytest.raises(JobTakenOverError):
        older.resume(ended)
    assert taken
    assert json.loads((tmp_path / "results.jsonl").read_text().splitlines()[0])["custom_id"] == "q0"
    assert not list(tmp_path.glob("*.part"))


def test_a_resumption_in_another_process_is_the_same_try(emulator: Emulator, tmp_path: Path) -> None:
    job = small(emulator, tmp_path, 30, max_in_flight=2)
    _, wait = started(job)
    emulator.service.configure(FAST)
    resumed: Wait | None = wait
    while resumed is not None:
        run = job.process()
        resumed = run.resume(job.wait(resumed))
    assert run.finish()["rows"]["ok"] == 30
    assert posts(emulator) == (6, 6)


def test_a_try_that_is_ended_before_it_begins_names_what_the_last_one_left_open(
    emulator: Emulator, tmp_path: Path
) -> None:
    job = small(emulator, tmp_path)
    _, wait = started(job)
    assert job.next_try().stop(cancels=True) == wait.batch_ids


# Rows that were changed -------------------------------------------------------------------------------------


CHANGES: dict[str, Callable[[list[Any]], Any]] = {
    "another row": lambda found: [*found[:-1], {**found[-1], "custom_id": "other"}],
    "one more row": lambda found: [*found, {"custom_id": "more", "messages": found[0]["messages"]}],
    "another order": lambda found: list(reversed(found)),
    "no rows": lambda found: [],
    "a row that is wrong": lambda found: [*found, {"messages": "?"}],
}


@pytest.mark.parametrize("change", CHANGES)
def test_rows_that_were_changed_between_two_tries_are_not_mixed_with_those_that_are_paid(
    emulator: Emulator, tmp_path: Path, change: str
) -> None:
    job = small(emulator, tmp_path)
    _, wait = started(job)
    original = job.requests
    job.requests = CHANGES[change](original)
    with pytest.raises(InvalidInputError, match="was changed since an earlier try submitted") as caught:
        job.attempt()
    assert caught.value.retryable
    assert wait.batch_ids[0] in str(caught.value)
    job.requests = original
    emulator.service.configure(FAST)
    assert job.attempt()["rows"]["ok"] == 10
    assert posts(emulator) == (2, 2)


def test_other_body_parameters_are_other_rows(emulator: Emulator, tmp_path: Path) -> None:
    job = small(emulator, tmp_path)
    started(job)
    job.options = options(models=MODELS[:1], request_params={"temperature": 1})
    with pytest.raises(InvalidInputError, match="request_params"):
        job.attempt()


def test_a_file_is_compared_by_its_rows_if_its_time_has_changed(emulator: Emulator, tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows(10)))
    job = Job(emulator, tmp_path / "out", source, models=MODELS[:1])
    started(job)
    os.utime(source, (1, 1))
    # The shards of the next try are not cut by other limits than those of the first.
    job.options = options(models=MODELS[:1], max_rows_per_batch=3)
    started(job)
    with source.open("a") as stream:
        stream.write(json.dumps(rows(11)[10]) + "\n")
    with pytest.raises(InvalidInputError, match="was changed"):
        job.attempt()
    source.unlink()
    emulator.service.configure(FAST)
    assert job.attempt()["rows"]["ok"] == 10, "rows that are gone are no reason to lose what is paid"
    assert posts(emulator) == (2, 2)


def test_rows_that_were_never_sent_may_change(emulator: Emulator, tmp_path: Path) -> None:
    job = small(emulator, tmp_path, 5)
    emulator.faults.add("POST /batches:status=400")
    with pytest.raises(SiliconFlowError):
        job.attempt()
    emulator.faults.clear()
    emulator.service.configure(FAST)
    job.requests = rows(4)
    assert job.attempt()["rows"]["total"] == 4


def test_the_plan_of_a_deleted_run_is_never_removed_while_its_batches_run(
    emulator: Emulator, tmp_path: Path
) -> None:
    _, wait = started(small(emulator, tmp_path))
    again = small(emulator, tmp_path, 7)
    with pytest.raises(InvalidInputError, match=wait.batch_ids[0]):
        again.attempt()
    assert list(tmp_path.glob(".siliconflow/*/plan.json"))
    for batch_id in wait.batch_ids:
        emulator.service.force_status(batch_id, "cancelled")
    emulator.service.configure(FAST)
    again.tries = 0
    assert again.attempt()["rows"]["total"] == 7


# Other jobs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [{"run_id": "other"}, {"map_index": 3}])
def test_an_output_folder_has_one_owner_at_a_time(
    emulator: Emulator, tmp_path: Path, other: dict[str, Any]
) -> None:
    first = small(emulator, tmp_path)
    first.map_index = 1 if "map_index" in other else -1
    run, wait = started(first)
    second = small(emulator, tmp_path)
    vars(second).update(other)
    with pytest.raises(InvalidInputError, match=r"output_dir: the job of dag/task.*/run is running there"):
        second.attempt()
    emulator.service.configure(FAST)
    assert first.carry_out(run, wait)["rows"]["ok"] == 10
    assert posts(emulator) == (2, 2)
    if "run_id" in other:
        assert second.attempt()["rows"]["ok"] == 10


def test_a_retry_does_not_begin_where_another_job_runs_by_now(emulator: Emulator, tmp_path: Path) -> None:
    emulator.service.configure(FAST)
    first = small(emulator, tmp_path)
    first.after = fail_first_of(emulator)
    with pytest.raises(BatchFailedError):
        first.attempt()
    emulator.service.configure({"speed": 1.0})
    second = small(emulator, tmp_path)
    second.run_id = "other"
    started(second)
    sent = posts(emulator)
    with pytest.raises(InvalidInputError, match="is running there"):
        first.attempt()
    assert posts(emulator) == sent


def test_of_two_jobs_that_start_at_once_none_writes_over_the_other(
    emulator: Emulator, tmp_path: Path
) -> None:
    """Each may have looked before the other had left anything in the folder."""
    second = small(emulator, tmp_path / "elsewhere")
    second.run_id = "other"
    started(second)
    (theirs,) = (tmp_path / "elsewhere").glob(".siliconflow/*")
    first = small(emulator, tmp_path / "out")

    def requests() -> Any:
        shutil.copytree(theirs, tmp_path / "out" / ".siliconflow" / theirs.name)
        return first.requests

    sent = posts(emulator)
    with pytest.raises(InvalidInputError, match="dag/task/other is running there"):
        first.next_try().start(requests, "requests", timeout=None)
    assert posts(emulator) == sent
    assert [path.name for path in (tmp_path / "out" / ".siliconflow").iterdir()] == [theirs.name]


def test_a_job_that_starts_keeps_others_from_its_folder(emulator: Emulator, tmp_path: Path) -> None:
    first, second = small(emulator, tmp_path), small(emulator, tmp_path)
    second.run_id = "other"

    def requests() -> Any:
        with pytest.raises(InvalidInputError, match="is starting there") as caught:
            second.attempt()
        assert caught.value.retryable
        return first.requests

    assert first.next_try().start(requests, "requests", timeout=None) is not None


def test_a_job_that_failed_for_good_does_not_keep_its_folder_from_others(
    emulator: Emulator, tmp_path: Path
) -> None:
    emulator.service.configure(FAST)
    failed = small(emulator, tmp_path)
    failed.after = fail_first_of(emulator)
    with pytest.raises(BatchFailedError):
        failed.attempt()
    second = small(emulator, tmp_path)
    second.run_id = "other"
    assert second.attempt()["rows"]["ok"] == 10


def test_models_that_were_changed_between_two_tries_are_named(emulator: Emulator, tmp_path: Path) -> None:
    job = small(emulator, tmp_path)
    _, wait = started(job)
    job.options = options(models=MODELS)
    with pytest.raises(InvalidInputError, match="models, conn_id, output_dir or on_clear") as caught:
        job.attempt()
    assert wait.batch_ids[0] in str(caught.value)
    assert posts(emulator) == (2, 2)


def test_a_connection_that_was_changed_between_two_tries_is_named(emulator: Emulator, tmp_path: Path) -> None:
    """Through the new one the batches of the first try cannot be seen: that is no proof that they do not run."""
    job = small(emulator, tmp_path)
    started(job)
    job.conn_id = "other"
    emulator.faults.add("GET /batches/*:status=404,times=-1")
    with pytest.raises(InvalidInputError, match="models, conn_id, output_dir or on_clear"):
        job.attempt()
    assert posts(emulator) == (2, 2)


# Generations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cancels", [True, False])
def test_a_clear_that_submits_anew_ends_what_the_older_generation_left(
    emulator: Emulator, tmp_path: Path, cancels: bool
) -> None:
    """It was woken and queued when it was cleared, so that neither a process nor a trigger could cancel."""
    job = small(emulator, tmp_path)
    older, wait = started(job)
    left_open = wait.batch_ids
    foreign = emulator.service.create_batch(
        {
            "input_file_id": batches(emulator)[0]["input_file_id"],
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
            "replace": {"model": MODELS[0]},
            "metadata": {},
        }
    )
    job.generation, job.cancel_on_kill = 6, cancels
    newer, wait = started(job)
    found = {batch["id"]: batch["status"] for batch in batches(emulator)}
    assert [found[batch_id] in ("cancelling", "cancelled") for batch_id in left_open] == [cancels] * 2
    assert found[foreign["id"]] == "in_progress"
    assert len(list(tmp_path.glob(".siliconflow/*"))) == 2, "what may run is not forgotten"
    with pytest.raises(JobTakenOverError):
        older.resume([])
    emulator.service.advance(60.0)
    emulator.service.configure(FAST)
    assert job.carry_out(newer, wait)["rows"]["ok"] == 10
    assert not list(tmp_path.glob(".siliconflow/*"))


def name_a_foreign_batch(emulator: Emulator, folder: Path) -> str:
    """Let a neighbour put a batch of somebody else in the place of ours in a job's ledger; return its id."""
    row = b'{"custom_id":"a","body":{"model":"m","messages":[{"role":"user","content":"hi"}]}}\n'
    request = {
        "input_file_id": emulator.service.add_file("f.jsonl", "batch", [row])["data"]["id"],
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
        "replace": {"model": MODELS[0]},
        "metadata": {},
    }
    ours = batches(emulator)[0]["id"]
    foreign = str(emulator.service.create_batch(request)["id"])
    (path,) = folder.glob(".siliconflow/*/ledger.json")
    path.write_text(path.read_text().replace(ours, foreign))
    return foreign


def test_a_ledger_that_names_a_foreign_batch_does_not_get_it_cancelled(
    emulator: Emulator, tmp_path: Path
) -> None:
    job = small(emulator, tmp_path, 5)
    started(job)
    foreign = name_a_foreign_batch(emulator, tmp_path)
    job.generation = 6
    started(job)
    found = {batch["id"]: batch["status"] for batch in batches(emulator)}
    assert found[foreign] == "in_progress"


def test_a_job_that_is_killed_owns_its_batches_and_no_others(emulator: Emulator, tmp_path: Path) -> None:
    job = small(emulator, tmp_path, 10)
    first, _ = started(job)
    # In a process that did not create them, the ledger alone says so.
    ours, other = (job.client().get_batch(each["id"]) for each in batches(emulator))
    foreign = name_a_foreign_batch(emulator, tmp_path)
    run = job.process()
    assert set(run.stop(cancels=True)) == {foreign, other.id}
    assert run.owns(other)
    assert not run.owns(job.client().get_batch(foreign))
    assert first.owns(ours)


# What others may have written -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("name", "../../../../etc/passwd"),
        ("name", "shard-00001.jsonl"),
        ("sha256", "x"),
        ("rows", -1),
        ("rows", 10**30),
        ("bytes", "many"),
    ],
)
def test_a_plan_is_not_believed(emulator: Emulator, tmp_path: Path, name: str, value: Any) -> None:
    job = small(emulator, tmp_path)
    started(job)
    (path,) = tmp_path.glob(".siliconflow/*/plan.json")
    stored = json.loads(path.read_text())
    stored["split"]["shards"][0][name] = value
    path.write_text(json.dumps(stored))
    emulator.service.configure(FAST)
    assert job.attempt()["rows"]["ok"] == 10
    assert posts(emulator) == (2, 2)


@pytest.mark.parametrize("figure", ["Infinity", "-Infinity", "1e400", "NaN"])
def test_a_plan_with_a_figure_that_is_none_is_made_anew(
    emulator: Emulator, tmp_path: Path, figure: str
) -> None:
    job = small(emulator, tmp_path)
    started(job)
    (path,) = tmp_path.glob(".siliconflow/*/plan.json")
    stored = json.loads(path.read_text()) | {"max_rows": "?"}
    path.write_text(json.dumps(stored).replace('"?"', figure))
    emulator.service.configure(FAST)
    assert job.attempt()["rows"]["ok"] == 10
    assert posts(emulator) == (2, 2)


@pytest.mark.parametrize("model", ["1", "-1", str(10**30)])
def test_a_round_over_a_model_that_the_job_does_not_have_is_planned_anew(
    emulator: Emulator, tmp_path: Path, model: str
) -> None:
    job = small(emulator, tmp_path)
    started(job)
    (path,) = tmp_path.glob(".siliconflow/*/plan.json")
    shards = json.loads(path.read_text())["split"]["shards"]
    (path.parent / "round-1.json").write_text(json.dumps({"shards": {model: shards}}))
    emulator.service.configure(FAST)
    assert job.attempt()["rows"]["ok"] == 10
    assert posts(emulator) == (2, 2)


def test_nobody_else_can_read_or_write_a_jobs_folder(emulator: Emulator, tmp_path: Path) -> None:
    started(small(emulator, tmp_path))
    (folder,) = tmp_path.glob(".siliconflow/*")
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_shard_that_became_a_link_is_not_uploaded(emulator: Emulator, tmp_path: Path) -> None:
    job = small(emulator, tmp_path, 15, max_in_flight=1)
    _, wait = started(job)
    (shard,) = tmp_path.glob(".siliconflow/*/round-0/shard-00001.jsonl")
    (tmp_path / "secret").write_bytes(shard.read_bytes())
    shard.unlink()
    shard.symlink_to(tmp_path / "secret")
    emulator.service.configure(FAST)
    with pytest.raises(SiliconFlowError, match="link"):
        job.carry_out(job.process(), wait)
    assert len(batches(emulator)) == 1


def test_a_plan_without_its_task_is_made_anew(emulator: Emulator, tmp_path: Path) -> None:
    job = small(emulator, tmp_path)
    started(job)
    (path,) = tmp_path.glob(".siliconflow/*/plan.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "task": {"dag_id": 5}}))
    emulator.service.configure(FAST)
    assert job.attempt()["rows"]["ok"] == 10
    assert len(batches(emulator)) == 2
