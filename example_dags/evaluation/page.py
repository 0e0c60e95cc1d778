"""The leaderboard as a self-contained HTML page, which can be mailed or served from an object store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from .charts import (
    Axis,
    Series,
    amount_axis,
    axis_start,
    bars,
    interval_axis,
    interval_mark,
    line_chart,
    share_axis,
)
from .comparison import Comparison
from .formats import amount_format, count_text, date_text, percent
from .judge import JudgeScore
from .leaderboard import MODELS_FOLDER, Missed, Night, Standing, file_name
from .rendering import render

# Colour-blind readers can tell neighbouring colours apart. From the ninth model on, all models are grey.
_COLOURS = 8
_MOST_FLIPS = 12

Colour = Callable[[str], str]


def colours(nights: Sequence[Night]) -> Colour:
    """Return the CSS colours of the models, by first appearance, so that a model keeps its colour at another rank."""
    order: dict[str, int] = {}
    for night in nights:
        for each in night.standings:
            order.setdefault(each.model, len(order))
    return lambda model: f"var(--s{order[model] + 1})" if order[model] < _COLOURS else "var(--muted)"


def render_page(
    nights: Sequence[Night],
    missed: Sequence[Missed] = (),
    *,
    title: str = "Nightly evaluation",
    note: str = "",
    gate_p: float = 0.05,
    questions: Mapping[str, str] | None = None,
) -> str:
    """
    Return the page for the latest night.

    :param nights: all nights, earliest first; at least one.
    :param missed: questions that models got wrong in the latest night.
    :param note: a sentence for the top of the page.
    :param gate_p: the threshold of a significant change.
    :param questions: texts by id, to show which changed.
    """
    night = nights[-1]
    colour = colours(nights)
    return render(
        "leaderboard.html.j2",
        title=title,
        note=note,
        night=night,
        gate_p=gate_p,
        asked=max((each.score.asked for each in night.standings), default=0),
        repeats=night.settings.get("repeats", 1),
        colour=colour,
        tiles=_tiles(night),
        axis=interval_axis(_start(night)),
        rows=_rows(nights, colour, gate_p),
        cards=_cards(night, colour),
        accuracy_chart=_accuracy_chart(nights, colour),
        cost_chart=_cost_chart(nights, colour),
        flips=_flips(night, gate_p, questions or {}),
        subjects=list(dict.fromkeys(name for each in night.standings for name in each.score.subjects)),
        missed=missed,
        nights=len(nights),
        judge_cost=_judge_cost(night),
    )


@dataclass
class _Row:
    """A row of the leaderboard."""

    standing: Standing
    link: str | None
    mark: Markup
    change: float | None
    comparison: Comparison | None
    dropped: bool
    rose: bool
    cost: str
    per_right: str
    judge: JudgeScore | None


@dataclass
class _Flips:
    """What changed for a model since the last night. ``worse`` and ``better`` are texts of questions."""

    comparison: Comparison
    verdict: str
    sign: str
    worse: list[str] = field(default_factory=list)
    better: list[str] = field(default_factory=list)
    link: str | None = None


def _start(night: Night) -> float:
    return axis_start(min((each.score.interval[0] for each in night.standings), default=0.0))


def _link(night: Night, model: str) -> str | None:
    # Nights of an older version of this example have no page per model.
    return f"{MODELS_FOLDER}/{file_name(model)}.html" if night.folder else None


def _tiles(night: Night) -> list[tuple[str, str, str]]:
    best = night.ranked[0]
    costs = [each.cost for each in night.standings]
    if night.judge is not None:
        costs.append(night.judge.cost)
    known = [cost for cost in costs if cost is not None]
    rows = sum(each.rows or each.score.asked for each in night.standings)
    failed = sum(each.failed for each in night.standings)
    resent = sum(each.resent for each in night.standings)
    complete = len(known) == len(costs)
    everybody = "all models and the judge" if night.judge is not None else "all models"
    return [
        ("Best model", best.model.rpartition("/")[2], f"{percent(best.score.accuracy)} correct"),
        (
            "Cost",
            amount_format([sum(known)])(sum(known)) if complete else "unknown",
            f"this night, {everybody}" if complete else "at least one model has no price",
        ),
        ("Tokens", count_text(sum(each.tokens for each in night.standings)), "billed, including prompts"),
        ("Rows answered", f"{rows - failed:,} of {rows:,}", f"{resent:,} sent again after transient errors"),
    ]


def _judge_cost(night: Night) -> str | None:
    cost = night.judge.cost if night.judge else None
    return None if cost is None else amount_format([cost])(cost)


def _rows(nights: Sequence[Night], colour: Colour, gate_p: float) -> list[_Row]:
    night = nights[-1]
    before = nights[-2] if len(nights) > 1 else None
    start = _start(night)
    write_cost = amount_format([each.cost for each in night.standings])
    write_relative = amount_format([_per_thousand_right(each) for each in night.standings])
    rows = []
    for each in night.ranked:
        earlier = before.standing(each.model) if before else None
        comparison = night.comparison(each.model)
        rows.append(
            _Row(
                each,
                _link(night, each.model),
                interval_mark(each.score.accuracy, *each.score.interval, colour(each.model), start=start),
                None if earlier is None else (each.score.accuracy - earlier.score.accuracy) * 100,
                comparison,
                comparison is not None and comparison.dropped(gate_p),
                comparison is not None and comparison.rose(gate_p),
                write_cost(each.cost),
                write_relative(_per_thousand_right(each)),
                night.judge.score(each.model) if night.judge else None,
            )
        )
    return rows


def _flips(night: Night, gate_p: float, questions: Mapping[str, str]) -> list[_Flips]:
    """Return what changed by model, significant drops first."""
    flips = []
    for standing in night.ranked:
        each = night.comparison(standing.model)
        if each is None:
            continue
        if each.why_not:
            verdict, sign = f"not compared: {each.why_not}", ""
        elif each.dropped(gate_p):
            verdict, sign = "significantly worse", "down"
        elif each.rose(gate_p):
            verdict, sign = "significantly better", "up"
        else:
            verdict, sign = "no significant change", ""
        worse, better = (
            [questions.get(name, name) for name in names[:_MOST_FLIPS]] for names in (each.worse, each.better)
        )
        flips.append(_Flips(each, verdict, sign, worse, better, _link(night, each.model)))
    return sorted(flips, key=lambda each: each.sign != "down")


def _cards(night: Night, colour: Colour) -> list[tuple[str, str, Markup]]:
    ranked = night.ranked

    def rows_of(each: Standing) -> int:
        return each.rows or each.score.asked or 1

    def share(count: Callable[[Standing], int]) -> Markup:
        rows = []
        for each in ranked:
            part = count(each) / rows_of(each)
            rows.append((each.model, f"{percent(part)} · {count(each):,}", [(part, colour(each.model))]))
        return bars(rows, least=0.05)

    def shades(each: Standing, *amounts: float) -> list[tuple[float, str]]:
        hue = colour(each.model)
        tints = [*(f"color-mix(in srgb, {hue} {strength}%, var(--surface))" for strength in (30, 62)), hue]
        return list(zip(amounts, tints, strict=True))

    def by_batch(each: Standing) -> int:
        return max(0, rows_of(each) - each.cached - each.live)

    def answered_by(each: Standing) -> str:
        counts = (each.cached, by_batch(each), each.live)
        return " / ".join(f"{count / rows_of(each) * 100:.0f}" for count in counts)

    write_cost = amount_format([each.cost for each in ranked])
    return [
        (
            "Cost",
            "CNY",
            bars(
                [
                    (each.model, write_cost(each.cost), [(each.cost or 0.0, colour(each.model))])
                    for each in ranked
                ]
            ),
        ),
        (
            "Tokens",
            "prompt, reasoning, answer",
            bars(
                [
                    (
                        each.model,
                        count_text(each.tokens),
                        shades(each, each.prompt_tokens, each.reasoning_tokens, each.answer_tokens),
                    )
                    for each in ranked
                ]
            ),
        ),
        (
            "Answered by",
            "cache / batch / live, %",
            bars(
                [
                    (
                        each.model,
                        answered_by(each),
                        shades(each, each.cached, by_batch(each), each.live),
                    )
                    for each in ranked
                ]
            ),
        ),
        ("Truncated", "answers cut at max_tokens", share(lambda each: each.truncated)),
        ("Failed", "no answer after all attempts", share(lambda each: each.failed)),
    ]


def _accuracy_chart(nights: Sequence[Night], colour: Colour) -> Markup:
    return _chart(
        nights,
        colour,
        lambda each: each.score.accuracy,
        lambda values: share_axis(values),
        "Accuracy by night",
    )


def _cost_chart(nights: Sequence[Night], colour: Colour) -> Markup | None:
    costs = [each.cost for night in nights for each in night.standings if each.cost is not None]
    if not costs:
        return None
    write = amount_format([max(costs) / 5])
    return _chart(
        nights, colour, lambda each: each.cost, lambda values: amount_axis(values, write), "Cost by night"
    )


def _chart(
    nights: Sequence[Night],
    colour: Colour,
    value: Callable[[Standing], float | None],
    axis: Callable[[Sequence[float]], Axis],
    title: str,
) -> Markup:
    models = list(dict.fromkeys(each.model for night in nights for each in night.standings))
    series = []
    for model in models:
        found = [night.standing(model) for night in nights]
        values = [value(each) if each else None for each in found]
        if any(number is not None for number in values):
            series.append(Series(model, values, colour(model)))
    known = [number for each in series for number in each.values if number is not None]
    return line_chart([date_text(night.date) for night in nights], series, axis(known), title=title)


def _per_thousand_right(each: Standing) -> float | None:
    return None if each.cost is None or not each.score.right else each.cost / each.score.right * 1000
