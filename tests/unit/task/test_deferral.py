"""The one way to defer, and the token of a wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from airflow.providers.common.compat.sdk import BaseOperator, TaskDeferred

from airflow_provider_siliconflow.task.deferral import WAIT_KEY, backstop, defer, end_wait, record_wait
from airflow_provider_siliconflow.task.state import TaskTry
from airflow_provider_siliconflow.triggers.batch import BatchTrigger


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
