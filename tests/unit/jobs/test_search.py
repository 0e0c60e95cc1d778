"""Searching the account: what a look shows, how often it is taken, and when nothing found proves nothing."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import pytest

from airflow_provider_siliconflow.api.exceptions import (
    NotFoundError,
    ServiceUnavailableError,
    SiliconFlowError,
    SubmissionUnknownError,
)
from airflow_provider_siliconflow.api.models import Batch, UploadedFile
from airflow_provider_siliconflow.jobs.identity import WORK_KEY, BatchWork, Submitter, Upload
from airflow_provider_siliconflow.jobs.search import CANCEL_PATIENCE, LIST_LAG, AccountSearch, is_replaceable
from airflow_provider_siliconflow.jobs.states import Ended, Planned, Sending, Sent, State, Uploaded
from tests.unit.jobs.faulty import FakeClock, FakeListing, FaultyLedger, work_over

NOW = 1_800_000_000.0
CONTENT = b"rows\n"
SUBMITTER = Submitter("dag", "run", "task", -1, 0)
WORK = work_over("file-1", SUBMITTER)
UPLOAD = Upload(
    "upload", "rows-upload.jsonl", len(CONTENT), sha256(CONTENT).hexdigest(), lambda: pytest.fail("not sent")
)


def batch(batch_id: str, status: str = "in_progress", **fields: Any) -> Batch:
    return Batch(**{"id": batch_id, "status": status, "created_at": NOW} | fields)


def ours(batch_id: str, status: str = "in_progress", **fields: Any) -> Batch:
    return batch(batch_id, status, **{"input_file_id": "file-1", "metadata": {WORK_KEY: WORK.key}} | fields)


class Account:
    """What the account lists, and what it answers to an id."""

    def __init__(self, clock: FakeClock, *batches: Batch) -> None:
        self.clock = clock
        self.listed = list(batches)
        self.by_id: dict[str, list[Any]] = {}
        self.files = [UploadedFile(id="file-1", filename="x", bytes=5, created_at=NOW)]
        self.files_error: SiliconFlowError | None = None
        self.reads: list[str] = []
        self.looks: list[float] = []
        self.listing: dict[str, Any] = {}

    def list_batches(self) -> FakeListing:
        self.looks.append(self.clock.monotonic())
        return FakeListing(self.listed, **self.listing)

    def list_files(self) -> list[UploadedFile]:
        if self.files_error:
            raise self.files_error
        return self.files

    def iter_file(self, reference: str, refresh: Any) -> Iterator[bytes]:
        raise NotFoundError("no such call", status_code=404)

    def get_batch(self, batch_id: str) -> Batch:
        self.reads.append(batch_id)
        answers = self.by_id.get(batch_id)
        if answers:
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
        else:
            answer = next(
                (each for each in self.listed if each.id == batch_id), NotFoundError("no", status_code=404)
            )
        if isinstance(answer, SiliconFlowError):
            raise answer
        assert isinstance(answer, Batch)
        return answer


class World:
    def __init__(self, *batches: Batch) -> None:
        self.clock = FakeClock()
        self.account = Account(self.clock, *batches)
        self.ledger = FaultyLedger(iter(()))
        self.search = AccountSearch(self.account, self.ledger, NOW, self.clock)

    def look(self, work: BatchWork = WORK, *, within: float = 0.0, **options: Any) -> Any:
        """The last look."""
        *_, found = self.search.searches(work, self.clock.monotonic() + within, **options)
        return found

    def is_conclusive(self, work: BatchWork = WORK) -> bool:
        found = self.look(work)
        try:
            self.search.check_conclusive(work, found)
        except SubmissionUnknownError as exc:
            # What to look for on the console.
            return not (exc.retryable and work.key in str(exc))
        return True


# Reading one --------------------------------------------------------------------------------------------------


def test_a_batch_that_is_unknown_or_another_is_no_answer() -> None:
    world = World()
    assert world.search.read("batch_1") is None
    world.account.by_id["batch_1"] = [ours("batch_2")]
    assert world.search.read("batch_1") is None
    world.account.by_id["batch_1"] = [ServiceUnavailableError("busy", status_code=500)]
    with pytest.raises(ServiceUnavailableError):
        world.search.read("batch_1")


def test_a_batch_that_is_being_cancelled_is_watched_as_long_as_that_may_take() -> None:
    world = World()
    going = ours("batch_1", "cancelling")
    world.account.by_id["batch_1"] = [going, going, ours("batch_1", "cancelled")]
    began = world.clock.now
    found = world.search.read("batch_1")
    assert found is not None
    assert (found.status, world.clock.now - began) == ("cancelled", 20.0)
    world.account.by_id["batch_1"] = [going]
    found = world.search.read("batch_1")
    assert found is not None
    assert (found.status, world.clock.now - began) == ("cancelling", 20.0 + CANCEL_PATIENCE)
    world.search.read("batch_1", watch=False)
    assert world.clock.now - began == 20.0 + CANCEL_PATIENCE


@pytest.mark.parametrize(
    ("found", "replaceable"),
    [
        (batch("a", "failed"), True),
        (batch("a", "cancelled"), True),
        (batch("a", "cancelled", request_counts={"total": 3, "completed": 2}), True),
        (batch("a", "cancelled", request_counts={"total": 3, "completed": 3}), False),
        (batch("a", "failed", request_counts={"total": 3, "completed": 3}), True),
        (batch("a", "completed"), False),
        (batch("a", "expired"), False),
        (batch("a", "cancelling"), False),
    ],
)
def test_only_a_dead_batch_with_rows_left_is_replaced(found: Batch, replaceable: bool) -> None:
    assert is_replaceable(found) == replaceable


# Looking ------------------------------------------------------------------------------------------------------


def test_looks_are_taken_with_growing_pauses_until_the_list_can_be_trusted() -> None:
    world = World()
    began = world.clock.monotonic()
    world.look(within=LIST_LAG)
    assert [round(at - began) for at in world.account.looks] == [0, 2, 5, 10, 20, 35, 60]
    world = World()
    world.look()
    assert len(world.account.looks) == 1


def test_a_look_tells_live_dead_and_foreign_batches_apart() -> None:
    world = World(
        ours("late", created_at=NOW),
        ours("early", created_at=NOW - 10),
        ours("dead", "failed"),
        ours("retired", "failed"),
        ours("foreign", input_file_id="file-2"),
        ours("untold", input_file_id=None),
        batch("plain", input_file_id="file-2"),
    )
    world.ledger.dead[WORK.key] = (Ended("retired", 1, "failed"),)
    found = world.look()
    assert [each.id for each in found.live] == ["early", "late"]
    assert [each.id for each in found.dead] == ["dead"]
    assert found.doubtful == ("untold",)
    assert not {"retired", "plain"} & {*world.account.reads}


def test_a_batch_that_is_listed_exists_whatever_its_id_answers_and_its_id_knows_its_status() -> None:
    world = World(ours("a"), ours("b"))
    world.account.by_id = {
        "a": [NotFoundError("no", status_code=404)],
        "b": [ours("b", "failed")],
    }
    found = world.look()
    assert ([each.id for each in found.live], [each.id for each in found.dead]) == (["a"], ["b"])


def test_batches_without_a_mark_are_read_by_their_ids_once() -> None:
    world = World(
        batch("over-ours", input_file_id="file-1"),
        batch("without-file"),
        batch("over-another", input_file_id="file-2"),
    )
    world.account.by_id = {
        "over-ours": [ours("over-ours")],
        "without-file": [batch("without-file", input_file_id="file-2")],
    }
    found = world.look(within=3.0)
    assert [each.id for each in found.live] == ["over-ours"]
    assert world.account.reads.count("without-file") == 1
    assert "over-another" not in world.account.reads
    assert found.doubtful == ()


def test_what_the_ledger_names_is_not_looked_up_as_unmarked() -> None:
    world = World(batch("known"), batch("unknown"))
    world.ledger.states["other"] = Sent("known", 1)
    assert world.look().doubtful == ("unknown",)
    assert world.account.reads == ["unknown"]


def test_no_more_than_a_limit_of_unmarked_batches_is_read_and_the_others_stay_doubtful() -> None:
    over_file = [batch(f"over-{n}", input_file_id="file-1") for n in range(202)]
    without = [batch(f"without-{n}") for n in range(53)]
    world = World(*without, *over_file)
    world.account.by_id = {
        each.id: [batch(each.id, input_file_id="file-2")] for each in [*over_file, *without]
    }
    found = world.look()
    assert len(world.account.reads) == 200 + 50
    assert set(found.doubtful) == {"over-200", "over-201", "without-50", "without-51", "without-52"}


# When nothing was found ---------------------------------------------------------------------------------------


def test_an_account_that_shows_everything_and_nothing_of_ours_is_conclusive() -> None:
    assert World().is_conclusive()
    assert World(batch("foreign", input_file_id="file-2", metadata={WORK_KEY: "other"})).is_conclusive()


def test_what_may_be_ours_is_not_conclusive() -> None:
    assert not World(batch("a")).is_conclusive()
    # A service that keeps the metadata of others has none of ours without it.
    marked = batch("b", input_file_id="file-2", metadata={WORK_KEY: "other"})
    assert World(batch("a"), marked).is_conclusive()


def test_entries_that_cannot_be_read_are_not_conclusive() -> None:
    world = World()
    world.account.listing = {"unreadable": 1}
    assert not world.is_conclusive()


def test_a_list_that_is_cut_is_conclusive_only_below_what_is_older_than_the_work() -> None:
    other: dict[str, Any] = {"input_file_id": "file-2", "metadata": {WORK_KEY: "other"}}
    world = World(batch("newer", **other), batch("older", created_at=NOW - 1, **other))
    world.account.listing = {"cut": True}
    assert not world.is_conclusive()
    for number, conclusive in ((1, False), (2, True)):
        states: dict[str, State] = {WORK.key: Sending(number, NOW), "other": Sent("older", 1)}
        world.ledger.states = states
        assert world.is_conclusive() == conclusive
    world.ledger.states[WORK.key] = Planned()
    assert not world.is_conclusive()


# Files --------------------------------------------------------------------------------------------------------


def upload_work() -> BatchWork:
    return BatchWork(
        key=WORK.key,
        label=WORK.label,
        input_file_id=None,
        endpoint=WORK.endpoint,
        completion_window=WORK.completion_window,
        metadata={},
        replace=None,
        upload=UPLOAD,
        submitter=SUBMITTER,
    )


def test_files_of_a_work_are_those_of_its_name_and_size_and_those_that_are_recorded() -> None:
    world = World()
    world.account.files = [
        UploadedFile(id="named", filename=UPLOAD.filename, bytes=5),
        UploadedFile(id="unsized", filename=UPLOAD.filename),
        UploadedFile(id="larger", filename=UPLOAD.filename, bytes=6),
        UploadedFile(id="renamed", filename="other.jsonl", bytes=5),
    ]
    world.ledger.uploads["upload"] = Uploaded("recorded", ("renamed", "earlier"))
    world.ledger.complete = False
    assert world.search.our_files(upload_work()) == {"named", "unsized", "recorded", "earlier"}
    assert world.search.our_files(WORK) == {"file-1"}
    # A file is recorded before a batch over it is sent, so a complete ledger knows of copies of its name.
    world.ledger.complete = True
    assert world.search.our_files(upload_work()) == {"recorded", "earlier"}


def test_the_search_goes_back_no_further_than_the_oldest_file_of_the_work() -> None:
    """What the list must show depends on it: a list that is cut a day before that shows all."""
    day = 86400.0
    for created_at, conclusive in ((NOW, True), (NOW - 10, False), (None, False)):
        world = World(
            batch("old", created_at=NOW - day - 1, input_file_id="file-2", metadata={WORK_KEY: "o"})
        )
        world.account.listed.insert(0, batch("new", input_file_id="file-2", metadata={WORK_KEY: "o"}))
        world.account.listing = {"cut": True}
        world.account.files = [UploadedFile(id="file-1", filename="x", bytes=5, created_at=created_at)]
        assert world.is_conclusive() == conclusive, created_at
    world.account.files_error = ServiceUnavailableError("busy", status_code=500)
    world.search = AccountSearch(world.account, world.ledger, NOW, world.clock)
    assert not world.is_conclusive()
    # Without a file of ours no batch can be older than the first try.
    world.account.files_error = None
    world.account.files = []
    world.search = AccountSearch(world.account, world.ledger, NOW, world.clock)
    assert world.is_conclusive(upload_work())
