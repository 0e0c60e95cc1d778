"""Values that a template turned into text."""

from __future__ import annotations

from collections import UserList
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from airflow_provider_siliconflow.task.templating import (
    is_templated,
    is_templated_inside,
    rendered_list,
    rendered_mapping,
    rendered_number,
    rendered_seconds,
    rendered_text,
)

XCOM = SimpleNamespace(resolve=None)


@pytest.mark.parametrize(
    "mark", ["{{ a }}", "x{% if a %}y", "[[ a ]]", "[% a %]", "<< a >>", "<% a %>", "${a}"]
)
def test_what_any_template_engine_may_change_is_templated(mark: str) -> None:
    assert is_templated(f"before {mark} after")
    assert is_templated_inside({"key": [mark]})
    assert is_templated_inside({mark: 1})
    assert is_templated_inside(({"a": (XCOM,)},))


@pytest.mark.parametrize("value", ["plain", "{a}", "", None, 7, 0.5, timedelta(1), [1], {"a": "b"}, "$a"])
def test_what_no_template_engine_changes_is_not(value: Any) -> None:
    assert not is_templated(value)
    assert not is_templated_inside(value)


def test_another_tasks_output_is_templated() -> None:
    assert is_templated(XCOM)


@pytest.mark.parametrize("nothing", ["", "  ", "None", "null", " None "])
def test_a_template_that_renders_to_nothing_is_not_given(nothing: str) -> None:
    for read in (rendered_list, rendered_mapping, rendered_number, rendered_seconds, rendered_text):
        assert read(nothing) is None, read


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("7", 7),
        (" 7 ", 7),
        ("7.0", 7),
        ("0.5", 0.5),
        ("1e3", 1000),
        ("-2", -2),
        (7.0, 7),
        (7.5, 7.5),
        (7, 7),
        ("soon", "soon"),
        ("7h", "7h"),
        ("1e3x", "1e3x"),
    ],
)
def test_numbers(value: Any, found: Any) -> None:
    assert rendered_number(value) == found
    assert type(rendered_number(value)) is type(found)


@pytest.mark.parametrize("text", ["nan", "inf", "-Infinity", "NaN"])
def test_what_is_no_number_of_anything_stays_for_the_check_to_refuse(text: str) -> None:
    found = rendered_number(text)
    assert isinstance(found, float | str)


def test_seconds() -> None:
    assert rendered_seconds(timedelta(minutes=1)) == 60
    assert rendered_seconds("90") == 90


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ('["a", "b"]', ["a", "b"]),
        ("['a', 'b']", ["a", "b"]),
        (" ['a']", ["a"]),
        (("a", "b"), ["a", "b"]),
        # As what a mapped task returned arrives.
        (UserList(["a"]), ["a"]),
        ("s3://bucket/[a].jsonl", "s3://bucket/[a].jsonl"),
        ("[broken", "[broken"),
        ("[" * 5000, "[" * 5000),
        (b"[1]", b"[1]"),
        ("[__import__('os')]", "[__import__('os')]"),
    ],
)
def test_lists(value: Any, found: Any) -> None:
    assert rendered_list(value) == found


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ('{"a": 1}', {"a": 1}),
        ("{'a': None}", {"a": None}),
        ({"a": 1}, {"a": 1}),
        ("{1, 2}", "{1, 2}"),
        ("text", "text"),
        (7, 7),
    ],
)
def test_mappings(value: Any, found: Any) -> None:
    assert rendered_mapping(value) == found
