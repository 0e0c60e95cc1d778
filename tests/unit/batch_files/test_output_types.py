"""Answers of a pydantic model or a JSON schema, and what is no type."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable
from typing import Any, Literal

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, RootModel

from airflow_provider_siliconflow.api.exceptions import InvalidInputError
from airflow_provider_siliconflow.batch_files.output_types import UnacceptableAnswerError, answer_type


class Item(BaseModel):
    name: str


class Ticket(BaseModel):
    product: str
    stars: int = Field(ge=1, le=5)
    mood: Literal["good", "bad"] = "good"
    items: list[Item] = []


SCHEMA = {
    "title": "A ticket!",
    "type": "object",
    "properties": {
        "product": {"type": "string"},
        "stars": {"type": "integer", "minimum": 1, "maximum": 5},
        "items": {"type": "array", "items": {"$ref": "#/$defs/item"}},
    },
    "required": ["product", "stars"],
    "$defs": {"item": {"type": "object", "required": ["name"]}},
}
GOOD = {"product": "lamp", "stars": 3}


@pytest.mark.parametrize("kind", [Ticket, SCHEMA], ids=["pydantic", "schema"])
@pytest.mark.parametrize("wrapping", ["{}", "```json\n{}\n```", "<think>hm</think>{}", "It is {}."])
def test_an_answer_of_the_type_is_read(kind: Any, wrapping: str) -> None:
    read = answer_type("output_type", kind).read(wrapping.format(json.dumps(GOOD)))
    assert (read.product if kind is Ticket else read["product"]) == "lamp"


@pytest.mark.parametrize("kind", [Ticket, SCHEMA], ids=["pydantic", "schema"])
@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("I cannot say.", "the answer is not JSON"),
        ('{"product": "lamp", "stars": 3', "the answer is not JSON"),
        ('{"product": "lamp", "stars": 3} {"product": "rug", "stars": 1}', "the answer is not JSON"),
        ('{"product": "lamp"}', "stars"),
        ('Sure: {"product": "lamp", "stars": "many"}', "stars: "),
        ('{"product": "lamp", "stars": 3, "items": [{"name": "a"}, {}]}', r"items\.\[\]"),
        ("[]", "."),
        ('{"product": "\\ud800", "stars": 3}', "not JSON"),
        ('{"product": "\ud800"}', "."),
        ("[" * 100_000, "not JSON|too deeply"),
    ],
)
def test_what_is_wrong_is_named_briefly(kind: Any, text: str, named: str) -> None:
    with pytest.raises(UnacceptableAnswerError, match=named) as caught:
        answer_type("output_type", kind).read(text)
    assert len(str(caught.value)) < 1000
    assert "lamp" not in str(caught.value), "equal problems of different answers read alike"


def test_many_problems_are_not_all_named() -> None:
    with pytest.raises(UnacceptableAnswerError, match=r"; \.\.\.$"):
        answer_type("output_type", list_of_items := RootModel[list[Item]]).read(json.dumps([{}] * 9))
    assert answer_type("output_type", list_of_items).read('[{"name": "a"}]').root[0].name == "a"


LISTS: dict[str, Any] = {
    "anyOf": {"anyOf": [{"items": {"type": "string"}}, {"type": "null"}]},
    "oneOf": {"oneOf": [{"items": {"type": "string"}}, {"type": "null"}]},
    "uniqueItems": {"uniqueItems": True},
    "model": RootModel[list[int]],
}


@pytest.mark.parametrize("kind", LISTS)
def test_the_cost_of_a_long_answer_is_bounded(kind: str) -> None:
    """By the schema alone, each of these took minutes or gigabytes."""
    answers = answer_type("output_type", LISTS[kind])
    tracemalloc.start()
    began = time.process_time()
    try:
        for text in ("[" + '{"a": 0}, ' * 20_000 + "1]", "[" + '"x", ' * 2_000_000 + '"x"]'):
            with pytest.raises(UnacceptableAnswerError):
                answers.read(text)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert time.process_time() - began < 20


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from([0.0, 1.0, "1", "", "a"]),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("ab"), inner),
        max_leaves=8,
    )
)
def test_what_is_decided_is_what_jsonschema_decides(value: Any) -> None:
    schema = {
        "uniqueItems": True,
        "anyOf": [{"maxItems": 2}, {"type": "integer"}],
        "oneOf": [{"type": ["array", "number"]}, {"minimum": 1}, {"maxLength": 1, "type": "string"}],
        "items": {"$ref": "#"},
    }
    try:
        answer_type("output_type", schema).read(json.dumps(value))
        found = True
    except UnacceptableAnswerError:
        found = False
    assert found == jsonschema.Draft202012Validator(schema).is_valid(value)


@pytest.mark.parametrize("digits", [400, 4200, 5000])
@pytest.mark.parametrize("rule", [{"multipleOf": 0.01}, {"type": "string"}])
def test_a_number_of_hundreds_of_digits_is_no_error_of_the_author(digits: int, rule: dict[str, Any]) -> None:
    with pytest.raises(UnacceptableAnswerError):
        answer_type("output_type", {"items": rule}).read(f"[1{'0' * digits}]")


class WithFunction(BaseModel):
    function: Callable[[], int]


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Ticket(product="lamp", stars=3), "an instance of Ticket"),
        (list[Item], "a pydantic model class or a JSON schema"),
        (int, "got int"),
        ("Ticket", "an instance of str"),
        ({}, "empty schema"),
        ({"type": "strin"}, "not a JSON schema"),
        ({"$ref": "http://127.0.0.1:9/a.json"}, r"the reference 'http://127\.0\.0\.1:9/a\.json'"),
        ({"items": {"$ref": "#/$defs/none"}}, r"the reference '/\$defs/none'"),
        ({"enum": {1, 2}}, "cannot be written as JSON"),
        ({"$defs": {"a": True}, "$ref": "#/$defs/a/b"}, "not a JSON schema"),
        ({"$ref": "#"}, "leads back to itself"),
        ({"properties": {"a": {"$ref": "#/properties/a"}}}, "leads back to itself"),
        ({"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"allOf": [{"$ref": "#"}]}}}, "recursion"),
        ({"$dynamicRef": "http://127.0.0.1:9/#a"}, r"the reference 'http://127\.0\.0\.1:9/#a'"),
        (WithFunction, "no JSON schema for WithFunction"),
    ],
)
def test_what_is_no_type_is_refused_with_the_name_of_the_argument(value: Any, named: str) -> None:
    with pytest.raises(InvalidInputError, match=named) as caught:
        answer_type("output_type", value)
    assert str(caught.value).startswith("output_type")


def test_a_type_has_a_name_and_fields() -> None:
    assert answer_type("output_type", Ticket).name == "Ticket"
    assert answer_type("output_type", SCHEMA).name == "A-ticket"
    assert answer_type("output_type", SCHEMA).fields == ("product", "stars", "items")
    numbers = answer_type("output_type", RootModel[list[int]])
    assert numbers.values(numbers.read("[1, 2]")) == {"parsed": [1, 2]}
