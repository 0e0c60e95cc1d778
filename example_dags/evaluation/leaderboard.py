"""The history of all nights: a JSONL file with one line per night, from which the pages are made."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .comparison import Comparison
from .judge import JudgeScore
from .questions import Question
from .scoring import ModelScore, ScoredRow

HISTORY_FILE = "history.jsonl"
PAGE_FILE = "leaderboard.html"
MODELS_FOLDER = "models"

_FILE_NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")


def file_name(model: str) -> str:
    """
    Return a file name without its suffix for a model: safe in file systems and URLs, and different for every model.

    ``deepseek-ai/DeepSeek-V3`` becomes ``deepseek-ai--DeepSeek-V3``. A name that cannot be converted back ends in a
    digest.
    """
    name = model.replace("/", "--")
    if _FILE_NAME.fullmatch(name) and name.replace("--", "/") == model and not name.startswith("."):
        return name
    digest = hashlib.sha256(model.encode("utf-8", "surrogatepass")).hexdigest()[:10]
    return f"{re.sub('[^A-Za-z0-9_-]+', '-', name).strip('-')[:80] or 'model'}-{digest}"


@dataclass
class Standing:
    """
    One model in one night: its score, and its figures from the job's manifest.

    :param failed: questions without an answer after all attempts.
    :param resent: rows that were sent again.
    :param cost: in CNY, the live part included; ``None`` if the model has no price.
    :param rows: rows of the model: its questions, times their repeats.
    :param cached: rows that the cache answered.
    :param live: rows that were asked live.
    :param live_cost: in CNY.
    """

    score: ModelScore
    truncated: int = 0
    failed: int = 0
    resent: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    reasoning_tokens: int = 0
    cost: float | None = None
    rows: int = 0
    cached: int = 0
    live: int = 0
    live_cost: float | None = None

    @property
    def model(self) -> str:
        return self.score.model

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.answer_tokens + self.reasoning_tokens

    @classmethod
    def from_manifest(cls, score: ModelScore, manifest: Mapping[str, Any]) -> Standing:
        """
        Combine a score with the figures of its model.

        :raises ValueError: the manifest does not contain the model.
        """
        found = [each for each in manifest["models"] if each["model"] == score.model]
        if not found:
            raise ValueError(f"the manifest has no model {score.model!r}")
        figures = found[0]
        rows, usage, cost = figures["rows"], figures["billed_usage"], figures["cost"]
        live = figures.get("live") or {}
        return cls(
            score,
            truncated=figures["truncated"],
            failed=rows["total"] - rows["ok"],
            # Rows that are asked live were not answered before, and are shown as such.
            resent=sum(
                each["rows"] for each in figures["rounds"] if each["round"] > 0 and each["route"] == "batch"
            ),
            prompt_tokens=usage["prompt_tokens"],
            # The service includes reasoning tokens in the completion tokens.
            answer_tokens=usage["completion_tokens"] - usage["reasoning_tokens"],
            reasoning_tokens=usage["reasoning_tokens"],
            cost=None if cost is None else cost["total"],
            rows=rows["total"],
            cached=figures["cached"]["rows"],
            live=live.get("rows", 0),
            live_cost=(live.get("cost") or {}).get("total"),
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Standing:
        return cls(**{**data, "score": ModelScore.from_dict(data["score"])})


@dataclass
class Judge:
    """
    The judge of a night.

    :param cost: of its own requests, in CNY; ``None`` if it has no price.
    """

    model: str
    rows: int = 0
    cost: float | None = None
    scores: list[JudgeScore] = field(default_factory=list)

    def score(self, model: str) -> JudgeScore | None:
        return next((each for each in self.scores if each.model == model), None)

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any], scores: list[JudgeScore]) -> Judge:
        (figures,) = manifest["models"]
        cost = figures["cost"]
        return cls(
            figures["model"], figures["rows"]["total"], None if cost is None else cost["total"], scores
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Judge:
        return cls(**{**data, "scores": [JudgeScore.from_dict(each) for each in data["scores"]]})


@dataclass
class Night:
    """
    One run of the evaluation: a line of the history.

    :param folder: name of the night's folder, which has its answers.
    :param dataset: SHA-256 of the questions.
    :param settings: what else decides the scores: ``max_tokens``, ``temperature``, ``repeats``.
    :param comparisons: each model against the last night.
    """

    date: str
    run_id: str
    standings: list[Standing] = field(default_factory=list)
    folder: str = ""
    dataset: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    judge: Judge | None = None
    comparisons: list[Comparison] = field(default_factory=list)

    @property
    def ranked(self) -> list[Standing]:
        """The models, best first. If two have the same accuracy, the cheaper one comes first."""
        return sorted(
            self.standings, key=lambda each: (-each.score.accuracy, each.cost or 0.0, each.score.model)
        )

    def standing(self, model: str) -> Standing | None:
        return next((each for each in self.standings if each.model == model), None)

    def comparison(self, model: str) -> Comparison | None:
        return next((each for each in self.comparisons if each.model == model), None)

    def file(self, root: Any, kind: str, model: str) -> Any:
        """
        Return the file of a model's answers.

        :param root: the folder of the leaderboard.
        :param kind: ``scored`` or ``judged``.
        """
        return root / self.folder / kind / f"{file_name(model)}.jsonl"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Night:
        judge = data.get("judge")
        return cls(
            data["date"],
            data["run_id"],
            [Standing.from_dict(each) for each in data["standings"]],
            data.get("folder", ""),
            data.get("dataset", ""),
            data.get("settings", {}),
            None if judge is None else Judge.from_dict(judge),
            [Comparison.from_dict(each) for each in data.get("comparisons", ())],
        )


@dataclass
class Missed:
    """A question that models got wrong, with the answer of each model (``None`` if it was correct)."""

    id: str
    question: str
    expected: str
    answers: dict[str, str | None]

    @property
    def count(self) -> int:
        return sum(answer is not None for answer in self.answers.values())


def read_history(folder: Any) -> list[Night]:
    """Return the nights recorded in a folder, earliest first."""
    file = folder / HISTORY_FILE
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")
    return [Night.from_dict(json.loads(line)) for line in lines if line.strip()]


def add_night(folder: Any, night: Night) -> list[Night]:
    """
    Record a night and return all nights, earliest first. A repeated run replaces its earlier entry.

    Object stores cannot append, so the whole file is rewritten. Only one night may be added at a time.
    """
    nights = [each for each in read_history(folder) if each.run_id != night.run_id]
    nights = sorted([*nights, night], key=lambda each: (each.date, each.run_id))
    text = "".join(json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in nights)
    (folder / HISTORY_FILE).write_text(text, encoding="utf-8")
    return nights


def most_missed(
    questions: Sequence[Question], scored: Mapping[str, Mapping[str, ScoredRow]], limit: int = 12
) -> list[Missed]:
    """
    Return the questions that most models got wrong.

    :param scored: judged answers, by model and question id.
    """
    missed = [
        Missed(question.id, question.question, question.answer, _wrong_answers(question.id, scored))
        for question in questions
    ]
    worst = sorted((each for each in missed if each.count > 1), key=lambda each: -each.count)
    return worst[:limit]


def _wrong_answers(question: str, scored: Mapping[str, Mapping[str, ScoredRow]]) -> dict[str, str | None]:
    answers: dict[str, str | None] = {}
    for model, rows in scored.items():
        row = rows.get(question)
        answers[model] = "" if row is None else None if row.right else row.answer
    return answers
