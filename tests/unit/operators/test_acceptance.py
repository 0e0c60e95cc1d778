"""Arguments that are Python objects: what is refused, and what becomes of them in a serialized DAG and a deferral."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from airflow.providers.common.compat.sdk import DAG, AirflowFailException, TaskDeferred, XComArg, task
from pydantic import BaseModel

from airflow_provider_siliconflow.decorators.batch import siliconflow_batch_task
from airflow_provider_siliconflow.operators.batch import RunBatchOperator, UploadBatchFileOperator
from tests.support.triggers import payload

if TYPE_CHECKING:
    from airflow_provider_siliconflow.api.models import BatchResult
    from airflow_provider_siliconflow.emulator import Emulator

MakeContext = Callable[..., dict[str, Any]]

pytestmark = pytest.mark.every_airflow


class Label(BaseModel):
    label: str
    stars: int


SCHEMA = {"type": "object", "title": "{{ not a template }}", "required": ["label"]}


def is_short(result: BatchResult, most: int = 100) -> bool | str:
    return len(result.parsed.label) < most or "too long"


class Check:
    def __call__(self, result: BatchResult) -> bool:
        return True


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"output_type": "Label"}, "output_type must be a pydantic model class"),
        ({"output_type": Label(label="a", stars=1)}, "output_type must be a pydantic model class"),
        ({"output_type": {"type": "strin", "title": "{{ a }}"}}, "output_type is not a JSON schema"),
        ({"accept": "{{ accept }}"}, "accept must be a function"),
        ({"accept": True}, "accept must be a function"),
        (
            {"output_type": Label, "structured_output": "json"},
            "structured_output must be one of 'json_object'",
        ),
        ({"structured_output": "prompt"}, "structured_output has no meaning without output_type"),
        ({"retry_params": {"messages": []}}, "retry_params must not contain 'messages'"),
        ({"retry_params": {"model": "a"}}, "retry_params must not contain 'model'"),
        ({"retry_params": '{"stop": NaN}'}, "retry_params"),
    ],
)
def test_what_cannot_work_fails_when_the_dag_is_parsed(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        RunBatchOperator(task_id="t", requests="x", output_dir="x", **given)


def test_the_output_of_a_task_is_no_type() -> None:
    with DAG("dag", start_date=datetime(2026, 1, 1), schedule=None):
        upstream = UploadBatchFileOperator(task_id="upstream", input_path="x")
        assert isinstance(upstream.output, XComArg)
        with pytest.raises(ValueError, match="output_type must be"):
            RunBatchOperator(task_id="t", requests="x", output_dir="x", output_type=upstream.output)


@pytest.mark.usefixtures("siliconflow_connection")
def test_templates_are_read_when_the_task_starts(
    make_context: MakeContext, emulator: Emulator, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"requests": ["Hi"], "output_dir": str(tmp_path / "out")}
    task = RunBatchOperator(task_id="t", structured_output="{{ how }}", **given)
    task.render_template_fields({"how": "prompt"})
    with pytest.raises(AirflowFailException, match="structured_output has no meaning without output_type"):
        task.execute(make_context(task))
    assert emulator.request_counts == {}
    task = RunBatchOperator(
        task_id="t", structured_output="{{ none }}", retry_params="{{ {'seed': 1} }}", **given
    )
    task.render_template_fields({})
    read = task.ARGUMENTS.read(task, "structured_output", "retry_params")
    assert read == {"structured_output": None, "retry_params": {"seed": 1}}


def serialized(dag: DAG) -> str:
    try:
        from airflow.serialization.serialized_objects import DagSerialization as Serialization
    except ImportError:
        from airflow.serialization.serialized_objects import SerializedDAG as Serialization
    data = Serialization.to_dict(dag)
    Serialization.from_dict(data)
    return json.dumps(data)


@pytest.mark.parametrize("output_type", [Label, SCHEMA], ids=["pydantic", "schema"])
@pytest.mark.parametrize(
    "accept", [is_short, functools.partial(is_short, most=5), Check(), lambda result: True]
)
def test_a_dag_with_python_objects_is_serialized(output_type: Any, accept: Any) -> None:
    given: dict[str, Any] = {"output_type": output_type, "accept": accept, "retry_params": {"seed": 1}}
    with DAG("dag", start_date=datetime(2026, 1, 1), schedule=None) as dag:
        whole = RunBatchOperator(task_id="whole", requests="x", output_dir="x", **given)
        RunBatchOperator.partial(task_id="mapped", output_dir="x", **given).expand(requests=["a", "b"])

        @task
        def numbers() -> list[int]:
            return [1, 2]

        def rows(number: int) -> list[str]:
            return [f"Say {number}"]

        decorated = siliconflow_batch_task(rows, output_dir="x", **given)
        decorated(1)
        decorated.override(task_id="mapped_rows").expand(number=numbers())
    assert set(dag.task_ids) == {"whole", "mapped", "rows", "mapped_rows", "numbers"}
    assert "not a template" not in json.dumps(sorted(map(str, whole.template_fields)))
    assert not {"output_type", "accept"} & set(whole.template_fields)
    assert '"whole"' in serialized(dag)


@pytest.mark.usefixtures("siliconflow_connection")
@pytest.mark.emulator(speed=1000.0, invalid_rate=0.5)
def test_a_task_that_resumes_in_another_process_judges_alike(
    make_context: MakeContext, emulator: Emulator, tmp_path: Path
) -> None:
    """The DAG is parsed again there: everything that is not in the event comes from the operator."""

    def operator() -> RunBatchOperator:
        return RunBatchOperator(
            task_id="t",
            requests=[f"Say {n}" for n in range(20)],
            output_dir=str(tmp_path),
            model="deepseek-ai/DeepSeek-V3",
            output_type=Label,
            accept=is_short,
            max_row_attempts=2,
            deferrable=True,
            poll_interval=0.05,
        )

    waits = 0
    step = operator().execute
    while True:
        try:
            manifest = step(make_context(operator()))
            break
        except TaskDeferred as deferred:
            waits += 1
            event = payload(deferred.trigger)
            step = functools.partial(operator().execute_complete, event=event)
    assert waits == 2
    assert manifest["rounds"][0]["rows"] == 20
    assert manifest["rounds"][1]["rows"] == 20 - manifest["rounds"][0]["ok"] > 0
    assert manifest["rows"]["ok"] == 20
