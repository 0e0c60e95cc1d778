from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airflow_provider_siliconflow.api.exceptions import InvalidInputError, InvalidRequestFileError
from airflow_provider_siliconflow.batch_files.lines import LineReader
from airflow_provider_siliconflow.batch_files.reader import check_request_file, read_rows
from airflow_provider_siliconflow.batch_files.rules import Problems, explain

USER = [{"role": "user", "content": "hi"}]


def line(custom_id: Any = "a", **over: Any) -> bytes:
    return json.dumps({"custom_id": custom_id, "body": {"messages": USER}, **over}).encode() + b"\n"


def check(tmp_path: Path, data: bytes, **limits: int) -> Any:
    path = tmp_path / "in.jsonl"
    path.write_bytes(data)
    return check_request_file(path, name="in.jsonl", **limits)


def problems_of(tmp_path: Path, data: bytes, **limits: int) -> list[tuple[int, str]]:
    with pytest.raises(InvalidRequestFileError) as caught:
        check(tmp_path, data, **limits)
    return [(problem.line, problem.reason) for problem in caught.value.problems]


def rows_of(requests: Any, **options: Any) -> list[dict[str, Any]]:
    problems = Problems("requests")
    rows = [json.loads(row.line) for row in read_rows(requests, problems, **options)]
    problems.raise_if_any()
    return rows


def test_a_valid_file_is_summed_up(tmp_path):
    data = line("a") + line("b", body={"messages": USER, "model": "m"}) + line("c", extra="中")
    summary = check(tmp_path, data)
    assert (summary.rows, summary.bytes, summary.models, summary.rows_without_model) == (
        3,
        len(data),
        ("m",),
        2,
    )
    assert summary.sha256 == hashlib.sha256(data).hexdigest()


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
def test_a_file_that_the_service_would_refuse_is_refused_with_the_reason(tmp_path, data, number, reason):
    [(found, text)] = problems_of(tmp_path, data)
    assert found == number
    assert reason in text
    assert text.encode(), "a log must be able to hold it"


def test_limits_of_a_file_are_inclusive(tmp_path):
    data = line("a") + line("b")
    assert check(tmp_path, data, max_rows=2, max_bytes=len(data)).rows == 2
    assert "more than the 1 lines" in problems_of(tmp_path, data, max_rows=1)[0][1]
    assert "bytes" in problems_of(tmp_path, data, max_bytes=len(data) - 1)[0][1]


def test_all_problems_are_shown_up_to_twenty(tmp_path):
    with pytest.raises(InvalidRequestFileError, match=r"(?s)line 2 \(custom_id 'b'\).*line 3:") as caught:
        check(tmp_path, line() + line("b", url="x") + b"x\n")
    assert not caught.value.more
    with pytest.raises(InvalidRequestFileError) as caught:
        check(tmp_path, b"x\n" * 30)
    assert len(caught.value.problems) == 20
    assert caught.value.more


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


class Bytes:
    def __init__(self, data: bytes, step: int = 1 << 20) -> None:
        self.data, self.step, self.at = data, step, 0

    def open(self, mode: str) -> Any:
        assert mode == "rb"
        return self

    def __enter__(self) -> Any:
        self.at = 0
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def read(self, size: int = -1) -> bytes:
        chunk = self.data[self.at : self.at + min(size, self.step)]
        self.at += len(chunk)
        return chunk


@settings(max_examples=300)
@given(request_lines, st.booleans())
def test_a_line_is_accepted_exactly_when_the_rules_say_so(value, ascii_only):
    data = json.dumps(value, ensure_ascii=ascii_only).encode() + b"\n"
    if is_request_line(value):
        assert check_request_file(Bytes(data), name="x").rows == 1
    else:
        with pytest.raises(InvalidRequestFileError) as caught:
            check_request_file(Bytes(data), name="x")
        assert "not a valid request" not in str(caught.value), "every refusal has a reason of its own"


@given(st.binary(max_size=40) | st.text(max_size=20).map(str.encode))
def test_no_bytes_at_all_break_the_check(data):
    with pytest.raises(InvalidRequestFileError):
        check_request_file(Bytes(data + b"\n"), name="x")
    assert explain(data, as_row=True)[1]


@given(st.lists(st.binary(max_size=9).map(lambda b: b.replace(b"\n", b"")), max_size=6), st.integers(1, 7))
def test_lines_are_the_same_whatever_the_size_of_a_read(lines, step):
    data = b"".join(each + b"\n" for each in lines) + b"end"
    reader = LineReader(Bytes(data, step), longest=5)
    assert list(reader) == [each if len(each) <= 5 else None for each in [*lines, b"end"]]
    assert reader.bytes == len(data)
    assert not reader.ends_with_newline


