"""What rows can cost at most."""

from __future__ import annotations

import itertools
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_siliconflow.api.exceptions import InvalidInputError, InvalidRequestFileError
from airflow_provider_siliconflow.batch_files.cost_bounds import (
    LONGEST_THINKING,
    MESSAGE_TOKENS,
    TEMPLATE_TOKENS,
    Tariff,
    TokenBound,
    UnboundedRowError,
    bound_file,
    bound_row,
)
from airflow_provider_siliconflow.batch_files.shards import split_requests

V3, R1, QWEN = "deepseek-ai/DeepSeek-V3", "deepseek-ai/DeepSeek-R1", "Qwen/Qwen3-8B"
PRICES: dict[str, Any] = {
    V3: {"prompt": 1, "completion": 4, "thinking": 0},
    R1: {"prompt": 2, "completion": 8, "cached_prompt": 3},
    QWEN: {"prompt": 0.7, "completion": 0.1},
}
MESSAGES = [{"role": "user", "content": "今天天气很好"}]
MESSAGE_BYTES = len(json.dumps(MESSAGES, ensure_ascii=False, separators=(",", ":")).encode())


def line(**body: Any) -> bytes:
    row = {"custom_id": "a", "body": {"messages": MESSAGES, **body}}
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode()


def cost(model: str, **body: Any) -> Fraction:
    _, bound = bound_row(line(**body))
    return Tariff((model,), PRICES, Fraction(1)).cost({"": bound}, model) * 1_000_000


def test_a_prompt_is_bounded_by_its_bytes_and_an_answer_by_max_tokens() -> None:
    prompt = MESSAGE_BYTES + MESSAGE_TOKENS + TEMPLATE_TOKENS
    assert bound_row(line(max_tokens=10, enable_thinking=False)) == (
        "",
        TokenBound(prompt, 10, switched_off=1),
    )
    assert bound_row(line(max_tokens=10, enable_thinking=False, n=3, model="m"))[1].answers == 30
    # A model reads neither of these, but it reads tools, which its template may write in other words.
    assert bound_row(line(max_tokens=1, temperature=0.5, stop=["x"]))[1].prompt == prompt
    tools = [{"type": "function", "function": {"name": "f" * 100}}]
    assert bound_row(line(max_tokens=1, tools=tools))[1].prompt > prompt + 4 * 100
    assert bound_row(line(max_tokens=1, response_format={"schema": "x" * 100}))[1].prompt > prompt + 4 * 100


def test_thinking_comes_on_top_of_max_tokens_unless_it_is_off() -> None:
    prompt = MESSAGE_BYTES + MESSAGE_TOKENS + TEMPLATE_TOKENS
    assert cost(QWEN, max_tokens=10, enable_thinking=False) == Fraction("0.7") * prompt + 1
    # A model that only thinks may ignore the switch.
    assert cost(R1, max_tokens=10, enable_thinking=False) == 3 * prompt + 8 * (10 + LONGEST_THINKING)
    # Only Qwen3 is known to stop at its budget; an author may know better of another model.
    assert cost(QWEN, max_tokens=10, n=2, thinking_budget=200) == Fraction("0.7") * prompt + 42
    assert cost(R1, max_tokens=10, thinking_budget=200) == 3 * prompt + 8 * (10 + LONGEST_THINKING)
    assert cost(V3, max_tokens=10) == cost(V3, max_tokens=10, thinking_budget=200) == prompt + 40
    for model in (R1, QWEN):
        with pytest.raises(
            UnboundedRowError, match=f"{model} may think .* 'thinking': 0 for a model that does"
        ):
            cost(model, max_tokens=10)
        with pytest.raises(UnboundedRowError, match="may think"):
            cost(model, max_tokens=10, enable_thinking=False, chat_template_kwargs={"enable_thinking": True})


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "max_tokens is missing"),
        ({"max_tokens": None}, "max_tokens is missing"),
        ({"max_tokens": "10"}, "max_tokens must be a whole number above 0; it is 10"),
        ({"max_tokens": 0}, "max_tokens must be"),
        ({"max_tokens": True}, "max_tokens must be"),
        ({"max_tokens": 5, "n": 1.5}, "n must be a whole number"),
        ({"max_tokens": 5, "thinking_budget": -1}, "thinking_budget must be a whole number"),
        (
            {
                "max_tokens": 5,
                "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            },
            "a part that is not text",
        ),
    ],
)
def test_a_row_that_can_cost_any_sum_is_said_to(body: dict[str, Any], said: str) -> None:
    with pytest.raises(UnboundedRowError, match=said):
        bound_row(line(**body))


def rows(count: int, **body: Any) -> list[Any]:
    return [{"custom_id": f"q{n}", "messages": MESSAGES, **body} for n in range(count)]


@pytest.mark.parametrize("report", [False, True])
def test_the_first_row_without_a_limit_is_named_also_where_invalid_rows_are_reported(
    tmp_path: Path, report: bool
) -> None:
    tariff = Tariff((V3,), PRICES, Fraction(5))
    given = [*rows(3, max_tokens=5), *rows(2)]
    if report:
        given.insert(1, 7)
    given[-2]["custom_id"] = "without"
    given[-1]["custom_id"] = "also"
    with pytest.raises(InvalidRequestFileError, match="max_tokens is missing") as caught:
        split_requests(given, tmp_path, name="rows", tariff=tariff, report_invalid=report)
    assert [(each.line, each.custom_id) for each in caught.value.problems] == [
        (4 + report, "without"),
        (5 + report, "also"),
    ]
    with pytest.raises(InvalidInputError, match="prices has none for 'x'"):
        split_requests(
            rows(1, max_tokens=5, model="x"), tmp_path, name="rows", tariff=Tariff((), PRICES, Fraction(1))
        )


def test_a_batch_costs_at_most_an_eighth_of_a_budget_and_a_later_split_is_the_same(tmp_path: Path) -> None:
    given = [
        *rows(60, max_tokens=100, model=V3),
        *rows(60, max_tokens=100, model=QWEN, enable_thinking=False),
    ]
    for number, row in enumerate(given):
        row["custom_id"] = str(number)
    tariff = Tariff((), PRICES, Fraction("0.03"))
    split = split_requests(given, tmp_path / "a", name="rows", tariff=tariff)
    costs = [
        tariff.cost(bound_file(tmp_path / "a" / each.name, own_models=True), None) for each in split.shards
    ]
    assert max(costs) <= Fraction("0.03") / 8
    assert all(left + right > Fraction("0.03") / 8 for left, right in itertools.pairwise(costs))
    again = split_requests(
        given, tmp_path / "b", name="rows", rows_per_shard=[shard.rows for shard in split.shards]
    )
    assert again == split


def test_a_job_whose_prompts_alone_cost_too_much_is_not_cut_into_single_rows(tmp_path: Path) -> None:
    tariff = Tariff((V3,), PRICES, Fraction("0.00001"))
    split = split_requests(rows(1), tmp_path, name="rows", defaults={"max_tokens": 9}, tariff=tariff)
    assert split.rows == 1
    many = [{"messages": MESSAGES, "max_tokens": 9} for _ in range(500)]
    assert len(split_requests(many, tmp_path, name="rows", tariff=tariff).shards) < 5
