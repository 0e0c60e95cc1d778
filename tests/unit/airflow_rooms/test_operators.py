"""The operators: what they refuse and when, what is rendered, and that each does its one thing once."""

from __future__ import annotations

import asyncio
import inspect
import json
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from airflow.providers.common.compat.sdk import (
    DAG,
    AirflowFailException,
    AirflowSkipException,
    TaskDeferred,
    XComArg,
)

from airflow_provider_siliconflow.api.client import SiliconFlowClient
from airflow_provider_siliconflow.api.exceptions import (
    BatchTimeoutError,
    InvalidInputError,
    SiliconFlowError,
)
from airflow_provider_siliconflow.api.models import Batch
from airflow_provider_siliconflow.operators.batch import (
    CancelBatchOperator,
    CreateBatchOperator,
    DownloadBatchResultsOperator,
    RunBatchOperator,
    UploadBatchFileOperator,
)
from airflow_provider_siliconflow.sensors.batch import BatchSensor

if TYPE_CHECKING:
    from airflow_provider_siliconflow.emulator import Emulator

MakeContext = Callable[..., dict[str, Any]]
MakeInput = Callable[..., str]

#: Each with as little as it needs.
OPERATORS: dict[type, dict[str, Any]] = {
    UploadBatchFileOperator: {"input_path": "x"},
    CreateBatchOperator: {},
    DownloadBatchResultsOperator: {"batch_id": "x", "output_dir": "x"},
    CancelBatchOperator: {"batch_id": "x"},
    RunBatchOperator: {"requests": "x", "output_dir": "x"},
    BatchSensor: {"batch_id": "x"},
}


def batches(emulator: Emulator) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = emulator.service.state()["batches"]
    return found


# At parse ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", [CreateBatchOperator, RunBatchOperator])
@pytest.mark.parametrize("argument", ["poll_interval", "timeout"])
@pytest.mark.parametrize("value", [0, -1, "soon", True, float("nan"), float("inf"), timedelta(0)])
def test_waiting_arguments_that_cannot_work_fail_when_the_dag_is_parsed(
    operator: type, argument: str, value: Any
) -> None:
    with pytest.raises(ValueError, match=argument):
        operator(task_id="t", **OPERATORS[operator] | {argument: value})


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_argument_that_may_hold_a_text_is_templated(operator: type) -> None:
    signature = {"conn_id": "str"}
    for name, parameter in inspect.signature(operator.__init__).parameters.items():
        signature[name] = str(parameter.annotation)
    texts = {
        name
        for name, annotation in signature.items()
        if any(part in annotation for part in ("str", "dict")) or (annotation == "Any" and name != "kwargs")
    }
    assert set(operator.template_fields) == texts


@pytest.mark.parametrize("operator", OPERATORS)
def test_arguments_are_kept_as_they_came(operator: type) -> None:
    """Airflow renders the attribute: one that was changed on the way there would lose an XComArg."""
    with DAG("dag", start_date=datetime(2026, 1, 1), schedule=None):
        upstream = UploadBatchFileOperator(task_id="upstream", input_path="x")
        arguments = dict.fromkeys(operator.template_fields, upstream.output)
        task = operator(task_id="t", **OPERATORS[operator] | arguments)
    assert all(
        getattr(task, name) is upstream.output or isinstance(getattr(task, name), XComArg)
        for name in arguments
    )
    assert task.upstream_task_ids == {"upstream"}


BOTH = [CreateBatchOperator, RunBatchOperator]


@pytest.mark.parametrize(
    ("operators", "given", "named"),
    [
        ([CreateBatchOperator], {"input_file_id": "file-1", "input_path": "x"}, "not both"),
        ([RunBatchOperator], {"model": "a", "models": ["b"]}, "not both"),
        (BOTH, {"completion_window": "12h"}, "completion_window"),
        (BOTH, {"completion_window": timedelta(days=15)}, "completion_window"),
        (BOTH, {"metadata": {str(n): "" for n in range(16)}}, "metadata"),
        ([CreateBatchOperator], {"endpoint": "/v1/embeddings"}, "endpoint"),
        ([CreateBatchOperator], {"replace": "Qwen/Qwen3-32B"}, "replace"),
        ([CreateBatchOperator], {"replace": {"model": ""}}, "replace"),
        ([RunBatchOperator], {"max_rows_per_batch": 6000}, "max_rows_per_batch"),
        ([RunBatchOperator], {"max_in_flight": 0}, "max_in_flight"),
        ([RunBatchOperator], {"max_error_rate": 5}, "max_error_rate"),
    ],
)
def test_what_cannot_work_fails_when_the_dag_is_parsed(
    operators: list[type], given: dict[str, Any], named: str
) -> None:
    for operator in operators:
        with pytest.raises(ValueError, match=named):
            operator(task_id="t", **OPERATORS[operator] | given)


