"""The operator that runs a whole job: kills, timeouts, deferrals, and what it leaves."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from airflow.providers.common.compat.sdk import (
    AirflowFailException,
    AirflowSkipException,
    TaskDeferred,
)

from airflow_provider_siliconflow.api.client import SiliconFlowClient
from airflow_provider_siliconflow.api.exceptions import (
    BatchCancelledAtTimeoutError,
    BatchTimeoutError,
    InvalidInputError,
    SiliconFlowError,
)
from airflow_provider_siliconflow.hooks.siliconflow import SiliconFlowHook
from airflow_provider_siliconflow.operators.batch import (
    CreateBatchOperator,
    RunBatchOperator,
)

if TYPE_CHECKING:
    from pytest_mock import MockerFixture

    from airflow_provider_siliconflow.emulator import Emulator

MakeContext = Callable[..., dict[str, Any]]
MakeInput = Callable[..., str]
SetState = Callable[[str | None], Any]


def batches(emulator: Emulator) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = emulator.service.state()["batches"]
    return found


@pytest.mark.usefixtures("siliconflow_connection")
def test_a_job_that_cannot_go_on_with_its_paid_batches_leaves_a_retry(
    make_context: MakeContext, emulator: Emulator, tmp_path: Path
) -> None:
    emulator.service.configure({"speed": 0.001})
    arguments: dict[str, Any] = {
        "requests": ["a"],
        "output_dir": str(tmp_path),
        "model": "Qwen/Qwen3-8B",
        "deferrable": True,
    }
    task = RunBatchOperator(task_id="t", **arguments)
    with pytest.raises(TaskDeferred):
        task.execute(make_context(task))
    again = RunBatchOperator(task_id="t", **arguments | {"conn_id": "gone"})
    event = {"status": "ended", "batches": []}
    with pytest.raises(InvalidInputError, match="gone"):
        again.execute_complete(make_context(again), event)
    with pytest.raises(InvalidInputError, match="gone"):
        again.execute(make_context(again, try_number=2))
    with pytest.raises(AirflowFailException, match="gone"):
        again.execute(make_context(again, try_number=1))


@pytest.mark.parametrize("version", [(2, 11), (3, 0)])
@pytest.mark.parametrize("job", [True, False])
@pytest.mark.emulator(speed=0.001, list_lag_seconds=0.2)
@pytest.mark.usefixtures("siliconflow_connection")
def test_airflow_2_breaks_a_request_off_only_when_its_batch_was_looked_for(
    make_context: MakeContext,
    make_input: MakeInput,
    emulator: Emulator,
    tmp_path: Path,
    mocker: MockerFixture,
    set_state: SetState,
    job: bool,
    version: tuple[int, int],
) -> None:
    class Terminated(BaseException):
        """What Airflow 2 raises in the middle of the request."""

    if job:
        task: Any = RunBatchOperator(
            task_id="t", requests=["a"], output_dir=str(tmp_path), model="Qwen/Qwen3-8B"
        )
    else:
        task = CreateBatchOperator(task_id="t", input_path=make_input("Hi"))
    create_batch = SiliconFlowClient.create_batch

    def killed(*args: Any, **kwargs: Any) -> Any:
        create_batch(*args, **kwargs)
        task.on_kill()
        raise Terminated

    set_state("failed")
    mocker.patch.object(SiliconFlowClient, "create_batch", killed)
    mocker.patch("airflow_provider_siliconflow.operators.base.airflow_version", return_value=version)
    mocker.patch("airflow_provider_siliconflow.jobs.search._LIST_PAUSES", (0.3, 0.3))
    with pytest.raises(Terminated):
        task.execute(make_context(task))
    (batch,) = batches(emulator)
    assert (batch["status"] == "cancelling") == (version < (3, 0))


@pytest.mark.parametrize("resumes", [True, False])
@pytest.mark.usefixtures("siliconflow_connection")
def test_a_job_that_is_ended_before_it_begins_sends_nothing_and_cancels_what_is_open(
    make_context: MakeContext,
    emulator: Emulator,
    tmp_path: Path,
    mocker: MockerFixture,
    set_state: SetState,
    resumes: bool,
) -> None:
    emulator.service.configure({"speed": 0.001})
    set_state("failed")
    arguments: dict[str, Any] = {
        "requests": ["a"],
        "output_dir": str(tmp_path),
        "model": "Qwen/Qwen3-8B",
        "deferrable": True,
    }
    task = RunBatchOperator(task_id="t", **arguments)
    if resumes:
        with pytest.raises(TaskDeferred):
            task.execute(make_context(task))
    sent = len(batches(emulator))
    again = RunBatchOperator(task_id="t", **arguments)
    options = again._options

    def ended(*given: Any) -> Any:
        again.on_kill()
        return options(*given)

    mocker.patch.object(again, "_options", ended)
    context = make_context(again)
    event = {"status": "ended", "batches": []}
    with pytest.raises(SiliconFlowError, match="ended from outside"):
        again.execute_complete(context, event) if resumes else again.execute(context)
    assert len(batches(emulator)) == sent
    assert emulator.request_counts.get("POST /batches/*/cancel", 0) == sent


@pytest.mark.parametrize("state", ["failed", "restarting", "running", None])
@pytest.mark.emulator(speed=0.001)
@pytest.mark.usefixtures("siliconflow_connection")
def test_a_batch_whose_answer_comes_after_the_kill_is_cancelled(
    make_context: MakeContext,
    emulator: Emulator,
    tmp_path: Path,
    mocker: MockerFixture,
    set_state: SetState,
    state: str | None,
) -> None:
    """When the signal comes there is no batch to be found yet."""
    set_state(state)
    mocker.patch("airflow_provider_siliconflow.operators.base.airflow_version", return_value=(3, 0))
    task = RunBatchOperator(
        task_id="t",
        on_clear="resubmit",
        requests=["a", "b"],
        output_dir=str(tmp_path),
        model="Qwen/Qwen3-8B",
        max_rows_per_batch=1,
    )
    create_batch = SiliconFlowClient.create_batch

    def killed_first(*args: Any, **kwargs: Any) -> Any:
        task.on_kill()
        return create_batch(*args, **kwargs)

    mocker.patch.object(SiliconFlowClient, "create_batch", killed_first)
    with pytest.raises(SiliconFlowError, match="ended from outside"):
        task.execute(make_context(task))
    (batch,) = batches(emulator)
    assert (batch["status"] == "cancelling") == (state in ("failed", "restarting"))


@pytest.mark.usefixtures("siliconflow_connection")
def test_many_batches_are_cancelled_whatever_one_of_them_answers(
    make_context: MakeContext, emulator: Emulator, tmp_path: Path, set_state: SetState
) -> None:
    emulator.service.configure({"speed": 0.001})
    set_state("failed")
    arguments: dict[str, Any] = {
        "requests": ["a"] * 40,
        "output_dir": str(tmp_path),
        "model": "Qwen/Qwen3-8B",
    }
    task = RunBatchOperator(task_id="t", max_rows_per_batch=1, deferrable=True, **arguments)
    with pytest.raises(TaskDeferred):
        task.execute(make_context(task))
    emulator.faults.add("POST /batches/*/cancel:status=500,times=9")
    task.on_kill()
    assert {batch["status"] for batch in batches(emulator)} == {"cancelling"}


@pytest.mark.emulator(speed=0.001)
@pytest.mark.parametrize("cancel", [True, False])
@pytest.mark.parametrize("deferrable", [True, False])
@pytest.mark.usefixtures("siliconflow_connection")
def test_a_timeout_ends_the_wait_and_cancels_only_if_the_author_says_so(
    make_context: MakeContext,
    emulator: Emulator,
    tmp_path: Path,
    mocker: MockerFixture,
    cancel: bool,
    deferrable: bool,
) -> None:
    mocker.patch("airflow_provider_siliconflow.triggers.batch._FIRST_PAUSE", 0)
    arguments: dict[str, Any] = {
        "requests": ["a", "b"],
        "output_dir": str(tmp_path),
        "model": "Qwen/Qwen3-8B",
    }
    waits: dict[str, Any] = {
        "timeout": timedelta(seconds=0.4),
        "poll_interval": 0.05,
        "deferrable": deferrable,
    }
    task = RunBatchOperator(task_id="t", max_rows_per_batch=1, cancel_on_timeout=cancel, **arguments, **waits)
    error = BatchCancelledAtTimeoutError if cancel else BatchTimeoutError
    began = time.time()
    with pytest.raises(TaskDeferred if deferrable else error) as caught:
        task.execute(make_context(task))
    if deferrable:
        event = asyncio.run(anext(caught.value.trigger.run())).payload
        again = RunBatchOperator(task_id="t", cancel_on_timeout=cancel, **arguments, **waits)
        with pytest.raises(error) as caught:
            again.execute_complete(make_context(again), json.loads(json.dumps(event)))
    assert 0.4 <= time.time() - began < 20
    assert type(caught.value) is error
    assert {batch["status"] for batch in batches(emulator)} == {"cancelling" if cancel else "in_queue"}


@pytest.mark.emulator(speed=0.001)
@pytest.mark.usefixtures("siliconflow_connection")
def test_what_a_job_hands_to_its_trigger(
    make_context: MakeContext, emulator: Emulator, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {
        "requests": ["a"] * 12,
        "output_dir": str(tmp_path),
        "model": "Qwen/Qwen3-8B",
        "max_rows_per_batch": 1,
        "max_in_flight": 8,
        "poll_interval": 7,
        "timeout": 3600,
        "deferrable": True,
    }
    task = RunBatchOperator(task_id="t", **arguments)
    context = make_context(task)
    before = time.time()
    with pytest.raises(TaskDeferred) as deferred:
        task.execute(context)
    given = deferred.value.trigger.serialize()[1]
    assert sorted(given["batch_id"]) == sorted(batch["id"] for batch in batches(emulator))
    assert context["ti"].pushed["batch_ids"] == given["batch_id"]
    assert len(given["batch_id"]) == 8
    # The next go out when a quarter has ended.
    assert given["min_ended"] == 2
    assert given["counts_only"] is True
    assert before <= given["began"] <= time.time()
    assert before + 3600 <= given["deadline"] <= time.time() + 3600
    assert (given["poll_interval"], given["cancel_on_kill"]) == (7.0, True)
    assert given["wait_token"] == context["ti"].pushed["siliconflow_wait"] != ""
    assert timedelta(seconds=3600) < deferred.value.timeout < timedelta(hours=2), (
        "a backstop of that very wait"
    )


@pytest.mark.usefixtures("siliconflow_connection")
def test_what_a_job_that_holds_its_worker_hands_to_the_hook(
    make_context: MakeContext, emulator: Emulator, tmp_path: Path, mocker: MockerFixture
) -> None:
    waits = mocker.spy(SiliconFlowHook, "wait_for_batches")
    task = RunBatchOperator(
        task_id="t",
        requests=["a"] * 12,
        output_dir=str(tmp_path),
        model="Qwen/Qwen3-8B",
        max_rows_per_batch=1,
        max_in_flight=8,
        poll_interval=0.05,
        timeout=3600,
    )
    before = time.time()
    assert task.execute(make_context(task))["rows"]["ok"] == 12
    first, last = waits.call_args_list[0].kwargs, waits.call_args_list[-1].kwargs
    # The next go out when a quarter has ended; nothing is left to go out at last.
    assert (first["min_ended"], last["min_ended"]) == (2, None)
    assert first["poll_interval"] == 0.05
    assert before + 3600 <= first["deadline"] == last["deadline"] <= time.time() + 3600


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.usefixtures("siliconflow_connection")
def test_no_rows_are_an_error_or_a_skip(make_context: MakeContext, tmp_path: Path, skip: bool) -> None:
    task = RunBatchOperator(
        task_id="t", requests=[], output_dir=str(tmp_path), model="Qwen/Qwen3-8B", skip_if_empty=skip
    )
    with pytest.raises(AirflowSkipException if skip else AirflowFailException, match="holds no rows"):
        task.execute(make_context(task))
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("siliconflow_connection")
def test_a_job_that_fails_by_its_verdict_leaves_its_manifest_to_the_tasks_after_it(
    make_context: MakeContext, tmp_path: Path
) -> None:
    task = RunBatchOperator(
        task_id="t",
        requests=["Hi", "[[emulator:error=400]]"],
        output_dir=str(tmp_path),
        model="Qwen/Qwen3-8B",
        max_error_rate=0.1,
        poll_interval=0.05,
    )
    context = make_context(task)
    with pytest.raises(AirflowFailException, match=r"50\.00% is more than max_error_rate"):
        task.execute(context)
    manifest = context["ti"].pushed["return_value"]
    assert manifest == json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["rows"]["ok"] == 1


@pytest.mark.usefixtures("siliconflow_connection")
def test_a_request_file_that_is_not_there_fails_for_good(make_context: MakeContext, tmp_path: Path) -> None:
    task = RunBatchOperator(
        task_id="t", requests=str(tmp_path / "rows.jsonl"), output_dir=str(tmp_path / "out"), model="a"
    )
    with pytest.raises(AirflowFailException, match=r"rows\.jsonl does not exist; nothing was uploaded"):
        task.execute(make_context(task))


@pytest.mark.usefixtures("siliconflow_connection")
def test_a_job_that_the_cache_answers_ends_without_a_wait(
    make_context: MakeContext, emulator: Emulator, tmp_path: Path
) -> None:
    def task(night: str, *, deferrable: bool) -> RunBatchOperator:
        made = RunBatchOperator(
            task_id="t",
            requests=["Say a", "Say b"],
            output_dir=str(tmp_path / night),
            model="Qwen/Qwen3-8B",
            cache_dir="{{ cache }}",
            poll_interval=0.05,
            deferrable=deferrable,
        )
        made.render_template_fields({"cache": str(tmp_path / "cache")})
        return made

    first, second = task("1", deferrable=False), task("2", deferrable=True)
    assert first.execute(make_context(first))["cached"]["rows"] == 0
    before = emulator.request_counts.get("POST /batches", 0)
    assert second.execute(make_context(second, run_id="next"))["cached"]["rows"] == 2
    assert emulator.request_counts.get("POST /batches", 0) == before
    without = RunBatchOperator(task_id="t", requests=["a"], output_dir="x", cache_dir="")
    assert without.ARGUMENTS.read(without, "cache_dir") == {"cache_dir": None}
