"""Whatever the service answers, lists and tells of the time: one batch per work, and nothing foreign is touched."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pytest_mock import MockerFixture

from airflow_provider_siliconflow.api.exceptions import (
    InvalidInputError,
    InvalidRequestError,
    NotFoundError,
    RateLimitedError,
    SiliconFlowError,
    SubmissionUnknownError,
    UnexpectedAnswerError,
)
from airflow_provider_siliconflow.api.models import Batch, RequestCounts
from airflow_provider_siliconflow.jobs.identity import WORK_KEY, BatchWork, Submitter
from airflow_provider_siliconflow.jobs.ledger import NoLedger
from airflow_provider_siliconflow.jobs.states import Ended, Planned, Sending, Sent, Uploaded
from airflow_provider_siliconflow.jobs.submission import Search, Submission
from tests.unit.jobs.faulty import (
    CONTENT,
    FAULTS,
    Crash,
    FakeClock,
    FakeListing,
    FaultyAPI,
    FaultyLedger,
    Oddities,
    batches_of,
    make_service,
    make_upload_work,
    make_work,
)

ODDITIES = st.builds(
    Oddities,
    order=st.sampled_from(["newest", "oldest", "any"]),
    without=st.sets(st.sampled_from(["metadata", "input_file_id", "file_name", "created_at"])).map(frozenset),
    never_told=st.sets(st.sampled_from(["metadata", "input_file_id"]), max_size=1).map(frozenset),
    clock_off=st.sampled_from([0.0, -7200.0, 7200.0, -3 * 86400.0, 3 * 86400.0]),
    readable=st.booleans(),
)


class World:
    """An account that others use too."""

    def __init__(
        self, folder: Any, script: list[str], oddities: Oddities, jumps: list[float], lag: float
    ) -> None:
        self.clock = FakeClock(jumps)
        self.service = make_service(folder, self.clock, list_lag_seconds=lag)
        self.faults = iter(script)
        self.api = FaultyAPI(self.service, self.faults, self.clock, oddities)
        self.start = self.clock.time()

    def copy_mark(self, work: BatchWork) -> str:
        """Let a neighbour create a batch over a file of theirs that carries the mark of ours; return its id."""
        answer = self.service.add_file("theirs.jsonl", "batch", [b"{}\n"])
        request = {**replace(work, completion_window="48h").request(answer["data"]["id"])}
        return str(self.service.create_batch(request)["id"])

    def submission(self, ledger: Any, search: Search) -> Submission:
        return Submission(self.api, ledger=ledger, earlier_tries=search, since=self.start, clock=self.clock)

    def submit(
        self, work: BatchWork, ledger: Any = None, search: Search = "patiently", **options: Any
    ) -> Batch:
        return self.submission(NoLedger() if ledger is None else ledger, search).submit(work, **options)

    def ours(self, work: BatchWork, foreign: set[str]) -> list[str]:
        return [batch["id"] for batch in batches_of(self.service, work) if batch["id"] not in foreign]


@pytest.fixture
def world(tmp_path: Any) -> World:
    return World(tmp_path, [], Oddities(), [], 0.0)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    script=st.lists(st.sampled_from(FAULTS), max_size=20),
    oddities=ODDITIES,
    jumps=st.lists(st.sampled_from([0.0, -86400.0, 7200.0, 1e6]), max_size=8),
    lag=st.sampled_from([0.0, 5.0, 40.0]),
    recorded=st.booleans(),
    uploads=st.booleans(),
    copied=st.booleans(),
    retry_delay=st.sampled_from([0.0, 300.0]),
)
def test_one_batch_and_nothing_foreign(
    tmp_path_factory: pytest.TempPathFactory,
    script: list[str],
    oddities: Oddities,
    jumps: list[float],
    lag: float,
    recorded: bool,
    uploads: bool,
    copied: bool,
    retry_delay: float,
) -> None:
    world = World(tmp_path_factory.mktemp("world"), script, oddities, jumps, lag)
    work = make_upload_work(world.api) if uploads else make_work(world.service)
    foreign = {world.copy_mark(work)} if copied else set()
    ledger: Any = FaultyLedger(world.faults) if recorded else NoLedger()
    last: Any = None
    for attempt in range(1, len(script) + 4):
        try:
            batch = world.submit(work, ledger, "none" if attempt == 1 else "patiently")
            break
        except (Crash, SiliconFlowError) as exc:
            last = exc
        assert isinstance(last, Crash) or last.retryable, last
        assert len(world.ours(work, foreign)) <= 1
        world.clock.sleep(retry_delay)
    else:
        # A service that tells too little of what exists leaves a try nothing but to say so, each time.
        assert isinstance(last, SubmissionUnknownError)
        assert oddities.never_told
        return
    assert world.ours(work, foreign) == [batch.id]
    assert all(world.service.get_batch(each)["status"] != "cancelling" for each in foreign)


# Answers to POST /batches ----------------------------------------------------------------------------------


def test_an_accepted_request_is_never_sent_again(world: World) -> None:
    work, ledger = make_work(world.service), FaultyLedger(iter(()))
    world.service.configure({"list_lag_seconds": 86400.0})
    world.faults = world.api.script = iter(["odd-after"])
    with pytest.raises(SubmissionUnknownError, match="success status") as caught:
        world.submit(work, ledger, "none")
    assert caught.value.retryable
    assert f"{WORK_KEY}={work.key}" in str(caught.value)
    for _ in range(3):
        world.clock.sleep(300.0)
        with pytest.raises(SubmissionUnknownError, match="only searches"):
            world.submit(work, ledger)
    assert world.api.calls.count("create") == 1
    world.clock.sleep(86400.0)
    assert [world.submit(work, ledger).id] == world.ours(work, set())
    assert world.api.calls.count("create") == 1


def test_a_success_without_a_batch_ends_in_what_to_do(world: World, mocker: MockerFixture) -> None:
    work, ledger = make_work(world.service), FaultyLedger(iter(()))
    post = mocker.patch.object(
        world.api, "create_batch", side_effect=UnexpectedAnswerError("{}", accepted=True)
    )
    for _ in range(3):
        with pytest.raises(SubmissionUnknownError, match="manual clear"):
            world.submit(work, ledger)
    assert post.call_count == 1


@pytest.mark.parametrize("named", ["right", "wrong", "another's"])
def test_an_answer_that_says_little_is_looked_up(world: World, mocker: MockerFixture, named: str) -> None:
    work = make_work(world.service)
    stranger = make_work(world.service, "other")
    ids = {"wrong": "req_12345", "another's": world.submit(stranger).id}
    create = world.api.create_batch

    def answer(**request: Any) -> Batch:
        return Batch(id=ids.get(named, create(**request).id), status="unknown")

    mocker.patch.object(world.api, "create_batch", side_effect=answer)
    if named == "another's":
        # The id is read before the batch exists, so the answer's own is of no use.
        create(**work.request(work.input_file_id or ""))
    batch = world.submit(work, NoLedger(), "none")
    assert batch.id in world.ours(work, set())
    assert batch.input_file_id == work.input_file_id


def test_a_full_account_is_not_sat_out_for_a_caller_that_can_wait_better(
    world: World, mocker: MockerFixture
) -> None:
    work, ledger = make_work(world.service), FaultyLedger(iter(()))
    mocker.patch.object(world.api, "create_batch", side_effect=RateLimitedError("full", status_code=429))
    began = world.clock.monotonic()
    with pytest.raises(RateLimitedError):
        world.submit(work, ledger, rate_limit_patience=20.0)
    assert world.clock.monotonic() - began <= 20.0
    assert ledger.state(work.key) == Planned()
    with pytest.raises(RateLimitedError):
        world.submit(work, ledger)
    assert world.clock.monotonic() - began > 600.0


@pytest.mark.parametrize("status", [400, 404])
@pytest.mark.parametrize("message", ["File {} does not exist.", "The input file was not found", "bad {}"])
def test_a_file_that_is_gone_is_uploaded_again_once(world: World, status: int, message: str) -> None:
    work, ledger = make_upload_work(world.api), FaultyLedger(iter(()))
    assert work.upload is not None
    first = world.submission(ledger, "none").upload(work.upload)
    create = world.api.create_batch

    def refuse(**request: Any) -> Batch:
        if request["input_file_id"] == first.id:
            error = NotFoundError if status == 404 else InvalidRequestError
            raise error(message.format(first.id), status_code=status)
        return create(**request)

    world.api.create_batch = refuse  # type: ignore[method-assign]
    batch = world.submit(work, ledger)
    assert batch.input_file_id is not None
    assert batch.input_file_id != first.id
    assert world.api.calls.count("upload") == 2
    assert ledger.upload(work.upload.key) == Uploaded(batch.input_file_id, (first.id,))


def test_a_refusal_that_names_no_file_uploads_nothing(world: World, mocker: MockerFixture) -> None:
    work = make_upload_work(world.api)
    refusal = NotFoundError("404 page not found", status_code=404)
    mocker.patch.object(world.api, "create_batch", side_effect=refusal)
    with pytest.raises(NotFoundError):
        world.submit(work)
    assert world.api.calls.count("upload") == 1


# The list ---------------------------------------------------------------------------------------------------


def left_by_a_try(world: World, work: BatchWork) -> str:
    """Let a try create the batch and die before it recorded that; return its id."""
    world.faults = world.api.script = iter(["crash-after"])
    with pytest.raises(Crash):
        world.submit(work, NoLedger(), "none")
    world.faults = world.api.script = iter(())
    (batch,) = world.ours(work, set())
    return batch


@pytest.mark.parametrize(
    "oddities",
    [
        pytest.param(Oddities(without=frozenset({"metadata"})), id="no-metadata"),
        pytest.param(
            Oddities(without=frozenset({"metadata", "input_file_id", "file_name", "created_at"})),
            id="little-more-than-ids",
        ),
        pytest.param(Oddities(order="oldest"), id="oldest-first"),
        pytest.param(Oddities(clock_off=-7200.0), id="clock-two-hours-slow"),
        pytest.param(Oddities(clock_off=-30 * 86400.0), id="clock-a-month-slow"),
        pytest.param(Oddities(clock_off=7200.0), id="clock-two-hours-fast"),
        pytest.param(
            Oddities(never_told=frozenset({"created_at", "endpoint", "completion_window"})), id="little-told"
        ),
    ],
)
@pytest.mark.parametrize("jump", [0.0, 7200.0, -7200.0])
def test_what_an_earlier_try_left_is_found_in_an_odd_list(
    tmp_path: Any, oddities: Oddities, jump: float
) -> None:
    world = World(tmp_path, [], Oddities(), [jump] * 20, 30.0)
    for _ in range(40):
        world.service.seed_foreign_batches(1, age_seconds=10 * 86400.0)
    work = make_work(world.service)
    batch = left_by_a_try(world, work)
    world.api.oddities = oddities
    assert world.submit(work).id == batch
    assert world.api.calls.count("create") == 1


def test_a_long_list_with_the_oldest_first_is_read_to_its_end_each_time(
    world: World, mocker: MockerFixture
) -> None:
    work = make_work(world.service)
    old = [{"id": f"batch_old{i}", "status": "completed", "created_at": i * 3600} for i in range(400)]
    batch = left_by_a_try(world, work)
    shown = world.clock.monotonic() + 30.0

    def listing() -> FakeListing:
        late = [world.service.get_batch(batch)] if world.clock.monotonic() > shown else []
        return FakeListing(Batch.model_validate(item) for item in [*old, *late])

    mocker.patch.object(world.api, "list_batches", side_effect=listing)
    assert world.submit(work).id == batch


def test_a_list_that_cannot_be_read_is_not_an_empty_one(world: World, mocker: MockerFixture) -> None:
    work = make_work(world.service)
    mocker.patch.object(world.api, "list_batches", side_effect=UnexpectedAnswerError("data is null"))
    left_by_a_try(world, work)
    with pytest.raises(SubmissionUnknownError, match="cannot be searched") as caught:
        world.submit(work)
    assert caught.value.retryable
    world.api.script = iter(["lost-after"])
    other = make_work(world.service, "other")
    with pytest.raises(SubmissionUnknownError, match="data is null"):
        world.submit(other, NoLedger(), "none")
    assert world.api.calls.count("create") == 2


def test_entries_that_are_no_batches_may_be_ours(world: World, mocker: MockerFixture) -> None:
    work = make_work(world.service)
    mocker.patch.object(world.api, "list_batches", side_effect=lambda: FakeListing((), unreadable=1))
    with pytest.raises(SubmissionUnknownError, match="1 batches that cannot be read"):
        world.submit(work)
    assert not world.ours(work, set())


def test_a_list_without_what_is_known_to_exist_is_not_complete(world: World, mocker: MockerFixture) -> None:
    """It ends early, and says that this was all."""
    ledger = FaultyLedger(iter(()))
    world.submit(make_work(world.service, "earlier"), ledger, "none")
    work = make_work(world.service)
    ledger.record(work.key, Sending(2, 1.0))
    mocker.patch.object(world.api, "list_batches", side_effect=lambda: FakeListing(()))
    with pytest.raises(SubmissionUnknownError, match="none of them is dag/create/run"):
        world.submit(work, ledger)
    assert not world.ours(work, set())


def test_a_service_that_keeps_no_metadata_pays_for_nothing_twice(world: World) -> None:
    work = make_work(world.service)
    batch = left_by_a_try(world, work)
    world.api.oddities = Oddities(never_told=frozenset({"metadata"}))
    with pytest.raises(SubmissionUnknownError, match=f"{batch} may be its batch"):
        world.submit(work)
    ledger = FaultyLedger(iter(()))
    ledger.record(work.key, Sent(batch, 1))
    assert world.submit(work, ledger).id == batch, "the record and the input file agree"


def test_a_batch_that_somebody_else_made_over_the_same_file_is_not_ours(world: World) -> None:
    """The service keeps metadata, and that batch has none."""
    work = make_work(world.service)
    world.submit(make_work(world.service, "other"))
    by_hand = world.service.create_batch({**work.request(work.input_file_id or ""), "metadata": None})
    batch = world.submit(work)
    assert batch.id != by_hand["id"]


# Proof ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", ["file", "window", "content"])
@pytest.mark.parametrize("recorded", [True, False])
def test_a_copy_of_our_mark_is_neither_adopted_nor_touched(
    world: World, caplog: pytest.LogCaptureFixture, copies: str, recorded: bool
) -> None:
    work, ledger = make_upload_work(world.api), FaultyLedger(iter(()))
    ledger.complete = False
    assert work.upload is not None
    if copies == "window":
        file = world.submission(ledger, "none").upload(work.upload).id
    else:
        name = work.upload.filename if copies == "content" else "theirs.jsonl"
        content = b"x" * work.upload.size
        file = world.service.add_file(name, "batch", [content])["data"]["id"]
    request = work.request(file) | ({"completion_window": "48h"} if copies == "window" else {})
    copy = world.service.create_batch(request)["id"]
    if recorded:
        ledger.record(work.key, Sent(copy, 1))
    batch = world.submit(work, ledger)
    assert world.ours(work, {copy}) == [batch.id]
    assert batch.id != copy
    assert any(copy in record.message and record.levelname == "ERROR" for record in caplog.records)
    submission = world.submission(ledger, "patiently")
    assert submission.is_ours(work, world.api.get_batch(copy)) is False
    assert submission.is_ours(work, batch) is True
    assert [found.id for found in submission.find([work])] == [batch.id]


def test_a_ledger_that_names_a_strangers_batch_or_file_is_not_believed(world: World) -> None:
    stranger = make_work(world.service, "other")
    theirs = world.submit(stranger)
    work, ledger = make_upload_work(world.api), FaultyLedger(iter(()))
    assert work.upload is not None
    ledger.record(work.key, Sent(theirs.id, 1))
    ledger.record_upload(work.upload.key, Uploaded(theirs.input_file_id or ""))
    assert world.submission(ledger, "patiently").recorded(work) is None
    batch = world.submit(work, ledger)
    assert batch.id != theirs.id
    assert batch.input_file_id != theirs.input_file_id
    state = ledger.upload(work.upload.key)
    assert state == Uploaded(batch.input_file_id or ""), "a stranger's file is none of the earlier ones"


def test_a_record_that_cannot_be_checked_is_neither_adopted_nor_replaced(world: World) -> None:
    work, ledger = make_work(world.service), FaultyLedger(iter(()))
    batch = left_by_a_try(world, work)
    ledger.record(work.key, Sent(batch, 1))
    world.api.oddities = Oddities(never_told=frozenset({"metadata", "input_file_id"}))
    with pytest.raises(SubmissionUnknownError, match="may belong to others"):
        world.submit(work, ledger)
    assert len(world.ours(work, set())) == 1


@pytest.mark.parametrize("readable", [True, False])
def test_a_paid_batch_is_found_though_its_file_cannot_be_compared(world: World, readable: bool) -> None:
    work = make_upload_work(world.api)
    assert work.upload is not None
    world.api.oddities = Oddities(readable=readable)
    first = world.submit(work, NoLedger(), "none")
    assert world.submit(work).id == first.id
    world.service.force_status(first.id, "failed")
    again = world.submit(work)
    assert (again.input_file_id == first.input_file_id) == readable


def test_two_files_of_our_name_are_one_too_many(world: World) -> None:
    work = make_upload_work(world.api)
    assert work.upload is not None
    known = {work.upload.send().id, work.upload.send().id}
    assert world.submit(work).input_file_id not in known


@pytest.mark.parametrize("size", [-1, 1])
def test_a_file_of_another_size_is_not_used(world: World, size: int) -> None:
    work = make_upload_work(world.api)
    assert work.upload is not None
    content = b"x" * (work.upload.size + size)
    other = world.service.add_file(work.upload.filename, "batch", [content])["data"]["id"]
    assert world.submit(work).input_file_id != other


# What is dead, dying, or changed ----------------------------------------------------------------------------


def test_a_batch_that_is_being_cancelled_without_end_is_not_replaced(tmp_path: Any) -> None:
    world = World(tmp_path, [], Oddities(), [], 0.0)
    world.service.configure({"cancelling_seconds": 7200.0, "queue_seconds": 0.0, "rows_per_second": 0.0001})
    work = make_work(world.service)
    first = world.submit(work)
    world.clock.sleep(1.0)
    world.service.cancel_batch(first.id)
    with pytest.raises(SubmissionUnknownError, match="being cancelled") as caught:
        world.submit(work)
    assert caught.value.retryable
    assert world.ours(work, set()) == [first.id]


def test_a_cancelled_batch_that_answered_every_row_costs_nothing_more(
    world: World, mocker: MockerFixture
) -> None:
    work = make_work(world.service)
    first = world.submit(work)
    counts = {"total": 1, "completed": 1, "failed": 0}
    done = first.model_copy(update={"status": "cancelled", "request_counts": RequestCounts(**counts)})
    mocker.patch.object(world.api, "get_batch", return_value=done)
    assert world.submit(work).id == first.id
    assert world.ours(work, set()) == [first.id]


@pytest.mark.parametrize("adopt_dead", [True, False])
def test_a_dead_batch_that_nobody_recorded_is_known_from_then_on(world: World, adopt_dead: bool) -> None:
    work, ledger = make_work(world.service), FaultyLedger(iter(()))
    ledger.complete = False
    first = left_by_a_try(world, work)
    world.service.force_status(first, "failed")
    batch = world.submit(work, ledger, adopt_dead=adopt_dead)
    if adopt_dead:
        ended = ledger.state(work.key)
        assert isinstance(ended, Ended)
        assert (batch.id, ended.batch_id, ended.number, ended.status) == (first, first, 0, "failed")
        ledger.retire(work.key)
        batch = world.submit(work, ledger, adopt_dead=True)
    assert batch.id != first
    assert [ended.batch_id for ended in ledger.retired(work.key)] == [first]


def changed(world: World, content: bytes, generation: int = 3) -> BatchWork:
    work = make_upload_work(world.api, content, generation=generation)
    return replace(work, only_one=True)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("fate", ["runs", "died", "cleared", "open"])
def test_an_input_that_was_changed_names_the_batch_that_is_paid(
    world: World, recorded: bool, fate: str
) -> None:
    ledger: Any = FaultyLedger(iter(())) if recorded else NoLedger()
    old = changed(world, CONTENT)
    first = world.submit(old, ledger, "none")
    if fate == "open" and recorded:
        ledger.states[old.key] = Sending(1, 1.0)
    if fate == "died":
        world.service.force_status(first.id, "cancelled")
    if fate == "cleared":
        ledger = NoLedger()
    new = changed(world, CONTENT * 2, generation=4 if fate == "cleared" else 3)
    again = ledger if recorded else NoLedger()
    if fate in ("died", "cleared"):
        assert world.submit(new, again).id != first.id
        return
    with pytest.raises(InvalidInputError, match=f"batch {first.id} .*was made from the earlier") as caught:
        world.submit(new, again)
    assert caught.value.retryable
    assert "restore the input" in str(caught.value)
    assert world.submit(old, again).id == first.id, "restored"


# Deployments ------------------------------------------------------------------------------------------------


def test_another_deployment_on_the_account_is_another_submitter(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    def work_of(deployment_id: str | None) -> BatchWork:
        work = make_work(world.service)
        submitter = Submitter("dag", "run", "create", -1, 3, deployment_id)
        return replace(work, key=submitter.key(input="same"), submitter=submitter)

    ids = {world.submit(work_of(deployment_id)).id for deployment_id in ("staging", "production", None)}
    assert len(ids) == 3
    assert "to deployment 'staging'; this one is 'production'" in caplog.text
