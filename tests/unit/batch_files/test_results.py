from __future__ import annotations

import io
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airflow_provider_siliconflow.api.exceptions import IncompleteResultsError, InvalidInputError
from airflow_provider_siliconflow.api.models import BatchResult, Outcome
from airflow_provider_siliconflow.batch_files import merge, result_lines
from airflow_provider_siliconflow.batch_files.atomic_files import write_json
from airflow_provider_siliconflow.batch_files.frames import to_frame
from airflow_provider_siliconflow.batch_files.merge import BatchFiles, merge_shard
from airflow_provider_siliconflow.batch_files.result_lines import read_results
from airflow_provider_siliconflow.batch_files.tally import ModelTally, Usage
from airflow_provider_siliconflow.batch_files.verdicts import (
    NotJSONError,
    is_balance_error,
    read_result,
    read_verdict,
    worth_retrying,
)
from airflow_provider_siliconflow.batch_files.whole_batch import copy_batch


def answer(custom_id, text="yes", *, finish="stop", model="m", usage=(10, 2), **more):
    body = {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}],
        "model": model,
        "usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)},
    }
    return {"id": "x", "custom_id": custom_id, "response": {"body": body}, "error": None, **more}


def failure(custom_id, code="500", message="Internal error"):
    return {"id": "x", "custom_id": custom_id, "response": None, "error": {"code": code, "message": message}}


class Folder:
    def __init__(self, path, ids):
        self.path = path
        self.shard = path / "shard.jsonl"
        rows = [{"custom_id": each, "body": {"messages": [], "model": "m"}} for each in ids]
        self.shard.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.count = 0

    def batch(self, output=None, errors=None, **more):
        return BatchFiles(self.file(output), self.file(errors), **more)

    def file(self, lines):
        if lines is None:
            return None
        self.count += 1
        path = self.path / f"result-{self.count}.jsonl"
        lines = [each if isinstance(each, bytes) else json.dumps(each).encode() for each in lines]
        path.write_bytes(b"".join(each + b"\n" for each in lines))
        return path

    def merge(self, *batches, **options):
        results, errors = io.BytesIO(), io.BytesIO()
        merged = merge_shard(self.shard, batches, results, errors, **options)
        return merged, results.getvalue().splitlines(), errors.getvalue().splitlines()


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path, ["a", "b", "c", "d"])


def ids(lines):
    return [json.loads(line)["custom_id"] for line in lines]


def test_lines_come_in_input_order_with_their_bytes_untouched(folder):
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


def test_a_later_answer_wins_but_a_later_error_does_not(folder):
    first = folder.batch([answer("a", "old"), answer("b", "old")], [failure("c"), failure("d", "400", "bad")])
    second = folder.batch([answer("a", "new"), answer("c", "new")], [failure("b"), failure("d")], round=1)
    merged, results, _ = folder.merge(first, second)
    texts = [BatchResult.model_validate_json(line).text for line in results]
    assert texts == ["new", "old", "new", None]
    assert BatchResult.model_validate_json(results[3]).error_code == "500", "the later of two errors"
    assert merged.tally.ok_in_round == {0: 1, 1: 2}
    assert merged.tally.usage == Usage(30, 6, 0, 36)
    assert merged.tally.billed == Usage(40, 8, 0, 48)


def test_within_a_batch_the_first_line_of_a_row_counts_and_output_comes_before_errors(folder, caplog):
    batch = folder.batch([answer("a", "1"), answer("a", "2")], [failure("a"), failure("b")])
    merged, results, _ = folder.merge(batch)
    assert BatchResult.model_validate_json(results[0]).text == "1"
    assert (merged.tally.duplicates, merged.tally.ok, merged.tally.billed.prompt) == (2, 1, 10)
    assert "1 lines of result-1.jsonl were left out" in caplog.text


def test_rows_of_other_shards_are_foreign_only_in_a_batch_of_this_shard(folder):
    lines = [answer(each) for each in "abcdefg"]
    assert folder.merge(folder.batch(lines))[0].tally.foreign == 3
    merged = folder.merge(folder.batch(lines, shared=True))[0]
    assert (merged.tally.foreign, merged.tally.billed.prompt) == (0, 40)


