"""Odd answers that agree with each other well enough to be believed: nothing is paid twice, and no paid row is lost."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from airflow.providers.common.compat.sdk import TaskDeferred
from pytest_mock import MockerFixture

from airflow_provider_siliconflow.api.client import SiliconFlowClient
from airflow_provider_siliconflow.api.exceptions import (
    BatchFailedError,
    IncompleteResultsError,
    InvalidInputError,
    JobTakenOverError,
)
from airflow_provider_siliconflow.api.models import Batch, RequestCounts
from airflow_provider_siliconflow.emulator.server import Emulator
from airflow_provider_siliconflow.jobs.downloads import LATE_FILE_PATIENCE, download_results
from airflow_provider_siliconflow.jobs.settled import SETTLE_LIMIT
from airflow_provider_siliconflow.jobs.states import Sending
from airflow_provider_siliconflow.operators.batch import RunBatchOperator
from tests.unit.boundary.test_jobs_dead_batches import batches, billed, written
from tests.unit.boundary.test_submission_money import World
from tests.unit.jobs.faulty import (
    CONTENT,
    FakeListing,
    FaultyLedger,
    Oddities,
    batches_of,
    make_upload_work,
    make_work,
)
from tests.unit.jobs.whole_job import MODELS, Job, rows

pytestmark = pytest.mark.emulator(speed=2000.0)


class OddJob(Job):
    """A job whose service answers as a test wants it."""

    def __init__(self, emulator: Emulator, folder: Path, requests: Any, **changes: Any) -> None:
        super().__init__(emulator, folder, requests, **({"models": MODELS[:1]} | changes))
        self.created: Callable[[Batch], Batch] = lambda batch: batch
        self.read: Callable[[Batch], Batch] = lambda batch: batch
        self.listed: Callable[[Batch], bool] = lambda _: True
        self.downloaded: Callable[[str, bytes], bytes] = lambda _, content: content

    def client(self) -> SiliconFlowClient:
        client = super().client()
        create, get, download = client.create_batch, client.get_batch, client.iter_file
        listed = client.list_batches

        def iter_file(reference: str, refresh: Any, *, limit: int | None = None) -> Iterator[bytes]:
            yield self.downloaded(reference, b"".join(download(reference, refresh, limit=limit)))

        def list_batches() -> FakeListing:
            listing = listed()
            shown = list(filter(self.listed, listing))
            return FakeListing(shown, cut=listing.cut, unreadable=listing.unreadable)

        client.create_batch = lambda **request: self.created(create(**request))  # type: ignore[method-assign]
        client.get_batch = lambda batch_id, **how: self.read(get(batch_id, **how))  # type: ignore[method-assign]
        client.list_batches = list_batches  # type: ignore[assignment,method-assign]
        client.iter_file = iter_file  # type: ignore[method-assign]
        return client


def changed(batch: Batch, **fields: Any) -> Batch:
    return batch.model_copy(update=fields)


@pytest.mark.parametrize("with_metadata", [True, False])
def test_an_answer_that_names_the_batch_of_another_model_is_not_taken(
    emulator: Emulator, tmp_path: Path, with_metadata: bool
) -> None:
    """A gateway that caches by URL, say; both batches are over the same file."""
    job = OddJob(emulator, tmp_path, rows(4), models=MODELS)
    seen: list[Batch] = []

    def created(batch: Batch) -> Batch:
        seen.append(batch if with_metadata else changed(batch, metadata={}))
        return seen[0]

    job.created = created
    manifest = job.attempt()
    assert len(batches(emulator)) == 2
    assert len({batch["id"] for model in manifest["models"] for batch in model["batches"]}) == 2
    assert manifest["model_mismatches"] == 0
    assert manifest["rows"]["ok"] == 8


@pytest.mark.parametrize("how", ["duplicate", "foreign", "null"])
def test_rows_that_are_counted_as_answered_are_not_sent_again_for_lines_that_are_not_theirs(
    emulator: Emulator, tmp_path: Path, how: str
) -> None:
    job = OddJob(emulator, tmp_path, rows(5), max_row_attempts=2)

    def downloaded(reference: str, content: bytes) -> bytes:
        lines = content.splitlines(keepends=True)
        other = {
            "duplicate": lines[0],
            "foreign": lines[-1].replace(b'"q', b'"other'),
            "null": b"null\n",
        }
        return b"".join([*lines[:-1], other[how]])

    job.downloaded = downloaded
    manifest = job.attempt()
    assert len(batches(emulator)) == 1, "the row is counted as answered, so it is paid for"
    assert manifest["rows"]["missing"] == 1


def test_a_round_knows_as_well_what_is_counted_as_answered(emulator: Emulator, tmp_path: Path) -> None:
    """A batch of a later round has rows of several shards, so no merge of a shard sees all of its lines."""
    requests = rows(10, lambda i: "[[emulator:once=429]]" if i in (1, 8) else "")
    job = OddJob(emulator, tmp_path, requests, max_row_attempts=3)

    def downloaded(reference: str, content: bytes) -> bytes:
        lines = content.splitlines(keepends=True)
        return lines[0] * 2 if "output" in reference and len(lines) == 2 else content

    job.downloaded = downloaded
    manifest = job.attempt()
    assert len(batches(emulator)) == 3
    assert manifest["rows"]["ok"] == 9


def refused_then(emulator: Emulator, tmp_path: Path, attempts: int) -> OddJob:
    requests = rows(10, lambda i: "[[emulator:once=429]]" if i == 7 else "")
    job = OddJob(emulator, tmp_path, requests, max_row_attempts=attempts)
    emulator.faults.add("POST /batches:status=400")
    with pytest.raises(BatchFailedError, match="refused"):
        job.attempt()
    assert len(batches(emulator)) == 2
    return job


@pytest.mark.parametrize("attempts", [2, 3])
def test_a_batch_of_an_earlier_round_that_is_cancelled_late_is_not_forgotten(
    emulator: Emulator, tmp_path: Path, attempts: int
) -> None:
    job = refused_then(emulator, tmp_path, attempts)
    emulator.service.configure({"speed": 1.0})

    def cancel(call: str) -> None:
        if call == "POST /batches":
            emulator.service.force_status(batches(emulator)[-1]["id"], "cancelled")
            emulator.service.configure({"speed": 2000.0})
            job.after = lambda _: None

    job.after = cancel
    with pytest.raises(BatchFailedError, match="cancelled"):
        job.attempt()
    assert len(batches(emulator)) == 3, "not replaced in the same try"
    assert job.attempt()["rows"]["ok"] == 10
    assert set(billed(emulator).values()) == {1}


@pytest.mark.parametrize("shown", [True, False])
def test_a_batch_that_vanished_for_good_costs_its_own_rows_alone(
    emulator: Emulator, tmp_path: Path, shown: bool
) -> None:
    job = OddJob(emulator, tmp_path, rows(15))
    run = job.next_try()
    run.start(lambda: job.requests, "requests", timeout=None)
    gone = batches(emulator)[1]["id"]
    emulator.faults.add(f"GET /batches/{gone}:status=404,times=-1")
    if not shown:
        emulator.service.configure({"list_limit": 1})
    job.listed = lambda batch: shown and batch.id != gone
    with pytest.raises(IncompleteResultsError, match="cannot be read") as caught:
        job.attempt()
    assert caught.value.retryable
    assert gone in str(caught.value)
    assert len(batches(emulator)) == 3
    assert [row["error"] is None for row in written(tmp_path)] == [True] * 5 + [False] * 5 + [True] * 5
    emulator.faults.clear()
    assert job.attempt()["rows"]["ok"] == 15
    assert len(batches(emulator)) == 3


@pytest.mark.parametrize("lag", [30.0, 100.0])
def test_counts_that_add_up_to_fewer_rows_than_were_sent_are_not_there_yet(
    emulator: Emulator, tmp_path: Path, lag: float
) -> None:
    job = OddJob(emulator, tmp_path, rows(6), max_row_attempts=2, max_rows_per_batch=6)
    ended: list[float] = []

    def early() -> bool:
        ended.append(job.clock.time())
        return job.clock.time() < ended[0] + lag

    def read(batch: Batch) -> Batch:
        if batch.is_terminal and early():
            counts = batch.request_counts.model_copy(update={"total": 3, "completed": 3})
            return changed(batch, request_counts=counts)
        return batch

    def downloaded(reference: str, content: bytes) -> bytes:
        return b"".join(content.splitlines(keepends=True)[: 3 if early() else 6])

    job.read, job.downloaded = read, downloaded
    if lag > sum(LATE_FILE_PATIENCE):
        with pytest.raises(IncompleteResultsError, match="cannot be read"):
            job.attempt()
        job.clock.sleep(300.0)
    manifest = job.attempt()
    assert manifest["rows"]["ok"] == 6
    assert len(batches(emulator)) == 1
    assert set(billed(emulator).values()) == {1}


@pytest.mark.emulator(speed=1.0, queue_seconds=0.0, rows_per_second=100.0)
def test_a_line_that_is_not_json_costs_one_row_of_a_cancelled_batch_too(
    emulator: Emulator, tmp_path: Path
) -> None:
    job = OddJob(emulator, tmp_path, rows(20), max_rows_per_batch=20)

    def cancel(call: str) -> None:
        if call == "POST /batches":
            emulator.service.advance(0.12)
            emulator.service.force_status(batches(emulator)[-1]["id"], "cancelled")
            job.after = lambda _: None

    def downloaded(reference: str, content: bytes) -> bytes:
        if "output" not in reference:
            return content
        return b"{broken\n" + b"".join(content.splitlines(keepends=True)[1:])

    job.after = cancel
    job.downloaded = downloaded
    with pytest.raises(BatchFailedError, match="cancelled"):
        job.attempt()
    answered = emulator.service.state()["batches"][0]["request_counts"]["completed"]
    assert sum(row["error"] is None for row in written(tmp_path)) == answered - 1 > 3


@pytest.mark.emulator(speed=1.0, queue_seconds=0.0, rows_per_second=100.0)
def test_a_cancelled_batch_of_which_nothing_is_known_yet_is_not_replaced_at_once(
    emulator: Emulator, tmp_path: Path
) -> None:
    emulator.service.configure({"late_output_seconds": 40.0, "settle_as": "null", "settle_seconds": 86400.0})
    job = OddJob(emulator, tmp_path, rows(20), max_rows_per_batch=20)
    job.read = lambda batch: changed(batch, in_progress_at=None)

    def die(call: str) -> None:
        if call == "POST /batches":
            emulator.service.advance(0.12)
            emulator.service.force_status(batches(emulator)[-1]["id"], "cancelled")
            emulator.service.configure({"speed": 1000.0})
            job.after = lambda _: None
            raise KeyboardInterrupt

    job.after = die
    with pytest.raises(KeyboardInterrupt):
        job.attempt()
    with pytest.raises(BatchFailedError, match="cancelled"):
        job.attempt()
    assert len(batches(emulator)) == 1
    # Only the service says when it ended, and its clock may be hours off.
    job.clock.sleep(3 * SETTLE_LIMIT)
    assert job.attempt()["rows"]["ok"] == 20
    assert set(billed(emulator).values()) == {1}


def test_rows_of_a_round_that_was_refused_are_sent_once(emulator: Emulator, tmp_path: Path) -> None:
    """Refused in their second attempt, they are not sent in a third one beside it."""
    requests = rows(4, lambda i: "[[emulator:once=429]]" if i == 1 else "")
    job = OddJob(emulator, tmp_path, requests, max_row_attempts=3)
    emulator.faults.add("POST /batches:status=400,skip=1")
    with pytest.raises(BatchFailedError, match="refused"):
        job.attempt()
    assert len(batches(emulator)) == 1
    assert job.attempt()["rows"]["ok"] == 4
    assert set(billed(emulator).values()) == {1}


def test_a_ledger_that_says_a_foreign_batch_has_ended_brings_no_foreign_rows(
    emulator: Emulator, tmp_path: Path
) -> None:
    other = OddJob(emulator, tmp_path / "other", rows(3, lambda _: "of somebody else"))
    other.run_id = "other"
    other.attempt()
    theirs = batches(emulator)[0]["id"]
    job = OddJob(emulator, tmp_path / "ours", rows(3))
    run = job.next_try()
    run.start(lambda: job.requests, "requests", timeout=None)
    (path,) = (tmp_path / "ours").glob(".siliconflow/*/ledger.json")
    ledger = json.loads(path.read_text())
    ((key, entry),) = ledger["work"].items()
    ledger["work"][key] = entry | {
        "state": "ended",
        "batch_id": theirs,
        "status": "completed",
        "counts": {"total": 3, "completed": 3, "failed": 0},
        "errors": [],
        "at": 0,
    }
    path.write_text(json.dumps(ledger))
    with pytest.raises(IncompleteResultsError, match="belongs to other work"):
        job.attempt()
    assert not any(row["error"] is None for row in written(tmp_path / "ours"))
    assert len(batches(emulator)) == 2


def test_rows_that_were_changed_are_not_sent_beside_a_record_that_is_cut(
    emulator: Emulator, tmp_path: Path
) -> None:
    job = OddJob(emulator, tmp_path, rows(3))
    run = job.next_try()
    run.start(lambda: job.requests, "requests", timeout=None)
    (path,) = tmp_path.glob(".siliconflow/*/ledger.json")
    path.write_text(path.read_text()[:20])
    job.requests = rows(4)
    with pytest.raises(InvalidInputError, match="the record of them is cut") as caught:
        job.attempt()
    assert caught.value.retryable
    assert len(batches(emulator)) == 1


def test_a_clock_that_is_set_forward_ends_no_patience(emulator: Emulator, tmp_path: Path) -> None:
    emulator.service.configure({"settle_seconds": 86400.0, "partial_output_seconds": 600.0})
    job = OddJob(emulator, tmp_path, rows(6), max_row_attempts=2, max_rows_per_batch=6)
    time, jump = job.clock.time, [0.0]
    job.clock.time = lambda: time() + jump[0]  # type: ignore[method-assign]

    def read(batch: Batch) -> Batch:
        if batch.is_terminal:
            jump[0] = 7200.0
        return batch

    run = job.next_try()
    wait = run.start(lambda: job.requests, "requests", timeout=None)
    assert wait is not None
    ended = job.wait(wait)
    job.read = read
    wait = run.resume(ended)
    while wait is not None:
        wait = run.resume(job.wait(wait))
    run.finish()
    assert len(batches(emulator)) == 1


def test_a_service_whose_clock_is_slow_ends_no_patience(emulator: Emulator, tmp_path: Path) -> None:
    emulator.service.configure(
        {"clock_offset_seconds": -7200.0, "late_output_seconds": 1000.0, "settle_seconds": 1000.0}
    )
    job = OddJob(emulator, tmp_path / "job", rows(6), max_rows_per_batch=6)
    run = job.next_try()
    wait = run.start(lambda: job.requests, "requests", timeout=None)
    assert wait is not None
    job.wait(wait)
    with pytest.raises(IncompleteResultsError):
        download_results(job.client(), wait.batch_ids[0], tmp_path / "out", job.clock)


@pytest.mark.parametrize("counts", ["null", "zeros", "few"])
def test_a_cancelled_batch_is_not_replaced_before_its_counts_are_there(
    tmp_path: Path, mocker: MockerFixture, counts: str
) -> None:
    """All of its rows were answered; a moment after it was cancelled, that does not show yet."""
    world = World(tmp_path, [], Oddities(), [], 0.0)
    work = make_work(world.service)
    first = world.submit(work)
    began = world.clock.time()
    late = {"null": (0, 0), "zeros": (9, 0), "few": (9, 4)}[counts]

    def get_batch(batch_id: str) -> Batch:
        total, completed = (9, 9) if world.clock.time() > began + 60 else late
        said = RequestCounts(total=total, completed=completed)
        return first.model_copy(
            update={"status": "cancelled", "in_progress_at": began, "request_counts": said}
        )

    mocker.patch.object(world.api, "get_batch", side_effect=get_batch)
    assert world.submit(work).id == first.id
    assert world.ours(work, set()) == [first.id]


@pytest.mark.parametrize("sent", [True, False])
def test_a_copy_of_our_mark_and_of_our_file_is_not_adopted_by_a_ledger_that_knows_our_files(
    tmp_path: Path, sent: bool
) -> None:
    """The content cannot be read, so the copy differs in nothing but what the ledger knows."""
    world = World(tmp_path, [], Oddities(readable=False), [], 0.0)
    work, ledger = make_upload_work(world.api), FaultyLedger(iter(()))
    assert work.upload is not None
    file = world.submission(ledger, "none").upload(work.upload)
    content = CONTENT.replace(b"hi", b"ho")
    theirs = world.service.add_file(work.upload.filename, "batch", [content])["data"]["id"]
    copy = world.service.create_batch(work.request(theirs))["id"]
    world.clock.sleep(5)
    if sent:
        ours = world.service.create_batch(work.request(file.id))["id"]
    ledger.record(work.key, Sending(1, world.clock.time()))
    batch = world.submit(work, ledger)
    assert batch.id != copy
    assert not sent or batch.id == ours
    assert world.ours(work, {copy}) == [batch.id]


def test_a_batch_that_is_cancelled_while_it_is_searched_for_is_not_replaced_in_the_same_try(
    tmp_path: Path,
) -> None:
    world = World(tmp_path, ["lost-after"], Oddities(), [], 10.0)
    work, sleep = make_work(world.service), world.clock.sleep

    def sleep_and_cancel(seconds: float) -> None:
        sleep(seconds)
        for batch in batches_of(world.service, work):
            if batch["status"] != "cancelled":
                world.service.force_status(batch["id"], "cancelled")

    world.clock.sleep = sleep_and_cancel  # type: ignore[method-assign]
    batch = world.submit(work, FaultyLedger(iter(())), "none")
    assert len(world.ours(work, set())) == 1
    assert batch.status == "cancelled"


def test_a_job_that_uploads_keeps_others_from_its_folder(emulator: Emulator, tmp_path: Path) -> None:
    """An upload may take long, and nothing that is recorded so far may run."""
    first, second = OddJob(emulator, tmp_path, rows(4)), OddJob(emulator, tmp_path, rows(3))
    second.run_id = "other"
    refused: list[str] = []

    def begin_second(call: str) -> None:
        if call == "POST /files" and not refused:
            refused.append("")
            with pytest.raises(InvalidInputError, match="is starting there") as caught:
                second.next_try().start(lambda: second.requests, "requests", timeout=None)
            assert caught.value.retryable

    first.after = begin_second
    assert first.attempt()["rows"]["ok"] == 4
    assert refused
    assert len(batches(emulator)) == 1
    assert second.attempt()["rows"]["ok"] == 3


@pytest.mark.emulator(speed=1.0, queue_seconds=0.0, rows_per_second=100.0)
def test_an_older_try_plans_no_rest_over_that_of_the_newer(emulator: Emulator, tmp_path: Path) -> None:
    """It read the results of the batch that died earlier, and they were fewer."""
    job = OddJob(emulator, tmp_path, rows(20), max_rows_per_batch=20)

    def die(call: str) -> None:
        if call == "POST /batches":
            emulator.service.advance(0.12)
            emulator.service.force_status(batches(emulator)[-1]["id"], "cancelled")
            raise KeyboardInterrupt

    job.after = die
    with pytest.raises(KeyboardInterrupt):
        job.attempt()
    job.after = lambda _: None
    emulator.service.advance(300.0)
    emulator.service.configure({"speed": 1000.0})
    older = job.next_try()
    newer: list[Any] = []
    reads = 0

    def is_older() -> bool:
        return len(newer) != 1

    def fewer(batch: Batch) -> Batch:
        if not is_older() or batch.status != "cancelled":
            return batch
        counts = batch.request_counts
        return changed(batch, request_counts=counts.model_copy(update={"completed": counts.completed - 3}))

    def downloaded(reference: str, content: bytes) -> bytes:
        nonlocal reads
        if not is_older():
            return content
        reads += 1
        if reads == 1 + len(LATE_FILE_PATIENCE):
            newer.append(job.next_try())
            newer.append(newer[0].start(lambda: job.requests, "requests", timeout=None))
        return b"".join(content.splitlines(keepends=True)[:-3])

    job.read, job.downloaded = fewer, downloaded
    with pytest.raises(JobTakenOverError):
        older.start(lambda: job.requests, "requests", timeout=None)
    del newer[0]
    run = job.process()
    assert job.carry_out(run, run.resume(job.wait(newer[0])))["rows"]["ok"] == 20
    assert set(billed(emulator).values()) == {1}


@pytest.mark.emulator(speed=0.001)
@pytest.mark.usefixtures("siliconflow_connection")
def test_a_kill_cancels_no_foreign_batch_that_a_ledger_names(
    make_context: Callable[..., dict[str, Any]],
    make_batch: Callable[..., str],
    set_state: Callable[[str | None], Any],
    emulator: Emulator,
    tmp_path: Path,
) -> None:
    foreign = make_batch("of somebody else")
    arguments: dict[str, Any] = {"requests": ["a"], "output_dir": str(tmp_path / "out"), "model": MODELS[0]}
    task = RunBatchOperator(task_id="t", deferrable=True, **arguments)
    with pytest.raises(TaskDeferred):
        task.execute(make_context(task))
    (path,) = (tmp_path / "out").glob(".siliconflow/*/ledger.json")
    ledger = json.loads(path.read_text())
    for entry in ledger["work"].values():
        entry["batch_id"] = foreign
    path.write_text(json.dumps(ledger))
    set_state("failed")
    resumed = RunBatchOperator(task_id="t", deferrable=True, **arguments)
    with pytest.raises(TaskDeferred):
        resumed.execute_complete(make_context(resumed), {"status": "ended", "batches": []})
    resumed.on_kill()
    statuses = {batch["id"]: batch["status"] for batch in batches(emulator)}
    assert statuses[foreign] != "cancelling"
