"""The JSON in the text of an answer: found as a person would find it, and never changed."""

from __future__ import annotations

import json
import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_provider_siliconflow.api.answer_texts import json_in, without_thinking

TEXTS = st.text() | st.sampled_from(
    ["</think>", "<think>", "a </think> b", "```", "```json", "{", "\n</think>\n"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
#: What models write around an answer.
WRAPPINGS = [
    "{}",
    " \n{}\n",
    "```json\n{}\n```",
    "Here is the answer:\n\n```\n{}\n```\nI hope this helps.",
    "<think>\nPerhaps {{'a': 1}}, or [2]?\n</think>\n\n{}",
    'It may be {{"draft": true}}.\n</think>\n{}',
    'It may be {{"draft": true}}.</think>\n```json\n{}\n```',
]


@given(VALUES, st.sampled_from(WRAPPINGS), st.sampled_from([None, 2]), st.booleans())
def test_a_json_answer_is_found_unchanged(
    value: object, wrapping: str, indent: int | None, ascii_only: bool
) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    assert json_in(wrapping.format(text)) == text


@given(st.dictionaries(st.text(max_size=5), VALUES, max_size=3) | st.lists(VALUES, max_size=3))
def test_an_object_or_list_is_found_within_a_sentence(value: object) -> None:
    text = json.dumps(value)
    assert json_in(f"As you can see {{above}}: {text}. Anything else?") == text


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('See [1]: {"a": 1}', '{"a": 1}'),
        ('{"a": 1} or rather {"a": 2}', None),
        ("[1] or [2]", None),
        ('```json\n{"a": 1}\n```\nor\n```json\n{"a": 2}\n```', None),
        ('{"code": "```py\\nx\\n```"}', '{"code": "```py\\nx\\n```"}'),
        ('Sure: {"code": "```"}', '{"code": "```"}'),
        ('```json\n{"a": 1}', '{"a": 1}'),
        ('{"tag": "</think>"}', '{"tag": "</think>"}'),
        ('<think>{"a": 1}', None),
        ("<think>Is it 42? Yes.</think> 42", "42"),
        ('{"a": 1', None),
        ("{'a': 1}", None),
        ('{"a": NaN}', None),
        ('{"a": ' + "9" * 5000 + "}", '{"a": ' + "9" * 5000 + "}"),
        ("I am sorry, but I cannot answer that.", None),
        ("", None),
        ("[" * 100_000, None),
        ('{"a":' * 100_000, None),
        ("{" * 1000 + '{"a": 1}', None),
    ],
)
def test_what_is_no_or_no_single_answer_is_not_guessed(text: str, found: str | None) -> None:
    assert json_in(text) == found


def test_a_hostile_text_costs_a_bounded_time() -> None:
    begun = time.process_time()
    for piece in ('["', "[", '{"a":', "[1,", "{", "```\n"):
        json_in(piece * (1_000_000 // len(piece)))
    assert time.process_time() - begun < 5


@pytest.mark.parametrize(("beginnings", "found"), [(3, '{"a": 1}'), (20, None)])
def test_a_text_is_read_only_so_often(beginnings: int, found: str | None) -> None:
    """Each of the beginnings is read to the end of the numbers."""
    assert json_in("[" * beginnings + "1, " * 10_000 + '] {"a": 1}') == found


def test_thinking_is_left_out() -> None:
    assert without_thinking("<think>a</think>\nb") == "b"
    assert without_thinking("a\n</think>\nb") == "b"
    assert without_thinking("a</think>b") == "a</think>b"
    assert without_thinking("say <think>a</think> b") == "say <think>a</think> b"
    assert without_thinking("<think>cut") == ""


def test_a_text_of_code_fences_costs_little_memory() -> None:
    tracemalloc.start()
    try:
        assert json_in("```\n" * 500_000 + "x") is None
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