@pytest.mark.parametrize("bad", [b'{"custom_id":"b","resp', b"<html>", b'{"custom_id":"b","error":"\xf0'])
@pytest.mark.parametrize("terminated", [True, False])
def test_a_line_that_is_not_json_is_never_dropped(folder, bad, terminated):
    batch = folder.batch([answer("a"), bad], batch_id="batch_1")
    if not terminated:
        batch.output.write_bytes(batch.output.read_bytes()[:-1])
    with pytest.raises(IncompleteResultsError, match=r"line 2 of result-1\.jsonl of batch batch_1") as caught:
        folder.merge(batch)
    assert caught.value.batch_id == "batch_1"


@pytest.mark.parametrize("odd", [b'{"message":"expired"}', b'"text"', b'{"custom_id":null}', b"[" * 100_000])
def test_json_that_is_no_result_does_not_stop_the_rows_around_it(folder, odd, caplog):
    merged, results, _ = folder.merge(folder.batch([answer("a"), odd, answer("b")]))
    assert (merged.tally.ok, merged.tally.foreign, ids(results)) == (2, 1, ["a", "b", "c", "d"])
    assert "result-1.jsonl: 1 lines are no results" in caplog.text
    assert "line 2" in caplog.text


def test_a_custom_id_that_became_a_number_is_the_row_s(tmp_path):
    folder = Folder(tmp_path, ["7"])
    batch = folder.batch([answer(7)])
    merged, [line], _ = folder.merge(batch)
    assert merged.tally.ok == 1
    assert [row.custom_id for row in result_lines.results_of([line], "x")] == ["7"]


#: Cut characters, escapes, control characters; then what JSON is made of.
DAMAGES = (
    *(b"\xf0\x9f", b"\xed\xa0\xbd", b"\\", b"\\ud83d", b"\\x", b"\x00", b"\x1f", b"\r"),
    *(b'"', b"}", b"0", b"9" * 5000, b"1e999", b".", b"-", b",", b"NaN", b"[" * 2000),
)


@settings(max_examples=500)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 400),
            st.integers(0, 2),
            st.sampled_from(DAMAGES) | st.binary(max_size=2),
        ),
        max_size=3,
    ),
    st.sampled_from(["yes", "x" * 90, None]),
)
def test_a_damaged_line_is_judged_as_it_is_read_or_not_at_all(damages, text):
    """Otherwise a file of results would hold lines that its reader refuses."""
    line = json.dumps(answer("a", text, n=[1, {"k": 1.5}])).encode()
    for at, gone, put in damages:
        line = line[:at] + put.replace(b"\n", b"") + line[at + gone :]

    def outcome(read):
        try:
            found = read(line)
        except NotJSONError:
            return "not JSON"
        return found and (found.custom_id, found.outcome)

    assert outcome(read_verdict) == outcome(read_result)


def test_text_cut_within_a_character_can_be_told_in_a_manifest(folder, tmp_path):
    batch = folder.batch(None, [failure("a", "400", "bad prompt \ud83d")])
    tally = folder.merge(batch)[0].tally
    assert tally.messages["bad prompt \ufffd (400)"] == 1
    write_json(tmp_path / "any.json", {"cut": "\ud83d"})
    assert json.loads((tmp_path / "any.json").read_bytes()) == {"cut": "\ud83d"}


def test_a_message_that_repeats_its_prompt_is_not_kept_whole():
    said = "x" * 100_000
    assert len(read_verdict(json.dumps(failure("a", said, said)).encode()).message) <= 2000
    refused = {"custom_id": "a", "response": {"status_code": 400, "body": said}}
    assert len(read_verdict(json.dumps(refused).encode()).message) <= 2000


