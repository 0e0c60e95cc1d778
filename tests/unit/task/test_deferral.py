"""The one way to defer, and the token of a wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from airflow.providers.common.compat.sdk import BaseOperator, TaskDeferred

from airflow_provider_siliconflow.api.models import Batch
from airflow_provider_siliconflow.task.deferral import (
    WAIT_KEY,
    LeftWaiting,
    backstop,
    defer,
    end_wait,
    left_waiting,
    record_wait,
    recorded_wait,
)
from airflow_provider_siliconflow.task.state import TaskTry, airflow_version
from airflow_provider_siliconflow.triggers.batch import BatchTrigger

if TYPE_CHECKING:
    from pytest_mock import MockerFixture


def test_airflows_own_limit_comes_after_the_triggers_whatever_that_is() -> None:
    assert backstop(None) > timedelta(days=14, hours=1), "an hour after the longest batch expires"
    assert timedelta(minutes=10) < backstop(time.time() + 60) - timedelta(seconds=60) < timedelta(hours=1)
    assert backstop(time.time() - 86400) > timedelta(minutes=10), "a wait that is over polls once more"


def test_a_task_defers_to_its_own_method() -> None:
    trigger = BatchTrigger(batch_ids=["batch_1"])
    with pytest.raises(TaskDeferred) as deferred:
        defer(BaseOperator(task_id="t"), trigger, deadline=None)
    assert deferred.value.trigger is trigger
    assert (deferred.value.method_name, deferred.value.timeout) == ("execute_complete", backstop(None))


def test_each_wait_has_a_token_of_its_own_and_none_once_it_is_over(
    make_context: Callable[..., dict[str, Any]],
) -> None:
    context = make_context(BaseOperator(task_id="t"))
    task_try, pushed = TaskTry.of(context), context["ti"].pushed
    first = record_wait(task_try)
    assert pushed[WAIT_KEY] == first
    assert record_wait(task_try) != first
    end_wait(task_try)
    assert pushed[WAIT_KEY] == ""


def test_what_is_waited_for_is_kept_for_a_later_generation_only(
    make_context: Callable[..., dict[str, Any]], store: Any
) -> None:
    task = BaseOperator(task_id="t")

    def of_generation(number: int) -> TaskTry:
        return TaskTry.of(make_context(task, max_tries=number) | {"task_state_store": store})

    batch = Batch(id="batch_1", status="in_progress", input_file_id="file-1")
    record_wait(of_generation(1))
    assert left_waiting(of_generation(2)) is None, "a job has a folder of its own"
    record_wait(of_generation(1), batch)
    assert left_waiting(of_generation(1)) is None, "a retry takes the batch up"
    left = left_waiting(of_generation(2))
    assert left == LeftWaiting("batch_1", "file-1")
    assert left.is_it(batch)
    assert not left.is_it(Batch(id="batch_1", status="in_progress", input_file_id="file-2"))
    assert not left.is_it(Batch(id="batch_2", status="in_progress", input_file_id="file-1"))
    end_wait(of_generation(1))
    assert left_waiting(of_generation(2)) is None
    (kept,) = store.retentions
    assert kept > timedelta(days=30)


def test_without_a_store_nothing_is_kept(make_context: Callable[..., dict[str, Any]]) -> None:
    task_try = TaskTry.of(make_context(BaseOperator(task_id="t"), max_tries=1))
    record_wait(task_try, Batch(id="batch_1", status="in_progress"))
    assert left_waiting(task_try) is None
    end_wait(task_try)


@pytest.mark.parametrize("pushed", ["token", "", None, 7])
@pytest.mark.skipif(airflow_version() < (3, 0), reason="older triggerers are told of no kill")
def test_the_triggerer_reads_the_token_of_this_very_task_instance(
    make_context: Callable[..., dict[str, Any]], mocker: MockerFixture, pushed: Any
) -> None:
    from airflow.sdk.bases.xcom import BaseXCom

    read = mocker.patch.object(BaseXCom, "get_one", return_value=pushed)
    ti = make_context(BaseOperator(task_id="t"), map_index=3)["ti"]
    assert recorded_wait(ti) == (pushed if isinstance(pushed, str) else None)
    read.assert_called_once_with(key=WAIT_KEY, dag_id="dag", task_id="t", run_id="run", map_index=3)