@pytest.mark.usefixtures("siliconflow_connection")
def test_numbers_and_mappings_may_be_templates(
    make_context: MakeContext, tmp_path: Path, emulator: Emulator
) -> None:
    task = RunBatchOperator(
        task_id="t",
        requests=["Say a", "Say b", "Say c"],
        output_dir=str(tmp_path),
        model="{{ model }}",
        models="{{ models }}",
        prices="{{ prices }}",
        request_params="{{ {'max_tokens': 7} }}",
        max_rows_per_batch="{{ most }}",
        max_in_flight="{{ nothing }}",
        max_row_attempts="{{ most }}",
        max_error_rate="{{ rate }}",
        poll_interval="{{ interval }}",
        timeout=timedelta(minutes=1),
    )
    task.render_template_fields(
        {
            "model": None,
            "models": ["Qwen/Qwen3-8B"],
            "prices": json.dumps({"Qwen/Qwen3-8B": {"prompt": 1, "completion": 2}}),
            "most": 2,
            "nothing": "",
            "rate": 0.5,
            "interval": 0.05,
        }
    )
    manifest = task.execute(make_context(task))
    assert [batch["rows"] for batch in manifest["models"][0]["batches"]] == [2, 1]
    assert manifest["cost"]["total"] > 0
    assert task.wait_arguments() == (0.05, 60.0)


def test_fields_are_rendered(make_context: MakeContext) -> None:
    task = CreateBatchOperator(
        task_id="t",
        input_path="s3://{{ bucket }}/rows.jsonl",
        completion_window="{{ hours }}h",
        metadata={"run": "{{ bucket }}"},
        replace={"model": "{{ model }}"},
        conn_id="conn_{{ bucket }}",
    )
    task.render_template_fields({"bucket": "b", "hours": 48, "model": "m"})
    assert task.input_path == "s3://b/rows.jsonl", "the path, not the content of the file"
    assert (task.completion_window, task.metadata, task.replace) == ("48h", {"run": "b"}, {"model": "m"})
    assert task.conn_id == task.hook.conn_id == "conn_b"


def test_operators_and_sensor_can_be_mapped() -> None:
    with DAG("dag", start_date=datetime(2026, 1, 1), schedule=None):
        create = CreateBatchOperator.partial(task_id="create", poll_interval=5).expand(input_path=["a", "b"])
        wait = BatchSensor.partial(task_id="wait", poke_interval=5, deferrable=True).expand(
            batch_id=create.output
        )
        DownloadBatchResultsOperator.partial(task_id="download", output_dir="x").expand(
            batch_id=create.output
        )
    assert wait.upstream_task_ids == {"create"}


# When the task starts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({}, "input_file_id or input_path"),
        ({"input_file_id": "None"}, "input_file_id"),
        ({"input_path": ""}, "path"),
        ({"input_path": "/nowhere/rows.jsonl"}, "does not exist"),
        ({"input_file_id": "file-1", "completion_window": "{{ '12h' }}"}, "completion_window"),
        ({"input_file_id": "file-1", "endpoint": "{{ '/v1/embeddings' }}"}, "endpoint"),
        ({"input_file_id": "file-1", "metadata": "{{ 'team' }}"}, "metadata"),
        ({"input_file_id": "file-1", "replace": {"model": "{{ '' }}"}}, "replace"),
    ],
)
@pytest.mark.usefixtures("siliconflow_connection")
def test_a_wrong_argument_fails_for_good_before_any_request(
    make_context: MakeContext, emulator: Emulator, arguments: dict[str, Any], named: str
) -> None:
    task = CreateBatchOperator(task_id="t", **arguments)
    task.render_template_fields({})
    with pytest.raises(AirflowFailException, match=named):
        task.execute(make_context(task))
    assert emulator.request_counts == {}


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.usefixtures("siliconflow_connection")
def test_rows_without_a_model_need_one_for_all(
    make_context: MakeContext, make_input: MakeInput, emulator: Emulator, durable: bool
) -> None:
    path = make_input("Hi", model=None)
    task = CreateBatchOperator(task_id="t", input_path=path, durable=durable)
    with pytest.raises(AirflowFailException, match="1 of 1 lines name no model"):
        task.execute(make_context(task))
    assert emulator.request_counts == {}
    task = CreateBatchOperator(
        task_id="t", input_path=path, replace={"model": "Qwen/Qwen3-8B"}, durable=durable
    )
    task.execute(make_context(task))
    assert batches(emulator)[0]["request"]["replace"] == {"model": "Qwen/Qwen3-8B"}


