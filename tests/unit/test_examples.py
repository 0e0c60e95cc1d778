"""What the examples bring along: the question set, its scoring, the history and the leaderboard page."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_provider_siliconflow.api.models import BatchResult
from example_dags.evaluation.charts import _spread
from example_dags.evaluation.leaderboard import Night, Standing, add_night, most_missed, read_history
from example_dags.evaluation.page import render_page
from example_dags.evaluation.questions import Question, read_questions, request_rows
from example_dags.evaluation.scoring import (
    ModelScore,
    extract_answer,
    is_right,
    read_scored,
    score_model,
    wilson_interval,
    write_scored,
)

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = read_questions(ROOT / "example_dags" / "data" / "questions.jsonl")


def result(custom_id: str, text: str | None = None, error: str | None = None) -> BatchResult:
    if error is not None:
        return BatchResult(custom_id=custom_id, error={"code": "500", "message": error})
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return BatchResult(custom_id=custom_id, response={"body": {"choices": [choice]}})


def test_question_set_is_sound() -> None:
    assert len(QUESTIONS) == 120
    assert all(is_right(accepted, each) for each in QUESTIONS for accepted in (each.answer, *each.accept))
    subjects = {each.subject for each in QUESTIONS}
    assert all(sum(each.subject == name for each in QUESTIONS) == 20 for name in subjects)
    texts = [each.question for each in QUESTIONS]
    assert not [(a, b) for a in texts for b in texts if a is not b and a in b]


def test_rows_are_requests_for_any_model() -> None:
    rows = list(request_rows(QUESTIONS, date="2026-01-01", max_tokens=64))
    assert [row["custom_id"] for row in rows] == [each.id for each in QUESTIONS]
    assert all("model" not in row["body"] for row in rows)
    assert rows[0]["body"]["messages"][-1]["role"] == "user"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("I compared what I know. Answer: Buenos Aires", "Buenos Aires"),
        ("Answer: 5? No.\n**Answer:** 42", "42"),
        ("**Answer: 42**", "42"),
        ("The final answer is: \\boxed{\\frac{11}{12}}", "\\frac{11}{12}"),
        ("so\n\nAnswer:\n\n**Paris**", "Paris"),
        ("<think>Answer: no</think>\nyes", "yes"),
        ("<think>cut while thinking. Answer: no", ""),
        ("It follows that \\boxed{H_2SO_4}.", "H_2SO_4"),
        ("Answer：北京", "北京"),
        ("first\nlast", "last"),
        ("", ""),
    ],
)
def test_extracts_the_last_answer(text: str, answer: str) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("given_answer", "expected", "right"),
    [
        ("Brasilia", "Brasília", True),
        ("the Amazon.", "Amazon", True),
        ("`NaCl`", "NaCl", True),
        ("H₂SO₄", "H2SO4", True),
        ("not Canberra", "Canberra", False),
        ("Canberra or Sydney", "Canberra", False),
        ("86,400 seconds", "86400", True),
        ("7 * 3 = 21", "21", True),
        ("nine", "9", True),
        ("€0.05", "0.05", True),
        (".05", "0.05", True),
        ("5.0 cents", "0.05", False),
        ("22/24", "11/12", True),
        ("\\frac{11}{12}", "11/12", True),
        ("1989 or 1990", "1989", False),
        ("-9", "9", False),
        ("1/0", "9", False),
        ("", "9", False),
    ],
)
def test_judges(given_answer: str, expected: str, right: bool) -> None:
    assert is_right(given_answer, Question("q", "s", "?", expected)) is right


@given(st.text(max_size=200))
def test_no_text_is_too_odd_to_judge(text: str) -> None:
    for question in (Question("q", "s", "?", "42"), Question("q", "s", "?", "Paris")):
        is_right(extract_answer(text), question)


def test_wilson_interval_against_published_values() -> None:
    # Newcombe (1998), Statistics in Medicine 17, table I: 81/263, 15/148, 0/20, 1/29.
    for right, asked, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson_interval(right, asked) == pytest.approx((low, high), abs=1e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_what_was_not_answered_is_wrong(tmp_path: Path) -> None:
    questions = [Question(str(n), "x" if n < 2 else "y", f"{n}?", str(n)) for n in range(4)]
    score, rows = score_model(
        "m",
        questions,
        [result("1", "Answer: 1"), result("0", "Answer: 7\u2028 no"), result("2", error="busy")],
    )
    assert (score.asked, score.right, score.accuracy) == (4, 1, 0.25)
    assert score.subjects == {"x": [1, 2], "y": [0, 2]}
    assert [row.right for row in rows] == [False, True, False, False]
    assert "busy" in rows[2].answer
    assert rows[3].answer == "(no result)"
    write_scored(tmp_path / "scored.jsonl", rows)
    assert list(read_scored(tmp_path / "scored.jsonl").values()) == rows
    (worst,) = most_missed(questions[:1], {"a": read_scored(tmp_path / "scored.jsonl"), "b": {}})
    assert worst.count == 2


def night(date: str, run_id: str, **right: int) -> Night:
    scores = [ModelScore(f"owner/{name}", 10, count, {"all": [count, 10]}) for name, count in right.items()]
    return Night(date, run_id, [Standing(score, truncated=1, cost=0.001) for score in scores])


def test_a_run_that_comes_again_takes_its_own_place(tmp_path: Path) -> None:
    add_night(tmp_path, night("2026-01-02", "second", a=5))
    add_night(tmp_path, night("2026-01-01", "first", a=4))
    nights = add_night(tmp_path, night("2026-01-02", "second", a=6, b=6))
    assert [(each.run_id, each.standings[0].score.right) for each in nights] == [("first", 4), ("second", 6)]
    assert read_history(tmp_path) == nights
    assert nights[-1].standing("owner/b") is not None


class Checker(HTMLParser):
    """Fails on tags that do not match, and collects what a page would load."""

    VOID = frozenset({"meta"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.loads += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("count", [1, 2, 40])
def test_page_is_whole_and_loads_nothing(count: int) -> None:
    names = {"a": 3, "<script>": 9, "unpriced": 0}
    nights = [night(f"2026-01-{n + 1:02}", f"<run-{n}>", **names) for n in range(count)]
    nights[-1].standings[-1].cost = None
    nights[0].standings.pop()
    page = render_page(nights, note="a < b")
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.loads == []
    assert not re.search(r"<script|@import|url\(|https?://", page)
    assert "&lt;script&gt;" in page
    assert "90.0\u202f%" in page
    assert page.count("<polyline") == (3 if count > 1 else 2)


@given(st.lists(st.floats(0, 300), max_size=10).map(sorted))
def test_labels_never_overlap(places: list[float]) -> None:
    moved = _spread(places, gap=19, low=14, high=270)
    assert all(b - a >= 19 - 1e-6 for a, b in pairwise(moved))
    assert all(each <= 270 for each in moved)
