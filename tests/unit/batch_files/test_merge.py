"""Result lines in the order of the input."""

from __future__ import annotations

import io
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_provider_siliconflow.api.exceptions import IncompleteResultsError
from airflow_provider_siliconflow.api.models import BatchResult, Outcome
from airflow_provider_siliconflow.batch_files import merge
from airflow_provider_siliconflow.batch_files.merge import BatchFiles, Unjudged, merge_batch, refused_lines
from airflow_provider_siliconflow.batch_files.result_lines import read_results
from airflow_provider_siliconflow.batch_files.tally import Usage
from airflow_provider_siliconflow.batch_files.verdicts import UnjudgedError
from tests.unit.batch_files.samples import Folder, answer, failure, ids, line


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path, ["a", "b", "c", "d"])


def test_lines_come_in_input_order_with_their_bytes_untouched(folder: Folder) -> None:
    odd = b'{"custom_id" :"a","response":{"body":{"choices":[{"message":{"content":"\\u4e2d"}}]}},"new":1.0}'
    error = failure("c", "batch_expired", "too late")
    merged, results, errors = folder.merge(folder.batch([answer("d"), odd], [error]))
    assert ids(results) == ["a", "b", "c", "d"]
    assert results[0] == odd
    assert json.loads(results[1]) == {
        "id": None,
        "custom_id": "b",
        "response": None,
        "error": {"code": "missing", "message": "the service returned no result for this row"},
    }
    assert errors == [results[1], results[2]]
    tally = merged.tally
    assert (tally.rows, tally.ok, tally.error, tally.expired, tally.missing) == (4, 2, 0, 1, 1)
    assert list(merged.retry) == [0, 1, 1, 0]
    assert [result.outcome for result in map(BatchResult.model_validate_json, results)] == [
        Outcome.OK,
        Outcome.MISSING,
        Outcome.EXPIRED,
        Outcome.OK,
    ]


def test_a_later_answer_wins_but_a_later_error_does_not(folder: Folder) -> None:
    first = folder.batch([answer("a", "old"), answer("b", "old")], [failure("c"), failure("d", "400", "bad")])
    second = folder.batch([answer("a", "new"), answer("c", "new")], [failure("b"), failure("d")], round=1)
    merged, results, _ = folder.merge(first, second)
    texts = [BatchResult.model_validate_json(line).text for line in results]
    assert texts == ["new", "old", "new", None]
    assert BatchResult.model_validate_json(results[3]).error_code == "500", "the later of two errors"
    assert merged.tally.ok_in_round == {0: 1, 1: 2}
    assert merged.tally.usage == Usage(30, 6, 0, 36)
    assert merged.tally.billed == Usage(40, 8, 0, 48)