@pytest.mark.usefixtures("siliconflow_connection")
def test_fail_fast_off_leaves_the_error_to_the_tasks_retries(make_context: MakeContext) -> None:
    task = CreateBatchOperator(task_id="t", fail_fast=False)
    with pytest.raises(InvalidInputError):
        task.execute(make_context(task))


# Work -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("siliconflow_connection")
def test_upload_create_cancel(make_context: MakeContext, make_input: MakeInput, emulator: Emulator) -> None:
    upload = UploadBatchFileOperator(task_id="upload", input_path=make_input("Hi"))
    context = make_context(upload)
    file_id = upload.execute(context)
    assert context["ti"].pushed == {"file_id": file_id}
    create = CreateBatchOperator(
        task_id="create", input_file_id=file_id, completion_window=timedelta(days=2), metadata={"team": "nlp"}
    )
    context = make_context(create)
    batch_id = create.execute(context)
    assert context["ti"].pushed == {"batch_id": batch_id}
    (made,) = batches(emulator)
    assert (made["id"], made["input_file_id"], made["completion_window"]) == (batch_id, file_id, "48h")
    assert made["metadata"]["team"] == "nlp"
    cancel = CancelBatchOperator(task_id="cancel", batch_id=batch_id)
    assert cancel.execute(make_context(cancel))["id"] == batch_id
    assert emulator.request_counts["POST /files"] == emulator.request_counts["POST /batches"] == 1


@pytest.mark.parametrize("deferrable", [False, True])
@pytest.mark.usefixtures("siliconflow_connection")
def test_create_waits_and_download_fetches(
    make_context: MakeContext,
    make_input: MakeInput,
    emulator: Emulator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    deferrable: bool,
) -> None:
    monkeypatch.setattr("airflow_provider_siliconflow.triggers.batch._FIRST_PAUSE", 0)
    create = CreateBatchOperator(
        task_id="create",
        input_path=make_input("Hi", "[[emulator:error=400]]"),
        wait_for_completion=True,
        deferrable=deferrable,
        poll_interval=0.05,
    )
    context = make_context(create)
    if deferrable:
        with pytest.raises(TaskDeferred) as deferred:
            create.execute(context)
        batch_id = context["ti"].pushed["batch_id"]
        event = asyncio.run(anext(deferred.value.trigger.run()))
        # It passes through Airflow's database, and another object takes it up.
        payload = json.loads(json.dumps(event.payload))
        again = CreateBatchOperator(task_id="create", input_path="gone", wait_for_completion=True)
        assert getattr(again, deferred.value.method_name)(context, payload) == batch_id
    else:
        batch_id = create.execute(context)
    download = DownloadBatchResultsOperator(
        task_id="download", batch_id=batch_id, output_dir=str(tmp_path / "out"), fail_on_partial_error=True
    )
    with pytest.raises(AirflowFailException, match="1 of 2 rows succeeded"):
        download.execute(make_context(download))
    # The files are written all the same.
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 2
    assert emulator.request_counts["POST /batches"] == 1


@pytest.mark.usefixtures("siliconflow_connection")
def test_a_batch_of_which_nothing_succeeded_fails_with_counts_and_the_commonest_reason(
    make_context: MakeContext, make_input: MakeInput
) -> None:
    rows = ["[[emulator:error=429]]", "[[emulator:error=400]]", "[[emulator:error=400]]"]
    create = CreateBatchOperator(
        task_id="t", input_path=make_input(*rows), wait_for_completion=True, poll_interval=0.05
    )
    words = r"0 of 3 rows succeeded.*The request has invalid parameters\. \(20015\) \(2 rows\)"
    with pytest.raises(AirflowFailException, match=words):
        create.execute(make_context(create))


@pytest.mark.emulator(speed=0.001)
@pytest.mark.parametrize("cancel", [True, False])
@pytest.mark.usefixtures("siliconflow_connection")
def test_a_timeout_cancels_only_where_the_author_says_so(
    make_context: MakeContext, make_input: MakeInput, emulator: Emulator, cancel: bool
) -> None:
    create = CreateBatchOperator(
        task_id="t",
        input_path=make_input("Hi"),
        wait_for_completion=True,
        poll_interval=0.05,
        timeout=0.2,
        cancel_on_timeout=cancel,
    )
    with pytest.raises(BatchTimeoutError):
        create.execute(make_context(create))
    assert emulator.request_counts.get("POST /batches/*/cancel", 0) == int(cancel)


