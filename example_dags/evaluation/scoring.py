"""Scores answers as right or wrong against the key, and computes accuracies with confidence intervals."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any, Protocol

from .questions import Question, row_id

_THINKING = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)
# "Answer: 42", "**Answer:** 42", "The final answer is: 42". The last match counts.
_MARKED = re.compile(r"\banswer(?:\s+is)?\W{0,3}[:：][ \t*_]*(.*)", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|mathbf)\{([^{}]*)\}")
_ARTICLE = re.compile(r"^(?:the|an?)\s+")
_THOUSANDS = re.compile(r"(?<=\d)[,\u202f\u00a0 '](?=\d{3}(?!\d))")
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+(?:\.\d+)?(?:\s*/\s*\d+)?|\.\d+)")
_WORDS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
]


class Answered(Protocol):
    """The attributes of a result row that scoring needs. ``BatchResult`` has them."""

    @property
    def custom_id(self) -> str: ...
    @property
    def ok(self) -> bool: ...
    @property
    def text(self) -> str | None: ...
    @property
    def error_message(self) -> str | None: ...


def without_thinking(text: str) -> str:
    """Return a text without what the model thought aloud in ``<think>``, and without what UTF-8 cannot encode."""
    return _THINKING.sub("", text).strip().encode("utf-8", "replace").decode()


def extract_answer(text: str) -> str:
    """
    Return the final answer in a text, as written.

    It is what follows the last ``Answer:``, on the same line or the next one. Without ``Answer:`` it is the last
    ``\\boxed{}``, and otherwise the last line.
    """
    text = without_thinking(text)
    marked = list(_MARKED.finditer(text))
    if marked:
        answer = marked[-1].group(1).strip(" \t*_")
        return _unboxed(answer or _first_line(text[marked[-1].end() :]))
    if boxed := _BOXED.findall(text):
        return str(boxed[-1]).strip()
    lines = text.splitlines()
    return lines[-1].strip() if lines else ""


def normalise(answer: str) -> str:
    """Return an answer without irrelevant differences: case, accents, markup, articles, a final full stop."""
    answer = _LATEX_TEXT.sub(r"\1", _FRACTION.sub(r"\1/\2", answer))
    decomposed = unicodedata.normalize("NFKD", answer)
    plain = "".join(c for c in decomposed if not unicodedata.combining(c)).casefold()
    plain = plain.replace("\N{FRACTION SLASH}", "/").replace("\N{MINUS SIGN}", "-").replace("’", "'")
    plain = re.sub(r"[*_`$\"“”„«»]", "", plain)
    plain = " ".join(plain.split()).lstrip(" ',;:!?").rstrip(" '.,;:!?")
    return _ARTICLE.sub("", plain)


def as_number(answer: str) -> Fraction | None:
    """
    Return the number that an answer consists of, or ``None``.

    The answer may have thousands separators, a unit or a currency: ``1,024``, ``90 km/h``, ``€0.05``. In an
    equation the last side counts. Several numbers yield ``None``.
    """
    plain = normalise(answer).rpartition("=")[2].strip()
    if plain in _WORDS:
        return Fraction(_WORDS.index(plain))
    found = _NUMBER.findall(_THOUSANDS.sub("", plain))
    if len(found) != 1:
        return None
    try:
        return Fraction(re.sub(r"\s", "", found[0]))
    except ZeroDivisionError:
        return None


def is_right(answer: str, question: Question) -> bool:
    """Return whether an extracted answer is correct. Numbers are compared as numbers, the rest as text."""
    given = normalise(answer)
    accepted = (question.answer, *question.accept)
    if any(given == normalise(each) for each in accepted):
        return True
    if _NUMBER.fullmatch(normalise(question.answer)):
        number = as_number(answer)
        return number is not None and any(number == as_number(each) for each in accepted)
    return False


def wilson_interval(right: int, asked: int, z: float = 1.96) -> tuple[float, float]:
    """
    Return the Wilson score interval of a share, which stays accurate for few questions and near 0 and 1.

    :param z: 1.96 for 95 %.
    """
    if not asked:
        return 0.0, 1.0
    share = right / asked
    scale = 1 + z * z / asked
    middle = (share + z * z / (2 * asked)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass
class ScoredRow:
    """
    A question with a model's answer and its score.

    :param right: the answer is right; with repeats, more than half of the answers are.
    :param answer: the extracted answer, or the error if there is none; with repeats, of the first run that was scored
        as the majority.
    :param run: the run that ``answer`` is from.
    :param runs: whether the answer is right, by run.
    """

    id: str
    right: bool
    answer: str
    run: int = 0
    runs: list[bool] = field(default_factory=list)


@dataclass
class ModelScore:
    """
    The score of one model.

    :param asked: all questions. A question without an answer counts as wrong, as it would in use.
    :param right: questions that were answered right; with repeats, by more than half of the runs.
    :param subjects: counts of right answers and of questions, by subject.
    :param runs: right answers in each run over all questions.
    """

    model: str
    asked: int = 0
    right: int = 0
    subjects: dict[str, list[int]] = field(default_factory=dict)
    runs: list[int] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        return self.right / self.asked if self.asked else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of the accuracy."""
        return wilson_interval(self.right, self.asked)

    @property
    def spread(self) -> tuple[float, float, float] | None:
        """Return the mean, the lowest and the highest accuracy of the runs; ``None`` if there is only one."""
        if len(self.runs) < 2 or not self.asked:
            return None
        shares = [count / self.asked for count in self.runs]
        return sum(shares) / len(shares), min(shares), max(shares)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelScore:
        return cls(
            data["model"], data["asked"], data["right"], dict(data["subjects"]), list(data.get("runs", ()))
        )


