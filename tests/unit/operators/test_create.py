"""Upload, create, download and cancel: each does its one thing once, and what a task that has paid does."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from airflow.providers.common.compat.sdk import (
    AirflowFailException,
    TaskDeferred,
)

from airflow_provider_siliconflow.api.client import SiliconFlowClient
from airflow_provider_siliconflow.api.exceptions import (
    BatchTimeoutError,
    InvalidInputError,
)
from airflow_provider_siliconflow.api.models import Batch
from airflow_provider_siliconflow.operators.batch import (
    CancelBatchOperator,
    CreateBatchOperator,
    DownloadBatchResultsOperator,
    UploadBatchFileOperator,
)

if TYPE_CHECKING:
    from pytest_mock import MockerFixture

    from airflow_provider_siliconflow.emulator import Emulator

MakeContext = Callable[..., dict[str, Any]]
MakeInput = Callable[..., str]


def batches(emulator: Emulator) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = emulator.service.state()["batches"]
    return found


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
    task = CreateBatchOperator(task_id="t", input_path="/nowhere", fail_fast=False)
    with pytest.raises(InvalidInputError):
        task.execute(make_context(task))


@pytest.mark.parametrize("deferrable", [False, True])
@pytest.mark.usefixtures("siliconflow_connection")
def test_create_waits_and_download_fetches(
    make_context: MakeContext,
    make_input: MakeInput,
    emulator: Emulator,
    tmp_path: Path,
    mocker: MockerFixture,
    deferrable: bool,
) -> None:
    mocker.patch("airflow_provider_siliconflow.triggers.batch._FIRST_PAUSE", 0)
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
def test_a_batch_of_which_nothing_succeeded_fails_with_counts_and_the_most_common_reason(
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
    make_context: MakeContext,
    make_input: MakeInput,
    emulator: Emulator,
    set_state: Callable[[str | None], Any],
    cancel: bool,
) -> None:
    set_state("failed")
    create = CreateBatchOperator(task_id="t", input_path=make_input("Hi"), cancel_on_kill=cancel)
    create.execute(make_context(create))
    create.on_kill()
    assert emulator.request_counts.get("POST /batches/*/cancel", 0) == int(cancel)


@pytest.mark.parametrize("on_clear", ["reuse", "resubmit"])
@pytest.mark.usefixtures("siliconflow_connection", "no_pauses")
def test_a_retry_adopts_what_the_first_try_made_and_a_clear_does_if_it_reuses(
    make_context: MakeContext, make_input: MakeInput, emulator: Emulator, on_clear: Any
) -> None:
    path = make_input("Hi")

    def run(**ti: Any) -> str:
        create = CreateBatchOperator(task_id="t", input_path=path, retries=2, on_clear=on_clear)
        made: str = create.execute(make_context(create, **ti))
        return made

    first = run(try_number=1, max_tries=2)
    assert run(try_number=2, max_tries=2) == first
    assert run(try_number=1, max_tries=2, map_index=1) != first
    cleared = run(try_number=3, max_tries=4)
    assert (cleared == first) == (on_clear == "reuse")
    assert run(try_number=4, max_tries=5) == cleared or on_clear == "resubmit"
    assert len(batches(emulator)) == (2 if on_clear == "reuse" else 4)


@pytest.mark.parametrize("on_clear", ["reuse", "resubmit"])
@pytest.mark.parametrize("there_from_the_start", [True, False])
@pytest.mark.usefixtures("siliconflow_connection", "no_pauses")
def test_a_store_that_came_between_two_tries_pays_nothing_again(
    make_context: MakeContext,
    make_input: MakeInput,
    store: Any,
    emulator: Emulator,
    there_from_the_start: bool,
    on_clear: Any,
) -> None:
    path = make_input("Hi")

    def run(stored: bool, **ti: Any) -> str:
        create = CreateBatchOperator(task_id="t", input_path=path, retries=2, on_clear=on_clear)
        context = make_context(create, **ti) | ({"task_state_store": store} if stored else {})
        made: str = create.execute(context)
        return made

    first = run(there_from_the_start, try_number=1, max_tries=2)
    assert run(True, try_number=2, max_tries=2) == first
    assert run(True, try_number=3, max_tries=2) == first
    # A manual clear: on 3.3.2 what the store holds outlives it, later versions discard it.
    assert (run(True, try_number=4, max_tries=5) == first) == (on_clear == "reuse")
    store.entries.clear()
    assert (run(True, try_number=5, max_tries=6) == first) == (on_clear == "reuse")
    assert len(batches(emulator)) == (1 if on_clear == "reuse" else 3)
    (kept,) = store.retentions
    assert kept > timedelta(days=30), "an entry outlives the longest batch"


@pytest.mark.usefixtures("siliconflow_connection")
def test_a_retry_that_cannot_reach_its_paid_batch_leaves_another_retry(
    make_context: MakeContext, make_input: MakeInput, store: Any, caplog: pytest.LogCaptureFixture
) -> None:
    create = CreateBatchOperator(task_id="t", input_path=make_input("Hi"), retries=2)
    paid = create.execute(make_context(create, max_tries=2) | {"task_state_store": store})
    again = CreateBatchOperator(task_id="t", input_path="/gone/rows.jsonl", retries=2)
    with pytest.raises(InvalidInputError, match="does not exist") as caught:
        again.execute(make_context(again, max_tries=2, try_number=2) | {"task_state_store": store})
    assert any("An earlier try may have submitted batches" in note for note in caught.value.__notes__)
    assert "at no extra cost" in caplog.text, "the UI shows no notes"
    resumed = CreateBatchOperator(task_id="t", input_path="/gone/rows.jsonl", conn_id="gone", retries=2)
    batch = Batch(id=paid, status="completed", request_counts={"total": 2, "completed": 1, "failed": 1})
    event = {"status": "ended", "batches": [batch.to_json_dict()]}
    with pytest.raises(InvalidInputError, match="gone") as caught:
        resumed.execute_complete(make_context(resumed, max_tries=2) | {"task_state_store": store}, event)
    assert any(f"Submitted: batch {paid}" in note for note in caught.value.__notes__)


@pytest.mark.parametrize(
    "state",
    ["running", "up_for_retry", "queued", "deferred", "failed", "success", "skipped", "restarting", None],
)
@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("on_clear", ["reuse", "resubmit"])
@pytest.mark.usefixtures("siliconflow_connection")
def test_the_end_of_a_worker_cancels_nothing_that_a_retry_takes_up(
    make_context: MakeContext,
    make_input: MakeInput,
    emulator: Emulator,
    set_state: Callable[[str | None], Any],
    state: str | None,
    durable: bool,
    on_clear: Any,
) -> None:
    set_state(state)
    create = CreateBatchOperator(task_id="t", input_path=make_input("Hi"), durable=durable, on_clear=on_clear)
    create.execute(make_context(create))
    create.on_kill()
    assert emulator.request_counts.get("POST /batches/*/cancel", 0) == int(
        state in ("failed", "success", "skipped")
        or (state == "restarting" and on_clear == "resubmit")
        or not durable
    )


@pytest.mark.usefixtures("siliconflow_connection")
def test_an_expired_batch_is_judged_by_counts_that_come_late(
    make_context: MakeContext, make_input: MakeInput, emulator: Emulator, mocker: MockerFixture
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
        update: dict[str, Any] = {
            "status": "expired",
            "request_counts": {},
            "output_file_id": None,
            "error_file_id": None,
        }
        return [
            type(batch).model_validate(batch.model_dump() | update) for batch in read(*arguments, **named)
        ]

    mocker.patch.object(hook, "wait_for_batches", early)
    assert create.execute(make_context(create)) == batches(emulator)[0]["id"]


@pytest.mark.emulator(speed=0.001)
@pytest.mark.parametrize("state", ["failed", "running"])
@pytest.mark.usefixtures("siliconflow_connection")
def test_a_batch_whose_answer_comes_after_the_kill_is_cancelled(
    make_context: MakeContext,
    make_input: MakeInput,
    emulator: Emulator,
    mocker: MockerFixture,
    set_state: Callable[[str | None], Any],
    state: str,
) -> None:
    """When the signal comes there is no batch to be found yet."""
    set_state(state)
    mocker.patch("airflow_provider_siliconflow.operators.base.airflow_version", return_value=(3, 0))
    create = CreateBatchOperator(task_id="t", input_path=make_input("Hi"))
    create_batch = SiliconFlowClient.create_batch

    def killed_first(*args: Any, **kwargs: Any) -> Any:
        create.on_kill()
        return create_batch(*args, **kwargs)

    mocker.patch.object(SiliconFlowClient, "create_batch", killed_first)
    create.execute(make_context(create))
    (batch,) = batches(emulator)
    assert (batch["status"] == "cancelling") == (state == "failed")


@pytest.mark.emulator(speed=0.001)
@pytest.mark.parametrize("may_end", [True, False])
@pytest.mark.parametrize("cancels", [True, False])
@pytest.mark.usefixtures("siliconflow_connection")
def test_what_a_create_task_hands_to_its_trigger(
    make_context: MakeContext, make_input: MakeInput, mocker: MockerFixture, may_end: bool, cancels: bool
) -> None:
    mocker.patch("airflow_provider_siliconflow.operators.create.may_end_in_trigger", return_value=may_end)
    create = CreateBatchOperator(
        task_id="t",
        input_path=make_input("Hi"),
        wait_for_completion=True,
        deferrable=True,
        poll_interval=7,
        timeout=3600,
        cancel_on_kill=cancels,
    )
    context = make_context(create)
    before = time.time()
    with pytest.raises(TaskDeferred) as deferred:
        create.execute(context)
    given, pushed = deferred.value.trigger.serialize()[1], context["ti"].pushed
    assert given["batch_id"] == [pushed["batch_id"]]
    assert before + 3600 <= given["deadline"] <= time.time() + 3600
    assert (given["poll_interval"], given["end_in_trigger"]) == (7.0, may_end)
    assert (given["cancel_on_kill"], given["wait_token"]) == (cancels, pushed.get("siliconflow_wait"))
    # If no worker comes to push it.
    assert pushed.get("return_value") == (pushed["batch_id"] if may_end else None)


@pytest.mark.emulator(speed=0.001)
@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.usefixtures("siliconflow_connection", "no_pauses")
def test_an_input_that_changed_between_two_tries_pays_for_nothing_but_with_durable_off(
    make_context: MakeContext, make_input: MakeInput, store: Any, emulator: Emulator, durable: bool
) -> None:
    def run(text: str, **ti: Any) -> str:
        create = CreateBatchOperator(task_id="t", input_path=make_input(text), retries=2, durable=durable)
        made: str = create.execute(make_context(create, max_tries=2, **ti) | {"task_state_store": store})
        return made

    paid = run("Hi", try_number=1)
    if durable:
        with pytest.raises(InvalidInputError, match=paid):
            run("Ho", try_number=2)
        assert len(batches(emulator)) == 1
    else:
        assert run("Ho", try_number=2) != paid


# Clears -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.usefixtures("siliconflow_connection", "no_pauses")
def test_a_batch_without_a_single_answer_is_replaced_by_a_clear_and_by_no_retry(
    make_context: MakeContext, make_input: MakeInput, store: Any, emulator: Emulator, stored: bool
) -> None:
    path = make_input("a [[emulator:once=400]]", "b [[emulator:once=400]]")

    def run(**ti: Any) -> str:
        create = CreateBatchOperator(
            task_id="t", input_path=path, wait_for_completion=True, poll_interval=0.05, allow_all_failed=True
        )
        made: str = create.execute(
            make_context(create, **ti) | ({"task_state_store": store} if stored else {})
        )
        return made

    first = run(try_number=1, max_tries=2)
    assert run(try_number=2, max_tries=2) == first
    second = run(try_number=3, max_tries=4)
    assert second != first
    # It has answers, and is kept; also by a retry that finds both in the account.
    assert run(try_number=4, max_tries=4) == second
    assert run(try_number=5, max_tries=6) == second
    assert len(batches(emulator)) == 2


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.usefixtures("siliconflow_connection", "no_pauses")
def test_an_input_that_was_changed_before_a_clear_is_new_work_and_between_retries_an_error(
    make_context: MakeContext, make_input: MakeInput, store: Any, emulator: Emulator, stored: bool
) -> None:
    def run(text: str, **ti: Any) -> str:
        create = CreateBatchOperator(task_id="t", input_path=make_input(text), retries=2)
        made: str = create.execute(
            make_context(create, **ti) | ({"task_state_store": store} if stored else {})
        )
        return made

    first = run("a", try_number=1, max_tries=2)
    with pytest.raises(InvalidInputError, match="was changed between two tries"):
        run("b", try_number=2, max_tries=2)
    second = run("b", try_number=3, max_tries=4)
    assert second != first
    with pytest.raises(InvalidInputError, match="was changed between two tries"):
        run("c", try_number=4, max_tries=4)
    assert run("a", try_number=5, max_tries=6) == first, "what was paid for before is still there"
    assert len(batches(emulator)) == 2


@pytest.mark.parametrize("cancels", [True, False])
@pytest.mark.parametrize("changed", [True, False])
@pytest.mark.emulator(speed=0.001)
@pytest.mark.usefixtures("siliconflow_connection", "no_pauses")
def test_a_clear_while_deferred_cancels_only_what_is_not_wanted_any_more(
    make_context: MakeContext,
    make_input: MakeInput,
    store: Any,
    emulator: Emulator,
    changed: bool,
    cancels: bool,
) -> None:
    def run(text: str, **ti: Any) -> None:
        create = CreateBatchOperator(
            task_id="t",
            input_path=make_input(text),
            wait_for_completion=True,
            deferrable=True,
            cancel_on_kill=cancels,
        )
        with pytest.raises(TaskDeferred):
            create.execute(make_context(create, **ti) | {"task_state_store": store})

    run("a", try_number=1, max_tries=2)
    run("b" if changed else "a", try_number=2, max_tries=3)
    statuses = [batch["status"] for batch in batches(emulator)]
    assert statuses == [
        "cancelling" if changed and cancels else "in_queue",
        *(["in_queue"] if changed else []),
    ]


@pytest.mark.usefixtures("siliconflow_connection", "no_pauses")
def test_a_run_that_was_deleted_and_made_again_is_new_work(
    make_context: MakeContext, make_input: MakeInput, emulator: Emulator
) -> None:
    """Without a task state store; Airflow deletes that of a run with the run."""
    path = make_input("Hi")
    began = datetime(2026, 1, 1, tzinfo=UTC)

    def run(start: datetime, *, cleared: int = 0, **ti: Any) -> str:
        create = CreateBatchOperator(task_id="t", input_path=path, retries=2)
        context = make_context(create, **{"max_tries": 2, **ti})
        context["dag_run"].start_date, context["dag_run"].clear_number = start, cleared
        made: str = create.execute(context)
        return made

    first = run(began)
    assert run(began) == first, "`airflow tasks test` has the same run"
    again = run(began + timedelta(days=1))
    assert again != first
    assert run(began + timedelta(days=1), try_number=2) == again
    # A clear moves the start of the run, and the batch of the later run is the one.
    assert run(began + timedelta(days=2), cleared=1, try_number=3, max_tries=5) == again
    assert len(batches(emulator)) == 2
