"""The gate: whether a night lets the tasks after it run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .comparison import Comparison

_MOST_NAMED = 5


def drops(comparisons: Iterable[Comparison], p: float) -> list[Comparison]:
    """Return the models that became significantly worse."""
    return [each for each in comparisons if each.dropped(p)]


def describe(comparisons: Sequence[Comparison], p: float, questions: Mapping[str, str] | None = None) -> str:
    """
    Return a line per model: what changed since the last night.

    :param p: the threshold of a significant change.
    :param questions: texts by id, to name the questions that became worse.
    """
    return "\n".join(_line(each, p, questions or {}) for each in comparisons) or "There are no models."


def _line(each: Comparison, p: float, questions: Mapping[str, str]) -> str:
    if each.why_not:
        return f"{each.model}: not compared: {each.why_not}"
    verdict = "WORSE" if each.dropped(p) else "better" if each.rose(p) else "no significant change"
    line = (
        f"{each.model}: {verdict} since the night of {each.before[:10]}: "
        f"{each.worse_count} worse, {each.better_count} better of {each.common} questions (p = {each.p:.2g})"
    )
    if not each.dropped(p):
        return line
    return "; ".join(
        [
            line,
            *_named("worse", each.worse, each.worse_count, questions),
            *_named("better", each.better, each.better_count, {}),
        ]
    )


def _named(what: str, ids: Sequence[str], count: int, questions: Mapping[str, str]) -> list[str]:
    if not ids:
        return []
    names = [_name(each, questions) for each in ids[:_MOST_NAMED]] + list(ids[_MOST_NAMED:20])
    more = f" and {count - len(names)} more" if count > len(names) else ""
    return [f"{what}: {', '.join(names)}{more}"]


def _name(question: str, questions: Mapping[str, str]) -> str:
    text = " ".join(questions.get(question, "").split())
    if not text:
        return question
    return f"{question} ({text if len(text) <= 80 else text[:79] + '…'})"
