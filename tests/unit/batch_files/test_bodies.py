"""What is put into the bodies of request lines."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_provider_siliconflow.batch_files.bodies import sent_again, with_instruction
from airflow_provider_siliconflow.batch_files.rules import accept

USER = {"role": "user", "content": "hi"}
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
CONTENTS = TEXT | st.lists(st.builds(lambda text: {"type": "text", "text": text}, TEXT))
MESSAGES = st.lists(
    st.builds(
        lambda role, content: {"role": role, "content": content, "name": "n"},
        st.sampled_from(["system", "user", "assistant"]),
        CONTENTS,
    ),
    max_size=9,
).map(lambda before: [*before, USER])


def raw(value: Any) -> msgspec.Raw:
    return msgspec.Raw(json.dumps(value).encode())


@pytest.mark.parametrize(
    ("first", "system"),
    [
        (USER, "Do."),
        ({"role": "system", "content": "Be kind."}, "Be kind.\n\nDo."),
        ({"role": "system", "content": ""}, "Do."),
        ({"role": "system", "content": None}, "Do."),
        (
            {"role": "system", "content": [{"type": "text", "text": "a"}]},
            [{"type": "text", "text": "a"}, {"type": "text", "text": "Do."}],
        ),
    ],
)
def test_an_instruction_goes_into_the_only_system_message(first: dict[str, Any], system: Any) -> None:
    messages = json.loads(bytes(with_instruction(raw([first, USER]), "Do.")))
    assert messages[0]["content"] == system
    assert [message["role"] for message in messages].count("system") == 1


@given(MESSAGES, TEXT, TEXT)
def test_a_changed_line_is_valid_and_keeps_what_it_had(
    messages: list[dict[str, Any]], answer: str, reply: str
) -> None:
    row = {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"messages": messages, "seed": 2**70, "max_tokens": 5},
        "more": 1,
    }
    line = json.dumps(row).encode()
    again = sent_again(line, {"max_tokens": msgspec.Raw(b"9")}, (answer, reply))
    if len(messages) > 8:
        assert again is None, "the service documents ten messages at most"
        return
    assert again is not None
    assert accept(again) is not None
    added = [{"role": "assistant", "content": answer}, {"role": "user", "content": reply}]
    assert json.loads(again) == {
        **row,
        "body": {"messages": [*messages, *added], "seed": 2**70, "max_tokens": 9},
    }
    instructed = json.loads(bytes(with_instruction(raw(messages), "Do.")))
    assert instructed[-1] == USER
    assert len(instructed) - len(messages) == (messages[0]["role"] != "system")


def test_an_instruction_is_no_eleventh_message() -> None:
    messages = [USER, {"role": "assistant", "content": "?"}] * 4 + [USER, USER]
    instructed = json.loads(bytes(with_instruction(raw(messages), "Do.")))
    assert instructed == [*messages[:-1], {"role": "user", "content": "hi\n\nDo."}]