def test_within_a_batch_the_first_line_of_a_row_counts_and_output_comes_before_errors(
    folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    batch = folder.batch([answer("a", "1"), answer("a", "2")], [failure("a"), failure("b")])
    merged, results, _ = folder.merge(batch)
    assert BatchResult.model_validate_json(results[0]).text == "1"
    assert (merged.tally.duplicates, merged.tally.ok, merged.tally.billed.prompt) == (2, 1, 10)
    assert "1 lines of result-1.jsonl were left out" in caplog.text


def test_rows_of_other_shards_are_foreign_only_in_a_batch_of_this_shard(folder: Folder) -> None:
    lines = [answer(each) for each in "abcdefg"]
    assert folder.merge(folder.batch(lines))[0].tally.foreign == 3
    merged = folder.merge(folder.batch(lines, shared=True))[0]
    assert (merged.tally.foreign, merged.tally.billed.prompt) == (0, 40)


UNREADABLE = [b'{"custom_id":"b","resp', b"<html>", b'{"custom_id":"b","error":"\xf0', b"[" * 100_000]


@pytest.mark.parametrize("bad", UNREADABLE)
@pytest.mark.parametrize("terminated", [True, False])
def test_a_line_that_cannot_be_read_is_an_error_of_a_strict_merge(
    folder: Folder, bad: Any, terminated: Any
) -> None:
    batch = folder.batch([answer("a"), bad], batch_id="batch_1")
    assert batch.output
    if not terminated:
        batch.output.write_bytes(batch.output.read_bytes()[:-1])
    with pytest.raises(IncompleteResultsError, match=r"line 2 of result-1\.jsonl of batch batch_1") as caught:
        folder.merge(batch)
    assert caught.value.batch_id == "batch_1"


@pytest.mark.parametrize("bad", UNREADABLE)
def test_otherwise_it_costs_one_row_and_none_that_may_be_paid_is_sent_again(
    folder: Folder, bad: bytes
) -> None:
    """The lost line is the result of "b" or "d", and nobody can say which; "c" failed, and has its line."""
    batch = folder.batch([answer("a"), bad, failure("c")], batch_id="batch_1")
    merged, results, errors = folder.merge(batch, strict=False)
    assert ids(results) == ["a", "b", "c", "d"]
    assert ids(errors) == ["b", "c", "d"]
    assert (merged.tally.ok, merged.tally.error, merged.tally.missing) == (1, 1, 2)
    assert list(merged.retry) == [0, 0, 1, 0]
    [spoilt] = merged.spoilt
    assert (spoilt.batch_id, spoilt.rows) == ("batch_1", 2)
    assert spoilt.reason.startswith("line 2 of result-1.jsonl of batch batch_1 is n")
    lost = BatchResult.model_validate_json(results[1])
    assert lost.outcome is Outcome.MISSING
    assert lost.error_message
    assert lost.error_message.startswith("no result for this row could be read: line 2 of result-1.jsonl")


def test_lines_beside_results_of_every_row_lose_none(folder: Folder) -> None:
    lines = [*(answer(each) for each in "abcd"), b"<html>", b"cut"]
    merged, results, _ = folder.merge(folder.batch(lines), strict=False)
    assert (merged.tally.ok, len(results)) == (4, 4)
    [spoilt] = merged.spoilt
    assert spoilt.rows == 0
    assert spoilt.reason == "line 5 of result-1.jsonl is not JSON, and 1 more lines cannot be read"


def test_a_batch_that_cannot_be_had_costs_its_own_rows(folder: Folder) -> None:
    """A retry of "b" and "c": what came of it is unknown, and what came of the others is not touched by it."""
    again = folder.path / "again.jsonl"
    again.write_bytes(line("b") + line("c"))
    first = folder.batch([answer("a")], [failure("b"), failure("c"), failure("d")])
    second = BatchFiles(
        None, None, round=1, shared=True, batch_id="batch_2", spoilt="HTTP 404", requests=again
    )
    merged, results, _ = folder.merge(first, second)
    assert ids(results) == ["a", "b", "c", "d"]
    assert (merged.tally.error, list(merged.retry)) == (3, [0, 0, 0, 1])
    assert [(each.batch_id, each.reason, each.rows) for each in merged.spoilt] == [("batch_2", "HTTP 404", 2)]
    merged, _, _ = folder.merge(first, replace(second, requests=None))
    assert list(merged.retry) == [0, 0, 0, 0], "they may be any rows"


def test_rows_that_a_short_file_lacks_are_not_sent_again(folder: Folder) -> None:
    first = folder.batch([answer("a")], [failure("b"), failure("c")], short=True)
    assert list(folder.merge(first)[0].retry) == [0, 1, 1, 0]
    again = folder.path / "again.jsonl"
    again.write_bytes(line("b") + line("c"))
    second = folder.batch([], [failure("b")], round=1, shared=True, short=True, requests=again)
    merged, _, _ = folder.merge(replace(first, short=False), second)
    assert (list(merged.retry), merged.spoilt) == ([0, 1, 0, 1], ())


def test_a_batch_whose_requests_are_not_at_hand_is_written_whole(folder: Folder) -> None:
    batch = folder.batch([answer("x"), b"cut", answer("y" * 1000)], [failure("z")], batch_id="batch_1")
    results, errors = io.BytesIO(), io.BytesIO()
    merged = merge_batch(batch, results, errors, rows=5, strict=False)
    assert ids(results.getvalue().splitlines()) == ["x", "y" * 1000, "z"]
    assert ids(errors.getvalue().splitlines()) == ["z"]
    assert (merged.tally.rows, merged.tally.ok, merged.tally.missing) == (5, 2, 2)
    assert merged.spoilt
    assert (merged.spoilt.batch_id, merged.spoilt.rows) == ("batch_1", 2)
    with pytest.raises(IncompleteResultsError, match="line 2"):
        merge_batch(batch, results, errors, rows=5)


def test_a_damaged_shard_is_named(folder: Folder) -> None:
    folder.shard.write_bytes(folder.shard.read_bytes()[:-9])
    with pytest.raises(IncompleteResultsError, match=r"line 4 of the request file .*shard\.jsonl is damaged"):
        folder.merge(folder.batch([answer("a")]))
    with pytest.raises(IncompleteResultsError, match="line 4 of the request file"):
        folder.merge(folder.batch([answer("a")]), model="m")


def test_a_batch_that_was_refused_says_so_of_each_row(folder: Folder) -> None:
    lines = list(refused_lines(folder.shard, status=400, message="no " * 9999))
    rows = [BatchResult.model_validate_json(each) for each in lines]
    assert [row.custom_id for row in rows] == ["a", "b", "c", "d"]
    assert rows[0].error_code == "400"
    assert all(len(each) < 3000 for each in lines)


@pytest.mark.parametrize("odd", [b'{"message":"expired"}', b'"text"', b'{"custom_id":null}', b"[]"])
def test_json_that_is_no_result_does_not_stop_the_rows_around_it(
    folder: Folder, odd: Any, caplog: pytest.LogCaptureFixture
) -> None:
    merged, results, _ = folder.merge(folder.batch([answer("a"), odd, answer("b")]))
    assert (merged.tally.ok, merged.tally.foreign, ids(results)) == (2, 1, ["a", "b", "c", "d"])
    assert "result-1.jsonl: 1 lines are not results" in caplog.text
    assert "line 2" in caplog.text


def test_a_custom_id_that_became_a_number_is_the_row_s(tmp_path: Path) -> None:
    folder = Folder(tmp_path, ["7"])
    batch = folder.batch([answer(7)])
    merged, _, _ = folder.merge(batch)
    assert merged.tally.ok == 1
    assert batch.output
    assert [row.custom_id for row in read_results(batch.output)] == ["7"]


@pytest.mark.parametrize("files", [([failure("a"), answer("a")], None), ([failure("a")], [answer("a")])])
@pytest.mark.parametrize("with_rows", [True, False])
def test_within_a_batch_an_answer_wins_over_an_error(folder: Folder, files: Any, with_rows: Any) -> None:
    batch = folder.batch(*files)
    if with_rows:
        merged, results, _ = folder.merge(batch)
        tally = merged.tally
    else:
        written, errors = io.BytesIO(), io.BytesIO()
        tally = merge_batch(batch, written, errors, rows=1).tally
        results = written.getvalue().splitlines()
        assert errors.getvalue() == b""
    assert json.loads(results[0]) == answer("a")
    assert (tally.ok, tally.error, tally.duplicates, tally.billed.prompt) == (1, 0, 1, 10)


def test_blank_lines_and_a_missing_final_newline_are_no_fault(folder: Folder) -> None:
    path = folder.file([answer("a"), b"", b"\r", answer("b")])
    path.write_bytes(path.read_bytes()[:-1])
    _, results, errors = folder.merge(BatchFiles(path, None))
    assert ids(results) == ["a", "b", "c", "d"]
    assert ids(errors) == ["c", "d"]


def test_figures_of_the_answers(folder: Folder) -> None:
    thinking = answer("d", None)
    thinking["response"]["body"]["usage"]["completion_tokens_details"] = {"reasoning_tokens": 2}
    thinking["response"]["body"]["choices"][0]["message"]["reasoning_content"] = "long thoughts"
    thinking["response"]["body"]["usage"]["total_tokens"] = 13
    batch = folder.batch([answer("a", finish="length"), answer("b", " \n"), answer("c", model="M"), thinking])
    tally = folder.merge(batch)[0].tally
    assert tally.finish_reasons == {"length": 1, "stop": 3}
    assert (tally.truncated, tally.empty, tally.mismatches) == (1, 2, 0)
    assert tally.usage == Usage(40, 8, 2, 49)
    assert folder.merge(batch, model="other")[0].tally.mismatches == 4


def test_an_answer_without_a_choice_is_an_error(folder: Folder) -> None:
    hollow = answer("a")
    hollow["response"]["body"]["choices"] = []
    refused = {
        "custom_id": "b",
        "response": {"status_code": 503, "body": {"code": 50505, "message": "overloaded"}},
    }
    merged = folder.merge(folder.batch([hollow, refused]))[0]
    assert (merged.tally.error, merged.tally.ok) == (2, 0)
    assert list(merged.retry) == [0, 1, 1, 1]
    assert merged.tally.messages["overloaded (50505)"] == 1


def test_a_balance_error_is_counted(folder: Folder) -> None:
    message = "Sorry, your account balance is insufficient"
    merged = folder.merge(folder.batch(None, [failure("a", "30001", message), failure("b", "429", "slow")]))[
        0
    ]
    assert merged.tally.balance_errors == 1
    assert list(merged.retry) == [0, 1, 1, 1]


@pytest.mark.parametrize("held", [0, 700, 1 << 20])
def test_lines_that_memory_does_not_hold_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: Any
) -> None:
    monkeypatch.setattr(merge, "_HELD_BYTES", held)
    names = [f"id-{n}" for n in range(50)]
    folder = Folder(tmp_path, names)
    lines = [json.dumps(answer(each, "x" * n), ensure_ascii=False).encode() for n, each in enumerate(names)]
    shuffled = random.Random(1).sample(lines, k=50)
    _, results, _ = folder.merge(folder.batch([*shuffled[:20], b"", *shuffled[20:30]], shuffled[30:]))
    assert results == lines


