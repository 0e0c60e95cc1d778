"""The argument `prices`, and what tokens cost by it."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from typing import Any

import pytest

from airflow_provider_siliconflow.api.exceptions import InvalidInputError
from airflow_provider_siliconflow.batch_files.prices import (
    check_prices,
    cost,
    merge_prices,
    price_of,
    prompt_cost,
    rounded,
)

FINE = {"prompt": 0.5, "completion": 2}


@pytest.mark.parametrize(
    ("prices", "said"),
    [
        (["m"], "prices must be a mapping such as .* got list"),
        (FINE, r"prices\['prompt'\] must be a mapping .* given by model"),
        ({1: FINE}, "must name models"),
        ({"m": 1}, r"prices\['m'\] must be a mapping"),
        (
            {"m": {"promt": 1, "completion": 2}},
            r"prices\['m'\] has the unknown key 'promt' \(did you mean 'prompt'\?\)",
        ),
        ({"m": {"input": 1, "completion": 2}}, r"unknown key 'input' \(did you mean 'prompt'\?\)"),
        ({"m": {**FINE, "batch": 2}}, r"unknown key 'batch'; a price has 'prompt' and 'completion'"),
        ({"m": {**FINE, "cached": 2}}, r"unknown key 'cached' \(did you mean 'cached_prompt'\?\)"),
        ({"m": {**FINE, "cached_prompt": None}}, r"\['cached_prompt'\] must be a number"),
        ({"m": {**FINE, "live": 2}}, r"prices\['m'\]\['live'\] must be a mapping"),
        ({"m": {**FINE, "live": {"prompt": 1}}}, r"prices\['m'\]\['live'\] lacks 'completion'"),
        ({"m": {**FINE, "live": {**FINE, "live": FINE}}}, r"\['live'\] has the unknown key 'live'"),
        ({"m": {"prompt": 1}}, r"prices\['m'\] lacks 'completion'"),
        ({"m": {**FINE, "prompt": -1}}, r"prices\['m'\]\['prompt'\] must be a number from 0 .* got -1"),
        ({"m": {**FINE, "prompt": "0.5"}}, "got '0.5'"),
        ({"m": {**FINE, "prompt": True}}, "got True"),
        ({"m": {**FINE, "prompt": float("nan")}}, "got nan"),
        ({"m": {**FINE, "prompt": 1e300}}, "from 0 to 1000000"),
    ],
)
def test_malformed_prices_are_refused_by_the_key_that_is_wrong(prices: Any, said: str) -> None:
    with pytest.raises(InvalidInputError, match=said):
        check_prices(prices)


def test_prices_that_are_fine() -> None:
    check_prices(None)
    check_prices({"m": FINE, "n": {"prompt": 0, "completion": 0.0}})
    check_prices({"m": {**FINE, "cached_prompt": 0.1, "live": {**FINE, "cached_prompt": 1}}})


def test_of_several_sources_the_first_that_has_a_model_gives_its_price() -> None:
    other = {"prompt": 1, "completion": 1}
    merged = merge_prices({"M": FINE}, None, {"m": other, "n": FINE}, {"N": other, "o": other})
    assert merged == {"M": FINE, "n": FINE, "o": other}
    assert merge_prices(None, {}) is None


def test_case_does_not_tell_models_apart() -> None:
    other = {"prompt": 1, "completion": 1}
    assert price_of("M", {"m": FINE}) == FINE
    assert price_of("M", {"m": FINE, "M": other}) == other
    assert price_of("x", {"m": FINE}) is None
    assert price_of(None, {"m": FINE}) is None


def test_money_follows_from_the_price_as_it_is_written() -> None:
    assert cost(3, 0.1) == Fraction(3, 10_000_000)
    assert rounded(cost(1_000_000, 0.1) * 3) == 0.3


def test_cached_tokens_are_a_part_of_the_prompt() -> None:
    cached = {**FINE, "cached_prompt": 0.1}
    assert prompt_cost(10, 4, cached) == Fraction(34, 10_000_000)
    assert prompt_cost(10, 11, cached) == Fraction(10, 10_000_000)
    assert prompt_cost(10, 4, FINE) == Fraction(5, 1_000_000)


def test_what_is_known_when_a_dag_is_parsed_is_checked_without_heavy_imports() -> None:
    code = (
        "import sys\n"
        "from airflow_provider_siliconflow.batch_files.prices import check_prices\n"
        "from airflow_provider_siliconflow.batch_files.parameters import check_parameters\n"
        f"check_prices({{'m': {FINE}}})\n"
        "check_parameters('request_params', {'top_p': 0.5})\n"
        "print({n.partition('.')[0] for n in sys.modules} - set(sys.stdlib_module_names) - {'__main__'})\n"
        "print(sorted(n for n in sys.modules if n in ('fractions', 'decimal', 'difflib')))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["{'airflow_provider_siliconflow'}", "[]"]
