"""What is taken in of values from outside."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from airflow_provider_siliconflow.api import bounds
from airflow_provider_siliconflow.api.bounds import MAX_COUNT, bounded, count, identifier, moment, reference
from airflow_provider_siliconflow.api.models import Batch


@pytest.mark.parametrize(
    ("sent", "taken"),
    [
        (3, 3),
        (3.0, 3),
        (3.9, 3),
        ("3", 3),
        (-1, 0),
        (2**53, MAX_COUNT),
        (2**64, MAX_COUNT),
        (10**400, MAX_COUNT),
        ("9" * 400, MAX_COUNT),
        (math.inf, MAX_COUNT),
        (-math.inf, 0),
        (math.nan, 0),
        (None, 0),
        (True, 0),
        ("three", 0),
        ([3], 0),
    ],
)
def test_counts(sent: Any, taken: int) -> None:
    assert count(sent) == taken


@pytest.mark.parametrize(
    ("sent", "taken"),
    [
        (0, 0),
        (1741685413, 1741685413),
        (1741685413.5, 1741685413.5),
        ("1741685413", 1741685413),
        (2**40, 2**40),
        (2**40 + 1, None),
        (10**400, None),
        ("9" * 400, None),
        (-1, None),
        (math.inf, None),
        (math.nan, None),
        (True, None),
        ("2025-03-11T00:00:00Z", None),
        (None, None),
    ],
)
def test_times(sent: Any, taken: Any) -> None:
    assert moment(sent) == taken


@pytest.mark.parametrize(
    ("sent", "taken"),
    [
        ("batch_1", "batch_1"),
        ("批次-1", "批次-1"),
        (41, "41"),
        ("x" * 512, "x" * 512),
        ("x" * 513, None),
        (10**400, None),
        ("", None),
        ("a b", None),
        ("a\nb", None),
        ("a\0", None),
        ("\ud800", None),
        ("..", None),
        (True, None),
        (4.0, None),
        (None, None),
    ],
)
def test_ids_are_whole_or_none(sent: Any, taken: str | None) -> None:
    assert identifier(sent) == taken


def test_references_are_whole_or_none() -> None:
    url = "https://h/" + "x" * 16_000
    assert reference(url) == url
    assert reference(url + "x" * 1000) is None
    assert reference("https://h/\ud800") is None
    assert reference(7) == "7"
    assert reference("") is None


def test_nested_values_are_cut_to_depth_items_and_characters() -> None:
    assert bounded({"a": [1, {"b": [2]}]}) == {"a": [1, {"b": [2]}]}
    assert bounded([[[1]]], depth=2) == [["..."]]
    assert bounded([1, 2, 3], items=2) == [1, 2]
    assert bounded({"a": 1, "b": 2}, items=1) == {"a": 1}
    assert bounded(["x" * 50] * 50, longest=10, characters=25) == ["x" * 10, "x" * 10, "x" * 5]
    assert bounded(["\0", "\ud800", 10**400, -(10**400), math.nan, math.inf, True, None]) == [
        *("\ufffd", "\ufffd", MAX_COUNT, -MAX_COUNT, 0, float(MAX_COUNT), True, None)
    ]
    assert len(json.dumps(bounded([{f"k{n}": "x" * 5000} for n in range(5000)]))) < 30_000


def test_fields_nobody_knows_are_few_and_short() -> None:
    batch = Batch.model_validate(
        {"id": "b", "status": "completed"} | {f"new-{n}": ["x" * 9999] for n in range(999)}
    )
    data = batch.to_json_dict()
    assert len([name for name in data if name.startswith("new-")]) == 32
    assert len(json.dumps(data)) < 200_000
    assert bounds.text_within("x" * 99, 64) == "x" * 64