@pytest.mark.parametrize("files", [([failure("a"), answer("a")], None), ([failure("a")], [answer("a")])])
@pytest.mark.parametrize("with_rows", [True, False])
def test_within_a_batch_an_answer_wins_over_an_error(folder, files, with_rows):
    batch = folder.batch(*files)
    if with_rows:
        merged, results, _ = folder.merge(batch)
        tally = merged.tally
    else:
        written, errors = io.BytesIO(), io.BytesIO()
        tally = copy_batch(batch, written, errors, rows=1)
        results = written.getvalue().splitlines()
        assert errors.getvalue() == b""
    assert json.loads(results[0]) == answer("a")
    assert (tally.ok, tally.error, tally.duplicates, tally.billed.prompt) == (1, 0, 1, 10)


def test_blank_lines_and_a_missing_final_newline_are_no_fault(folder):
    path = folder.file([answer("a"), b"", b"\r", answer("b")])
    path.write_bytes(path.read_bytes()[:-1])
    _, results, errors = folder.merge(BatchFiles(path, None))
    assert ids(results) == ["a", "b", "c", "d"]
    assert ids(errors) == ["c", "d"]


def test_figures_of_the_answers(folder):
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


def test_an_answer_without_a_choice_is_an_error(folder):
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


def test_a_balance_error_is_told_apart(folder):
    message = "Sorry, your account balance is insufficient"
    merged = folder.merge(folder.batch(None, [failure("a", "30001", message), failure("b", "429", "slow")]))[
        0
    ]
    assert merged.out_of_balance
    assert list(merged.retry) == [0, 1, 1, 1]


@pytest.mark.parametrize("held", [0, 700, 1 << 20])
def test_lines_that_memory_does_not_hold_are_read_again(tmp_path, monkeypatch, held):
    monkeypatch.setattr(merge, "_HELD_BYTES", held)
    names = [f"id-{n}" for n in range(50)]
    folder = Folder(tmp_path, names)
    lines = [json.dumps(answer(each, "x" * n), ensure_ascii=False).encode() for n, each in enumerate(names)]
    shuffled = random.Random(1).sample(lines, k=50)
    _, results, _ = folder.merge(folder.batch([*shuffled[:20], b"", *shuffled[20:30]], shuffled[30:]))
    assert results == lines


loose = st.none() | st.booleans() | st.integers(0, 600) | st.sampled_from(["", " ", "x", "200", 200.0, 0.5])
odd_lines = st.fixed_dictionaries(
    {
        "custom_id": st.just("a"),
        "error": st.none() | loose | st.fixed_dictionaries({}, optional={"code": loose, "message": loose}),
        "response": loose
        | st.fixed_dictionaries(
            {},
            optional={
                "status_code": loose,
                "body": loose
                | st.fixed_dictionaries(
                    {},
                    optional={
                        "model": loose,
                        "choices": loose
                        | st.lists(
                            st.just({})
                            | loose
                            | st.fixed_dictionaries(
                                {"message": loose | st.fixed_dictionaries({}, optional={"content": loose})},
                                optional={"finish_reason": loose},
                            ),
                            max_size=2,
                        ),
                        "usage": loose
                        | st.fixed_dictionaries(
                            {},
                            optional={
                                "prompt_tokens": loose,
                                "completion_tokens_details": loose | st.just({"reasoning_tokens": 1}),
                            },
                        ),
                    },
                ),
            },
        ),
    }
)


@settings(max_examples=500)
@given(odd_lines)
def test_a_line_of_any_shape_is_judged_as_the_model_judges_it(data):
    verdict = read_verdict(json.dumps(data).encode())
    assert verdict is not None
    response = data["response"]
    data = {**data, "response": response if isinstance(response, dict) else None}
    expected = BatchResult.model_validate(data)
    assert verdict.outcome == expected.outcome
    if verdict.outcome is Outcome.OK:
        reason = expected.finish_reason
        assert verdict.finish_reason == (reason if isinstance(reason, str) else None)
        prompt = expected.usage.get("prompt_tokens")
        assert verdict.prompt == (prompt if type(prompt) is int else 200 if prompt in ("200", 200.0) else 0)
        text = expected.text
        assert verdict.empty == (not (text.strip() if isinstance(text, str) else text))
    else:
        assert verdict.message is not None


