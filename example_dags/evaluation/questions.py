"""The question set: questions, correct answers and the request rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

_SYSTEM = "You answer quiz questions."
_DATE = " Today is {date}."
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


def request_rows(
    questions: Iterable[Question], *, date: str | None, max_tokens: int
) -> Iterator[dict[str, Any]]:
    """
    Return one request per question, for any model.

    :param date: the date of the night, which goes into the prompt, as in chat applications; ``None`` to ask the same
        every night, so that a cache can answer.
    :param max_tokens: maximum length of an answer; longer ones are cut and counted as truncated.
    """
    system = _SYSTEM + (_DATE.format(date=date) if date else "")
    for question in questions:
        yield {
            "custom_id": question.id,
            "body": {
                "messages": [
                    {"role": "system", "content": system},
                    {"role": "user", "content": _USER.format(question=question.question)},
                ],
                "temperature": 0,
                "max_tokens": max_tokens,
            },
        }
