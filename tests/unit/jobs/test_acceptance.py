"""Answers that a job does not accept: what is sent again, with what, and what it costs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field, ValidationError, field_validator

from airflow_provider_siliconflow.api.exceptions import (
    BatchFailedError,
    BatchPartialFailureError,
    IncompleteResultsError,
    InvalidInputError,
)
from airflow_provider_siliconflow.api.models import BatchResult
from airflow_provider_siliconflow.emulator.server import Emulator
from airflow_provider_siliconflow.jobs.acceptance import check_acceptance
from airflow_provider_siliconflow.jobs.outcome import judge_run
from airflow_provider_siliconflow.results import read_results
from tests.conftest import MakeEmulator
from tests.unit.jobs.whole_job import Job, fail_first_of, options, posts, rows

pytestmark = pytest.mark.emulator(speed=2000.0)

MODEL = "deepseek-ai/DeepSeek-V3"
EXHAUSTIVE = bool(os.environ.get("EXHAUSTIVE"))


class Review(BaseModel):
    product: str
    stars: int = Field(ge=1, le=5)
    mood: Literal["good", "bad"]
    price: float
    urgent: bool


def job(emulator: Emulator, folder: Path, requests: Any, **changes: Any) -> Job:
    return Job(emulator, folder, requests, **{"models": [MODEL], "max_row_attempts": 3} | changes)


def sent(emulator: Emulator) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """Yield the rows and the answers of each batch, in the order of creation."""
    for batch in emulator.service.state()["batches"]:
        content = emulator.service.open_content(batch["request"]["input_file_id"]).read_text()
        answers = emulator.service.open_results(batch["id"], "output").read_text()
        yield (
            [json.loads(line) for line in content.splitlines()],
            [json.loads(line) for line in answers.splitlines()],
        )


def text_of(answer: dict[str, Any]) -> str:
    found: str = answer["response"]["body"]["choices"][0]["message"]["content"]
    return found


def is_wrong(answer: dict[str, Any]) -> bool:
    try:
        Review.model_validate_json(text_of(answer))
    except ValidationError:
        return True
    return bool(answer["response"]["body"]["choices"][0]["finish_reason"] == "length")


# The whole way -----------------------------------------------------------------------------------------------


@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", ["json_object", "json_schema", "prompt"])
def test_three_attempts_answer_every_row_or_name_it_and_send_again_only_what_was_wrong(
    make_emulator: MakeEmulator, tmp_path: Path, mode: str
) -> None:
    count = 20_000 if EXHAUSTIVE else 600
    price = {"prompt": 1.0, "completion": 4.0}
    emulator = make_emulator(
        speed=100_000.0,
        invalid_rate=0.08 if EXHAUSTIVE else 0.3,
        truncated_rate=0.02,
        empty_rate=0.01,
        wrong_attempts=3,
        prices={MODEL: price},
    )
    task = job(
        emulator,
        tmp_path,
        rows(count),
        output_type=Review,
        structured_output=mode,
        retry_params={"max_tokens": 4000},
        max_rows_per_batch=5000 if EXHAUSTIVE else 100,
        max_bytes_per_batch=10**8,
        prices={MODEL: price},
    )
    manifest = task.attempt()

    results = list(read_results(manifest, output_type=Review))
    assert [row.custom_id for row in results] == [f"q{i}" for i in range(count)]
    assert all(row.parsed is not None if row.ok else row.outcome == "invalid" for row in results)
    lost = [json.loads(line) for line in (tmp_path / "errors.jsonl").read_text().splitlines()]
    assert [row["custom_id"] for row in lost] == [row.custom_id for row in results if not row.ok]
    assert all(row["invalid"] for row in lost), "the reason is there"
    assert manifest["rows"]["ok"] + manifest["rows"]["invalid"] == count
    assert manifest["rows"]["invalid"] == len(lost) == sum(manifest["invalid_reasons"].values())

    # Round by round, what was sent is exactly what was wrong before.
    batches = iter(sent(emulator))
    expected = {f"q{i}" for i in range(count)}
    for number in range(3):
        asked: set[str] = set()
        wrong: set[str] = set()
        for _ in range(manifest["rounds"][number]["batches"]):
            requests, answers = next(batches)
            asked |= {row["custom_id"] for row in requests}
            wrong |= {answer["custom_id"] for answer in answers if is_wrong(answer)}
            assert all((row["body"].get("max_tokens") == 4000) == (number > 0) for row in requests)
        assert asked == expected
        assert 0 < len(wrong) < len(asked)
        expected = wrong
    assert expected == {row["custom_id"] for row in lost}

    (line,) = emulator.bill.lines
    billed = manifest["billed_usage"]
    assert (line.prompt_tokens, line.completion_tokens) == (
        billed["prompt_tokens"],
        billed["completion_tokens"],
    )
    assert manifest["cost"]["total"] == pytest.approx(float(emulator.bill.total), abs=1e-6)


@pytest.mark.emulator(speed=2000.0, fenced_rate=0.5, thinking_rate=0.5)
def test_answers_that_a_person_can_read_are_not_paid_twice(emulator: Emulator, tmp_path: Path) -> None:
    manifest = job(emulator, tmp_path, rows(40), output_type=Review).attempt()
    assert manifest["rows"]["ok"] == 40
    assert len(manifest["rounds"]) == 1


# What is asked ----------------------------------------------------------------------------------------------


def test_the_service_is_asked_as_the_author_wants(emulator: Emulator, tmp_path: Path) -> None:
    own = {"custom_id": "own", "messages": rows(1)[0]["messages"], "response_format": {"type": "text"}}
    for mode, wanted in (
        ("json_object", {"type": "json_object"}),
        ("prompt", None),
        (
            "json_schema",
            {
                "type": "json_schema",
                "json_schema": {"name": "Review", "schema": Review.model_json_schema()},
            },
        ),
    ):
        job(
            emulator,
            tmp_path / mode,
            [*rows(1), own],
            output_type=Review,
            structured_output=mode,
            max_row_attempts=1,
            allow_all_failed=True,
        ).attempt()
        *_, (requests, _) = sent(emulator)
        assert requests[0]["body"].get("response_format") == wanted
        assert requests[1]["body"]["response_format"] == {"type": "text"}, "the row's own is kept"
        first = requests[0]["body"]["messages"][0]
        assert (first["role"] == "system" and '"stars"' in first["content"]) == (mode != "json_schema")


def test_the_next_attempt_shows_the_answer_and_what_was_wrong(emulator: Emulator, tmp_path: Path) -> None:
    marks = {1: "[[emulator:wrong-type-once]]", 2: "[[emulator:empty-once]]", 3: "[[emulator:once=429]]"}
    requests = rows(4, lambda i: marks.get(i, ""))
    task = job(emulator, tmp_path, requests, output_type=Review, retry_params={"temperature": 1})
    assert task.attempt()["rows"]["ok"] == 4
    (first, answers), (again, _) = sent(emulator)
    (wrong,) = [text_of(answer) for answer in answers if answer["custom_id"] == "q1"]
    by_id = {row["custom_id"]: row for row in first}
    assert [row["custom_id"] for row in again] == ["q1", "q2", "q3"]
    *before, shown, reply = again[0]["body"]["messages"]
    assert before == by_id["q1"]["body"]["messages"]
    assert shown == {"role": "assistant", "content": wrong}
    assert reply["role"] == "user"
    assert reply["content"].startswith("This answer cannot be used: ")
    assert ": Input should be " in reply["content"]
    for row in again[1:]:
        # Nothing was answered that could be shown.
        assert row["body"]["messages"] == by_id[row["custom_id"]]["body"]["messages"]
    assert all(row["body"]["temperature"] == 1 for row in again)


def test_what_does_not_fit_into_a_batch_is_left_out(emulator: Emulator, tmp_path: Path) -> None:
    requests = rows(1, lambda i: "[[emulator:wrong-type-once]]")
    line = {"custom_id": "q0", "method": "POST", "url": "/v1/chat/completions"}
    body = {
        "messages": requests[0]["messages"],
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "Review", "schema": Review.model_json_schema()},
        },
    }
    size = len(json.dumps({**line, "body": body}, separators=(",", ":")))
    task = job(
        emulator,
        tmp_path,
        requests,
        output_type=Review,
        structured_output="json_schema",
        max_bytes_per_batch=size + 12,
        retry_params={"seed": 7},
    )
    assert task.attempt()["rows"]["ok"] == 1
    (first, _), (again, _) = sent(emulator)
    assert again[0]["body"] == {**first[0]["body"], "seed": 7}


# The author's own check --------------------------------------------------------------------------------------


def test_accept_sees_the_answer_and_says_why_not(emulator: Emulator, tmp_path: Path) -> None:
    seen: list[BatchResult] = []

    def accept(result: BatchResult) -> bool | str:
        seen.append(result)
        assert isinstance(result.parsed, Review)
        said: dict[str, bool | str] = {"q0": True, "q1": False, "q2": "too few stars"}
        return said[result.custom_id]

    manifest = job(
        emulator, tmp_path, rows(3), output_type=Review, accept=accept, max_row_attempts=2
    ).attempt()
    assert (manifest["rows"]["ok"], manifest["rows"]["invalid"]) == (1, 2)
    assert manifest["invalid_reasons"] == {"the answer was not accepted": 1, "too few stars": 1}
    *_, (again, _) = sent(emulator)
    assert "too few stars" in again[1]["body"]["messages"][-1]["content"]
    assert all(result.usage["total_tokens"] for result in seen)


def test_accept_alone_sends_rows_again_as_they_are(emulator: Emulator, tmp_path: Path) -> None:
    marks = {0: "[[emulator:length-once]]", 1: "[[emulator:empty-once]]"}
    task = job(
        emulator,
        tmp_path,
        rows(3, lambda i: marks.get(i, "")),
        accept=lambda result: True,
        retry_params={"max_tokens": 999},
    )
    assert task.attempt()["rows"]["ok"] == 3
    (first, _), (again, _) = sent(emulator)
    assert [row["custom_id"] for row in again] == ["q0", "q1"]
    for row in again:
        assert row["body"].pop("max_tokens") == 999
        assert row in first


def test_a_call_of_a_tool_is_no_empty_answer() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    body = {"choices": [{"message": message, "finish_reason": "tool_calls"}]}
    line = json.dumps({"custom_id": "a", "response": {"body": body}}).encode()
    called = check_acceptance(
        output_type=None,
        accept=lambda row: len(row.tool_calls) == 1,
        structured_output=None,
        retry_params=None,
    )
    typed = check_acceptance(output_type=Review, accept=None, structured_output=None, retry_params=None)
    assert called.judge is not None
    assert typed.judge is not None
    assert called.judge(line, None, "tool_calls") is None
    assert typed.judge(line, None, "tool_calls") == "the answer is empty"
    message["tool_calls"] = []
    line = json.dumps({"custom_id": "a", "response": {"body": body}}).encode()
    assert called.judge(line, None, "stop") == "the answer is empty"


def test_without_a_type_or_check_every_answer_is_ok(emulator: Emulator, tmp_path: Path) -> None:
    marks = {0: "[[emulator:length]]", 1: "[[emulator:empty]]", 2: "[[emulator:once=429]]"}
    task = job(emulator, tmp_path, rows(4, lambda i: marks.get(i, "")), retry_params={"seed": 1})
    manifest = task.attempt()
    assert (manifest["rows"]["ok"], manifest["truncated"], manifest["empty"]) == (4, 1, 1)
    *_, (again, _) = sent(emulator)
    assert [(row["custom_id"], row["body"]["seed"]) for row in again] == [("q2", 1)]


class Careless(Review):
    @field_validator("product")
    @classmethod
    def look_up(cls, product: str) -> str:
        raise KeyError(product)


#: The same type to the service.
CORRECTED = type("Careless", (Review,), {})


def careless(result: BatchResult) -> bool:
    if result.custom_id in ("q1", "q6"):
        raise KeyError("x")
    return result.custom_id != "q2"


@pytest.mark.parametrize(
    ("wrong", "right", "named"),
    [
        (
            {"accept": careless},
            {"accept": lambda result: True},
            "2 answers could not be judged.*row 'q1': accept raised KeyError: 'x'",
        ),
        (
            {"accept": lambda result: None},
            {},
            "8 answers .*row 'q0': accept returned an instance of NoneType",
        ),
        (
            {"output_type": Careless},
            {"output_type": CORRECTED},
            "8 answers .*'q0': output_type raised KeyError",
        ),
    ],
)
def test_an_error_of_the_author_costs_no_answer_and_no_second_payment(
    emulator: Emulator, tmp_path: Path, wrong: dict[str, Any], right: dict[str, Any], named: str
) -> None:
    task = job(emulator, tmp_path, rows(8), **wrong)
    for _ in range(2):
        with pytest.raises(IncompleteResultsError, match=named) as caught:
            task.attempt()
        assert caught.value.retryable
        assert posts(emulator) == (2, 2), "nothing is sent again"
    found = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert all(map(text_of, found)), "every answer is there"
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["unfinished"]
    assert any("raised KeyError" in said or "NoneType" in said for said in manifest["invalid_reasons"])
    task.options = options(models=[MODEL], **right)
    assert task.attempt()["rows"]["ok"] == 8, "with the function corrected, the same answers count"
    assert posts(emulator) == (2, 2)


# Tries ------------------------------------------------------------------------------------------------------


def test_another_process_decides_alike(make_emulator: MakeEmulator, tmp_path: Path) -> None:
    """A process dies after each of its calls in turn: the same rows are sent again, and the results are the same."""
    requests = rows(6, lambda i: "[[emulator:wrong-type-once]]" if i % 4 == 1 else "")

    def live(dies_after: int) -> tuple[int, list[list[str]], bytes]:
        emulator = make_emulator(speed=2000.0)
        folder = tmp_path / str(dies_after)
        task = job(emulator, folder, requests, output_type=Review, accept=lambda row: row.parsed.stars > 0)
        calls = 0

        def count(name: str) -> None:
            nonlocal calls
            calls += 1
            if calls == dies_after:
                raise KeyboardInterrupt

        task.after = count
        try:
            manifest = task.attempt()
        except KeyboardInterrupt:
            manifest = task.attempt()
        assert manifest["rows"]["ok"] == 6
        asked = [[row["custom_id"] for row in wanted] for wanted, _ in sent(emulator)]
        return calls, asked, (folder / "results.jsonl").read_bytes()

    calls, asked, results = live(0)
    assert asked == [["q0", "q1", "q2", "q3", "q4"], ["q5"], ["q1", "q5"]]
    for point in range(1, calls):
        assert live(point)[1:] == (asked, results), f"died after call {point}"


def test_a_changed_type_is_changed_work(emulator: Emulator, tmp_path: Path) -> None:
    task = job(emulator, tmp_path, rows(10), output_type=Review, max_row_attempts=1)
    task.after = fail_first_of(emulator)
    with pytest.raises(BatchFailedError, match="1 of 2 batches failed"):
        task.attempt()
    task.options = options(models=[MODEL], output_type={"type": "object"})
    with pytest.raises(InvalidInputError, match="was changed since an earlier try"):
        task.attempt()
    # Another check, or other parameters for what is sent again, are no other work.
    task.options = options(
        models=[MODEL], output_type=Review, accept=lambda row: True, retry_params={"seed": 1}
    )
    assert task.attempt()["rows"]["ok"] == 10


def test_invalid_rows_are_lost_rows(emulator: Emulator, tmp_path: Path) -> None:
    requests = rows(10, lambda i: "[[emulator:not-json]]" if i < 3 else "")
    task = job(emulator, tmp_path, requests, output_type=Review, max_error_rate=0.2, max_row_attempts=1)
    manifest = task.attempt()
    with pytest.raises(BatchPartialFailureError, match=r"3 invalid.*30\.00% is more than max_error_rate"):
        judge_run(manifest, task.options)
    with pytest.raises(BatchPartialFailureError, match="fail_on_partial_error"):
        judge_run(manifest, options(fail_on_partial_error=True))
    said = judge_run(manifest, options())
    assert said is not None
    assert "3 of them failed for a transient reason or are invalid; with max_row_attempts above 1" in said
    assert "most often: the answer is not JSON (3 rows)" in said
