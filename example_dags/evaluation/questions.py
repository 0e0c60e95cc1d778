"""The question set: questions, correct answers and the request rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

_SYSTEM = "You answer quiz questions."
_USER = "{question}\n\nThink it through, then write only the short answer on the last line, as 'Answer: ...'."


@dataclass(frozen=True)
class Question:
    """
    A question with its known answer.

    :param answer: the correct answer.
    :param accept: other correct answers.
    """

    id: str
    subject: str
    question: str
    answer: str
    accept: tuple[str, ...] = ()


def read_questions(path: Any) -> list[Question]:
    """
    Read a JSONL file of ``id``, ``subject``, ``question``, ``answer`` and optionally ``accept``.

    :param path: a ``pathlib.Path`` or Airflow's ``ObjectStoragePath``.
    :raises ValueError: a line is not a question, or an id appears twice; the message has the line number.
    """
    questions: dict[str, Question] = {}
    # splitlines() would also split at characters that JSON strings may contain.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question = Question(
                id=str(row["id"]),
                subject=str(row.get("subject") or "all"),
                question=str(row["question"]),
                answer=str(row["answer"]),
                accept=tuple(map(str, row.get("accept") or ())),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: not a question: {error!r}") from None
        if question.id in questions:
            raise ValueError(f"{path}, line {number}: the id {question.id!r} appears twice")
        questions[question.id] = question
    if not questions:
        raise ValueError(f"{path} contains no questions")
    return list(questions.values())


def dataset_hash(questions: Iterable[Question]) -> str:
    """
    Return the SHA-256 of the questions and their answers, in hexadecimal.

    It depends on neither the order of the questions nor the way in which their file writes them.
    """
    digest = hashlib.sha256()
    for question in sorted(questions, key=lambda each: each.id):
        fields = asdict(question) | {"accept": sorted(question.accept)}
        digest.update(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()


def row_id(question: str, run: int, repeats: int) -> str:
    """
    Return the ``custom_id`` of the row that asks a question.

    :param run: from 0 to ``repeats`` - 1.
    """
    return question if repeats == 1 else f"{question}#{run + 1}"


def request_rows(
    questions: Iterable[Question], *, max_tokens: int, temperature: float = 0, seed: int = 0, repeats: int = 1
) -> Iterator[dict[str, Any]]:
    """
    Return the requests, for any model: each question ``repeats`` times.

    The prompt is the same every night, so that a change of the answers comes from the model.

    :param max_tokens: maximum length of an answer; longer ones are cut and counted as truncated.
    :param seed: seed of the first run. The others have the next ones, so that a cache tells them apart.
    """
    for question in questions:
        for run in range(repeats):
            yield {
                "custom_id": row_id(question.id, run, repeats),
                "body": {
                    "messages": [
                        {"role": "system", "content": _SYSTEM},
                        {"role": "user", "content": _USER.format(question=question.question)},
                    ],
                    "temperature": temperature,
                    "max_tokens": max_tokens,
                    "seed": seed + run,
                },
            }
