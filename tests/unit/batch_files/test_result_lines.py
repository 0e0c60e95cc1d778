"""The one reader of result lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from airflow_provider_siliconflow.api.exceptions import IncompleteResultsError
from airflow_provider_siliconflow.batch_files.lines import LineReader
from airflow_provider_siliconflow.batch_files.result_lines import read_lines, read_results, results_in
from airflow_provider_siliconflow.batch_files.verdicts import read_verdict
from tests.unit.batch_files.samples import Bytes, answer, failure


def test_results_are_read_as_models(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(answer("a", "中")) + "\n\n" + json.dumps(failure("b")) + "\n{")
    odd = answer("c", "cut \ud83d", id=7)
    path.write_text(path.read_text()[:-1] + json.dumps(odd) + "\n{")
    rows = read_results(path)
    assert [next(rows).text, next(rows).error_code, next(rows).text] == ["中", "500", "cut \ud83d"]
    with pytest.raises(IncompleteResultsError, match=r"line 5 of results\.jsonl"):
        next(rows)


def test_lines_come_with_their_place_past_those_that_cannot_be_read() -> None:
    """The merge reads them again by it."""
    good = [json.dumps(answer(each)).encode() for each in "abc"]
    data = b"\n".join([good[0], b"", b"x" * 900, good[1], b"{cut", b"[]", good[2]])
    problems: list[str] = []
    reader = LineReader(Bytes(data, 7), longest=600)
    found = list(
        read_lines(reader, read_verdict, name="f", batch_id="batch_1", on_unreadable=problems.append)
    )
    assert [(number, verdict and verdict.custom_id) for number, _, _, verdict in found] == [
        (1, "a"),
        (4, "b"),
        (6, None),
        (7, "c"),
    ]
    assert all(data[offset : offset + len(line)] == line for _, offset, line, _ in found)
    assert problems == [
        "line 3 of f of batch batch_1 is longer than 600 bytes",
        "line 5 of f of batch batch_1 is not JSON",
    ]
    with pytest.raises(IncompleteResultsError, match="line 3 of f of batch batch_1 is longer"):
        list(read_lines(LineReader(Bytes(data), longest=600), read_verdict, name="f", batch_id="batch_1"))


def test_a_download_is_read_as_it_arrives(caplog: pytest.LogCaptureFixture) -> None:
    data = (
        json.dumps(answer("a")).encode()
        + b'\n{"odd":1}\n\n'
        + json.dumps(failure("b")).encode()
        + b"\n<html>"
    )
    rows = results_in(
        [data[at : at + 9] for at in range(0, len(data), 9)], name="the file", batch_id="batch_1"
    )
    assert [next(rows).custom_id, next(rows).custom_id] == ["a", "b"]
    with pytest.raises(
        IncompleteResultsError, match=r"line 5 of the file of batch batch_1 .* a retry downloads"
    ):
        next(rows)
    assert len(list(results_in([data], name="the file", on_unreadable=lambda _: None))) == 2
    assert "the file: 1 lines are not results of any row" in caplog.text
