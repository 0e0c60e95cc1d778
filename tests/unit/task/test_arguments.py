"""The table of arguments: when a value is read, and what an error names."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from airflow_provider_siliconflow.api.exceptions import InvalidInputError
from airflow_provider_siliconflow.task import arguments as read

TABLE = read.Arguments(
    {"wait": read.seconds, "extra": read.optional(read.replace), "one": read.optional(read.text)},
    one_of=("one", "two"),
)


def task(**values: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"wait": 1, "extra": None, "one": "x", "two": None} | values)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"wait": 0}, "wait must be"),
        ({"extra": {"model": ""}}, r"replace\['model'\]"),
        ({"one": None}, "give one or two"),
        ({"two": "y"}, "not both"),
    ],
)
def test_what_is_known_is_refused_at_parse_and_at_start(values: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidInputError, match=named):
        TABLE.check(task(**values))
    with pytest.raises(InvalidInputError, match=named):
        TABLE.read(task(**values))


@pytest.mark.parametrize(
    "values",
    [
        {"wait": "{{ w }}"},
        {"extra": {"model": "", "more": "{{ m }}"}},
        {"one": "{{ o }}", "two": "y"},
        {"one": SimpleNamespace(resolve=None), "two": "y"},
    ],
)
def test_what_is_not_known_yet_is_refused_only_at_start(values: dict[str, Any]) -> None:
    TABLE.check(task(**values))
    with pytest.raises(InvalidInputError):
        TABLE.read(task(**values))


def test_values_come_as_the_work_needs_them() -> None:
    given = TABLE.read(task(wait=timedelta(minutes=2), extra='{"model": "m"}', one="x", two=""))
    assert given == {"wait": 120.0, "extra": {"model": "m"}, "one": "x"}
    assert TABLE.read(task(wait="90", one=None), "wait") == {"wait": 90.0}, "the choice is not asked for"


@pytest.mark.parametrize("value", [None, "", "None"])
def test_rows_and_places_that_an_upstream_task_did_not_push_say_so(value: Any) -> None:
    for reader in (read.rows, read.place):
        with pytest.raises(InvalidInputError, match=r"the_name must be .*If it is templated"):
            reader("the_name", value)


def test_rows_are_not_looked_into() -> None:
    rows = [{"custom_id": "a"}, "a prompt", 7]
    assert read.rows("requests", rows) == rows
    assert read.rows("requests", '["a prompt"]') == ["a prompt"]
    assert read.rows("requests", "s3://bucket/rows.jsonl") == "s3://bucket/rows.jsonl"


PAIRS = {f"k{n}": "v" for n in range(16)}


@pytest.mark.parametrize(
    ("reader", "value", "found"),
    [
        (read.limit, "7", 7),
        (read.window, "48", "48h"),
        (read.window, timedelta(days=2), "48h"),
        (read.metadata, '{"a": "b"}', {"a": "b"}),
        (read.plain_metadata, PAIRS, PAIRS),
        (read.replace, '{"model": "m"}', {"model": "m"}),
        (read.endpoint, "/v1/chat/completions", "/v1/chat/completions"),
        (read.prices, '{"m": {"prompt": 1, "completion": 2}}', {"m": {"prompt": 1, "completion": 2}}),
        (read.parameters, '{"temperature": 0}', {"temperature": 0}),
        (read.model, "m", "m"),
        (read.model, "", None),
        (read.models, "['a', 'b']", ("a", "b")),
        (read.models, "", None),
        (read.identifier, "batch_1", "batch_1"),
        (read.identifiers, "batch_1", ["batch_1"]),
        (read.identifiers, "['batch_1', 'batch_2']", ["batch_1", "batch_2"]),
        (read.text, "x", "x"),
        (read.place, "s3://bucket/x", "s3://bucket/x"),
    ],
)
def test_readers_return_what_templates_rendered_as_what_it_stands_for(
    reader: read.Reader, value: Any, found: Any
) -> None:
    name = "max_in_flight" if reader is read.limit else "the_name"
    assert reader(name, value) == found


@pytest.mark.parametrize(
    ("reader", "value", "named"),
    [
        (read.limit, "0", "max_in_flight"),
        (read.window, "soon", "completion_window"),
        # One pair is the identity's.
        (read.metadata, PAIRS, "metadata"),
        (read.replace, "text", "replace"),
        (read.endpoint, "/v1/nothing", "endpoint"),
        (read.prices, {"m": 3}, "prices"),
        (read.parameters, {"messages": []}, "the_name"),
        (read.model, 7, "model"),
        (read.models, ["a", "a"], "models"),
        (read.identifier, "None", "the_name"),
        (read.identifiers, [], "the_name"),
        (read.text, 7, "the_name"),
        (read.text, " ", "the_name"),
    ],
)
def test_readers_refuse_by_the_name_of_the_argument(reader: read.Reader, value: Any, named: str) -> None:
    with pytest.raises(InvalidInputError, match=named):
        reader("max_in_flight" if reader is read.limit else "the_name", value)
