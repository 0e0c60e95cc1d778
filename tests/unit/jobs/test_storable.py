"""What Airflow's encoders and databases take."""

from __future__ import annotations

import math
from datetime import date
from typing import Any

import pytest

from airflow_provider_siliconflow.jobs.storable import storable, storable_text

LARGEST = 2**63 - 1


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        (None, None),
        (True, True),
        (7, 7),
        (LARGEST, LARGEST),
        (2**63, LARGEST),
        (-LARGEST, -LARGEST),
        (-(2**70), -LARGEST),
        (0.5, 0.5),
        (math.inf, None),
        (-math.inf, None),
        (math.nan, None),
        ("a\x00b", "a\ufffdb"),
        ("\ud800", "?"),
        ("中文", "中文"),
        (date(2026, 1, 2), "2026-01-02"),
        ({1: (2**64, [math.nan])}, {"1": [LARGEST, [None]]}),
        ({"k\x00": "v"}, {"k\ufffd": "v"}),
        ({}, {}),
    ],
)
def test_a_value_is_kept_or_bounded(value: Any, stored: Any) -> None:
    found = storable(value)
    assert found == stored
    assert type(found) is type(stored)


def test_depth_and_length_are_bounded() -> None:
    assert storable({"a": [{"b": 1}]}, levels=2) == {"a": ["..."]}
    assert storable({"a": [{"b": 1}]}, levels=3) == {"a": [{"b": 1}]}
    assert storable([1], levels=0) == storable((1,), levels=0) == storable({}, levels=0) == "..."
    assert storable("x", levels=0) == "x"
    deep: Any = "end"
    for _ in range(16):
        deep = [deep]
    assert storable(deep) == deep
    assert storable([deep]) != [deep]
    assert storable("x" * 4001) == "x" * 4000
    assert len(storable(list(range(100_001)))) == len(storable(dict.fromkeys(range(100_001)))) == 100_000


def test_a_text_is_cut_where_it_is_asked_to_be() -> None:
    assert storable_text("abcdef", 3) == "abc"
    assert storable_text("abc", 3) == "abc"
