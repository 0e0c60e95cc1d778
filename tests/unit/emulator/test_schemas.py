"""Values for JSON schemas, checked by an independent validator."""

from __future__ import annotations

import datetime
import enum
import re
from decimal import Decimal
from typing import Annotated, Any, Literal

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from airflow_provider_siliconflow.emulator.draws import Draw
from airflow_provider_siliconflow.emulator.patterns import PatternError, matching_text
from airflow_provider_siliconflow.emulator.schemas import SchemaError, SchemaWriter

WORDS = ["the", "parcel", "is", "späť", "又迟到了"]


class Topic(enum.Enum):
    DELIVERY = "delivery"
    PRICE = "price"


class Line(BaseModel):
    article: Annotated[str, Field(pattern=r"^[A-Z]{2}-\d{3,5}$")]
    quantity: Annotated[int, Field(ge=1, le=9)]
    price: Decimal
    pair: tuple[int, str]


class Node(BaseModel):
    name: Annotated[str, Field(min_length=12, max_length=14)]
    children: list[Node]
    parent: Node | None = None


class Order(BaseModel):
    model_config = {"extra": "forbid"}

    topic: Topic
    kind: Literal["a", "b"]
    fixed: Literal[7]
    placed: datetime.date
    at: datetime.datetime
    lines: Annotated[list[Line], Field(min_length=2, max_length=3)]
    labels: dict[str, int]
    share: Annotated[float, Field(gt=0, lt=0.01)]
    tags: Annotated[set[Topic], Field(min_length=2)]
    even: Annotated[int, Field(multiple_of=2, gt=10, lt=20)]
    maybe: int | None
    note: str | None = None
    tree: Node


def values(schema: dict[str, Any], count: int = 60) -> list[Any]:
    writer = SchemaWriter(schema)
    return [writer.value(Draw(seed), WORDS) for seed in range(count)]


def test_values_of_a_pydantic_model_are_models_and_differ() -> None:
    schema = Order.model_json_schema()
    made = values(schema)
    for value in made:
        jsonschema.validate(value, schema)
        Order.model_validate(value)
    assert len({str(value["lines"]) for value in made}) > 50
    # Optional fields are sometimes there and sometimes not; so is null.
    assert {"note" in value for value in made} == {True, False}
    assert {value["maybe"] is None for value in made} == {True, False}
    assert values(schema) == made


numbers = st.one_of(
    st.builds(
        lambda low, span, whole: {
            "type": "integer" if whole else "number",
            "minimum": low,
            "maximum": low + span,
        },
        st.integers(-1000, 1000),
        st.integers(0, 3),
        st.booleans(),
    ),
    st.builds(
        lambda low, span: {"type": "number", "exclusiveMinimum": low, "exclusiveMaximum": low + span},
        st.floats(-10, 10).map(lambda low: round(low, 3)),
        st.sampled_from([0.001, 0.5, 30]),
    ),
    st.builds(
        lambda step, high: {"type": "integer", "multipleOf": step, "maximum": high},
        st.integers(1, 7),
        st.integers(-50, 50),
    ),
)
texts = st.builds(
    lambda least, more, form: {"type": "string", "minLength": least, "maxLength": least + more, **form},
    st.integers(0, 30),
    st.integers(0, 5),
    st.just({}),
)
leaves = st.one_of(
    numbers,
    texts,
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {}, {"const": {"a": [1]}}, True]),
    st.lists(st.one_of(st.integers(), st.text(max_size=3), st.none()), min_size=1).map(
        lambda choices: {"enum": choices}
    ),
)


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.builds(
            lambda properties, required, extra: {
                "type": "object",
                "properties": properties,
                "required": [name for name in properties if name in required],
                "additionalProperties": extra,
            },
            st.dictionaries(st.sampled_from("abcde"), inner, max_size=4),
            st.sets(st.sampled_from("abcde")),
            st.one_of(st.booleans(), inner),
        ),
        st.builds(
            lambda items, least, more: {
                "type": "array",
                "items": items,
                "minItems": least,
                "maxItems": least + more,
            },
            inner,
            st.integers(0, 3),
            st.integers(0, 2),
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda branches: {"anyOf": branches}),
        st.builds(
            lambda one, two: {"type": ["object", "null"], "properties": {"a": one, "b": two}}, inner, inner
        ),
        st.builds(
            lambda one, two: {
                "allOf": [
                    {"type": "object", "properties": {"a": one}, "required": ["a"]},
                    {"properties": {"b": two}, "required": ["b"]},
                ]
            },
            inner,
            inner,
        ),
    )


