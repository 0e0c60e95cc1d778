"""Whatever happens in a wait, the triggerer gets one event that it can hand on, and the task learns what to do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from airflow.providers.common.compat.sdk import AirflowSensorTimeout
from airflow.triggers.base import TriggerEvent

from airflow_provider_siliconflow.api.async_client import AsyncSiliconFlowClient
from airflow_provider_siliconflow.api.exceptions import AuthenticationError, BatchError, BatchWaitError
from airflow_provider_siliconflow.api.models import Batch
from airflow_provider_siliconflow.hooks.siliconflow import SiliconFlowHook
from airflow_provider_siliconflow.jobs.events import batches_of
from airflow_provider_siliconflow.operators.batch import CancelBatchOperator
from airflow_provider_siliconflow.sensors.batch import BatchSensor
from airflow_provider_siliconflow.triggers import batch as trigger_module
from airflow_provider_siliconflow.triggers.batch import BatchTrigger

if TYPE_CHECKING:
    from pytest_mock import MockerFixture

KEY, HEADER = "sk-boundary-0123456789abcdef", "header-secret-0123456789"


@pytest.fixture(autouse=True)
def _connection(mocker: MockerFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    mocker.patch.object(trigger_module, "_FIRST_PAUSE", 0)
    connection = {"conn_type": "siliconflow", "password": KEY, "extra": {"headers": {"X-Team": HEADER}}}
    monkeypatch.setenv("AIRFLOW_CONN_SILICONFLOW_DEFAULT", json.dumps(connection))


def only_event(trigger: BatchTrigger) -> TriggerEvent:
    async def run() -> TriggerEvent:
        async with asyncio.timeout(20):
            (event,) = [event async for event in trigger.run()]
            return event

    return asyncio.run(run())


def assert_can_be_handed_on(payload: Any) -> str:
    """By Airflow's own encoder, through a database that takes no NUL and no half of a surrogate pair."""
    text = json.dumps(payload, allow_nan=False, ensure_ascii=False)
    assert "\\u0000" not in json.dumps(payload)
    text.encode("utf-8")
    msgspec.msgpack.encode(payload)
    assert len(text) <= 1 << 20
    return text


def answering(mocker: MockerFixture, answer: Callable[[], Any]) -> None:
    async def get_batch(*_: Any, **__: Any) -> Any:
        return answer()

    mocker.patch.object(AsyncSiliconFlowClient, "get_batch", get_batch)


def raising(error: BaseException) -> Callable[[], Any]:
    def answer() -> Any:
        raise error

    return answer


