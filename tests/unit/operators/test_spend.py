"""What a job costs: where its prices come from, and what its manifest says of the service's own bill."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from airflow.providers.common.compat.sdk import AirflowFailException

from airflow_provider_siliconflow.emulator import Emulator
from airflow_provider_siliconflow.operators.batch import RunBatchOperator

MakeContext = Callable[..., dict[str, Any]]

V3, R1, QWEN = "deepseek-ai/DeepSeek-V3", "deepseek-ai/DeepSeek-R1", "Qwen/Qwen3-8B"
PRICES = {
    V3: {"prompt": 1, "completion": 4, "cached_prompt": 0.3},
    R1: {"prompt": 2.1, "completion": 8.7},
    QWEN: {"prompt": 0.7, "completion": 0.1, "cached_prompt": 0},
}


def run(make_context: MakeContext, output: Path, **arguments: Any) -> dict[str, Any]:
    task = RunBatchOperator(task_id="t", output_dir=str(output), poll_interval=0.01, **arguments)
    return task.execute(make_context(task))


@pytest.mark.emulator(speed=2000.0, cached_share=0.3, prices=PRICES)
def test_the_cost_by_prices_of_argument_connection_and_configuration_is_the_service_s_bill(
    make_context: MakeContext, emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = json.loads(emulator.airflow_connection)
    dear = {"prompt": 1000, "completion": 1000}
    connection["extra"] = {"prices": json.dumps({V3.lower(): dear, R1: PRICES[R1]})}
    monkeypatch.setenv("AIRFLOW_CONN_SILICONFLOW_DEFAULT", json.dumps(connection))
    monkeypatch.setenv("AIRFLOW__SILICONFLOW__PRICES", json.dumps({R1: dear, QWEN: PRICES[QWEN]}))
    rows = [f"What is {n} times {n}? {'[[emulator:once=503]]' if n == 3 else ''}" for n in range(9)]
    manifest = run(
        make_context,
        tmp_path,
        requests=rows,
        models=[V3, R1, QWEN],
        prices={V3: PRICES[V3]},
        max_row_attempts=2,
    )
    assert manifest["rows"]["ok"] == 27
    assert 0 < manifest["billed_usage"]["cached_tokens"] < manifest["billed_usage"]["prompt_tokens"]
    for each in manifest["models"]:
        assert each["cost"]["total"] == pytest.approx(float(emulator.bill.cost(each["model"])), abs=1e-6)


@pytest.mark.parametrize(
    ("connection", "config", "said"),
    [
        (
            '{"m": {"prompt": 1}}',
            "",
            r"connection 'siliconflow_default', extra: prices\['m'\] lacks 'completion'",
        ),
        ("", "{", r"\[siliconflow\] prices in Airflow's configuration is not JSON"),
        ("", '["m"]', r"\[siliconflow\] prices must be a mapping"),
    ],
)
def test_wrong_prices_fail_before_anything_is_sent_and_are_named_by_their_place(
    make_context: MakeContext,
    emulator: Emulator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    connection: str,
    config: str,
    said: str,
) -> None:
    extra = {"extra": {"prices": connection}}
    monkeypatch.setenv(
        "AIRFLOW_CONN_SILICONFLOW_DEFAULT", json.dumps(json.loads(emulator.airflow_connection) | extra)
    )
    monkeypatch.setenv("AIRFLOW__SILICONFLOW__PRICES", config)
    with pytest.raises(AirflowFailException, match=said):
        run(make_context, tmp_path, requests=["a"], model=V3)
    assert not emulator.requests


def test_a_dry_run_takes_prices_of_the_configuration_and_needs_no_connection(
    make_context: MakeContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW__SILICONFLOW__PRICES", json.dumps(PRICES))
    found = run(make_context, tmp_path, requests=["a" * 40], model=V3, dry_run=True, conn_id="gone")
    assert found["models"][0]["prompt_cost"] == 1e-05


@pytest.mark.emulator(speed=2000.0, prices=PRICES)
@pytest.mark.usefixtures("siliconflow_connection")
def test_a_job_of_the_operator_stays_within_max_cost(
    make_context: MakeContext, emulator: Emulator, tmp_path: Path
) -> None:
    manifest = run(
        make_context,
        tmp_path,
        requests=[f"Say {n}" for n in range(9)],
        model=V3,
        prices={V3: {**PRICES[V3], "thinking": 0}},
        request_params={"max_tokens": 50},
        max_cost="0.003",
    )
    assert (manifest["rows"]["ok"], manifest["budget"]["max_cost"]) == (9, 0.003)
    assert manifest["budget"]["spent"] == pytest.approx(float(emulator.bill.total), abs=1e-6)
    with pytest.raises(AirflowFailException, match="max_cost is 0 CNY, but the prompts of the rows"):
        run(
            make_context,
            tmp_path / "none",
            requests=["x" * 100],
            model=V3,
            prices=PRICES,
            request_params={"max_tokens": 5, "enable_thinking": False},
            max_cost=0,
        )


@pytest.mark.parametrize("max_cost", [-1, "free", True, float("nan"), float("inf")])
def test_a_max_cost_that_is_no_sum_fails_when_the_dag_is_parsed(max_cost: Any) -> None:
    with pytest.raises(ValueError, match="max_cost must be a number of 0 or more, in CNY"):
        RunBatchOperator(task_id="t", output_dir="x", requests=["a"], max_cost=max_cost)
