"""The key of an answer: the same for the same model and body, and for nothing else."""

from __future__ import annotations

import json
import random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from airflow_provider_siliconflow.batch_files.answer_keys import answer_key, read_request

TEXTS = st.text(st.characters(codec="utf-8"), max_size=8)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS
VALUES = st.recursive(
    SCALARS, lambda each: st.lists(each, max_size=3) | st.dictionaries(TEXTS, each, max_size=3), max_leaves=8
)
BODIES = st.dictionaries(TEXTS, VALUES, max_size=4)


def key(body: dict[str, Any], model: str = "m", custom_id: str = "a", **style: Any) -> bytes:
    line = json.dumps({"custom_id": custom_id, "body": body}, **style)
    found = read_request(line.encode())
    assert found is not None
    return answer_key(found[0], model)


def shuffled(value: Any) -> Any:
    if isinstance(value, dict):
        items = [(name, shuffled(each)) for name, each in value.items()]
        random.Random(7).shuffle(items)
        return dict(items)
    return [shuffled(each) for each in value] if isinstance(value, list) else value


def plain(value: Any) -> str:
    """Equal for equal JSON; 1, 1.0 and true differ, as they do for services."""
    return json.dumps(value, sort_keys=True)


@given(BODIES)
def test_a_key_does_not_depend_on_how_a_body_is_written(body: dict[str, Any]) -> None:
    expected = key(body)
    assert key(shuffled(body), custom_id="other", ensure_ascii=False, indent=1) == expected
    assert key(body | {"model": "x"}) == key(body | {"model": "y"}), "the model is given separately"


@given(BODIES, BODIES, st.sampled_from(["m", "n", "mé"]), st.sampled_from(["m", "n", "mé"]))
def test_keys_are_equal_only_if_model_and_body_are(
    one: dict[str, Any], other: dict[str, Any], model: str, other_model: str
) -> None:
    bodies = [{name: each for name, each in body.items() if name != "model"} for body in (one, other)]
    same = plain(bodies[0]) == plain(bodies[1]) and model == other_model
    assert (key(one, model) == key(other, other_model)) == same


@given(BODIES, st.data())
def test_any_change_of_a_body_changes_its_key(body: dict[str, Any], data: st.DataObject) -> None:
    body["n"] = 1
    name = data.draw(st.sampled_from(sorted(set(body) - {"model"})))
    changed = body | {name: [body[name]]}
    assert key(changed) != key(body)


def test_a_body_without_a_canonical_form_has_no_key() -> None:
    assert read_request(rb'{"custom_id": "a", "body": {"x": "\ud800"}}') is None
    assert read_request(b'{"custom_id": "a", "body": {"x": 1e999}}') is None
    assert read_request(b'{"custom_id": "a", "body": ' + b"[" * 5000 + b"]" * 5000 + b"}") is None


def test_a_key_stays_the_same() -> None:
    """A cache outlives many releases."""
    body = {"messages": [{"role": "user", "content": "é\u2028"}], "temperature": 0.1, "seed": 2**70}
    found = read_request(json.dumps({"body": body | {"model": "m"}, "custom_id": "a"}).encode())
    assert found is not None
    assert found[1] == "m"
    assert (
        answer_key(found[0], "m").hex() == "f6bb90390dd4686befe4501a66e0af197bd7fcfcab196ec1ce9944765424f1a2"
    )