ERRORS = [
    RuntimeError("a bug"),
    RecursionError("too deep"),
    MemoryError(),
    KeyError("id"),
    OverflowError("int too large to convert"),
    UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"),
    TypeError("'NoneType' object is not iterable"),
    StopIteration(),
    RuntimeError("\x00 \ud800 " + "x" * 2_000_000),
    RuntimeError("x" * 3990 + KEY + HEADER),
    RuntimeError(f"Authorization: Bearer {KEY}"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: f"{type(error).__name__}-{str(error)[:12]!a}")
def test_an_error_that_nobody_foresaw_ends_the_wait_with_an_event(
    mocker: MockerFixture, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    answering(mocker, raising(error))
    payload = only_event(BatchTrigger(batch_ids=["batch_1"], poll_interval=0.05)).payload
    text = assert_can_be_handed_on(payload)
    assert (payload["status"], payload["retryable"], payload["batch_ids"]) == ("error", True, ["batch_1"])
    assert type(error).__name__ in payload["message"] or isinstance(error, StopIteration)
    for secret in (KEY, HEADER):
        assert not [piece for piece in (secret, secret[:12]) if piece in text]
    with pytest.raises(BatchWaitError):
        batches_of(json.loads(text))


@pytest.mark.parametrize(
    "place",
    [
        "airflow_provider_siliconflow.hooks.connection._settings",
        "airflow_provider_siliconflow.jobs.waiting.BatchWait.due",
        "airflow_provider_siliconflow.jobs.waiting.BatchWait.observe",
        "airflow_provider_siliconflow.jobs.waiting.BatchWait.log_summary",
        "airflow_provider_siliconflow.jobs.outcome.is_flawless",
    ],
)
def test_wherever_it_comes_from(mocker: MockerFixture, place: str) -> None:
    answering(
        mocker, lambda: Batch(id="batch_1", status="completed", request_counts={"total": 1, "completed": 1})
    )
    mocker.patch(place, side_effect=ValueError("a bug"))
    # What kept Airflow from handing out the connection passes; the deadline then ends the wait.
    mocker.patch.object(trigger_module, "_CONNECTION_PAUSE", 0.01)
    trigger = BatchTrigger(
        batch_ids=["batch_1"], poll_interval=0.05, end_in_trigger=True, deadline=time.time() + 0.3
    )
    payload = only_event(trigger).payload
    assert_can_be_handed_on(payload)
    assert payload["status"] in ("error", "timeout")
    assert payload["retryable"]


def test_the_end_of_the_triggerer_is_no_event(mocker: MockerFixture) -> None:
    async def run() -> list[Any]:
        wait = asyncio.ensure_future(anext(BatchTrigger(batch_ids=["batch_1"]).run()))
        await asyncio.sleep(0.1)
        wait.cancel()
        return list(await asyncio.gather(wait, return_exceptions=True))

    async def hang(*_: Any, **__: Any) -> None:
        await asyncio.sleep(60)

    mocker.patch.object(AsyncSiliconFlowClient, "get_batch", hang)
    (ended,) = asyncio.run(run())
    assert isinstance(ended, asyncio.CancelledError)


#: What a service, a proxy or somebody on the account may say of a batch.
HOSTILE: dict[str, Any] = {
    "id": "batch_1",
    "status": "completed",
    "created_at": 10**400,
    "expires_at": -1e308,
    "request_counts": {"total": 2**63, "completed": 2**63, "failed": -(2**70)},
    "errors": {"data": [{"message": "\x00\ud800" + "e" * 1_000_000}] * 50},
    "metadata": {"note\x00": "\udfff" + "m" * 100_000},
    "output_file_id": "https://u:p@results.example/x?X-Amz-Signature=abc",
    "file_name": "\ud83d",
}
DEEP: Any = "end"
for _ in range(500):
    DEEP = {"deeper": DEEP}


def hostile() -> Batch:
    return Batch.model_validate(HOSTILE | {"extra": DEEP, "more": [2**80, float("1e400"), "\x00"]})


@pytest.mark.parametrize("counts_only", [True, False])
def test_what_the_service_says_of_a_batch_reaches_the_task_bounded(
    mocker: MockerFixture, counts_only: bool
) -> None:
    answering(mocker, hostile)
    mocker.patch("airflow_provider_siliconflow.jobs.settled.SETTLE_PATIENCE", 0.0)
    mocker.patch("airflow_provider_siliconflow.jobs.settled.SETTLE_POLL", 0.05)
    payload = only_event(
        BatchTrigger(batch_ids=["batch_1"], poll_interval=0.05, counts_only=counts_only)
    ).payload
    text = assert_can_be_handed_on(payload)
    assert [batch.id for batch in batches_of(json.loads(text))] == ["batch_1"]
    assert "Signature" not in text


def test_what_a_task_returns_to_xcom_encodes(
    mocker: MockerFixture, make_context: Callable[..., dict[str, Any]]
) -> None:
    client = "airflow_provider_siliconflow.api.client.SiliconFlowClient"
    mocker.patch(f"{client}.get_batch", return_value=hostile())
    mocker.patch(f"{client}.cancel_batch", return_value=hostile())
    mocker.patch("airflow_provider_siliconflow.jobs.settled.is_settled", return_value=True)
    mocker.patch("airflow_provider_siliconflow.jobs.outcome.finish_batch", return_value=None)
    sensor = BatchSensor(task_id="t", batch_id=["batch_1"], poke_interval=0.05)
    assert_can_be_handed_on(sensor.execute(make_context(sensor)))
    cancel = CancelBatchOperator(task_id="t", batch_id="batch_1")
    assert_can_be_handed_on(cancel.execute(make_context(cancel)))


def test_32_stuck_polls_do_not_stop_the_other_waits_of_the_connection(
    mocker: MockerFixture, make_emulator: Any, monkeypatch: pytest.MonkeyPatch, make_input: Callable[..., str]
) -> None:
    """Every wait of a triggerer over one connection polls through one client."""
    emulator = make_emulator(speed=1000.0)
    monkeypatch.setenv("AIRFLOW_CONN_SILICONFLOW_DEFAULT", emulator.airflow_connection)
    hook = SiliconFlowHook()
    honest = hook.create_batch(hook.upload_file(make_input("Hi")).id).id
    emulator.service.advance(1000)
    mocker.patch("airflow_provider_siliconflow.api.async_client._TURN", 0.2)
    request = AsyncSiliconFlowClient._request

    @contextlib.asynccontextmanager
    async def some_hang(self: Any, call: Any, *times: Any) -> AsyncIterator[Any]:
        if "stuck" in call.name:
            await asyncio.sleep(60)
        async with request(self, call, *times) as response:
            yield response

    mocker.patch.object(AsyncSiliconFlowClient, "_request", some_hang)

    async def run() -> Any:
        stuck = [
            asyncio.ensure_future(anext(BatchTrigger(batch_ids=[f"batch_stuck{number}"]).run()))
            for number in range(40)
        ]
        await asyncio.sleep(0.1)
        try:
            async with asyncio.timeout(10):
                return (await anext(BatchTrigger(batch_ids=[honest]).run())).payload
        finally:
            for wait in stuck:
                wait.cancel()
            await asyncio.gather(*stuck, return_exceptions=True)

    assert asyncio.run(run())["status"] == "ended"


def test_an_error_nobody_foresaw_is_logged_without_secrets(
    mocker: MockerFixture, caplog: pytest.LogCaptureFixture
) -> None:
    def answer() -> Any:
        try:
            raise RuntimeError(f"proxy http://me:{HEADER}@proxy refused {KEY}")
        except RuntimeError as exc:
            raise ZeroDivisionError(f"Bearer {KEY}") from exc

    answering(mocker, answer)
    event = only_event(BatchTrigger(batch_ids=["batch_1"]))
    told = assert_can_be_handed_on(event.payload) + "".join(map(logging.Formatter().format, caplog.records))
    assert "ZeroDivisionError" in told
    assert KEY not in told
    assert HEADER not in told


ODD_EVENTS: list[Any] = [
    {"status": "ended", "batches": [5]},
    {"status": "ended", "batches": [{}]},
    {"status": "ended", "batches": [{"id": None}]},
    {"status": "error", "message": 5, "batch_ids": 5},
    {"status": "timeout", "message": ["x" * 10**6], "batch_ids": {"a": 1}},
    {"status": ["ended"]},
    {"status": "x", KEY: f"https://h/?{KEY}"},
    7,
]


@pytest.mark.parametrize("event", ODD_EVENTS)
def test_an_odd_event_ends_the_task_by_an_error_of_ours(
    event: Any, make_context: Callable[..., dict[str, Any]]
) -> None:
    SiliconFlowHook().settings  # noqa: B018
    sensor = BatchSensor(task_id="wait", batch_id="batch_1", fail_fast=False)
    with pytest.raises((BatchError, AirflowSensorTimeout)) as caught:
        sensor.execute_complete(make_context(sensor), event)
    assert len(str(caught.value)) < 5000
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("when", ["before the poll", "under the poll"])
def test_a_clock_that_is_set_back_keeps_no_sensor_busy(mocker: MockerFixture, when: str) -> None:
    real, back, polls = time.time, 0.0, 0

    def set_back(*_: Any, **__: Any) -> Batch:
        nonlocal back, polls
        back, polls = -3600.0, polls + 1
        assert polls < 20
        return Batch(id="batch_1", status="in_progress")

    mocker.patch("airflow_provider_siliconflow.api.client.SiliconFlowClient.get_batch", set_back)
    poll_once = SiliconFlowHook.poll_once

    def poll(hook: SiliconFlowHook, wait: Any) -> None:
        if when == "before the poll":
            set_back()
        poll_once(hook, wait)

    mocker.patch.object(SiliconFlowHook, "poll_once", poll)
    mocker.patch("time.time", side_effect=lambda: real() + back)
    sensor = BatchSensor(task_id="wait", batch_id="batch_1", mode="poke")
    assert sensor.poke({}) is False
    assert polls <= 2


def test_a_wait_that_ends_by_one_poll_leaves_no_other_behind(mocker: MockerFixture) -> None:
    """They would go on over a client that is closed, and open connections that nobody closes."""

    async def get_batch(_: Any, batch_id: str, **__: Any) -> Any:
        if batch_id != "batch_3":
            await asyncio.sleep(60)
        raise AuthenticationError("no", status_code=401)

    mocker.patch.object(AsyncSiliconFlowClient, "get_batch", get_batch)

    async def run() -> int:
        trigger = BatchTrigger(batch_ids=[f"batch_{number}" for number in range(8)])
        (event,) = [event async for event in trigger.run()]
        assert event.payload["status"] == "error"
        return len(asyncio.all_tasks())

    assert asyncio.run(run()) == 1