@given(st.lists(st.tuples(st.sampled_from("abcdxy"), st.integers(0, 2), st.sampled_from("oe")), max_size=12))
def test_every_row_ends_as_exactly_one_line(tmp_path_factory: pytest.TempPathFactory, arrivals: Any) -> None:
    folder = Folder(tmp_path_factory.mktemp("merge"), list("abcd"))
    batches = []
    for number in range(3):
        lines: dict[str, list[Any]] = {"o": [], "e": []}
        for name, at, kind in arrivals:
            if at == number:
                lines[kind].append(answer(name) if kind == "o" else failure(name))
        batches.append(folder.batch(lines["o"], lines["e"], round=number))
    merged, results, errors = folder.merge(*batches)
    tally = merged.tally
    assert ids(results) == list("abcd")
    answered = {name for name, _, kind in arrivals if kind == "o"}
    assert {line for line in ids(results) if line not in ids(errors)} == answered & set("abcd")
    assert tally.ok + tally.error + tally.expired + tally.missing == 4
    assert tally.ok == len(answered & set("abcd"))


def judge(line: bytes, text: str | None, finish_reason: str | None) -> str | None:
    """Accepts "yes" and fails on "bug"."""
    if text == "bug":
        raise UnjudgedError("accept raised KeyError: 'x'")
    return None if text == "yes" else f"{text} is not yes"


