"""The arguments of the operators and the sensor: what is refused and when, and what is rendered."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from airflow.providers.common.compat.sdk import (
    DAG,
    AirflowFailException,
    XComArg,
)

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
    CreateBatchOperator: {"input_path": "x"},
    DownloadBatchResultsOperator: {"batch_id": "x", "output_dir": "x"},
    CancelBatchOperator: {"batch_id": "x"},
    RunBatchOperator: {"requests": "x", "output_dir": "x"},
    BatchSensor: {"batch_id": "x"},
}
BOTH = [CreateBatchOperator, RunBatchOperator]
ALL = list(OPERATORS)


@pytest.mark.parametrize("operator", [CreateBatchOperator, RunBatchOperator])
@pytest.mark.parametrize("argument", ["poll_interval", "timeout"])
@pytest.mark.parametrize("value", [0, -1, "soon", True, float("nan"), float("inf"), timedelta(0)])
def test_waiting_arguments_that_cannot_work_fail_when_the_dag_is_parsed(
    operator: type, argument: str, value: Any
) -> None:
    with pytest.raises(ValueError, match=argument):
        operator(task_id="t", **OPERATORS[operator] | {argument: value})


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_argument_that_may_hold_a_text_is_templated(operator: Any) -> None:
    signature = {
        name: str(parameter.annotation)
        for name, parameter in inspect.signature(operator.__init__).parameters.items()
    }
    texts = {
        name
        for name, annotation in signature.items()
        if any(part in annotation for part in ("str", "dict")) or (annotation == "Any" and name != "kwargs")
    }
    assert set(operator.template_fields) == texts


@pytest.mark.parametrize("operator", OPERATORS)
def test_arguments_are_kept_as_they_came(operator: Any) -> None:
    """Airflow renders the attribute: one that was changed on the way there would lose an XComArg."""
    with DAG("dag", start_date=datetime(2026, 1, 1), schedule=None):
        upstream = UploadBatchFileOperator(task_id="upstream", input_path="x")
        # Of two that exclude each other only one may be given.
        names = [name for name in operator.template_fields if name not in ("input_file_id", "model")]
        arguments = dict.fromkeys(names, upstream.output)
        task = operator(task_id="t", **OPERATORS[operator] | arguments)
    assert all(
        getattr(task, name) is upstream.output or isinstance(getattr(task, name), XComArg)
        for name in arguments
    )
    assert task.upstream_task_ids == {"upstream"}


@pytest.mark.parametrize(
    ("operators", "given", "named"),
    [
        ([CreateBatchOperator], {"input_file_id": "file-1", "input_path": "x"}, "not both"),
        ([CreateBatchOperator], {"input_path": None}, "input_file_id or input_path"),
        ([CreateBatchOperator], {"input_path": ""}, "input_file_id or input_path"),
        (ALL, {"conn_id": ""}, "conn_id"),
        ([UploadBatchFileOperator], {"input_path": None}, "input_path"),
        ([DownloadBatchResultsOperator, RunBatchOperator], {"output_dir": ""}, "output_dir"),
        ([DownloadBatchResultsOperator, CancelBatchOperator, BatchSensor], {"batch_id": ""}, "batch_id"),
        ([BatchSensor], {"batch_id": []}, "batch_id"),
        ([BatchSensor], {"batch_id": ["batch_1", None]}, "batch_id"),
        ([RunBatchOperator], {"requests": None}, "requests"),
        (BOTH, {"metadata": {"airflow_work": "mine"}}, "airflow_work"),
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
        ([RunBatchOperator], {"models": []}, "models is empty"),
        ([RunBatchOperator], {"models": ["a", "A"]}, "models names one twice"),
        ([RunBatchOperator], {"models": ["a", ""]}, r"models\[1\]"),
        ([RunBatchOperator], {"models": {"a": 7}}, r"models\['a'\] must be a mapping of body parameters"),
        ([RunBatchOperator], {"models": {"a": {"model": "b"}}}, r"models\['a'\] must not contain"),
        ([RunBatchOperator], {"models": "a"}, "models"),
        ([RunBatchOperator], {"model": 7}, "model must"),
        ([RunBatchOperator], {"prices": {"a": {"promt": 1, "completion": 2}}}, r"prices\['a'\]"),
        ([RunBatchOperator], {"prices": '{"a": {"prompt": 1}}'}, r"prices\['a'\]"),
        (
            [RunBatchOperator],
            {"request_params": {"messages": []}},
            "request_params must not contain 'messages'",
        ),
        ([RunBatchOperator], {"request_params": {"model": 7}}, r"request_params\['model'\]"),
        ([RunBatchOperator], {"request_params": {"stop": {1, 2}}}, r"request_params\['stop'\]"),
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
    read = task.ARGUMENTS.read(task, "poll_interval", "timeout", "max_in_flight")
    assert read == {"poll_interval": 0.05, "timeout": 60.0, "max_in_flight": None}


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


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"input_path": "{{ none }}"}, "input_file_id or input_path"),
        ({"input_file_id": "{{ 'None' }}"}, "input_file_id or input_path"),
        ({"input_file_id": "{{ 'f' }}", "input_path": "{{ 'p' }}"}, "not both"),
        ({"input_path": "/nowhere/rows.jsonl"}, "does not exist"),
        ({"input_file_id": "file-1", "poll_interval": "{{ -1 }}"}, "poll_interval"),
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


@pytest.mark.usefixtures("siliconflow_connection")
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"poll_interval": "{{ 'soon' }}"}, "poll_interval"),
        ({"output_dir": "{{ none }}"}, "output_dir"),
        ({"requests": "{{ none }}"}, "requests must be rows"),
        ({"models": "{{ [] }}"}, "models is empty"),
        ({"models": "{{ {'a': 7} }}"}, "must be a mapping of body parameters"),
        ({"request_params": "{{ {'messages': []} }}"}, "request_params must not contain 'messages'"),
        ({"prices": "{{ {'a': 1} }}"}, "prices"),
    ],
)
def test_a_wrong_argument_of_a_job_fails_for_good_before_any_batch(
    make_context: MakeContext, emulator: Emulator, tmp_path: Path, arguments: dict[str, Any], named: str
) -> None:
    given = {"requests": ["Hi"], "output_dir": str(tmp_path / "out")} | arguments
    task = RunBatchOperator(task_id="t", **given)
    task.render_template_fields({})
    with pytest.raises(AirflowFailException, match=named):
        task.execute(make_context(task))
    assert emulator.request_counts == {}


def test_what_a_template_may_still_change_is_not_judged_when_the_dag_is_parsed() -> None:
    RunBatchOperator(
        task_id="t",
        requests="{{ rows }}",
        output_dir="{{ dir }}",
        model="{{ one }}",
        models="{{ several }}",
        prices={"{{ model }}": {"prompt": "{{ price }}", "completion": 2}},
        metadata={"note": "{{ note }}" * 100},
        request_params={"{{ name }}": 1},
    )
    CreateBatchOperator(task_id="t", input_path="{{ path }}", replace={"model": "{{ model }}"})
