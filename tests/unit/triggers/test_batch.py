"""The trigger: what it waits for, when it ends, and when it cancels."""

from __future__ import annotations

import asyncio
import json
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from airflow.triggers.base import TaskSuccessEvent

from airflow_provider_siliconflow.api.models import Batch
from airflow_provider_siliconflow.triggers import batch as trigger_module
from airflow_provider_siliconflow.triggers.batch import BatchTrigger
from tests.support.triggers import fire, payload

if TYPE_CHECKING:
    from pytest_mock import MockerFixture

    from airflow_provider_siliconflow.emulator import Emulator

MakeContext = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def _no_first_pause(mocker: MockerFixture) -> None:
    mocker.patch.object(trigger_module, "_FIRST_PAUSE", 0)


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
    [
        (None, "nowhere"),
        ("{}", "no API key"),
        ('{"conn_type": "http", "password": "sk-1"}', "of type 'http'"),
        ('{"password": "sk-1", "extra": {"timeout": "x"}}', "timeout"),
    ],
)
def test_a_connection_that_is_wrong_ends_the_trigger_with_a_reason(
    monkeypatch: pytest.MonkeyPatch, mocker: MockerFixture, connection: str | None, words: str
) -> None:
    mocker.patch.object(trigger_module, "_MISSING_CONNECTION_PATIENCE", 0.0)
    if connection is not None:
        monkeypatch.setenv("AIRFLOW_CONN_NOWHERE", connection)
    event = payload(BatchTrigger(batch_ids=["batch_1"], conn_id="nowhere"))
    # One that is not there may be one that Airflow cannot read just now.
    assert (event["status"], event["retryable"]) == ("error", connection is None)
    assert words in event["message"]


def test_a_connection_that_airflow_cannot_read_for_a_moment_does_not_end_the_wait(
    make_batch: Callable[..., str], monkeypatch: pytest.MonkeyPatch, mocker: MockerFixture, emulator: Emulator
) -> None:
    batch_id = make_batch("Hi")
    mocker.patch.object(trigger_module, "_CONNECTION_PAUSE", 0.3)

    async def run() -> Any:
        event = asyncio.ensure_future(anext(BatchTrigger(batch_ids=[batch_id], conn_id="late").run()))
        await asyncio.sleep(0.1)
        monkeypatch.setenv("AIRFLOW_CONN_LATE", emulator.airflow_connection)
        async with asyncio.timeout(30):
            return (await event).payload

    assert asyncio.run(run())["status"] == "ended"


