"""What Airflow knows of a task: who submits, how a running task is being ended, and whether a trigger may end it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from airflow.providers.common.compat.sdk import Asset, BaseOperator

from airflow_provider_siliconflow.operators.batch import CreateBatchOperator
from airflow_provider_siliconflow.task import state
from airflow_provider_siliconflow.task.state import (
    TaskTry,
    airflow_version,
    is_ended_by_a_person,
    may_end_in_trigger,
)

if TYPE_CHECKING:
    from pytest_mock import MockerFixture


def test_who_submits_and_since_when(
    make_context: Callable[..., dict[str, Any]], mocker: MockerFixture, store: Any
) -> None:
    task = BaseOperator(task_id="t")
    context = make_context(task, map_index=2, max_tries=5, try_number=3) | {"task_state_store": store}
    early = datetime.now(UTC) - timedelta(days=2)
    # The run's own start moves when somebody clears another task of it.
    context["dag_run"].logical_date = early
    found = TaskTry.of(context)
    assert (found.submitter.label, found.submitter.generation, found.submitter.epoch) == (
        "dag/t[2]/run",
        0,
        5,
    )
    assert TaskTry.of(context, on_clear="resubmit").submitter.generation == 5
    assert (found.number, found.search, found.since, found.store) == (
        3,
        "patiently",
        early.timestamp(),
        store,
    )
    # `retries` may have been edited: the number of the try alone says that one came before.
    task.retries = 5
    assert TaskTry.of(context).search == "patiently"
    mocker.patch("airflow_provider_siliconflow.task.state.conf.getboolean", return_value=False)
    assert TaskTry.of(context).store is None


@pytest.mark.parametrize("name", ["", "production"])
def test_two_airflows_on_one_account_are_told_apart_by_their_names(
    make_context: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    context = make_context(BaseOperator(task_id="t"))
    unnamed = TaskTry.of(context).submitter
    monkeypatch.setenv("AIRFLOW__SILICONFLOW__DEPLOYMENT_ID", name)
    named = TaskTry.of(context).submitter
    assert named.deployment_id == (name or None)
    assert (named.key(input="a") == unnamed.key(input="a")) == (not name)


def test_a_first_try_looks_once_since_it_may_be_run_again_under_its_number(
    make_context: Callable[..., dict[str, Any]],
) -> None:
    assert TaskTry.of(make_context(BaseOperator(task_id="t"))).search == "once"


@pytest.mark.parametrize(
    ("found", "proof"),
    [
        ("failed", True),
        ("success", True),
        ("skipped", True),
        ("restarting", True),
        ("running", False),
        ("up_for_retry", False),
        ("scheduled", False),
        ("queued", False),
        ("deferred", False),
        ("removed", False),
        ("upstream_failed", False),
        (None, False),
    ],
)
def test_a_state_that_no_person_gave_is_no_proof(
    set_state: Callable[[str | None], Any], found: str | None, proof: bool
) -> None:
    set_state(found)
    assert is_ended_by_a_person(object()) == proof


@pytest.mark.parametrize("late", [True, False])
def test_a_state_that_cannot_be_read_in_time_is_no_proof(
    mocker: MockerFixture, caplog: pytest.LogCaptureFixture, late: bool
) -> None:
    """The database may be what hangs, and it is then what ends the task."""
    mocker.patch.object(state, "_STATE_PATIENCE", 0.1)

    answered = threading.Event()

    def ask(_: Any) -> str:
        if not late:
            raise ConnectionError("no database")
        answered.wait(30)
        return "failed"

    mocker.patch.object(state, "task_state", side_effect=ask)
    began = time.monotonic()
    assert not is_ended_by_a_person(object())
    assert time.monotonic() - began < 20
    answered.set()
    assert "Nothing is cancelled" in caplog.text
    assert late or "no database" in caplog.text


# Ending in the trigger ----------------------------------------------------------------------------------------

needs_new_airflow = pytest.mark.skipif(airflow_version() < (3, 3), reason="only from 3.3 on without loss")


class OwnEnding(CreateBatchOperator):
    def execute_complete(self, context: Any, event: Any = None) -> str:
        return super().execute_complete(context, event)


@needs_new_airflow
@pytest.mark.parametrize(
    ("operator", "arguments", "listener", "may"),
    [
        (CreateBatchOperator, {}, False, True),
        (CreateBatchOperator, {"outlets": [Asset("s3://evals/answers")]}, False, False),
        (CreateBatchOperator, {"post_execute": print}, False, False),
        (OwnEnding, {}, False, False),
        (CreateBatchOperator, {}, True, False),
    ],
)
def test_a_trigger_ends_no_task_that_needs_a_worker_for_it(
    mocker: MockerFixture, operator: type, arguments: dict[str, Any], listener: bool, may: bool
) -> None:
    manager = mocker.Mock(has_listeners=listener)
    mocker.patch("airflow.sdk.listener.get_listener_manager", return_value=manager)
    assert may_end_in_trigger(operator(task_id="t", input_path="x", **arguments)) == may


@pytest.mark.parametrize("version", [(2, 11), (3, 2)])
def test_an_older_airflow_ends_no_task_in_the_trigger(
    mocker: MockerFixture, version: tuple[int, int]
) -> None:
    mocker.patch.object(state, "airflow_version", return_value=version)
    assert not may_end_in_trigger(CreateBatchOperator(task_id="t", input_path="x"))


# What Airflow is asked ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("earliest", ["start_date", "run_after", "logical_date", "the task's own"])
def test_no_try_can_have_sent_anything_before_the_earliest_time_of_its_run(
    make_context: Callable[..., dict[str, Any]], earliest: str
) -> None:
    early, late = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 2, tzinfo=UTC)
    context = make_context(BaseOperator(task_id="t"), start_date=late)
    for name in ("start_date", "run_after", "logical_date"):
        setattr(context["dag_run"], name, early if name == earliest else late)
    if earliest == "the task's own":
        context["ti"].start_date = early
    assert TaskTry.of(context).since == early.timestamp()


@pytest.mark.parametrize(
    ("map_index", "states", "found"),
    [
        (-1, {"run": {"t": "failed"}}, "failed"),
        (None, {"run": {"t": "failed"}}, "failed"),
        (0, {"run": {"t_0": "failed", "t_1": "running"}}, "failed"),
        (1, {"run": {"t_0": "failed", "t_1": "running"}}, "running"),
        (-1, {"run": {"t": None}}, None),
        (-1, {"run": {}}, None),
        (-1, {}, None),
    ],
)
@pytest.mark.skipif(airflow_version() < (3, 0), reason="older versions know it from the task instance")
def test_the_state_is_that_of_this_very_task_instance(
    make_context: Callable[..., dict[str, Any]],
    mocker: MockerFixture,
    map_index: int | None,
    states: dict[str, Any],
    found: str | None,
) -> None:
    from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance

    asked = mocker.patch.object(RuntimeTaskInstance, "get_task_states", return_value=states)
    ti = make_context(BaseOperator(task_id="t"), map_index=map_index)["ti"]
    assert state.task_state(ti) == found
    asked.assert_called_once_with(dag_id="dag", task_ids=["t"], run_ids=["run"], map_index=map_index)


@pytest.mark.parametrize("found", ["failed", None])
def test_airflow_2_knows_the_state_from_the_task_instance(mocker: MockerFixture, found: str | None) -> None:
    mocker.patch.object(state, "airflow_version", return_value=(2, 11))
    # An enum, whose text is not its value.
    current = None if found is None else mocker.Mock(value=found)
    assert state.task_state(mocker.Mock(current_state=lambda: current)) == found
