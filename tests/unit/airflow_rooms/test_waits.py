"""The sensor and the trigger: one rule for both, whatever the way of waiting."""

from __future__ import annotations

import asyncio
import json
import time
from collections import UserList
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from airflow.providers.common.compat.sdk import (
    AirflowFailException,
    AirflowSensorTimeout,
    AirflowSkipException,
    TaskDeferred,
)
from airflow.triggers.base import TaskSuccessEvent, TriggerEvent

from airflow_provider_siliconflow.api.exceptions import BatchWaitError
from airflow_provider_siliconflow.hooks.siliconflow import SiliconFlowHook
from airflow_provider_siliconflow.sensors.batch import BatchSensor
from airflow_provider_siliconflow.triggers import batch as trigger_module
from airflow_provider_siliconflow.triggers.batch import BatchTrigger

if TYPE_CHECKING:
    from airflow_provider_siliconflow.emulator import Emulator

MakeContext = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def _no_first_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trigger_module, "_FIRST_PAUSE", 0)


@pytest.fixture
def make_batch(siliconflow_connection: str, make_input: Callable[..., str]) -> Callable[..., str]:
    """Uploads a file of one row per text and creates a batch over it; its id."""

    def make(*texts: str) -> str:
        hook = SiliconFlowHook(siliconflow_connection)
        return hook.create_batch(hook.upload_file(make_input(*texts)).id).id

    return make


def fire(trigger: BatchTrigger) -> TriggerEvent:
    """Run a trigger as a triggerer does: from what was stored of it; its one event."""
    path, arguments = trigger.serialize()
    assert path == "airflow_provider_siliconflow.triggers.batch.BatchTrigger"
    stored = BatchTrigger(**json.loads(json.dumps(arguments)))

    async def run() -> TriggerEvent:
        async with asyncio.timeout(30):
            events = [event async for event in stored.run()]
        assert len(events) == 1
        return events[0]

    return asyncio.run(run())


def payload(trigger: BatchTrigger) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(json.dumps(fire(trigger).payload))
    return read


def wait(sensor: BatchSensor, context: dict[str, Any]) -> Any:
    """Let a sensor wait in its own way; what it returns."""
    try:
        return sensor.execute(context)
    except TaskDeferred as deferred:
        again = BatchSensor(
            task_id=sensor.task_id,
            batch_id=sensor.batch_id,
            fail_on_partial_error=sensor.fail_on_partial_error,
            soft_fail=sensor.soft_fail,
        )
        return getattr(again, deferred.method_name)(context, payload(deferred.trigger))


@pytest.mark.parametrize("deferrable", [False, True])
def test_one_batch_or_several(
    make_batch: Callable[..., str], make_context: MakeContext, emulator: Emulator, deferrable: bool
) -> None:
    ids = [make_batch("Hi"), make_batch("Hi", "Ho"), make_batch("Hi", "Ho", "Ha")]
    for given, returns_list in (
        (ids[1], False),
        (ids[:1], True),
        (ids, True),
        (json.dumps(ids), True),
        (str(ids), True),
        # As what a mapped task returned arrives.
        (UserList(ids), True),
    ):
        sensor = BatchSensor(task_id="t", batch_id=given, deferrable=deferrable, poke_interval=0.05)
        found = wait(sensor, make_context(sensor))
        assert isinstance(found, list) == returns_list
        several = found if returns_list else [found]
        assert [one["id"] for one in several] == ([given] if not returns_list else ids[: len(several)])
        assert {one["status"] for one in several} == {"completed"}
        assert "X-Amz-Signature" not in json.dumps(found)


@pytest.mark.parametrize("deferrable", [False, True])
def test_faults_of_the_service_do_not_end_a_wait(
    make_batch: Callable[..., str], make_context: MakeContext, emulator: Emulator, deferrable: bool
) -> None:
    emulator.service.configure({"speed": 30.0})
    batch_id = make_batch("Hi")
    for fault in ("html=200", "status=404"):
        emulator.faults.add(f"GET /batches/*:{fault}")
    sensor = BatchSensor(task_id="t", batch_id=batch_id, deferrable=deferrable, poke_interval=0.05)
    assert wait(sensor, make_context(sensor))["status"] == "completed"


@pytest.mark.parametrize("deferrable", [False, True])
@pytest.mark.parametrize(
    ("texts", "arguments", "error", "words"),
    [
        (["Hi", "[[emulator:error=400]]"], {}, None, ""),
        (
            ["Hi", "[[emulator:error=400]]"],
            {"fail_on_partial_error": True},
            AirflowFailException,
            "1 of 2 rows",
        ),
        (
            ["[[emulator:error=400]]"],
            {},
            AirflowFailException,
            r"0 of 1 rows.*invalid parameters.*\(1 rows\)",
        ),
        (["[[emulator:error=400]]"], {"soft_fail": True}, AirflowSkipException, "0 of 1 rows"),
    ],
)
def test_outcome(
    make_batch: Callable[..., str],
    make_context: MakeContext,
    deferrable: bool,
    texts: list[str],
    arguments: dict[str, Any],
    error: type[Exception] | None,
    words: str,
) -> None:
    sensor = BatchSensor(
        task_id="t", batch_id=make_batch(*texts), deferrable=deferrable, poke_interval=0.05, **arguments
    )
    if error is None:
        assert wait(sensor, make_context(sensor))["request_counts"]["failed"] == 1
    else:
        with pytest.raises(error, match=words):
            wait(sensor, make_context(sensor))


