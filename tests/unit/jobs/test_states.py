"""What a piece of work may be: every transition, and what is read from what a ledger stored."""

from __future__ import annotations

import itertools
import json
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_provider_siliconflow.jobs.states import (
    IN_DOUBT,
    TRANSITIONS,
    Ended,
    ImpossibleTransitionError,
    Planned,
    Refused,
    Sending,
    Sent,
    State,
    Uploaded,
    Uploading,
    UploadState,
    check_transition,
    decode,
    decode_upload,
    encode,
    encode_upload,
)

COUNTS = {"total": 5, "completed": 3, "failed": 2}
#: One of each, and what their content makes different.
STATES: dict[str, State] = {
    "planned": Planned(),
    "sending": Sending(2, 100.0),
    "sending later": Sending(3, 200.0),
    "accepted": Sending(2, 100.0, accepted=True),
    "in doubt": IN_DOUBT,
    "sent": Sent("batch_a", 2),
    "unsettled": Sent("batch_a", 2, terminal_since=300.0),
    "sent again": Sent("batch_b", 2),
    "completed": Ended("batch_a", 2, "completed", COUNTS),
    "expired": Ended("batch_a", 2, "expired", COUNTS),
    "failed": Ended("batch_a", 2, "failed", {}, ("bad file",)),
    "cancelled": Ended("batch_a", 2, "cancelled", COUNTS),
    "refused": Refused(400, "no such model"),
}
#: What may follow what, but for itself.
POSSIBLE: dict[str, set[str]] = {
    "planned": {
        "sending",
        "sending later",
        "accepted",
        "in doubt",
        "sent",
        "unsettled",
        "sent again",
        "refused",
    },
    "sending": {"accepted", "sent", "unsettled", "sent again", "planned", "refused"},
    "sending later": {"sent", "unsettled", "sent again", "planned", "refused"},
    "accepted": {"sent", "unsettled", "sent again"},
    "in doubt": {
        "sending",
        "sending later",
        "accepted",
        "sent",
        "unsettled",
        "sent again",
        "planned",
        "refused",
    },
    "sent": {
        "unsettled",
        "sent again",
        "sending",
        "sending later",
        "accepted",
        "in doubt",
        "completed",
        "expired",
        "failed",
        "cancelled",
    },
    "unsettled": {
        "sent",
        "sent again",
        "sending",
        "sending later",
        "accepted",
        "in doubt",
        "completed",
        "expired",
        "failed",
        "cancelled",
    },
    "sent again": {
        "sent",
        "unsettled",
        "sending",
        "sending later",
        "accepted",
        "in doubt",
    },
    "completed": {"sending", "sending later", "accepted", "in doubt"},
    "expired": {"planned", "sending", "sending later", "accepted", "in doubt"},
    "failed": {"planned", "sending", "sending later", "accepted", "in doubt"},
    "cancelled": {"planned", "sending", "sending later", "accepted", "in doubt"},
    "refused": {"planned"},
}


@pytest.mark.parametrize(("before", "after"), itertools.product(STATES, STATES))
def test_every_transition(before: str, after: str) -> None:
    if before == after or after in POSSIBLE[before]:
        check_transition("key", STATES[before], STATES[after])
        return
    with pytest.raises(ImpossibleTransitionError, match="Work key cannot change from") as caught:
        check_transition("key", STATES[before], STATES[after])
    assert not caught.value.retryable


def test_the_table_knows_every_state() -> None:
    assert set(TRANSITIONS) == set(get_args(State)) == {type(state) for state in STATES.values()}


@pytest.mark.parametrize("state", STATES.values())
def test_a_state_comes_back_from_json_as_it_was(state: State) -> None:
    assert decode(json.loads(json.dumps(encode(state)))) == state


UPLOADS: list[UploadState] = [
    Planned(),
    Uploading(3.5),
    Uploading(3.5, ("file-a",)),
    Uploaded("file-b"),
    Uploaded("file-c", ("file-a", "file-b")),
]


@pytest.mark.parametrize("state", UPLOADS)
def test_an_upload_comes_back_from_json_as_it_was(state: UploadState) -> None:
    assert decode_upload(json.loads(json.dumps(encode_upload(state)))) == state


ODD: list[Any] = [
    *(None, -1, 2**60, "", "../x", "batch a", "batch/a", "batch_a?x=1", "b\x00", "\ud800"),
    *("x" * 300, [], {}, ["batch_a"], {"id": "batch_a"}, float("nan"), float("inf")),
]


@pytest.mark.parametrize("name", [name for name, state in STATES.items() if state != Planned()])
def test_a_damaged_entry_is_in_doubt(name: str) -> None:
    stored = encode(STATES[name])
    assert stored is not None
    for field, right in stored.items():
        without = {key: value for key, value in stored.items() if key != field}
        assert decode(without) == IN_DOUBT, field
        for wrong in ODD:
            if type(wrong) is type(right) and field in ("counts", "errors", "message"):
                continue
            if wrong is None and field == "terminal_since":
                continue
            assert decode({**stored, field: wrong}) == IN_DOUBT, (field, wrong)


@pytest.mark.parametrize(
    "entry", [[], "sent", 3, True, {}, {"state": "dead"}, [["state", "sent"]], {"a": {}}]
)
def test_what_is_no_entry_is_in_doubt(entry: Any) -> None:
    assert decode(entry) == IN_DOUBT
    assert decode_upload(entry) == Uploading(0.0)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
ENTRIES = st.dictionaries(
    st.sampled_from(
        ["state", "batch_id", "number", "at", "accepted", "status", "counts", "errors", "file_id"]
    ),
    JSON | st.sampled_from(["sending", "sent", "ended", "refused", "uploaded", "batch_a", "completed"]),
)


@given(ENTRIES | JSON)
def test_whatever_is_stored_is_read_and_bounded(entry: Any) -> None:
    for state in (decode(entry), decode_upload(entry)):
        assert len(json.dumps(encode(state) if isinstance(state, State) else encode_upload(state))) < 30_000
    state = decode(entry)
    if isinstance(state, Sent | Ended):
        assert isinstance(entry, dict)
        assert state.batch_id == entry["batch_id"]


def test_what_the_service_said_is_bounded() -> None:
    ended = Ended(
        "batch_a", 1, "failed", {"total": 2**70, "odd": 3}, ("\x00" + "x" * 10**6, "\ud800", "c", "d")
    )
    assert ended.counts == {"total": 2**53 - 1}
    assert [len(text) for text in ended.errors] == [2000, 1, 1]
    assert decode(json.loads(json.dumps(encode(ended)))) == ended
    json.dumps(encode(ended)).encode()
    assert "\x00" not in ended.errors[0]
