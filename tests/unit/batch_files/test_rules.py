"""What a request line must be."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airflow_provider_siliconflow.api.exceptions import InvalidRequestFileError
from airflow_provider_siliconflow.batch_files.reader import check_request_file
from airflow_provider_siliconflow.batch_files.rules import explain
from tests.unit.batch_files.samples import USER, Bytes, line


@pytest.mark.parametrize(
    ("data", "number", "reason"),
    [
        (b"", 1, "empty"),
        (line() + b"\n" + line("b"), 2, "blank"),
        (b"\xef\xbb\xbf" + line(), 1, "byte order mark"),
        (line()[:-1] + b"\r\n" + line("b")[:-1] + b"\r\n", 1, "convert the file's line ends to LF"),
        (line()[:-1], 1, "does not end with a newline"),
        (line("b", x="?").replace(b"?", b"\xff"), 1, "not UTF-8"),
        (b'{"custom_id": "a", \n', 1, "not valid JSON"),
        (line(x=float("nan")), 1, "NaN"),
        (line(x=float("-inf")), 1, "-Infinity"),
        (b'"hi"\n', 1, "is a string"),
        (line(17), 1, "custom_id must be a string"),
        (line(""), 1, "custom_id must be a string that is not empty"),
        (b'{"body":{"messages":[]}}\n', 1, "custom_id is missing"),
        (b'{"custom_id":"a","messages":[]}\n', 1, "body is missing"),
        (line(method="GET"), 1, "method must be"),
        (line(url="/v1/embeddings"), 1, "url must be"),
        (line(body={"messages": []}), 1, "at least one message"),
        (
            line(body={"messages": [{"role": "tool", "content": ""}, *USER]}),
            1,
            "messages[0].role must be one",
        ),
        (line(body={"messages": [{"role": "user"}]}), 1, "content is missing"),
        (line(body={"messages": [*USER, {"role": "assistant", "content": "x"}]}), 1, "role user"),
        (line(body={"messages": [{"role": "user", "content": None}]}), 1, "content must not be null"),
        (line(body={"messages": USER, "model": 1}), 1, "model must be a string"),
        (line("a") + line("b") + line("a"), 3, "line 1 has the same custom_id"),
        (line(x="\ud800"), 1, "not a valid request"),
        (line(method="GET", x="?").replace(b'"?"', b"9" * 5000), 1, "too many digits"),
        (line(method="\ud800"), 1, "method must be"),
    ],
)
def test_a_file_that_the_service_would_refuse_is_refused_with_the_reason(
    data: Any, number: Any, reason: Any
) -> None:
    with pytest.raises(InvalidRequestFileError) as caught:
        check_request_file(Bytes(data), name="in.jsonl")
    [problem] = caught.value.problems
    found, text = problem.line, problem.reason
    assert found == number
    assert reason in text
    assert text.encode(), "a log must be able to hold it"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)


messages = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["system", "user", "assistant", "tool", None]),
            "content": st.text(max_size=4) | json_values,
        },
    )
    | json_values,
    max_size=3,
)


request_lines = st.fixed_dictionaries(
    {},
    optional={
        "custom_id": st.text(max_size=3) | json_values,
        "method": st.sampled_from(["POST", "GET", None]),
        "url": st.sampled_from(["/v1/chat/completions", "/v1/x", None]),
        "extra": json_values,
        "body": st.fixed_dictionaries({"messages": messages | json_values}, optional={"model": json_values})
        | json_values,
    },
)


def is_request_line(value: dict[str, Any]) -> bool:
    """The rules of the service, as plainly as they can be written."""
    try:
        parts_ok = all(
            m["role"] in ("system", "user", "assistant")
            and (
                m["content"] is None
                or isinstance(m["content"], str)
                or (
                    isinstance(m["content"], list)
                    and all(isinstance(p, dict) and isinstance(p.get("text", ""), str) for p in m["content"])
                )
            )
            for m in value["body"]["messages"]
        )
        last = value["body"]["messages"][-1]
        return (
            isinstance(value["custom_id"], str)
            and bool(value["custom_id"])
            and value.get("method", "POST") == "POST"
            and value.get("url", "/v1/chat/completions") == "/v1/chat/completions"
            and isinstance(value["body"].get("model"), str | None)
            and parts_ok
            and last["role"] == "user"
            and last["content"] is not None
        )
    except (KeyError, TypeError, IndexError, AttributeError):
        return False


@settings(max_examples=300)
@given(request_lines, st.booleans())
def test_a_line_is_accepted_exactly_when_the_rules_say_so(value: Any, ascii_only: Any) -> None:
    data = json.dumps(value, ensure_ascii=ascii_only).encode() + b"\n"
    if is_request_line(value):
        assert check_request_file(Bytes(data), name="x").rows == 1
    else:
        with pytest.raises(InvalidRequestFileError) as caught:
            check_request_file(Bytes(data), name="x")
        assert "not a valid request" not in str(caught.value), "every refusal has a reason of its own"


@given(st.binary(max_size=40) | st.text(max_size=20).map(str.encode))
def test_no_bytes_at_all_break_the_check(data: Any) -> None:
    with pytest.raises(InvalidRequestFileError):
        check_request_file(Bytes(data + b"\n"), name="x")
    assert explain(data, as_row=True)[1]