def test_every_form_of_a_row_becomes_a_full_request_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf"
        + line("full", method="POST", url="/v1/chat/completions", tag={"k": 1})[:-1]
        + b"\r\n"
        + b'{"custom_id": "short", "messages": [{"role": "user", "content": "\xe4\xb8\xad"}], "top_p": 1}\n'
        + b' "a \\"prompt\\""\n'
        + b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1}\n\n\n'
    )
    head = {"method": "POST", "url": "/v1/chat/completions"}
    assert rows_of(path, defaults={"temperature": 0.5}) == [
        {"custom_id": "full", **head, "tag": {"k": 1}, "body": {"messages": USER, "temperature": 0.5}},
        {
            "custom_id": "short",
            **head,
            "body": {"messages": [{"role": "user", "content": "中"}], "top_p": 1, "temperature": 0.5},
        },
        {
            "custom_id": "row-0000003",
            **head,
            "body": {"messages": [{"role": "user", "content": 'a "prompt"'}], "temperature": 0.5},
        },
        {
            "custom_id": "row-0000004",
            **head,
            "body": {"messages": [{"role": "user", "content": "x"}], "temperature": 1},
        },
    ]


def test_a_line_that_is_whole_gets_defaults_too():
    whole = line(method="POST", url="/v1/chat/completions")
    assert rows_of(Bytes(whole), defaults={"seed": 1})[0]["body"] == {"messages": USER, "seed": 1}


@pytest.mark.parametrize("head", [{}, {"method": "POST", "url": "/v1/chat/completions"}])
def test_the_largest_line_counts_its_newline(head):
    data = line("a", **head)
    [row] = read_rows(Bytes(data), Problems("x"))
    size = len(row.line) + 1
    assert len(rows_of(Bytes(data), max_bytes=size)) == 1
    with pytest.raises(InvalidRequestFileError):
        rows_of(Bytes(data), max_bytes=size - 1)


def test_a_full_line_keeps_its_very_bytes(tmp_path):
    data = b'{"body" : {"messages":[{"content":"\\u4e2d","role":"user"}],"seed":1e2},"z":1.0,"custom_id":"a",'
    data += b'"url":"/v1/chat/completions","method":"POST"}'
    [row] = read_rows(Bytes(data), Problems("x"))
    assert row.line == data


@given(st.text(min_size=1), st.text(), st.dictionaries(st.text(), json_values, max_size=3))
def test_python_rows_and_their_jsonl_become_the_same_requests(custom_id, prompt, more):
    more = {
        k: v for k, v in more.items() if k not in ("custom_id", "body", "messages", "method", "url", "model")
    }
    row = {"custom_id": custom_id, "messages": [{"role": "user", "content": prompt}], **more}
    [request] = rows_of([row])
    assert rows_of(Bytes(json.dumps(row).encode())) == [request]
    assert request["custom_id"] == custom_id
    assert request["body"] == {"messages": [{"role": "user", "content": prompt}], **more}
    assert rows_of([prompt])[0]["body"]["messages"] == [{"role": "user", "content": prompt}]


class Frame(list):
    columns = ("x",)


@pytest.mark.parametrize("requests", ["one prompt", b"bytes", {"messages": USER}, 5, None, Frame(["x"])])
def test_one_row_in_place_of_rows_is_refused(requests):
    with pytest.raises(InvalidInputError, match="requests must be"):
        rows_of(requests)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": USER, "temperature": float("nan")}, "cannot be written as JSON"),
        (b"prompt", "type bytes"),
        ({"messages": USER, "when": object()}, "cannot be written as JSON"),
        ({"custom_id": "a"}, "neither body nor messages"),
        ({"custom_id": None, "messages": USER}, "custom_id must be a string"),
        ("\ud800", "cannot be written as JSON"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "larger than the 300 bytes"),
    ],
)
def test_a_row_that_cannot_be_a_request_is_named_by_its_position(row, reason):
    with pytest.raises(InvalidRequestFileError) as caught:
        rows_of(["fine", row], max_bytes=300)
    [problem] = caught.value.problems
    assert problem.line == 2
    assert reason in problem.reason


@pytest.mark.parametrize("defaults", [{"messages": USER}, {"t": float("nan")}, {"model": 3}, ["temperature"]])
def test_defaults_that_cannot_be_body_parameters_are_refused(defaults):
    with pytest.raises(InvalidInputError, match="defaults"):
        rows_of(["x"], defaults=defaults)


def test_the_estimate_counts_text_only_and_takes_wide_characters_for_tokens():
    rows = read_rows(["a" * 40, "中文" * 10, "中aaaa"], Problems("x"))
    assert [row.prompt_tokens for row in rows] == [10, 20, 2]
    content = [
        {"type": "image_url", "image_url": {"url": "data:" + "a" * 99}},
        {"type": "text", "text": "中aaaa"},
    ]
    [row] = read_rows([{"messages": [{"role": "user", "content": content}]}], Problems("x"))
    assert row.prompt_tokens == 2
