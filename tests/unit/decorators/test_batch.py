"""``@task.siliconflow_batch``: the function is called once, and its rows are sent as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from airflow.providers.common.compat.sdk import DAG, AirflowFailException

from airflow_provider_siliconflow.decorators.batch import (
    SiliconFlowBatchDecoratedOperator,
    siliconflow_batch_task,
)

MakeContext = Callable[..., dict[str, Any]]


def decorated(function: Callable[..., Any], **arguments: Any) -> SiliconFlowBatchDecoratedOperator:
    with DAG("dag", start_date=datetime(2026, 1, 1), schedule=None):
        given: dict[str, Any] = {"model": "Qwen/Qwen3-8B", "poll_interval": 0.05} | arguments
        operator: SiliconFlowBatchDecoratedOperator = siliconflow_batch_task(function, **given)().operator
        return operator


@pytest.mark.usefixtures("siliconflow_connection")
def test_the_rows_of_a_function_are_run(make_context: MakeContext, tmp_path: Path) -> None:
    calls = []

    def rows() -> Iterator[str]:
        calls.append(1)
        yield "Say {{ this }}"
        yield "Say that"

    task = decorated(rows, output_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert "requests" not in task.template_fields
    manifest = task.execute(make_context(task))
    assert manifest["rows"]["ok"] == 2
    assert list((tmp_path / "cache" / "siliconflow-answers").iterdir())
    assert len(calls) == 1
    assert "{{ this }}" in (tmp_path / "results.jsonl").read_text()


@pytest.mark.usefixtures("siliconflow_connection")
def test_a_function_that_returns_something_else_is_named(make_context: MakeContext, tmp_path: Path) -> None:
    def rows() -> str:
        return "/nowhere/rows.jsonl"

    task = decorated(rows, output_dir=str(tmp_path))
    with pytest.raises(AirflowFailException, match=r"what rows\(\) returned|rows\.jsonl does not exist"):
        task.execute(make_context(task))


@pytest.mark.parametrize(
    ("arguments", "named"), [({"multiple_outputs": True}, "multiple_outputs"), ({"models": []}, "models")]
)
def test_what_cannot_work_fails_when_the_dag_is_parsed(arguments: dict[str, Any], named: str) -> None:
    def rows() -> list[str]:
        return []

    with pytest.raises(ValueError, match=named):
        decorated(rows, output_dir="x", **{"model": None} | arguments)
