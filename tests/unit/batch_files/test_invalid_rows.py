"""Invalid rows that are reported: which they are, and where their lines go."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_provider_siliconflow.api.exceptions import IncompleteResultsError, InvalidRequestFileError
from airflow_provider_siliconflow.batch_files.invalid_rows import (
    INVALID_ROWS,
    InvalidLines,
    read_invalid_rows,
)
from airflow_provider_siliconflow.batch_files.merge import merge_shard
from airflow_provider_siliconflow.batch_files.shards import Split, split_requests
from airflow_provider_siliconflow.batch_files.tally import ModelTally


def line(custom_id: str) -> bytes:
    message = {"role": "user", "content": "hi"}
    return json.dumps({"custom_id": custom_id, "messages": [message], "model": "m"}).encode()


ids = st.sampled_from(["a", "b", "c", "row-0000002", "row-0000003"])
lines = st.lists(
    ids.map(line)
    | st.sampled_from(
        [
            b"",
            b"{",
            b'"a prompt"',
            b'{"custom_id": "a"}',
            b'{"custom_id": "", "messages": []}',
            b"\xff",
            b" \r",
        ]
    )
    | st.just(b'{"custom_id": "\\ud800", "messages": 1}')
    | st.just(b'"' + b"x" * 300 + b'"'),
    max_size=12,
)


def merged(split: Split, folder: Path) -> list[dict[str, Any]]:
    """Merge a job none of whose rows got a result."""
    results, errors, tally = io.BytesIO(), io.BytesIO(), ModelTally()
    invalid = InvalidLines(folder / INVALID_ROWS if split.invalid else None, tally, rows=split.invalid)
    for shard in split.shards:
        merge_shard(folder / shard.name, [], results, errors, model="m", invalid_rows=invalid)
    for data in invalid.rest():
        results.write(data + b"\n")
    assert (tally.rows, tally.error, tally.invalid_input) == (split.invalid,) * 3
    return [json.loads(data) for data in results.getvalue().splitlines()]


@given(given=lines, max_rows=st.integers(1, 4))
def test_every_line_of_the_input_has_a_line_in_the_results_at_its_place(
    tmp_path_factory: pytest.TempPathFactory, given: list[bytes], max_rows: int
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    source = folder / "rows.jsonl"
    source.write_bytes(b"".join(each + b"\n" for each in given))
    while given and not given[-1].strip():
        given.pop()

    expected: list[str | None] = []
    for number, each in enumerate(given, 1):
        own = json.loads(each)["custom_id"] if b'"m"' in each else None
        own = f"row-{number:07d}" if each == b'"a prompt"' else own
        expected.append(own if own not in expected else None)

    def split(work: str) -> Split:
        return split_requests(
            source, folder / work, name="rows", max_rows=max_rows, max_bytes=256, report_invalid=True
        )

    if not any(expected):
        with pytest.raises((InvalidRequestFileError, ValueError), match="rows"):
            split("work")
        return
    found = split("work")
    results = merged(found, folder / "work")
    assert len(results) == len(given)
    assert [
        None if result["error"]["code"] == "invalid_input" else result["custom_id"] for result in results
    ] == expected
    assert found.rows == sum(own is not None for own in expected)
    for number, result in enumerate(results, 1):
        if result["error"]["code"] == "invalid_input":
            assert result["error"]["message"].startswith(f"line {number}: ")
            assert result["custom_id"] not in expected, "an error must not stand under the id of an answer"
    shards = itertools.chain.from_iterable(
        (folder / "work" / shard.name).read_bytes().splitlines() for shard in found.shards
    )
    assert [json.loads(each)["custom_id"] for each in shards] == [own for own in expected if own]
    assert Split.from_dict(json.loads(json.dumps(found.to_dict()))) == found == split("again")


def test_what_is_wrong_with_a_row_given_as_an_object_is_reported_under_its_id(tmp_path: Path) -> None:
    rows = [{"custom_id": "a", "messages": "hi"}, "a prompt", {"custom_id": "b", "x": object()}, 7]
    split = split_requests(rows, tmp_path, name="rows", report_invalid=True)
    assert (split.rows, split.invalid) == (1, 3)
    found = list(read_invalid_rows(tmp_path / INVALID_ROWS))
    assert [(row.line, row.custom_id) for row in found] == [(1, "a"), (3, "b"), (4, "row-0000004")]
    assert "cannot be written as JSON" in found[1].reason


def test_the_second_half_of_an_input_that_stands_twice_in_its_file_is_reported(tmp_path: Path) -> None:
    rows = [line(f"q{number}") for number in range(50)] * 2
    source = tmp_path / "rows.jsonl"
    source.write_bytes(b"\n".join(rows))
    split = split_requests(source, tmp_path / "work", name="rows", max_rows=7, report_invalid=True)
    assert (split.rows, split.invalid, len(split.shards)) == (50, 50, 8)
    (reason,) = {row.reason for row in read_invalid_rows(tmp_path / "work" / INVALID_ROWS) if row.line == 51}
    assert reason == "line 1 has the same custom_id 'q0'; each must be unique"


def test_an_input_without_a_valid_row_is_refused_with_what_is_wrong(tmp_path: Path) -> None:
    said = r"the first 20 problems.*\n  line 1: the row is"
    with pytest.raises(InvalidRequestFileError, match=said) as caught:
        split_requests([7] * 21 + [{}], tmp_path, name="rows", report_invalid=True)
    assert caught.value.more


@pytest.mark.parametrize("damage", [b"", b'{"line": 1, "custom_id": "a", "reason": "r"}\n' * 2, b"{"])
def test_a_damaged_record_of_invalid_rows_is_no_complete_result(tmp_path: Path, damage: bytes) -> None:
    split = split_requests([7, "a prompt"], tmp_path, name="rows", report_invalid=True)
    (tmp_path / INVALID_ROWS).write_bytes(damage)
    with pytest.raises(IncompleteResultsError, match="untouched"):
        merged(split, tmp_path)
