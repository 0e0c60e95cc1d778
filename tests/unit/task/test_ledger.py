"""The ledger over Airflow's task state store."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from airflow_provider_siliconflow.jobs.states import (
    IN_DOUBT,
    ImpossibleTransitionError,
    Planned,
    Sending,
    Sent,
    Uploaded,
    Uploading,
)
from airflow_provider_siliconflow.task.ledger import TaskStateLedger

KEY = "a" * 32


def test_what_is_recorded_is_there_for_the_next_try(store: Any) -> None:
    ledger = TaskStateLedger(store, try_number=1)
    assert ledger.state(KEY) == Planned()
    ledger.record(KEY, Sending(1, 100.0))
    again = TaskStateLedger(store, try_number=2)
    assert again.state(KEY) == Sending(1, 100.0)
    again.record(KEY, Sent("batch_1", 1))
    again.record_upload("u", Uploading(at=1.0))
    again.record_upload("u", Uploaded("file-1"))
    third = TaskStateLedger(store, try_number=3)
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
    assert TaskStateLedger(store, try_number=2).state(KEY) == IN_DOUBT


def test_a_store_that_was_there_in_every_try_is_complete(store: Any) -> None:
    for number in (1, 1, 2, 3):
        assert TaskStateLedger(store, try_number=number).complete
    # A try ran without the store.
    assert not TaskStateLedger(store, try_number=5).complete
    assert not TaskStateLedger(store, try_number=6).complete, "nor will it be again"


@pytest.mark.parametrize("left", [None, "text", {"number": 1}, {"number": 1, "complete": "yes"}])
def test_a_store_that_came_later_is_not_complete(store: Any, left: Any) -> None:
    if left is not None:
        store.set("siliconflow.try", left)
    assert not TaskStateLedger(store, try_number=2).complete
