"""Whatever the service said, an event and a manifest encode, and are bounded."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airflow_provider_siliconflow.api.exceptions import BatchError, BatchWaitError, SiliconFlowError
from airflow_provider_siliconflow.api.models import Batch
from airflow_provider_siliconflow.jobs import events
from airflow_provider_siliconflow.jobs.events import batches_of, encode, ended, failed
from airflow_provider_siliconflow.jobs.storable import storable

texts = st.text(st.characters(), max_size=40) | st.sampled_from(
    ["\x00", "\ud800", "a" * 100_000, "\ud83d\x00"]
)
numbers = st.integers(-(10**400), 10**400) | st.floats(allow_nan=False, allow_infinity=False)
deep: Any = "x"
for _ in range(500):
    deep = [deep]
values = st.recursive(
    st.none() | st.booleans() | numbers | texts | st.just(deep),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(texts, children, max_size=3),
    max_leaves=8,
)
batches = st.fixed_dictionaries(
    {"id": st.just("batch_1"), "status": st.sampled_from(["completed", "failed"]) | texts.filter(bool)},
    optional=dict.fromkeys((*list(Batch.model_fields)[2:], "something_new", "\x00"), values),
)


def check(payload: Any) -> None:
    """Encode as Airflow does on the way to the task: msgpack between processes, JSON in the database."""
    text = json.dumps(payload, ensure_ascii=False, allow_nan=False)
    text.encode("utf-8")
    assert "\x00" not in text
    assert "\\u0000" not in json.dumps(payload), "Postgres takes no NUL"
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(payload)) == payload
    assert len(text.encode()) <= events.MAX_BYTES


@settings(max_examples=400, deadline=None)
@given(said=batches, counts_only=st.booleans())
def test_a_batch_of_any_content_encodes(said: dict[str, Any], counts_only: bool) -> None:
    try:
        batch = Batch.model_validate(said)
    except (ValueError, RecursionError):
        return
    payload = encode(ended([batch]), counts_only=counts_only)
    check(payload)
    (read,) = batches_of(payload)
    assert (read.id, read.is_terminal) == (batch.id, batch.is_terminal)


@settings(max_examples=100, deadline=None)
@given(message=texts, ids=st.lists(texts, max_size=3))
def test_an_error_of_any_content_encodes(message: str, ids: list[str]) -> None:
    payload = encode(failed(SiliconFlowError(message), ids))
    check(payload)
    with pytest.raises(BatchError):
        batches_of(payload)


@settings(max_examples=200, deadline=None)
@given(value=values)
def test_anything_is_made_storable(value: Any) -> None:
    made = storable(value)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(made)) == made
    assert "\\u0000" not in json.dumps(made, allow_nan=False)


def many(count: int, **fields: Any) -> list[Batch]:
    counts = {"total": 5000, "completed": 5000, "failed": 0}
    return [
        Batch(id=f"batch_{number:010d}", status="completed", request_counts=counts, **fields)
        for number in range(count)
    ]


def test_a_job_gets_as_many_batches_as_there_is_room_for_and_waits_for_the_others_again() -> None:
    found = many(20_000)
    payload = encode(ended(found), counts_only=True)
    check(payload)
    read = batches_of(payload)
    assert [batch.id for batch in read] == [batch.id for batch in found[: len(read)]]
    assert 3000 < len(read) < 20_000
    assert len(batches_of(encode(ended(found[len(read) :]), counts_only=True))) > 3000


def test_a_sensor_gets_every_batch_or_an_error_but_never_some_of_them() -> None:
    found = many(2000, output_file_id="https://h/" + "o" * 80, metadata={"m": "x" * 500})
    payload = encode(ended(found))
    check(payload)
    assert [batch.id for batch in batches_of(payload)] == [batch.id for batch in found]
    assert batches_of(payload)[0].output_file_id
    payload = encode(ended(many(20_000)))
    check(payload)
    with pytest.raises(BatchWaitError, match="20000 batches are too many") as caught:
        batches_of(payload)
    assert not caught.value.retryable


def test_a_batch_that_cannot_be_encoded_at_all_ends_the_wait_with_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RecursionError

    monkeypatch.setattr(events, "_described", fail)
    payload = encode(ended(many(2)))
    check(payload)
    with pytest.raises(BatchWaitError, match="cannot be encoded") as caught:
        batches_of(payload)
    assert caught.value.retryable