def test_a_deadline_in_the_past_polls_once_and_ends(
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
    event = payload(BatchTrigger(batch_ids=[second, first], poll_interval=0.05, min_ended=1))
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


@pytest.mark.emulator(speed=0.001)
def test_a_deadline_ends_a_poll_under_way(
    make_batch: Callable[..., str], mocker: MockerFixture, emulator: Emulator
) -> None:
    batch_id = make_batch("Hi")

    async def hang(*_: Any, **__: Any) -> None:
        await asyncio.sleep(60)

    mocker.patch("airflow_provider_siliconflow.api.async_client.AsyncSiliconFlowClient.get_batch", hang)
    began = time.time()
    event = payload(BatchTrigger(batch_ids=[batch_id], poll_interval=0.05, deadline=began + 0.5))
    assert 0.5 <= time.time() - began < 10
    assert event["status"] == "timeout"
    assert batch_id in event["message"]


def test_an_error_that_no_log_can_encode_ends_the_wait_with_an_event_all_the_same(
    siliconflow_connection: str, mocker: MockerFixture
) -> None:
    """A handler that writes UTF-8 raises for half of a surrogate pair, as Airflow's own does on some streams."""
    log = mocker.patch.object(BatchTrigger, "log", create=True)
    log.error.side_effect = lambda text, *args: (text % args).encode()
    log.exception.side_effect = lambda *_: traceback.format_exc().encode()
    get_batch = "airflow_provider_siliconflow.api.async_client.AsyncSiliconFlowClient.get_batch"
    mocker.patch(get_batch, side_effect=RuntimeError("half a pair: \ud800"))
    event = payload(BatchTrigger(batch_ids=["batch_1"], poll_interval=0.05))
    assert (event["status"], event["retryable"]) == ("error", True)
    assert "half a pair" in event["message"]
    assert "half a pair" in log.error.call_args.args[1]


# A person ends the task ---------------------------------------------------------------------------------------


class Killed:
    """A trigger in a triggerer that is told of a kill, as Airflow 3.3 does it."""

    def __init__(self, mocker: MockerFixture, emulator: Emulator) -> None:
        self._mocker, self._emulator = mocker, emulator

    def __call__(self, trigger: BatchTrigger, *, states: list[Any], tokens: list[Any]) -> None:
        mocker = self._mocker
        mocker.patch("airflow_provider_siliconflow.task.state.task_state", side_effect=states)
        mocker.patch("airflow_provider_siliconflow.task.deferral.recorded_wait", side_effect=tokens)
        mocker.patch.object(BatchTrigger, "task_instance", mocker.Mock(), create=True)
        asyncio.run(self._run(BatchTrigger(**json.loads(json.dumps(trigger.serialize()[1])))))

    async def _run(self, trigger: BatchTrigger) -> None:
        waiting = asyncio.ensure_future(anext(trigger.run()))
        async with asyncio.timeout(20):
            while not self._emulator.request_counts.get("GET /batches/*"):  # noqa: ASYNC110 - another thread counts
                await asyncio.sleep(0.01)
        waiting.cancel("__airflow_user_action__")
        await asyncio.gather(waiting, return_exceptions=True)
        # Airflow ends this call itself after a moment.
        call = asyncio.ensure_future(trigger.on_kill())
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        async with asyncio.timeout(20):
            await asyncio.gather(*trigger_module._CANCELLATIONS)


@pytest.fixture
def killed(mocker: MockerFixture, emulator: Emulator) -> Killed:
    mocker.patch.object(trigger_module, "_STATE_PAUSES", (0.01, 0.01))
    return Killed(mocker, emulator)


@pytest.mark.emulator(speed=0.001)
@pytest.mark.parametrize(
    ("states", "tokens", "cancels"),
    [
        (["failed"], ["ours"], True),
        (["success"], ["ours"], True),
        (["skipped"], ["ours"], True),
        # Away for a moment, the database then tells.
        ([RuntimeError("away"), "failed"], ["ours"], True),
        # It resumed first, and ended after that.
        (["failed"], [""], False),
        (["success"], ["a later wait's"], False),
        (["failed"], [None], False),
        # The trigger moved, or the same trigger elsewhere woke the task, or the task was cleared.
        (["deferred"], ["ours"], False),
        (["scheduled"], ["ours"], False),
        (["queued"], ["ours"], False),
        (["running"], ["ours"], False),
        (["up_for_retry"], ["ours"], False),
        (["restarting"], ["ours"], False),
        (["removed"], ["ours"], False),
        ([None], ["ours"], False),
        ([RuntimeError("away")] * 3, [], False),
        (["failed"] * 3, [RuntimeError("away")] * 3, False),
    ],
)
def test_only_proof_of_a_person_s_act_cancels(
    make_batch: Callable[..., str],
    emulator: Emulator,
    killed: Killed,
    states: list[Any],
    tokens: list[Any],
    cancels: bool,
) -> None:
    batch_id = make_batch("Hi")
    trigger = BatchTrigger(batch_ids=[batch_id], poll_interval=60, cancel_on_kill=True, wait_token="ours")
    killed(trigger, states=states, tokens=tokens)
    assert emulator.request_counts.get("POST /batches/*/cancel", 0) == int(cancels)


@pytest.mark.emulator(speed=0.001)
@pytest.mark.parametrize("given", [{"cancel_on_kill": False, "wait_token": "ours"}, {"cancel_on_kill": True}])
def test_a_trigger_without_an_order_or_a_token_cancels_nothing(
    make_batch: Callable[..., str], emulator: Emulator, killed: Killed, given: dict[str, Any]
) -> None:
    trigger = BatchTrigger(batch_ids=[make_batch("Hi")], poll_interval=60, **given)
    killed(trigger, states=["failed"], tokens=["ours"])
    assert "POST /batches/*/cancel" not in emulator.request_counts


def test_a_kill_cancels_only_what_is_open(
    make_batch: Callable[..., str], emulator: Emulator, killed: Killed
) -> None:
    ended = make_batch("Hi")
    emulator.service.advance(1000)
    emulator.service.configure({"speed": 0.001})
    going = [make_batch("Hi"), make_batch("Ho")]
    emulator.faults.add("POST /batches/*/cancel:status=500")
    trigger = BatchTrigger(
        batch_ids=[ended, *going], poll_interval=60, cancel_on_kill=True, wait_token="ours"
    )
    killed(trigger, states=["failed"], tokens=["ours"])
    statuses = {batch["id"]: batch["status"] for batch in emulator.service.state()["batches"]}
    assert statuses == {ended: "completed", going[0]: "cancelling", going[1]: "cancelling"}


# What the task hands on ---------------------------------------------------------------------------------------


def test_a_wait_that_began_long_ago_does_not_begin_anew_in_another_triggerer(
    mocker: MockerFixture, siliconflow_connection: str
) -> None:
    now = time.time()
    late = Batch(id="batch_1", status="in_progress", expires_at=now - 20 * 86400)

    async def get_batch(*_: Any, **__: Any) -> Batch:
        return late

    mocker.patch("airflow_provider_siliconflow.api.async_client.AsyncSiliconFlowClient.get_batch", get_batch)
    event = payload(BatchTrigger(batch_ids=["batch_1"], poll_interval=0.05, began=now - 10 * 86400))
    assert event["status"] == "timeout"


@pytest.mark.parametrize("counts_only", [True, False])
def test_a_job_is_told_no_more_than_it_asks_for(make_batch: Callable[..., str], counts_only: bool) -> None:
    """Of hundreds of batches; a sensor returns them whole."""
    event = payload(BatchTrigger(batch_ids=[make_batch("Hi")], poll_interval=0.05, counts_only=counts_only))
    (batch,) = event["batches"]
    assert batch["request_counts"]["completed"] == 1
    assert ("input_file_id" in batch) != counts_only