def test_every_failed_batch_of_several_is_told(
    make_batch: Callable[..., str], make_context: MakeContext, caplog: pytest.LogCaptureFixture
) -> None:
    ids = [make_batch("[[emulator:error=400]]"), make_batch("Hi"), make_batch("[[emulator:error=400]]")]
    sensor = BatchSensor(task_id="t", batch_id=ids, poke_interval=0.05, fail_fast=False)
    told: list[str] = []
    sensor.log.error = lambda text, *rest: told.append(text % rest)  # type: ignore[method-assign]
    with pytest.raises(Exception, match=ids[0]):
        sensor.execute(make_context(sensor))
    assert [any(one in line for line in told) for one in ids] == [True, False, True]


@pytest.mark.emulator(speed=0.001)
@pytest.mark.parametrize("soft_fail", [False, True])
def test_the_deferred_wait_ends_at_the_sensors_timeout_and_before_airflows(
    make_batch: Callable[..., str], make_context: MakeContext, emulator: Emulator, soft_fail: bool
) -> None:
    sensor = BatchSensor(
        task_id="t",
        batch_id=make_batch("Hi"),
        deferrable=True,
        poke_interval=0.05,
        timeout=timedelta(seconds=0.5),
        soft_fail=soft_fail,
    )
    began = time.time()
    with pytest.raises(TaskDeferred) as deferred:
        sensor.execute(make_context(sensor))
    assert deferred.value.timeout > timedelta(seconds=60)
    event = payload(deferred.value.trigger)
    assert 0.5 <= time.time() - began < 5
    with pytest.raises(AirflowSkipException if soft_fail else AirflowSensorTimeout, match="deadline"):
        sensor.execute_complete(make_context(sensor), event)
    assert "POST /batches/*/cancel" not in emulator.request_counts


@pytest.mark.parametrize("batch_id", ["None", "", [], ["batch_1", None]])
@pytest.mark.parametrize("deferrable", [False, True])
@pytest.mark.usefixtures("siliconflow_connection")
def test_no_id_is_a_failure_for_good(
    make_context: MakeContext, emulator: Emulator, batch_id: Any, deferrable: bool
) -> None:
    sensor = BatchSensor(task_id="t", batch_id=batch_id, deferrable=deferrable)
    with pytest.raises(AirflowFailException, match="batch_id"):
        sensor.execute(make_context(sensor))
    assert emulator.request_counts == {}


def test_an_event_that_is_none_of_ours_does_not_pass(make_context: MakeContext) -> None:
    sensor = BatchSensor(task_id="t", batch_id="batch_1", fail_fast=False)
    with pytest.raises(Exception, match="does not know"):
        sensor.execute_complete(make_context(sensor), {"status": "success"})


def test_a_batch_that_has_ended_is_not_deferred_for(
    make_batch: Callable[..., str], make_context: MakeContext, emulator: Emulator
) -> None:
    batch_id = make_batch("Hi")
    emulator.service.advance(1000)
    sensor = BatchSensor(task_id="t", batch_id=batch_id, deferrable=True)
    assert sensor.execute(make_context(sensor))["id"] == batch_id


# The trigger ------------------------------------------------------------------------------------------------


def test_a_key_that_is_refused_ends_the_trigger_with_a_reason(
    make_batch: Callable[..., str], emulator: Emulator
) -> None:
    batch_id = make_batch("Hi")
    emulator.faults.add("GET /batches/*:status=401,times=-1")
    event = payload(BatchTrigger(batch_ids=[batch_id], poll_interval=0.05))
    assert (event["status"], event["retryable"], event["batch_ids"]) == ("error", False, [batch_id])
    assert "untouched" in event["message"]


@pytest.mark.parametrize(
    ("connection", "words"),
    [(None, "nowhere"), ("{}", "no API key"), ('{"password": "sk-1", "extra": {"timeout": "x"}}', "timeout")],
)
def test_a_connection_that_is_wrong_ends_the_trigger_with_a_reason(
    monkeypatch: pytest.MonkeyPatch, connection: str | None, words: str
) -> None:
    monkeypatch.setattr(trigger_module, "_MISSING_CONNECTION_PATIENCE", 0.0)
    if connection is not None:
        monkeypatch.setenv("AIRFLOW_CONN_NOWHERE", connection)
    event = payload(BatchTrigger(batch_ids=["batch_1"], conn_id="nowhere"))
    # One that is not there may be one that Airflow cannot read just now.
    assert (event["status"], event["retryable"]) == ("error", connection is None)
    assert words in event["message"]