def score_model(
    model: str, questions: Sequence[Question], results: Iterable[Answered], repeats: int = 1
) -> tuple[ModelScore, list[ScoredRow]]:
    """
    Score a model's results.

    :param results: results for these questions, in any order. A question without a result counts as wrong. They are
        read one at a time, and only the extracted answers are kept.
    :param repeats: how often each question was asked.
    """
    asked = {row_id(each.id, run, repeats): each for each in questions for run in range(repeats)}
    given: dict[str, tuple[bool, str]] = {}
    for result in results:
        question = asked.get(result.custom_id)
        if question is None:
            continue
        if result.ok:
            answer = extract_answer(result.text or "")
            given[result.custom_id] = is_right(answer, question), answer
        else:
            given[result.custom_id] = False, f"({result.error_message or 'no answer'})"
    score = ModelScore(model, runs=[0] * repeats)
    rows = []
    for question in questions:
        runs = [
            given.get(row_id(question.id, run, repeats), (False, "(no result)")) for run in range(repeats)
        ]
        row = _scored(question, runs)
        rows.append(row)
        tally = score.subjects.setdefault(question.subject, [0, 0])
        tally[0] += row.right
        tally[1] += 1
        score.right += row.right
        score.asked += 1
        for run, right in enumerate(row.runs):
            score.runs[run] += right
    return score, rows


def write_scored(path: Any, rows: Iterable[ScoredRow]) -> None:
    """Write scored answers as JSONL."""
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")


def read_scored(path: Any) -> dict[str, ScoredRow]:
    """Return the scored answers that :func:`write_scored` wrote, by question id."""
    rows = (ScoredRow(**json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line)
    return {row.id: row for row in rows}


def _scored(question: Question, runs: Sequence[tuple[bool, str]]) -> ScoredRow:
    rights = [right for right, _ in runs]
    majority = 2 * sum(rights) > len(rights)
    shown = rights.index(majority) if majority in rights else 0
    return ScoredRow(question.id, majority, runs[shown][1], shown, rights)


def _first_line(text: str) -> str:
    return next((line.strip(" \t*_") for line in text.splitlines() if line.strip(" \t*_")), "")


def _unboxed(answer: str) -> str:
    boxed = _BOXED.findall(answer)
    return str(boxed[-1]).strip() if boxed else answer