def test_a_reason_is_bounded_and_can_be_written(folder: Folder) -> None:
    reason = "\ud800\0" + "x" * 10_000
    _, results, _ = folder.merge(folder.batch([answer("a")]), judge=lambda *_: reason)
    assert len(json.loads(results[0])["invalid"]) <= 300


def test_an_answer_that_is_not_accepted_is_marked_and_sent_again(folder: Folder) -> None:
    odd = (
        b'{"custom_id" :"a","response":{"body":{"choices":[{"message":{"content":"\\u4e2d"}}]}},"new":1.0}\r'
    )
    batch = folder.batch([odd, answer("b"), answer("c", None)], [failure("d", "400", "bad")])
    merged, results, errors = folder.merge(batch, judge=judge)
    assert results[0] == odd[:-2] + ',"invalid":"中 is not yes"}'.encode()
    assert json.loads(results[1]) == answer("b")
    assert ids(errors) == ["a", "c", "d"]
    assert list(merged.retry) == [1, 0, 1, 0]
    tally = merged.tally
    assert (tally.ok, tally.invalid, tally.error, tally.billed.prompt) == (1, 2, 1, 20)
    assert tally.invalid_reasons == {"中 is not yes": 1, "None is not yes": 1}
    found = list(map(BatchResult.model_validate_json, results))
    assert [result.outcome for result in found] == ["invalid", "ok", "invalid", "error"]
    assert found[0].error_message == "中 is not yes"


