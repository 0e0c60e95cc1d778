"""The ledgers: what survives, what is believed, and who may write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from airflow_provider_siliconflow.api.exceptions import JobTakenOverError
from airflow_provider_siliconflow.jobs.identity import Submitter
from airflow_provider_siliconflow.jobs.ledger import FolderLedger, NoLedger, Owner
from airflow_provider_siliconflow.jobs.states import (
    IN_DOUBT,
    Ended,
    ImpossibleTransitionError,
    Planned,
    Refused,
    Sending,
    Sent,
    Uploaded,
    Uploading,
)

KEY, OTHER = "a" * 32, "b" * 32
SUBMITTER = Submitter("dag", "run", "task", -1, 3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "job" / "ledger.json"


def new(path: Path, *, complete: bool = True) -> FolderLedger:
    ledger = FolderLedger(path, complete=complete, is_new=True)
    ledger.deadline = None
    return ledger


def again(path: Path) -> FolderLedger:
    return FolderLedger(path, complete=True)


def test_an_intent_survives_a_crash_and_takes_with_it_what_was_not_written(path: Path) -> None:
    ledger = new(path)
    ledger.record(KEY, Sending(1, 5.0))
    assert again(path).state(KEY) == Sending(1, 5.0)
    ledger.record(KEY, Sent("batch_a", 2))
    assert again(path).state(KEY) == Sending(1, 5.0), "one write serves each batch"
    ledger.record(OTHER, Sending(3, 6.0))
    assert again(path).state(KEY) == Sent("batch_a", 2)
    ledger.record_upload("u", Uploading(7.0))
    assert again(path).upload("u") == Uploading(7.0)
    ledger.record_upload("u", Uploaded("file-a", ("file-0",)))
    ledger.flush()
    assert again(path).upload("u") == Uploaded("file-a", ("file-0",))


def test_an_intent_that_is_taken_back_is_taken_back_at_once(path: Path) -> None:
    ledger = new(path)
    ledger.record(KEY, Sending(1, 5.0))
    ledger.record(KEY, Planned())
    assert again(path).state(KEY) == Planned()


def test_what_died_is_kept_beside_what_replaces_it(path: Path) -> None:
    ledger = new(path)
    ended = Ended("batch_a", 2, "cancelled", {"total": 5, "completed": 2})
    for state in (Sending(1, 1.0), Sent("batch_a", 2), ended):
        ledger.record(KEY, state)
    ledger.retire(KEY)
    found = again(path)
    assert (found.state(KEY), found.retired(KEY)) == (Planned(), (ended,))
    assert found.recorded_batches() == {"batch_a": 2}
    assert found.next_number() == 3, "a dead batch is older than what comes after it"


def test_what_cannot_follow_is_refused_and_nothing_of_it_is_kept(path: Path) -> None:
    for ledger in (new(path), NoLedger()):
        with pytest.raises(ImpossibleTransitionError):
            ledger.record(KEY, Ended("batch_a", 1, "completed"))
        ledger.record(KEY, Sending(1, 1.0))
        ledger.record(KEY, Sent("batch_a", 1))
        ledger.record(OTHER, Sending(2, 1.0))
        ledger.record(OTHER, Planned())
        with pytest.raises(ImpossibleTransitionError):
            ledger.retire(KEY)
        assert (ledger.state(KEY), ledger.retired(KEY)) == (Sent("batch_a", 1), ())
    folder = again(path)
    with pytest.raises(ImpossibleTransitionError):
        folder.record_all({OTHER: Refused(400, "no"), KEY: Planned()})
    assert folder.state(OTHER) == Planned(), "all or nothing"


def test_several_states_are_one_write(path: Path, mocker: Any) -> None:
    ledger = new(path)
    write = mocker.spy(ledger, "_write")
    ledger.record_all({KEY: Refused(400, "no"), OTHER: Refused(400, "no")})
    assert write.call_count == 1
    assert again(path).state(OTHER) == Refused(400, "no")


def test_a_deadline_outlives_the_process(path: Path) -> None:
    ledger = new(path)
    ledger.deadline = 123.5
    assert again(path).deadline == 123.5


# What is believed -------------------------------------------------------------------------------------------


def test_a_new_job_misses_nothing_and_an_old_one_without_its_file_everything(path: Path) -> None:
    assert again(path).damaged
    assert new(path).complete
    assert new(path, complete=False).damaged is False
    path.unlink()
    lost = again(path)
    lost.record(KEY, Sending(1, 1.0))
    assert not again(path).complete, "what was lost once is lost for every later try"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"work": []}', "[" * 10**5, '{"work": {"../x": 1}}']
)
def test_a_damaged_ledger_is_not_complete(path: Path, content: str) -> None:
    new(path)
    path.write_text(content)
    assert (again(path).complete, again(path).damaged) == (False, True)
    # Not even for a job that begins: its plan is gone, and not what it sent.
    assert not FolderLedger(path, complete=True, is_new=True).complete


def test_a_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    new(path).record(KEY, Sending(1, 1.0))
    other = tmp_path / "other.json"
    path.rename(other)
    path.symlink_to(other)
    ledger = again(path)
    assert (ledger.state(KEY), ledger.complete) == (Planned(), False)
    ledger.record(OTHER, Sending(1, 1.0))
    assert OTHER not in other.read_text()


def test_a_ledger_that_is_too_large_is_not_read(path: Path, mocker: Any) -> None:
    new(path).record(KEY, Sending(1, 1.0))
    mocker.patch("airflow_provider_siliconflow.jobs.ledger._MAX_LEDGER_BYTES", 50)
    assert not again(path).complete


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    part=st.sampled_from(["work", "uploads", "retired", "deadline", "owner", "complete"]),
    odd=JSON.filter(lambda value: not isinstance(value, dict)),
    entry=JSON,
)
def test_whatever_lies_in_the_file_no_batch_is_forgotten(path: Path, part: str, odd: Any, entry: Any) -> None:
    """What was recorded is read as it was, or as being in doubt, or the whole as damaged."""
    path.unlink(missing_ok=True)
    ledger = new(path)
    ledger.record(KEY, Sending(1, 1.0))
    stored = json.loads(path.read_text())
    stored["work"][OTHER] = entry
    for damage in ({}, {part: odd}):
        path.write_text(json.dumps({**stored, **damage}))
        found = again(path)
        for key in (KEY, OTHER):
            assert found.damaged or found.state(key) != Planned()
        if not damage and (not isinstance(entry, dict) or "state" not in entry):
            assert found.state(OTHER) == IN_DOUBT
        # And it can be written again.
        found.deadline = 1.0
        assert again(path).deadline == 1.0


# Whose job it is --------------------------------------------------------------------------------------------


def owner(number: int) -> Owner:
    return Owner.new(SUBMITTER, try_number=number, try_id=f"id-{number}")


def test_every_write_of_an_older_try_stops(path: Path) -> None:
    older = new(path)
    older.claim(owner(1))
    older.record(KEY, Sending(1, 1.0))
    newer = again(path)
    newer.claim(owner(2))
    assert newer.state(KEY) == Sending(1, 1.0), "read after the claim"
    before = path.read_bytes()
    writes: list[Any] = [
        lambda: older.record(OTHER, Sending(2, 2.0)),
        lambda: older.record(KEY, Sending(1, 1.0)),
        lambda: older.record_upload("u", Uploading(1.0)),
        lambda: older.record_all({OTHER: Refused(400, "no")}),
        lambda: setattr(older, "deadline", 1.0),
        older.remove_folder,
        older.check_owner,
    ]
    for write in writes:
        with pytest.raises(JobTakenOverError, match="try 2 of task"):
            write()
    assert path.read_bytes() == before


def test_a_resumption_goes_on_under_its_tries_token(path: Path) -> None:
    first = owner(1)
    new(path).claim(first)
    resumed = again(path)
    found = resumed.owner()
    assert found == first
    resumed.continue_as(first.token)
    resumed.record(KEY, Sending(1, 1.0))
    assert resumed.complete
    again(path).claim(owner(2))
    with pytest.raises(JobTakenOverError):
        again(path).continue_as(first.token)


def test_a_resumption_does_not_believe_what_an_older_try_wrote_over(path: Path) -> None:
    older = new(path)
    older.claim(owner(1))
    older.flush()
    stale = path.read_bytes()
    newer = owner(2)
    again(path).claim(newer)
    path.write_bytes(stale)
    resumed = again(path)
    resumed.continue_as(newer.token)
    assert (resumed.complete, resumed.damaged) == (False, True)


@pytest.mark.parametrize("content", [None, "", "[]", '{"token": 1}', '{"token": "' + "x" * 2000 + '"}'])
def test_an_owner_that_cannot_be_read_is_another(path: Path, content: str | None) -> None:
    ledger = new(path)
    ledger.claim(owner(1))
    file = path.parent / "owner.json"
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises(JobTakenOverError, match=r"owner\.json is gone"):
        ledger.record(KEY, Sending(1, 1.0))


def test_a_folder_stays_while_something_of_it_may_run(path: Path) -> None:
    ledger = new(path)
    ledger.claim(owner(1))
    ledger.record(KEY, Sending(1, 1.0))
    ledger.record(OTHER, Refused(400, "no"))
    assert ledger.open_batches == (KEY,)
    assert not ledger.remove_folder()
    ledger.record(KEY, Sent("batch_a", 2))
    assert ledger.open_batches == ("batch_a",)
    assert not ledger.remove_folder()
    assert path.exists()
    ledger.record(KEY, Ended("batch_a", 2, "completed"))
    assert ledger.remove_folder()
    assert not path.parent.exists()
