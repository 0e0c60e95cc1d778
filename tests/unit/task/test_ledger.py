"""The ledger over Airflow's task state store."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from airflow_provider_siliconflow.api.exceptions import JobTakenOverError
from airflow_provider_siliconflow.jobs.identity import Submitter
from airflow_provider_siliconflow.jobs.ledger import Owner
from airflow_provider_siliconflow.jobs.states import (
    IN_DOUBT,
    Ended,
    ImpossibleTransitionError,
    Planned,
    Sending,
    Sent,
    Uploaded,
    Uploading,
)
from airflow_provider_siliconflow.task.ledger import TaskStateLedger

KEY, OTHER = "a" * 32, "b" * 32


def open_ledger(store: Any, try_number: int, *, epoch: int = 0) -> TaskStateLedger:
    """The ledger of a try that begins now."""
    submitter = Submitter("dag", "run", "task", -1, epoch)
    return TaskStateLedger(store, epoch=epoch, owner=Owner.new(submitter, try_number=try_number))


def test_what_is_recorded_is_there_for_the_next_try(store: Any) -> None:
    ledger = open_ledger(store, 1)
    assert ledger.state(KEY) == Planned()
    ledger.record(KEY, Sending(1, 100.0))
    again = open_ledger(store, 2)
    assert again.state(KEY) == Sending(1, 100.0)
    again.record(KEY, Sent("batch_1", 1))
    again.record_upload("u", Uploading(at=1.0))
    again.record_upload("u", Uploaded("file-1"))
    third = open_ledger(store, 3)
    assert (third.state(KEY), third.upload("u")) == (Sent("batch_1", 1), Uploaded("file-1"))
    with pytest.raises(ImpossibleTransitionError):
        third.record(KEY, Planned())
    (kept,) = store.retentions
    assert kept > timedelta(days=30), "an entry outlives the longest batch"


@pytest.mark.parametrize(
    "damage", ["text", 7, [], {"state": "sent"}, {"state": "sent", "batch_id": 1, "number": 1}]
)
def test_an_entry_that_is_damaged_leads_to_a_search(store: Any, damage: Any) -> None:
    store.set(f"siliconflow.{KEY}", damage)
    assert open_ledger(store, 2).state(KEY) == IN_DOUBT


def test_a_store_that_was_there_in_every_try_is_complete(store: Any) -> None:
    for number in (1, 1, 2, 3):
        assert open_ledger(store, number).complete
    # A try ran without the store.
    assert not open_ledger(store, 5).complete
    assert not open_ledger(store, 6).complete, "nor will it be again"


@pytest.mark.parametrize("left", [None, "text", {"number": 1}, {"number": 1, "complete": "yes"}])
def test_a_store_that_came_later_is_not_complete(store: Any, left: Any) -> None:
    if left is not None:
        store.set("siliconflow.try", left)
    assert not open_ledger(store, 2).complete


# Two tries alive at once --------------------------------------------------------------------------------------


def test_an_older_try_stops_before_it_sends(store: Any) -> None:
    older = open_ledger(store, 1)
    newer = open_ledger(store, 2)
    with pytest.raises(JobTakenOverError, match="try 2 of task"):
        older.record(KEY, Sending(1, 100.0))
    assert newer.state(KEY) == Planned(), "the older one has left nothing"
    newer.record(KEY, Sending(1, 100.0))
    # An intent that was there is as good a reason to ask.
    with pytest.raises(JobTakenOverError):
        older.record(KEY, Sending(1, 100.0))


def test_a_try_that_begins_while_an_intent_is_written_is_seen_after_it(store: Any) -> None:
    older = open_ledger(store, 1)
    write = store.set

    def set_and_begin(key: str, value: Any, **kwargs: Any) -> None:
        write(key, value, **kwargs)
        if key == f"siliconflow.{KEY}":
            store.set = write
            open_ledger(store, 2)

    store.set = set_and_begin
    with pytest.raises(JobTakenOverError):
        older.record(KEY, Sending(1, 100.0))


@pytest.mark.parametrize("left", [None, "text", {}, {"token": 7}])
def test_a_fence_that_is_gone_or_damaged_stops_the_try(store: Any, left: Any) -> None:
    ledger = open_ledger(store, 1)
    store.entries["siliconflow.fence"] = left
    with pytest.raises(JobTakenOverError) as caught:
        ledger.record(KEY, Sending(1, 100.0))
    assert caught.value.retryable


def test_work_whose_input_changed_is_found_in_its_generation_only(store: Any) -> None:
    first = open_ledger(store, 1)
    first.record(KEY, Sending(1, 100.0))
    first.record(KEY, Sent("batch_1", 1))
    second = open_ledger(store, 2)
    assert second.earlier_work(OTHER) == (KEY, Sent("batch_1", 1))
    assert second.earlier_work(KEY) is None
    assert open_ledger(store, 3, epoch=4).earlier_work(OTHER) is None


def test_batches_that_died_are_kept_in_order_and_not_without_end(store: Any) -> None:
    ledger = open_ledger(store, 1)
    died = [Ended(f"batch_{n}", 1, "failed", at=float(n)) for n in range(1, 26)]
    for each in died:
        ledger.record(KEY, Sending(1, 100.0))
        ledger.record(KEY, Sent(each.batch_id, 1))
        ledger.record(KEY, each)
        ledger.retire(KEY)
        assert ledger.state(KEY) == Planned()
    kept = open_ledger(store, 2).retired(KEY)
    assert [each.batch_id for each in kept] == [f"batch_{n}" for n in range(6, 26)]
    assert open_ledger(store, 3).state(KEY) == Planned()
    assert open_ledger(store, 3).retired(OTHER) == ()


def test_work_that_was_not_sent_leaves_no_batch_that_died(store: Any) -> None:
    ledger = open_ledger(store, 1)
    ledger.record(KEY, Sending(1, 100.0))
    ledger.retire(KEY)
    assert (ledger.state(KEY), ledger.retired(KEY)) == (Planned(), ())
    assert f"siliconflow.{KEY}" not in store.entries, "what is planned takes no room"


def test_what_an_earlier_version_of_ours_left_is_found_under_its_name(store: Any) -> None:
    store.set("siliconflow.try", {"number": 1, "complete": True})
    store.set("siliconflow.last", {"key": OTHER, "epoch": 0})
    store.set(
        f"siliconflow.{OTHER}", {"state": "sent", "batch_id": "batch_1", "number": 1, "terminal_since": 0.0}
    )
    ledger = open_ledger(store, 2)
    assert ledger.complete
    assert ledger.earlier_work(KEY) == (OTHER, Sent("batch_1", 1))
    assert store.get("siliconflow.fence")["who"].startswith("try 2 of task")
