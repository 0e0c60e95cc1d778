"""Answers in JSON, and how they are wrong on request: always, or only the first time a row is run."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any, Literal

import jsonschema
import pytest
from pydantic import BaseModel, ValidationError

from airflow_provider_siliconflow.emulator import ServiceError
from tests.unit.emulator.clients import Account, row

if TYPE_CHECKING:
    from pathlib import Path


class Review(BaseModel):
    topic: Literal["delivery", "price", "quality"]
    score: int
    late: bool
    summary: str
    tags: list[str]


SCHEMA = Review.model_json_schema()
FORMAT = {"type": "json_schema", "json_schema": {"name": "review", "schema": SCHEMA}}


@pytest.fixture
def account(tmp_path: Path) -> Account:
    return Account(tmp_path)


def asked(custom_id: str, text: str = "The parcel was late.", **body: Any) -> dict[str, Any]:
    return row(custom_id, text, **{"response_format": FORMAT, **body})


def contents(account: Account, batch: dict[str, Any]) -> dict[str, str]:
    return {
        line["custom_id"]: line["response"]["body"]["choices"][0]["message"]["content"]
        for line in account.lines(batch, "output")
    }


def is_review(text: str) -> bool:
    try:
        Review.model_validate_json(text)
    except ValidationError:
        return False
    return True


def test_answers_satisfy_the_schema_and_are_the_same_every_time(tmp_path: Path) -> None:
    lines = [asked(f"r{number}") for number in range(200)]
    first, second = (Account(tmp_path / name) for name in ("first", "second"))
    answers = contents(first, first.run(lines))
    assert all(map(is_review, answers.values()))
    assert len(set(answers.values())) > 150
    assert contents(second, second.run(lines)) == answers


@pytest.mark.parametrize("wanted", [{"response_format": {"type": "json_object"}}, {}])
@pytest.mark.parametrize("role", ["system", "user"])
def test_a_schema_in_the_messages_is_followed(account: Account, role: str, wanted: dict[str, Any]) -> None:
    instruction = (
        'Answer in JSON, not as {these} or {"properties": "no"}, by this schema:\n'
        f"{json.dumps(SCHEMA, indent=1)}\nand nothing else."
    )
    messages = [{"role": role, "content": instruction}, {"role": "user", "content": "It was late."}]
    batch = account.run([row("a", messages=messages, **wanted)])
    assert is_review(contents(account, batch)["a"])


def test_a_schema_in_the_messages_that_is_impossible_is_no_error(account: Account) -> None:
    text = 'Explain {"properties": {"a": {"not": {}}}, "required": ["a"]}.'
    answers = contents(
        account, account.run([row("a", text, response_format={"type": "json_object"}), row("b", text)])
    )
    assert set(json.loads(answers["a"])) == {"answer"}
    assert "was asked" in answers["b"]


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ("json_object", "response_format must be an object with a type"),
        ({"type": "json_schema"}, "response_format.json_schema.schema must be an object"),
        (
            {"type": "json_schema", "json_schema": {"schema": {"not": {}}}},
            "cannot satisfy this schema: not is not supported",
        ),
    ],
)
def test_a_format_that_cannot_be_answered_is_named(account: Account, wanted: Any, reason: str) -> None:
    batch = account.create(account.upload([row("a"), row("b", response_format=wanted)]))
    (error,) = batch["errors"]
    assert error.startswith("Line 2: ")
    assert reason in error
    with pytest.raises(ServiceError, match=r"replace\.response_format") as refused:
        account.create(account.upload([row("a")]), replace={"response_format": wanted})
    assert reason in refused.value.body["message"]


@pytest.mark.parametrize("marker", ["not-json", "wrong-type", "missing-field", "invalid"])
def test_an_invalid_answer_does_not_satisfy_the_schema(account: Account, marker: str) -> None:
    lines = [asked(f"r{number}", f"Late. [[emulator:{marker}]]") for number in range(60)]
    answers = contents(account, account.run(lines))
    assert not any(map(is_review, answers.values()))
    kinds: Counter[str] = Counter()
    for text in answers.values():
        try:
            value = json.loads(text)
        except ValueError:
            kinds["not-json"] += 1
            continue
        kinds["missing-field" if value.keys() < SCHEMA["properties"].keys() else "wrong-type"] += 1
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(value, SCHEMA)
    assert set(kinds) == ({"not-json", "wrong-type", "missing-field"} if marker == "invalid" else {marker})


def test_invalid_answers_without_a_schema(account: Account) -> None:
    json_mode = {"response_format": {"type": "json_object"}}
    batch = account.run(
        [
            row("type", "x [[emulator:wrong-type]]", **json_mode),
            row("field", "x [[emulator:missing-field]]", **json_mode),
            row("plain", "x [[emulator:invalid]]"),
            row("right", "x"),
        ]
    )
    answers = contents(account, batch)
    assert json.loads(answers["type"]) == {"answer": {"unexpected": True}}
    assert json.loads(answers["field"]) == {}
    assert "cannot answer" in answers["plain"]
    assert "was asked" in answers["right"]


def test_wrapped_answers_hold_the_answer(account: Account) -> None:
    lines = [
        asked(f"{kind}-{n}", f"[[emulator:{kind}]]") for kind in ("fenced", "thinking") for n in range(9)
    ]
    for custom_id, text in contents(account, account.run(lines)).items():
        assert not is_review(text)
        if custom_id.startswith("fenced"):
            inner = text.partition("```json\n")[2].partition("\n```")[0]
        else:
            assert text.startswith("<think>")
            inner = text.partition("</think>")[2]
        assert is_review(inner.strip())


def test_rates_hold_the_first_time_a_row_is_run(tmp_path: Path) -> None:
    rates: dict[str, Any] = {
        "invalid_rate": 0.08,
        "truncated_rate": 0.04,
        "empty_rate": 0.02,
        "fenced_rate": 0.1,
        "thinking_rate": 0.06,
    }
    account = Account(tmp_path, **rates)
    lines = [asked(f"r{number}") for number in range(2000)]
    batch = account.run(lines)
    assert batch["request_counts"] == {"total": 2000, "completed": 2000, "failed": 0}
    found: Counter[str] = Counter()
    wrong = set()
    for line in account.lines(batch, "output"):
        (choice,) = line["response"]["body"]["choices"]
        text = choice["message"]["content"]
        if is_review(text):
            continue
        wrong.add(line["custom_id"])
        if choice["finish_reason"] == "length":
            found["truncated_rate"] += 1
        elif not text:
            found["empty_rate"] += 1
        elif "```" in text:
            found["fenced_rate"] += 1
        else:
            found["thinking_rate" if "<think>" in text else "invalid_rate"] += 1
    for name, rate in rates.items():
        assert 0.6 * rate < found[name] / 2000 < 1.4 * rate, name

    # Of another model the same rows are run the first time.
    other = account.run(lines, replace={"model": "deepseek-ai/DeepSeek-V3"})
    assert {name for name, text in contents(account, other).items() if not is_review(text)} not in (
        set(),
        wrong,
    )
    assert all(map(is_review, contents(account, account.run(lines)).values()))


def test_each_wrong_attempt_is_drawn_anew(tmp_path: Path) -> None:
    account = Account(tmp_path, empty_rate=0.5, wrong_attempts=3)
    lines = [asked(f"r{number}") for number in range(400)]
    rounds = [contents(account, account.run(lines)) for _ in range(4)]
    empty = [{name for name, text in answers.items() if not text} for answers in rounds]
    # Who is right once stays right.
    assert empty[0] > empty[1] > empty[2] > empty[3] == set()
    assert 0.3 < len(empty[1]) / len(empty[0]) < 0.7


def test_markers_that_hold_once(account: Account) -> None:
    kinds = ("invalid", "not-json", "wrong-type", "missing-field", "fenced", "thinking", "length", "empty")
    lines = [asked(kind, f"x [[emulator:{kind}-once]]") for kind in kinds]
    assert not any(map(is_review, contents(account, account.run(lines)).values()))
    assert all(map(is_review, contents(account, account.run(lines)).values()))


def test_a_row_that_fails_is_answered_wrongly_the_next_time(account: Account) -> None:
    lines = [asked("a", "x [[emulator:once=429]] [[emulator:empty-once]]")]
    assert account.ids(account.run(lines), "error") == ["a"]
    assert contents(account, account.run(lines)) == {"a": ""}
    assert is_review(contents(account, account.run(lines))["a"])


def test_a_row_that_is_shown_its_answer_keeps_its_markers_and_question(tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"question": "Which letter comes first?", "answer": "A"}\n')
    account = Account(tmp_path / "data", answers=answers, models={"sure": 1.0})

    def shown(question: str) -> list[dict[str, str]]:
        return [
            {"role": "user", "content": question},
            {"role": "assistant", "content": "..."},
            {"role": "user", "content": "That is not JSON. Answer again."},
        ]

    batch = account.run(
        [
            asked("wrong", model="sure", messages=shown("Late. [[emulator:missing-field]]")),
            row("known", model="sure", messages=shown("Which letter comes first?")),
        ]
    )
    found = contents(account, batch)
    assert not is_review(found["wrong"])
    assert found["known"].endswith("Answer: A")


def test_wrong_answers_outlive_a_restart(tmp_path: Path) -> None:
    lines = [asked(f"r{number}") for number in range(50)]
    account = Account(tmp_path, persistent=True, empty_rate=0.5)
    batch = account.create(account.upload(lines))
    account.service.advance(1000)
    restarted = Account(tmp_path, persistent=True, empty_rate=0.5)
    assert 10 < sum(not text for text in contents(restarted, batch).values()) < 40
    assert all(contents(restarted, restarted.run(lines)).values())


def test_a_known_answer_takes_the_form_of_the_schema(tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"question": "What is six times seven?", "answer": "42"}\n')
    account = Account(tmp_path / "data", answers=str(answers), models={"sure": 1.0})
    kinds: dict[str, Any] = {
        "text": {"type": "string"},
        "choice": {"enum": ["41", "42", "43"]},
        "short": {"type": "boolean"},
        # Of a judge.
        "verdict": {"enum": ["41", "42", "43"]},
    }
    lines = []
    for name, kind in kinds.items():
        field = "verdict" if name == "verdict" else "answer"
        schema = {"type": "object", "properties": {field: kind}, "required": [field]}
        wanted = {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}
        lines.append(row(name, "What is six times seven?", model="sure", response_format=wanted))
    answered = contents(account, account.run(lines)).items()
    found = {name: next(iter(json.loads(text).values())) for name, text in answered}
    assert (found["text"], found["choice"], found["verdict"]) == ("42", "42", "42")
    assert type(found["short"]) is bool


def test_given_answers_are_taken_as_they_are(tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    lines: list[dict[str, Any]] = [
        {"custom_id": "by-id", "answer": "Exactly this."},
        {"custom_id": "json", "answer": {"topic": "späť", "score": None}},
        {"prompt": "The whole prompt. ", "answer": "By prompt."},
    ]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    account = Account(tmp_path / "data", answers=str(answers))
    batch = account.run(
        [
            asked("by-id"),
            row("json", "The whole prompt."),
            row("by-prompt", "The whole prompt. [[emulator:duplicate]]"),
            row("other", "Not the whole prompt."),
            row("cut", "The whole prompt. [[emulator:length]]"),
        ]
    )
    found = contents(account, batch)
    assert "was asked" in found.pop("other")
    assert found == {
        "by-id": "Exactly this.",
        "json": '{"topic":"späť","score":null}',
        "by-prompt": "By prompt.",
        "cut": "By pr",
    }


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"answer": "x"}, "one of question, prompt and custom_id"),
        ({"custom_id": "a", "prompt": "b", "answer": "x"}, "one of question, prompt and custom_id"),
        ({"custom_id": "a"}, "missing required field `answer`"),
        ({"custom_id": "first", "answer": "x"}, "the custom_id 'first' has an answer already"),
        ({"prompt": " ", "answer": "x"}, "the prompt is empty"),
        ({"question": "a", "answer": {}}, "got `object`"),
    ],
)
def test_wrong_line_of_the_answers_is_named(tmp_path: Path, line: dict[str, Any], reason: str) -> None:
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"custom_id": "first", "answer": 1}\n' + json.dumps(line))
    with pytest.raises(ValueError, match="line 2: ") as refused:
        Account(tmp_path / "data", answers=answers)
    assert reason in str(refused.value)
