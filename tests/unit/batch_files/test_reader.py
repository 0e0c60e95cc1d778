"""Request files are checked; rows become request lines."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_provider_siliconflow.api.exceptions import InvalidInputError, InvalidRequestFileError
from airflow_provider_siliconflow.batch_files.reader import check_request_file, read_rows
from airflow_provider_siliconflow.batch_files.rules import Problems
from tests.unit.batch_files.samples import USER, Bytes, line


def check(tmp_path: Path, data: bytes, **limits: int) -> Any:
    path = tmp_path / "in.jsonl"
    path.write_bytes(data)
    return check_request_file(path, name="in.jsonl", **limits)


def rows_of(requests: Any, **options: Any) -> list[dict[str, Any]]:
    problems = Problems("requests")
    rows = [json.loads(row.line) for row in read_rows(requests, problems, **options)]
    problems.raise_if_any()
    return rows


def test_a_valid_file_is_summed_up(tmp_path: Path) -> None:
    data = line("a") + line("b", body={"messages": USER, "model": "m"}) + line("c", extra="中")
    summary = check(tmp_path, data)
    assert (summary.rows, summary.bytes, summary.models, summary.rows_without_model) == (
        3,
        len(data),
        ("m",),
        2,
    )
    assert summary.sha256 == hashlib.sha256(data).hexdigest()


def test_limits_of_a_file_are_inclusive(tmp_path: Path) -> None:
    data = line("a") + line("b")
    assert check(tmp_path, data, max_rows=2, max_bytes=len(data)).rows == 2
    with pytest.raises(InvalidRequestFileError, match="more than the 1 lines"):
        check(tmp_path, data, max_rows=1)
    with pytest.raises(InvalidRequestFileError, match=r"more than the \d+ bytes"):
        check(tmp_path, data, max_bytes=len(data) - 1)


def test_all_problems_are_shown_up_to_twenty(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestFileError, match=r"(?s)line 2 \(custom_id 'b'\).*line 3:") as caught:
        check(tmp_path, line() + line("b", url="x") + b"x\n")
    assert not caught.value.more
    with pytest.raises(InvalidRequestFileError) as caught:
        check(tmp_path, b"x\n" * 30)
    assert len(caught.value.problems) == 20
    assert caught.value.more


def test_every_form_of_a_row_becomes_a_full_request_line(tmp_path: Path) -> None:
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


def test_a_line_that_is_whole_gets_defaults_too() -> None:
    whole = line(method="POST", url="/v1/chat/completions")
    assert rows_of(Bytes(whole), defaults={"seed": 1})[0]["body"] == {"messages": USER, "seed": 1}


@pytest.mark.parametrize("head", [{}, {"method": "POST", "url": "/v1/chat/completions"}])
def test_the_largest_line_counts_its_newline(head: Any) -> None:
    data = line("a", **head)
    [row] = read_rows(Bytes(data), Problems("x"))
    size = len(row.line) + 1
    assert len(rows_of(Bytes(data), max_bytes=size)) == 1
    with pytest.raises(InvalidRequestFileError):
        rows_of(Bytes(data), max_bytes=size - 1)


def test_a_full_line_keeps_its_very_bytes(tmp_path: Path) -> None:
    data = b'{"body" : {"messages":[{"content":"\\u4e2d","role":"user"}],"seed":1e2},"z":1.0,"custom_id":"a",'
    data += b'"url":"/v1/chat/completions","method":"POST"}'
    [row] = read_rows(Bytes(data), Problems("x"))
    assert row.line == data


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)


@given(st.text(min_size=1), st.text(), st.dictionaries(st.text(), json_values, max_size=3))
def test_python_rows_and_their_jsonl_become_the_same_requests(custom_id: Any, prompt: Any, more: Any) -> None:
    more = {
        k: v for k, v in more.items() if k not in ("custom_id", "body", "messages", "method", "url", "model")
    }
    row = {"custom_id": custom_id, "messages": [{"role": "user", "content": prompt}], **more}
    [request] = rows_of([row])
    assert rows_of(Bytes(json.dumps(row).encode())) == [request]
    assert request["custom_id"] == custom_id
    assert request["body"] == {"messages": [{"role": "user", "content": prompt}], **more}
    assert rows_of([prompt])[0]["body"]["messages"] == [{"role": "user", "content": prompt}]


class Frame(list[str]):
    columns = ("x",)


@pytest.mark.parametrize("requests", ["one prompt", b"bytes", {"messages": USER}, 5, None, Frame(["x"])])
def test_one_row_in_place_of_rows_is_refused(requests: Any) -> None:
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
def test_a_row_that_cannot_be_a_request_is_named_by_its_position(row: Any, reason: Any) -> None:
    with pytest.raises(InvalidRequestFileError) as caught:
        rows_of(["fine", row], max_bytes=300)
    [problem] = caught.value.problems
    assert problem.line == 2
    assert reason in problem.reason


def test_the_estimate_counts_text_only_and_takes_wide_characters_for_tokens() -> None:
    rows = read_rows(["a" * 40, "中文" * 10, "中aaaa"], Problems("x"))
    assert [row.prompt_tokens for row in rows] == [10, 20, 2]
    content = [
        {"type": "image_url", "image_url": {"url": "data:" + "a" * 99}},
        {"type": "text", "text": "中aaaa"},
    ]
    [row] = read_rows([{"messages": [{"role": "user", "content": content}]}], Problems("x"))
    assert row.prompt_tokens == 2