@given(st.lists(st.tuples(st.sampled_from("abcdxy"), st.integers(0, 2), st.sampled_from("oe")), max_size=12))
def test_every_row_ends_as_exactly_one_line(tmp_path_factory, arrivals):
    folder = Folder(tmp_path_factory.mktemp("merge"), list("abcd"))
    batches = []
    for number in range(3):
        lines = {"o": [], "e": []}
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


@pytest.mark.parametrize(
    ("code", "message", "status", "expected"),
    [
        ("429", "x", None, True),
        ("50505", "Model service overloaded. Please try again later.", None, True),
        ("50603", "x", None, True),
        (None, "Request was rejected due to rate limiting. Details: TPM limit reached.", None, True),
        ("rate_limit_exceeded", None, None, True),
        ("internal_error", None, None, True),
        (None, "Request timed out", None, True),
        (None, "x", 503, True),
        (None, "x", 408, True),
        (None, "Please try again", 400, False),
        ("400", "server busy parsing your request", None, False),
        ("20012", "Model does not exist. Please check it carefully.", None, False),
        ("20015", "invalid parameter: timeout", None, False),
        ("invalid_request_error", "timeout must be positive", None, False),
        ("30001", "Sorry, your account balance is insufficient", 500, False),
        ("30003", "Model disabled.", None, False),
        (None, "Invalid value for timeout", None, False),
        (None, "something odd", None, False),
        (None, None, None, False),
    ],
)
def test_only_passing_failures_are_worth_a_retry(code, message, status, expected):
    assert worth_retrying(Outcome.ERROR, code=code, message=message, status=status) is expected


def test_balance_errors_are_known_by_code_status_or_words():
    assert is_balance_error(code="30001")
    assert is_balance_error(status=402)
    assert is_balance_error(message="Insufficient account balance")
    assert not is_balance_error(code="429", message="load balancer busy", status=429)


def test_tallies_add_up_and_survive_json():
    one = ModelTally(rows=2, ok=1, usage=Usage(1, 2, 3, 4), finish_reasons={"stop": 1}, ok_in_round={0: 1})
    two = ModelTally.from_dict(json.loads(json.dumps(one.to_dict())))
    assert two == one
    two.add(one)
    assert (two.rows, two.usage, two.finish_reasons, two.ok_in_round) == (
        4,
        Usage(2, 4, 6, 8),
        {"stop": 2},
        {0: 2},
    )
    for number in range(1000):
        two.add_message(f"request {number} failed")
        two.add_message("the usual")
    assert len(two.messages) == 201
    assert two.commonest_errors(1) == {"the usual": 1000}


def test_results_are_read_as_models(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(answer("a", "中")) + "\n\n" + json.dumps(failure("b")) + "\n{")
    odd = answer("c", "cut \ud83d", id=7)
    path.write_text(path.read_text()[:-1] + json.dumps(odd) + "\n{")
    rows = read_results(path)
    assert [next(rows).text, next(rows).error_code, next(rows).text] == ["中", "500", "cut \ud83d"]
    with pytest.raises(IncompleteResultsError, match=r"line 5 of results\.jsonl"):
        next(rows)


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_a_frame_has_a_row_per_result(folder, library):
    pytest.importorskip(library)
    odd = answer("c", "cut \ud83d", finish=1, usage=(10.0, 1))
    odd["response"]["body"]["choices"][0]["message"]["reasoning_content"] = ["hm"]
    odd["response"]["body"]["usage"]["completion_tokens"] = "7"
    path = folder.file([answer("a"), failure("b", "400", "bad"), odd])
    frame = to_frame(path, library)
    assert list(frame["custom_id"]) == ["a", "b", "c"]
    assert list(frame["outcome"]) == ["ok", "error", "ok"]
    assert (frame["prompt_tokens"].sum(), frame["completion_tokens"].sum()) == (20, 9)
    assert frame["error"][1] == "bad (400)"
    assert frame["text"][2] == "cut \ufffd"
    assert len(to_frame([], library)) == 0


def test_a_frame_without_its_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "polars", None)
    with pytest.raises(ImportError, match=r"airflow-provider-siliconflow\[polars\]"):
        to_frame([], "polars")
    with pytest.raises(InvalidInputError, match="'pandas' or 'polars'"):
        to_frame([], "numpy")