def test_a_connection_that_airflow_cannot_read_for_a_moment_does_not_end_the_wait(
    make_batch: Callable[..., str], monkeypatch: pytest.MonkeyPatch, emulator: Emulator
) -> None:
    batch_id = make_batch("Hi")
    monkeypatch.setattr(trigger_module, "_CONNECTION_PAUSE", 0.3)

    async def run() -> Any:
        event = asyncio.ensure_future(anext(BatchTrigger(batch_ids=[batch_id], conn_id="late").run()))
        await asyncio.sleep(0.1)
        monkeypatch.setenv("AIRFLOW_CONN_LATE", emulator.airflow_connection)
        async with asyncio.timeout(30):
            return (await event).payload

    assert asyncio.run(run())["status"] == "ended"


def test_a_deadline_in_the_past_looks_once_and_ends(
    make_batch: Callable[..., str], emulator: Emulator
) -> None:
    emulator.service.configure({"speed": 0.001})
    batch_id = make_batch("Hi")
    event = payload(BatchTrigger(batch_ids=[batch_id], deadline=time.time() - 60))
    assert event["status"] == "timeout"
    assert f"{batch_id} (in_queue)" in event["message"]
    assert emulator.request_counts["GET /batches/*"] == 1


@pytest.mark.parametrize("text", ["Hi", "[[emulator:error=400]]"])
def test_only_a_flawless_wait_ends_without_a_worker(make_batch: Callable[..., str], text: str) -> None:
    event = fire(BatchTrigger(batch_ids=[make_batch(text)], poll_interval=0.05, end_in_trigger=True))
    assert isinstance(event, TaskSuccessEvent) == (text == "Hi")


def test_a_rendered_list_of_ids_is_a_list(make_batch: Callable[..., str]) -> None:
    ids = [make_batch("Hi"), make_batch("Hi")]
    event = payload(BatchTrigger(batch_id=str(ids), poll_interval=0.05))
    assert [one["id"] for one in event["batches"]] == ids


def test_the_first_that_end_can_be_enough(make_batch: Callable[..., str], emulator: Emulator) -> None:
    first = make_batch("Hi")
    emulator.service.advance(1000)
    emulator.service.configure({"speed": 0.001})
    second = make_batch("Hi")
    event = payload(BatchTrigger(batch_ids=[second, first], poll_interval=0.05, wake_after=1))
    assert [one["id"] for one in event["batches"]] == [first]


@pytest.mark.emulator(speed=0.001)
def test_many_waits_share_one_client_and_give_it_back_when_they_are_cancelled(
    make_batch: Callable[..., str], emulator: Emulator
) -> None:
    ids = [make_batch("Hi") for _ in range(5)]
    shared: list[tuple[Any, int]] = []

    async def run() -> None:
        waits = [
            asyncio.ensure_future(anext(BatchTrigger(batch_ids=[one], poll_interval=60).run())) for one in ids
        ]
        async with asyncio.timeout(20):
            while emulator.request_counts.get("GET /batches/*", 0) < 5:  # noqa: ASYNC110 - another thread counts
                await asyncio.sleep(0.01)
        shared.extend(trigger_module._CLIENTS.values())
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)

    asyncio.run(run())
    ((client, users),) = shared
    assert users == 5
    assert trigger_module._CLIENTS == {}
    assert client._session is None, "closed by the last one"
    # A triggerer that stops is no kill.
    assert "POST /batches/*/cancel" not in emulator.request_counts


@pytest.mark.usefixtures("siliconflow_connection")
@pytest.mark.parametrize("known", [True, False])
def test_a_rescheduled_sensor_gives_an_unknown_batch_up_as_any_other_does(
    make_batch: Callable[..., str],
    make_context: MakeContext,
    emulator: Emulator,
    monkeypatch: pytest.MonkeyPatch,
    known: bool,
) -> None:
    """Each look is by a process of its own, and knows of the ones before only when the first was."""
    emulator.service.configure({"speed": 0.001})
    monkeypatch.setattr("airflow_provider_siliconflow.sensors.batch._SECOND_LOOKS", (0.01, 0.01))
    batch_id = make_batch("Hi")
    sensor = BatchSensor(task_id="t", batch_id=batch_id if known else "batch_unknown", mode="reschedule")
    began = datetime.now(UTC)
    monkeypatch.setattr(BatchSensor, "_first_poke", lambda *_: began.timestamp())
    context = make_context(sensor)
    assert not sensor.poke(context)
    began -= timedelta(minutes=11)
    emulator.faults.add("GET /batches/*:status=404,times=2")
    sensor = BatchSensor(task_id="t", batch_id=sensor.batch_id, mode="reschedule")
    if known:
        assert not sensor.poke(context), "two answers are not the last word"
    else:
        # Retries are left to it, as nobody knows whether an earlier process had found it.
        with pytest.raises(BatchWaitError, match="batch_unknown is not known to this account"):
            sensor.poke(context)