@settings(max_examples=200, deadline=None)
@given(schema=st.recursive(leaves, nested, max_leaves=8), seed=st.integers(0, 2**64 - 1))
def test_a_value_satisfies_its_schema(schema: Any, seed: int) -> None:
    whole = {"type": "object", "properties": {"it": schema}, "required": ["it"]}
    jsonschema.validate(SchemaWriter(whole).value(Draw(seed), WORDS), whole)


def test_a_schema_that_contains_itself_ends() -> None:
    tree = {
        "$defs": {
            "expression": {
                "anyOf": [
                    {
                        "type": "object",
                        "properties": {
                            "left": {"$ref": "#/$defs/expression"},
                            "right": {"$ref": "#/$defs/expression"},
                        },
                        "required": ["left", "right"],
                    },
                    {"type": "integer"},
                ]
            },
            "list": {
                "type": ["null", "object"],
                "properties": {"rest": {"$ref": "#/$defs/list"}},
                "required": ["rest"],
            },
        },
        "type": "object",
        "properties": {"expression": {"$ref": "#/$defs/expression"}, "list": {"$ref": "#/$defs/list"}},
        "required": ["expression", "list"],
    }
    for value in values(tree):
        jsonschema.validate(value, tree)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"not": {"type": "string"}}, "not is not supported"),
        ({"properties": {"a": {"type": "text"}}, "required": ["a"]}, "the type 'text' is not known"),
        ({"$ref": "https://example.com/schema"}, "does not lead into the schema"),
        ({"$ref": "#/$defs/absent"}, "leads to nothing"),
        ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "leads to itself"),
        ({"properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "nothing satisfies it"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "no number lies within the limits"),
        ({"type": "string", "minLength": 5, "maxLength": 4}, "longer than it may be"),
        ({"type": "string", "pattern": r"^(\w)\1{40}-\1$"}, "pattern"),
        ({"type": "array", "items": {"enum": [1]}, "uniqueItems": True, "minItems": 2}, "different items"),
        ({"type": "array", "minItems": 1_000_000}, "too many items"),
        ({"enum": []}, "no values"),
        ({"type": "object", "properties": 5}, "no JSON schema"),
        ({"type": "integer", "minimum": "many"}, "no JSON schema"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "nothing satisfies it"),
    ],
)
def test_an_impossible_schema_is_refused_with_the_reason(schema: dict[str, Any], reason: str) -> None:
    with pytest.raises((SchemaError, PatternError), match=reason):
        SchemaWriter(schema)


def test_what_is_impossible_is_left_out_where_it_may_be() -> None:
    impossible: dict[str, Any] = {"not": {}}
    schema = {
        "type": "object",
        "properties": {
            "optional": impossible,
            "choice": {"anyOf": [impossible, {"type": "integer"}]},
            "list": {"type": "array", "items": impossible},
        },
        "required": ["choice", "list"],
    }
    for value in values(schema, 20):
        assert type(value["choice"]) is int
        assert (value["list"], value.keys()) == ([], {"choice", "list"})


@pytest.mark.parametrize(
    "pattern",
    [
        r"^\d{4}-\d{2}-\d{2}$",
        r"^(yes|no|n/a)$",
        r"^#[0-9a-fA-F]{6}$",
        r"^[^\s@]+@[a-z]+\.(?:com|org)$",
        r"^\+?[1-9]\d{1,14}$",
        r"^[\w.\-\]]*?x{2,}$",
        r"^(?P<word>[A-ZÄ]+)\s\w+\.$",
        r"^(?!0)\d{3}$",
        r"^A\x41B\t[\x30-\x39]$",
        r"^\D\W\S$",
        r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$",
        "",
    ],
)
def test_a_text_matches_its_pattern(pattern: str) -> None:
    found = {matching_text(pattern, Draw(seed).below, lambda _: True) for seed in range(30)}
    assert all(re.search(pattern, text) for text in found)
    assert not pattern.startswith("^[") or len(found) > 5
