"""Models and parameters that the service refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from airflow_provider_siliconflow.emulator import ServiceError
from tests.unit.emulator.clients import MODEL, Account, row

if TYPE_CHECKING:
    from pathlib import Path

OTHER = "deepseek-ai/DeepSeek-V3"
JSON_MODE: dict[str, Any] = {"response_format": {"type": "json_object"}}


def outcomes(account: Account, batch: dict[str, Any]) -> dict[str, str]:
    """Return the code and message by row; the counts of the batch must agree with them."""
    counts = batch["request_counts"]
    # Without such rows there is no such file.
    errors = {
        line["custom_id"]: f"{line['error']['code']} {line['error']['message']}"
        for line in (account.lines(batch, "error") if counts["failed"] else ())
    }
    answered = dict.fromkeys(account.ids(batch, "output") if counts["completed"] else (), "ok")
    assert (counts["completed"], counts["failed"]) == (len(answered), len(errors))
    return {**errors, **answered}


def test_a_model_that_batches_do_not_take_is_refused(tmp_path: Path) -> None:
    account = Account(tmp_path, batch_models=(OTHER,))
    file_id = account.upload([row("a")])
    with pytest.raises(ServiceError) as refused:
        account.create(file_id)
    assert (refused.value.status, refused.value.body["code"]) == (400, 20012)
    with pytest.raises(ServiceError):
        account.create(account.upload([row("a", model=OTHER)]), replace={"model": MODEL})
    assert account.create(file_id, replace={"model": OTHER})["status"] == "in_queue"
    # No list of models says so.
    assert MODEL in [one["id"] for one in account.service.models()["data"]]


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        (127, "20015 thinking_budget: Must be greater than or equal to 128"),
        (0, "20015 thinking_budget: Must be greater than or equal to 128"),
        (32769, "20015 thinking_budget: Must be less than or equal to 32768"),
        ("500", "20015 thinking_budget: Must be an integer"),
        (True, "20015 thinking_budget: Must be an integer"),
        (128, "ok"),
        (32768, "ok"),
        (None, "ok"),
    ],
)
def test_thinking_budget_has_bounds(tmp_path: Path, budget: Any, said: str) -> None:
    account = Account(tmp_path)
    lines = [row("a", thinking_budget=budget), row("b")]
    assert outcomes(account, account.run(lines)) == {"a": said, "b": "ok"}
    replaced = account.run([row("a"), row("b")], replace={"thinking_budget": budget})
    assert outcomes(account, replaced) == {"a": said, "b": said}


def test_a_model_without_thinking_refuses_the_parameter(tmp_path: Path) -> None:
    account = Account(tmp_path, no_thinking_models=(OTHER,))
    lines = [row("on", enable_thinking=True), row("off", enable_thinking=False), row("not-given")]
    said = "20015 Value error, current model does not support parameter `enable_thinking`."
    batch = account.run(lines, replace={"model": OTHER})
    assert outcomes(account, batch) == {"on": said, "off": said, "not-given": "ok"}
    assert set(outcomes(account, account.run(lines)).values()) == {"ok"}


def test_a_model_without_json_mode_refuses_it(tmp_path: Path) -> None:
    account = Account(tmp_path, no_json_models=(OTHER,), row_error_rate=1.0)
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    lines = [
        row("object", **JSON_MODE),
        row("schema", response_format=schema),
        row("text", response_format={"type": "text"}),
    ]
    account.run(lines, replace={"model": OTHER})
    # The second time no other failure is left, but a refusal lasts.
    said = "20024 Json mode is not supported for this model."
    batch = account.run(lines, replace={"model": OTHER})
    assert outcomes(account, batch) == {"object": said, "schema": said, "text": "ok"}
    account.run(lines)
    assert set(outcomes(account, account.run(lines)).values()) == {"ok"}


def test_thinking_is_bounded_by_its_budget_and_not_by_max_tokens(tmp_path: Path) -> None:
    account = Account(tmp_path, thinking_tokens=1000)
    batch = account.run(
        [
            row("free", enable_thinking=True, max_tokens=1),
            row("bounded", enable_thinking=True, max_tokens=1, thinking_budget=128),
            row("off", max_tokens=1),
        ]
    )
    bodies = {line["custom_id"]: line["response"]["body"] for line in account.lines(batch, "output")}
    completion = {name: body["usage"]["completion_tokens"] for name, body in bodies.items()}
    assert completion == {"free": 1001, "bounded": 129, "off": 1}
    thought = bodies["bounded"]["choices"][0]["message"]["reasoning_content"]
    assert len(thought) == 4 * bodies["bounded"]["usage"]["completion_tokens_details"]["reasoning_tokens"]