def test_of_several_answers_the_accepted_one_is_kept(folder: Folder) -> None:
    first = folder.batch([answer("a"), answer("b", "old"), answer("c", "old"), answer("d", "old")])
    second = folder.batch(
        [answer("a", "no"), answer("b"), answer("c", "new")], [failure("d", "400", "bad")], round=1
    )
    merged, results, _ = folder.merge(first, second, judge=judge)
    texts = [BatchResult.model_validate_json(line).text for line in results]
    assert texts == ["yes", "yes", "new", "old"], "and an answer that is paid for is not lost to an error"
    assert list(merged.retry) == [0, 0, 1, 0], "the service refuses the next attempt of d"
    assert merged.tally.billed.prompt == 70


def test_an_empty_account_is_seen_behind_an_invalid_answer(folder: Folder) -> None:
    first = folder.batch([answer("a", "old")])
    second = folder.batch([], [failure("a", "30001", "balance is insufficient")], round=1)
    assert folder.merge(first, second, judge=judge)[0].tally.balance_errors == 1


def test_within_a_batch_an_accepted_answer_wins(folder: Folder) -> None:
    merged, results, _ = folder.merge(
        folder.batch([answer("a", "no"), answer("a"), answer("a", "no")]), judge=judge
    )
    assert json.loads(results[0]) == answer("a")
    assert (merged.tally.ok, merged.tally.duplicates, merged.tally.billed.prompt) == (1, 2, 10)


def test_an_answer_that_cannot_be_judged_is_kept_and_not_paid_again(folder: Folder) -> None:
    first = folder.batch([answer("a", "bug"), answer("b", "bug"), answer("c", "no")])
    second = folder.batch([answer("a", "no"), answer("b")], round=1)
    merged, results, _ = folder.merge(first, second, judge=judge)
    assert [BatchResult.model_validate_json(line).text for line in results[:3]] == ["bug", "yes", "no"]
    assert list(merged.retry) == [0, 0, 1, 1]
    assert merged.unjudged == Unjudged("a", "accept raised KeyError: 'x'")


@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 2), st.sampled_from(["yes", "no", None]))),
)
def test_any_accepted_answer_of_any_round_makes_its_row_ok(
    tmp_path_factory: pytest.TempPathFactory, arrivals: list[tuple[str, int, str | None]]
) -> None:
    folder = Folder(tmp_path_factory.mktemp("merge"), list("abcd"))
    batches = [
        folder.batch(
            [answer(name, text) for name, at, text in arrivals if at == number and text],
            [failure(name) for name, at, text in arrivals if at == number and text is None],
            round=number,
        )
        for number in range(3)
    ]
    merged, results, _ = folder.merge(*batches, judge=judge)
    given_answers = {name: {text for other, _, text in arrivals if other == name} for name in "abcd"}
    outcomes = [BatchResult.model_validate_json(line).outcome for line in results]
    assert outcomes == [
        "ok" if "yes" in texts else "invalid" if "no" in texts else "error" if None in texts else "missing"
        for texts in given_answers.values()
    ]
    assert list(merged.retry) == [outcome != "ok" for outcome in outcomes]
