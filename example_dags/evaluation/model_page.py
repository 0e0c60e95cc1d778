"""A page per model: each question with the model's answers of the last nights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .charts import Series, line_chart, share_axis
from .formats import date_text, p_text, percent
from .judge import Judged
from .leaderboard import PAGE_FILE, Night
from .questions import Question
from .rendering import render
from .scoring import ScoredRow

#: Nights on the page, and questions: those that changed or are wrong come first.
NIGHTS_SHOWN = 7
MOST_QUESTIONS = 1000


@dataclass
class _Line:
    """
    A question with its answers.

    :param answers: by night, the latest first; ``None`` if the night does not have the question.
    """

    question: Question
    answers: list[ScoredRow | None]
    judged: Judged | None

    @property
    def changed(self) -> str:
        """Return ``worse`` or ``better`` if the score changed since the last night."""
        now, before = (*self.answers, None)[:2]
        if now is None or before is None or now.right == before.right:
            return ""
        return "better" if now.right else "worse"

    @property
    def rank(self) -> int:
        now = self.answers[0]
        return 0 if self.changed else 1 if now is None or not now.right else 2


def render_model(
    model: str,
    nights: Sequence[Night],
    scored: Sequence[Mapping[str, ScoredRow]],
    questions: Sequence[Question],
    *,
    judged: Mapping[str, Judged] | None = None,
    colour: str = "var(--s1)",
    gate_p: float = 0.05,
) -> str:
    """
    Return the page of a model.

    :param nights: the nights to show, earliest first; the last one has the model.
    :param scored: the model's scored answers of each of these nights, by question id.
    :param questions: those of the latest night.
    :param judged: the judge's verdicts on the latest night, by question id.
    :param gate_p: the threshold of a significant change.
    """
    judged = judged or {}
    night = nights[-1]
    lines = [
        _Line(each, [rows.get(each.id) for rows in reversed(scored)], judged.get(each.id))
        for each in questions
    ]
    shown = sorted(lines, key=lambda each: each.rank)[:MOST_QUESTIONS]
    standings = [each.standing(model) for each in nights]
    values = [each.score.accuracy if each else None for each in standings]
    known = [value for value in values if value is not None]
    groups = (
        ("Changed since the last night", [each for each in shown if each.rank == 0], True),
        ("Wrong", [each for each in shown if each.rank == 1], True),
        ("Right", [each for each in shown if each.rank == 2], False),
    )
    return render(
        "model.html.j2",
        model=model,
        night=night,
        tiles=_tiles(model, night, gate_p),
        judge_model=night.judge.model if night.judge else None,
        colour=colour,
        chart=line_chart(
            [date_text(each.date) for each in nights],
            [Series(model, values, colour)],
            share_axis(known),
            title="Accuracy by night",
            height=220,
        ),
        dates=[date_text(each.date) for each in reversed(nights)],
        groups=[group for group in groups if group[1]],
        hidden=len(lines) - len(shown),
        back=f"../{PAGE_FILE}",
    )


def _tiles(model: str, night: Night, gate_p: float) -> list[tuple[str, str, str]]:
    standing, comparison = night.standing(model), night.comparison(model)
    judge = night.judge.score(model) if night.judge else None
    tiles = []
    if standing is not None:
        score = standing.score
        tiles.append(("Accuracy", percent(score.accuracy), f"{score.right:,} of {score.asked:,} questions"))
        if score.spread is not None:
            mean, low, high = score.spread
            tiles.append(("Mean of runs", percent(mean), f"{percent(low)} to {percent(high)}"))
    if comparison is not None and comparison.why_not:
        tiles.append(("Since last night", "not compared", comparison.why_not))
    elif comparison is not None:
        significant = comparison.dropped(gate_p) or comparison.rose(gate_p)
        tiles.append(
            (
                "Since last night",
                f"{comparison.worse_count} worse, {comparison.better_count} better",
                f"{p_text(comparison.p)}, {'' if significant else 'not '}significant",
            )
        )
    if judge is not None and judge.agreement is not None:
        kappa = "–" if judge.kappa is None else f"{judge.kappa:.2f}"
        tiles.append(
            (
                "Judge agrees with the key",
                percent(judge.agreement),
                f"κ {kappa}, {judge.settled:,} of {judge.judged:,} answers with a verdict",
            )
        )
    return tiles
