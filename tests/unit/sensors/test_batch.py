"""The sensor, whatever its way of waiting."""

from __future__ import annotations

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

from airflow_provider_siliconflow.api.exceptions import BatchWaitError
from airflow_provider_siliconflow.api.models import Batch
from airflow_provider_siliconflow.hooks.siliconflow import SiliconFlowHook
from airflow_provider_siliconflow.sensors.batch import BatchSensor
from airflow_provider_siliconflow.triggers import batch as trigger_module
from tests.support.triggers import payload

if TYPE_CHECKING:
    from pytest_mock import MockerFixture

    from airflow_provider_siliconflow.emulator import Emulator

MakeContext = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def _no_first_pause(mocker: MockerFixture) -> None:
    mocker.patch.object(trigger_module, "_FIRST_PAUSE", 0)


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


def test_every_failed_batch_of_several_is_logged(
    make_batch: Callable[..., str], make_context: MakeContext, mocker: MockerFixture
) -> None:
    ids = [make_batch("[[emulator:error=400]]"), make_batch("Hi"), make_batch("[[emulator:error=400]]")]
    sensor = BatchSensor(task_id="t", batch_id=ids, poke_interval=0.05, fail_fast=False)
    error = mocker.patch.object(sensor.log, "error")
    with pytest.raises(Exception, match=ids[0]):
        sensor.execute(make_context(sensor))
    logged = [call.args[0] % call.args[1:] for call in error.call_args_list]
    assert [any(one in line for line in logged) for one in ids] == [True, False, True]


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


@pytest.mark.parametrize("rendered", [None, "", [], ["batch_1", None]])
@pytest.mark.parametrize("deferrable", [False, True])
@pytest.mark.usefixtures("siliconflow_connection")
def test_no_id_is_a_failure_for_good(
    make_context: MakeContext, emulator: Emulator, rendered: Any, deferrable: bool
) -> None:
    sensor = BatchSensor(task_id="t", batch_id="{{ ids }}", deferrable=deferrable)
    sensor.render_template_fields({"ids": rendered})
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


@pytest.mark.usefixtures("siliconflow_connection")
@pytest.mark.parametrize("known", [True, False])
def test_a_rescheduled_sensor_gives_an_unknown_batch_up_as_any_other_does(
    make_batch: Callable[..., str],
    make_context: MakeContext,
    emulator: Emulator,
    mocker: MockerFixture,
    known: bool,
) -> None:
    """Each poke is a process of its own, and knows of the ones before only when the first was."""
    emulator.service.configure({"speed": 0.001})
    mocker.patch("airflow_provider_siliconflow.sensors.batch._SECOND_POLLS", (0.01, 0.01))
    batch_id = make_batch("Hi")
    sensor = BatchSensor(task_id="t", batch_id=batch_id if known else "batch_unknown", mode="reschedule")
    began = datetime.now(UTC)
    mocker.patch.object(BatchSensor, "_first_poke", side_effect=lambda *_: began.timestamp())
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


@pytest.mark.usefixtures("siliconflow_connection")
def test_a_rescheduled_sensor_waits_within_a_poke_for_counts_that_come_late(
    make_context: MakeContext, mocker: MockerFixture
) -> None:
    """The next poke is another process, for which it would be the first look again, and so for ever."""
    early = Batch(id="batch_1", status="completed", request_counts={"total": 2, "completed": 0})
    settled = Batch(id="batch_1", status="completed", request_counts={"total": 2, "completed": 2})
    mocker.patch("airflow_provider_siliconflow.jobs.settled.SETTLE_POLL", 0.05)
    client = "airflow_provider_siliconflow.api.client.SiliconFlowClient"
    read = mocker.patch(f"{client}.get_batch", side_effect=[early, early, settled])
    sensor = BatchSensor(task_id="t", batch_id="batch_1", mode="reschedule")
    mocker.patch.object(BatchSensor, "_first_poke", return_value=None)
    done: Any = sensor.poke(make_context(sensor))
    assert done.xcom_value["request_counts"]["completed"] == 2
    assert read.call_count == 3


def test_a_poll_takes_no_longer_than_the_wait(mocker: MockerFixture, make_batch: Callable[..., str]) -> None:
    hook = SiliconFlowHook()
    read = mocker.spy(hook.get_conn(), "get_batch")
    hook.wait_for_batches([make_batch("Hi")], poll_interval=0.05, deadline=time.time() + 60)
    assert all(0 < call.kwargs["within"] <= 60 for call in read.call_args_list)