@pytest.mark.parametrize("cancel", [True, False])
@pytest.mark.usefixtures("siliconflow_connection")
def test_a_kill_cancels_unless_the_author_says_otherwise(
    make_context: MakeContext, make_input: MakeInput, emulator: Emulator, cancel: bool
) -> None:
    create = CreateBatchOperator(task_id="t", input_path=make_input("Hi"), cancel_on_kill=cancel)
    create.execute(make_context(create))
    create.on_kill()
    assert emulator.request_counts.get("POST /batches/*/cancel", 0) == int(cancel)


@pytest.mark.usefixtures("siliconflow_connection")
def test_a_retry_adopts_what_the_first_try_made_and_a_clear_does_not(
    make_context: MakeContext, make_input: MakeInput, emulator: Emulator
) -> None:
    path = make_input("Hi")

    def run(**ti: Any) -> str:
        create = CreateBatchOperator(task_id="t", input_path=path, retries=2)
        made: str = create.execute(make_context(create, **ti))
        return made

    first = run(try_number=1, max_tries=2)
    assert run(try_number=2, max_tries=2) == first
    assert run(try_number=1, max_tries=2, map_index=1) != first
    assert run(try_number=3, max_tries=4) != first
    assert len(batches(emulator)) == 3


class Store:
    """Airflow's task state store, as far as it is used."""

    def __init__(self) -> None:
        self.entries: dict[str, Any] = {}
        self.retentions: set[Any] = set()

    def get(self, key: str, default: Any = None) -> Any:
        return self.entries.get(key, default)

    def set(self, key: str, value: Any, *, retention: Any = None) -> None:
        self.entries[key] = value
        self.retentions.add(retention)

    def delete(self, key: str) -> None:
        self.entries.pop(key, None)


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches of the account are patient: a minute, which need not pass here."""
    from airflow_provider_siliconflow.jobs.clock import SystemClock

    slept = 0.0

    def sleep(_: SystemClock, seconds: float) -> None:
        nonlocal slept
        slept += seconds

    monkeypatch.setattr(SystemClock, "sleep", sleep)
    monkeypatch.setattr(SystemClock, "time", lambda _: time.time() + slept)


@pytest.mark.parametrize("there_from_the_start", [True, False])
@pytest.mark.usefixtures("siliconflow_connection", "no_pauses")
def test_a_store_that_came_between_two_tries_pays_nothing_again(
    make_context: MakeContext, make_input: MakeInput, emulator: Emulator, there_from_the_start: bool
) -> None:
    path, store = make_input("Hi"), Store()

    def run(stored: bool, **ti: Any) -> str:
        create = CreateBatchOperator(task_id="t", input_path=path, retries=2)
        context = make_context(create, **ti) | ({"task_state_store": store} if stored else {})
        made: str = create.execute(context)
        return made

    first = run(there_from_the_start, try_number=1, max_tries=2)
    assert run(True, try_number=2, max_tries=2) == first
    assert run(True, try_number=3, max_tries=2) == first
    # A person's clear: on 3.3.2 what the store holds outlives it.
    assert run(True, try_number=4, max_tries=5) != first
    assert len(batches(emulator)) == 2
    (kept,) = store.retentions
    assert kept > timedelta(days=30), "an entry outlives the longest batch"


@pytest.mark.usefixtures("siliconflow_connection")
def test_a_retry_that_cannot_reach_its_paid_batch_leaves_another_retry(
    make_context: MakeContext, make_input: MakeInput
) -> None:
    store = Store()
    create = CreateBatchOperator(task_id="t", input_path=make_input("Hi"), retries=2)
    paid = create.execute(make_context(create, max_tries=2) | {"task_state_store": store})
    again = CreateBatchOperator(task_id="t", input_path="/gone/rows.jsonl", retries=2)
    with pytest.raises(InvalidInputError, match=f"does not exist.*Batch {paid} is submitted"):
        again.execute(make_context(again, max_tries=2, try_number=2) | {"task_state_store": store})
    resumed = CreateBatchOperator(task_id="t", input_path="/gone/rows.jsonl", conn_id="gone", retries=2)
    batch = Batch(id=paid, status="completed", request_counts={"total": 2, "completed": 1, "failed": 1})
    event = {"status": "ended", "batches": [batch.to_json_dict()]}
    with pytest.raises(InvalidInputError, match=f"gone.*Batch {paid} is submitted"):
        resumed.execute_complete(make_context(resumed, max_tries=2) | {"task_state_store": store}, event)


@pytest.mark.usefixtures("siliconflow_connection")
def test_a_job_that_cannot_go_on_with_its_paid_batches_leaves_a_retry(
    make_context: MakeContext, emulator: Emulator, tmp_path: Path
) -> None:
    emulator.service.configure({"speed": 0.001})
    arguments = {"requests": ["a"], "output_dir": str(tmp_path), "model": "Qwen/Qwen3-8B", "deferrable": True}
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


@pytest.mark.parametrize("state", ["running", "up_for_retry", "failed", "restarting", None])
@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.usefixtures("siliconflow_connection")
def test_the_end_of_a_worker_cancels_nothing_that_a_retry_takes_up(
    make_context: MakeContext,
    make_input: MakeInput,
    emulator: Emulator,
    monkeypatch: pytest.MonkeyPatch,
    state: str | None,
    durable: bool,
) -> None:
    monkeypatch.setattr("airflow_provider_siliconflow.task.state.task_state", lambda _: state)
    create = CreateBatchOperator(task_id="t", input_path=make_input("Hi"), durable=durable)
    create.execute(make_context(create))
    create.on_kill()
    assert emulator.request_counts.get("POST /batches/*/cancel", 0) == int(
        state not in ("running", "up_for_retry") or not durable
    )


@pytest.mark.parametrize("version", [(2, 11), (3, 0)])
@pytest.mark.parametrize("job", [True, False])
@pytest.mark.emulator(speed=0.001, list_lag_seconds=0.2)
@pytest.mark.usefixtures("siliconflow_connection")
def test_airflow_2_breaks_a_request_off_only_when_its_batch_was_looked_for(
    make_context: MakeContext,
    make_input: MakeInput,
    emulator: Emulator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
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

    monkeypatch.setattr(SiliconFlowClient, "create_batch", killed)
    monkeypatch.setattr("airflow_provider_siliconflow.operators.base.airflow_version", lambda: version)
    monkeypatch.setattr("airflow_provider_siliconflow.task.state.task_state", lambda _: "failed")
    monkeypatch.setattr("airflow_provider_siliconflow.jobs.submission._LIST_PAUSES", (0.3, 0.3))
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
    monkeypatch: pytest.MonkeyPatch,
    resumes: bool,
) -> None:
    emulator.service.configure({"speed": 0.001})
    arguments = {"requests": ["a"], "output_dir": str(tmp_path), "model": "Qwen/Qwen3-8B", "deferrable": True}
    task = RunBatchOperator(task_id="t", **arguments)
    if resumes:
        with pytest.raises(TaskDeferred):
            task.execute(make_context(task))
    sent = len(batches(emulator))
    again = RunBatchOperator(task_id="t", **arguments)
    options = again._options

    def ended() -> Any:
        again.on_kill()
        return options()

    monkeypatch.setattr(again, "_options", ended)
    context = make_context(again)
    event = {"status": "ended", "batches": []}
    with pytest.raises(SiliconFlowError, match="ended from outside"):
        again.execute_complete(context, event) if resumes else again.execute(context)
    assert len(batches(emulator)) == sent
    assert emulator.request_counts.get("POST /batches/*/cancel", 0) == sent


@pytest.mark.usefixtures("siliconflow_connection")
def test_many_batches_are_cancelled_whatever_one_of_them_answers(
    make_context: MakeContext, emulator: Emulator, tmp_path: Path
) -> None:
    emulator.service.configure({"speed": 0.001})
    arguments = {"requests": ["a"] * 40, "output_dir": str(tmp_path), "model": "Qwen/Qwen3-8B"}
    task = RunBatchOperator(task_id="t", max_rows_per_batch=1, deferrable=True, **arguments)
    with pytest.raises(TaskDeferred):
        task.execute(make_context(task))
    emulator.faults.add("POST /batches/*/cancel:status=500,times=9")
    task.on_kill()
    assert {batch["status"] for batch in batches(emulator)} == {"cancelling"}


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
def test_an_expired_batch_is_judged_by_counts_that_come_late(
    make_context: MakeContext, make_input: MakeInput, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = CreateBatchOperator(
        task_id="t",
        input_path=make_input("Hi", "[[emulator:expire]]"),
        wait_for_completion=True,
        poll_interval=0.05,
    )
    hook = type(create.hook)
    read = hook.wait_for_batches

    def early(*arguments: Any, **named: Any) -> Any:
        """What the poll saw that met the end: the status alone."""
        update = {"status": "expired", "request_counts": {}, "output_file_id": None, "error_file_id": None}
        return [
            type(batch).model_validate(batch.model_dump() | update) for batch in read(*arguments, **named)
        ]

    monkeypatch.setattr(hook, "wait_for_batches", early)
    assert create.execute(make_context(create)) == batches(emulator)[0]["id"]


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
