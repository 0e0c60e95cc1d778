"""The leaderboard as one self-contained HTML page, which can be mailed or served from an object store."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

from .charts import Series, axis_start, bars, interval_axis, interval_mark, line_chart, percent
from .leaderboard import Missed, Night, Standing

# Colour-blind readers can tell neighbouring colours apart. From the ninth model on, all models are grey.
_COLOURS = 8


def render_page(
    nights: Sequence[Night], missed: Sequence[Missed] = (), title: str = "Nightly evaluation", note: str = ""
) -> str:
    """
    Return the page for the latest night.

    :param nights: all nights, earliest first; at least one.
    :param missed: questions that models got wrong in the latest night.
    :param note: a sentence for the top of the page.
    """
    night = nights[-1]
    before = nights[-2] if len(nights) > 1 else None
    colour = _colours(nights)
    asked = max((each.score.asked for each in night.standings), default=0)
    subtitle = f"Night of {_date(night.date)} · {asked:,} questions · {len(night.standings)} models"
    remark = f'<p class="remark">{escape(note)}</p>' if note else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}, {_date(night.date)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p>{remark}</header>
{_tiles(night)}
<section class="card"><h2>Leaderboard</h2>{_table(night, before, colour)}
<p class="note">Accuracy covers every question; a question without an answer counts as wrong. The bar is the 95 %
Wilson interval. If two intervals overlap widely, the order of their models may be due to chance.</p></section>
<div class="grid4">{_figures(night, colour)}</div>
<section class="card"><h2>Accuracy by night</h2>{_history(nights, colour)}</section>
<section class="card"><h2>Accuracy by subject</h2>{_subjects(night, colour)}</section>
{_missed(night, missed, colour)}
<footer>Run {escape(night.run_id)} · cost in CNY, calculated from the DAG's prices and all billed tokens,
including rows that were sent again</footer>
</main>
</body>
</html>
"""


Colour = Callable[[str], str]


def _colours(nights: Sequence[Night]) -> Colour:
    # By first appearance, so that a model keeps its colour when its rank changes.
    order: dict[str, int] = {}
    for night in nights:
        for each in night.standings:
            order.setdefault(each.model, len(order))
    return lambda model: f"var(--s{order[model] + 1})" if order[model] < _COLOURS else "var(--muted)"


def _tiles(night: Night) -> str:
    best = night.ranked[0]
    costs = [each.cost for each in night.standings]
    known = [cost for cost in costs if cost is not None]
    rows = sum(each.score.asked for each in night.standings)
    failed = sum(each.failed for each in night.standings)
    resent = sum(each.resent for each in night.standings)
    tiles = [
        ("Best model", best.model.rpartition("/")[2], f"{percent(best.score.accuracy)} correct"),
        (
            "Cost",
            _amounts([sum(known)])[0] if len(known) == len(costs) else "unknown",
            "this night, all models" if len(known) == len(costs) else "at least one model has no price",
        ),
        ("Tokens", _count(sum(each.tokens for each in night.standings)), "billed, including prompts"),
        ("Rows answered", f"{rows - failed:,} of {rows:,}", f"{resent:,} sent again after transient errors"),
    ]
    return (
        '<div class="grid4">'
        + "".join(
            f'<section class="card tile"><h3>{escape(name)}</h3><strong>{escape(value)}</strong>'
            f"<span>{escape(note)}</span></section>"
            for name, value, note in tiles
        )
        + "</div>"
    )


def _table(night: Night, before: Night | None, colour: Colour) -> str:
    start = axis_start(min(each.score.interval[0] for each in night.standings))
    rows = []
    costs = _amounts([each.cost for each in night.ranked])
    relative = _amounts([_per_thousand_right(each) for each in night.ranked])
    for rank, (each, cost, per_right) in enumerate(zip(night.ranked, costs, relative, strict=True), 1):
        score = each.score
        hue = colour(each.model)
        earlier = before.standing(each.model) if before else None
        rows.append(
            f'<tr><td class="number">{rank}</td><th scope="row">{_name(each.model, hue)}</th>'
            f'<td class="number strong">{percent(score.accuracy)}</td>'
            f'<td class="plot">{interval_mark(score.accuracy, *score.interval, hue, start=start)}</td>'
            f'<td class="number">{_change(each, earlier)}</td>'
            f'<td class="number">{score.right:,} of {score.asked:,}</td>'
            f'<td class="number">{cost}</td>'
            f'<td class="number">{per_right}</td></tr>'
        )
    return (
        '<div class="scroll"><table><thead><tr><th class="number">#</th><th>Model</th>'
        f'<th class="number">Accuracy</th><th class="plot">{interval_axis(start)}</th>'
        '<th class="number">Since last night</th><th class="number">Correct</th><th class="number">Cost</th>'
        '<th class="number">Cost per 1,000 correct</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _figures(night: Night, colour: Colour) -> str:
    ranked = night.ranked

    def share(count: Callable[[Standing], int]) -> str:
        rows = []
        for each in ranked:
            asked = each.score.asked or 1
            text = f"{percent(count(each) / asked)} · {count(each):,}"
            rows.append((each.model, text, [(count(each) / asked, colour(each.model))]))
        return bars(rows, least=0.05)

    def parts(each: Standing) -> list[tuple[float, str]]:
        hue = colour(each.model)
        return [
            (each.prompt_tokens, f"color-mix(in srgb, {hue} 30%, var(--surface))"),
            (each.reasoning_tokens, f"color-mix(in srgb, {hue} 62%, var(--surface))"),
            (each.answer_tokens, hue),
        ]

    costs = _amounts([each.cost for each in ranked])
    cost_bars = [
        (each.model, cost, [(each.cost or 0.0, colour(each.model))])
        for each, cost in zip(ranked, costs, strict=True)
    ]
    charts = [
        ("Cost", "CNY", bars(cost_bars)),
        (
            "Tokens",
            "prompt, reasoning, answer",
            bars([(each.model, _count(each.tokens), parts(each)) for each in ranked]),
        ),
        ("Truncated", "answers cut at max_tokens", share(lambda each: each.truncated)),
        ("Failed", "no answer after all attempts", share(lambda each: each.failed)),
    ]
    return "".join(
        f'<section class="card"><h3>{name}</h3><p class="unit">{unit}</p>{chart}</section>'
        for name, unit, chart in charts
    )


def _history(nights: Sequence[Night], colour: Colour) -> str:
    models = list(dict.fromkeys(each.model for night in nights for each in night.standings))
    series = []
    for model in models:
        found = [night.standing(model) for night in nights]
        values = [each.score.accuracy if each else None for each in found]
        series.append(Series(model, values, colour(model)))
    chart = line_chart([_date(night.date) for night in nights], series)
    note = "" if len(nights) > 1 else '<p class="note">Lines appear from the second night on.</p>'
    return f'<div class="scroll">{chart}</div>{note}'


def _subjects(night: Night, colour: Colour) -> str:
    subjects = list(dict.fromkeys(name for each in night.standings for name in each.score.subjects))
    rows = []
    for each in night.ranked:
        cells = []
        for subject in subjects:
            right, asked = each.score.subjects.get(subject, (0, 0))
            if not asked:
                cells.append("<td></td>")
                continue
            depth = 6 + 64 * max(0.0, right / asked - 0.4) / 0.6
            cells.append(
                f'<td class="heat" style="background:color-mix(in srgb, var(--heat) {depth:.0f}%, var(--surface))"'
                f' title="{right} of {asked} correct">{percent(right / asked, 0)}</td>'
            )
        rows.append(f'<tr><th scope="row">{_name(each.model, colour(each.model))}</th>{"".join(cells)}</tr>')
    head = "".join(f'<th class="heat">{escape(subject.capitalize())}</th>' for subject in subjects)
    return (
        f'<div class="scroll"><table class="heats"><thead><tr><th>Model</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _missed(night: Night, missed: Sequence[Missed], colour: Colour) -> str:
    if not missed:
        return ""
    models = [each.model for each in night.ranked]
    head = "".join(f"<th>{_name(model, colour(model))}</th>" for model in models)
    rows = "".join(
        f'<tr><td class="text">{escape(each.question)}</td><td>{escape(each.expected)}</td>'
        f"{''.join(_given(each.answers, models))}</tr>"
        for each in missed
    )
    return (
        f'<section class="card"><h2>Missed by several models</h2><div class="scroll"><table class="missed">'
        f"<thead><tr><th>Question</th><th>Expected</th>{head}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _given(answers: Mapping[str, str | None], models: Iterable[str]) -> Iterable[str]:
    for model in models:
        answer = answers.get(model)
        if answer is None:
            yield '<td class="right">correct</td>'
        else:
            shown = answer if len(answer) <= 40 else f"{answer[:39]}…"
            yield f"<td>{escape(shown) or '(empty)'}</td>"


def _name(model: str, colour: str) -> str:
    owner, _, name = model.rpartition("/")
    small = f"<small>{escape(owner)}</small>" if owner else ""
    return f'<span class="model"><i style="background:{colour}"></i><span>{escape(name)}{small}</span></span>'


def _change(now: Standing, earlier: Standing | None) -> str:
    if earlier is None:
        return '<span class="muted">–</span>'
    points = (now.score.accuracy - earlier.score.accuracy) * 100
    if abs(points) < 0.05:
        return '<span class="muted">±0.0 pt</span>'
    sign = ("▲", "up", "+") if points > 0 else ("▼", "down", "−")
    return f'<span class="{sign[1]}">{sign[0]} {sign[2]}{abs(points):.1f} pt</span>'


def _per_thousand_right(each: Standing) -> float | None:
    return None if each.cost is None or not each.score.right else each.cost / each.score.right * 1000


def _amounts(amounts: Sequence[float | None]) -> list[str]:
    """Return amounts in CNY, all with as many decimals as the smallest needs for two significant digits."""
    smallest = min((amount for amount in amounts if amount), default=1.0)
    digits = min(max(1 - math.floor(math.log10(smallest)), 2), 4)
    return ["–" if amount is None else f"¥{amount:,.{digits}f}" for amount in amounts]


def _count(number: int) -> str:
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.1f}\u202f{unit}"
    return f"{number:,}"


def _date(date: str) -> str:
    return escape(date.replace("T", " ")[:10])


_STYLE = """
:root{--page:#f6f6f3;--surface:#fff;--ink:#16181d;--soft:#575b66;--muted:#8b8f99;--line:#e4e4df;--up:#0a7a45;
--down:#c0392b;--heat:#2a78d6;--s1:#2a78d6;--s2:#1b9e77;--s3:#d98200;--s4:#7b4fc9;--s5:#e34948;--s6:#008ba3;
--s7:#c2569a;--s8:#6b7d0a}
@media (prefers-color-scheme:dark){:root{--page:#101114;--surface:#191b20;--ink:#eceef2;--soft:#b0b5c0;
--muted:#7f8490;--line:#2c2f37;--up:#4cc38a;--down:#ff8070;--heat:#3d86e0;--s1:#5598ee;--s2:#2fb98d;--s3:#e0a030;
--s4:#a888ee;--s5:#f07171;--s6:#35b4c8;--s7:#de7dba;--s8:#a4b53c}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue","DejaVu Sans",sans-serif}
main{max-width:1160px;margin:0 auto;padding:32px 24px 40px}
header{margin-bottom:20px}
h1{font-size:28px;line-height:1.2;margin:0 0 4px;letter-spacing:-.01em}
header p,.unit,.note,footer{color:var(--soft);margin:0}
header .remark{margin-top:10px;padding:8px 12px;border-left:3px solid var(--muted);background:var(--surface)}
h2{font-size:17px;margin:0 0 12px}
h3{font-size:14px;margin:0}
.card{background:var(--surface);border:1px solid var(--line);border-radius:10px;padding:18px 20px;margin:0 0 16px}
.grid4{display:grid;grid-template-columns:repeat(4,minmax(0,1fr));gap:16px;margin-bottom:16px}
.grid4 .card{margin:0}
.tile h3{font-weight:500;color:var(--soft)}
.tile strong{display:block;font-size:23px;line-height:1.3;margin:3px 0;letter-spacing:-.01em;overflow-wrap:anywhere}
.tile span,.unit,.note,footer{font-size:13px}
.tile span{color:var(--soft)}
.note{margin-top:10px;max-width:90ch}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px}
th,td{padding:8px 10px;text-align:left;vertical-align:middle;border-top:1px solid var(--line)}
thead th{border-top:0;color:var(--soft);font-weight:500;font-size:13px;vertical-align:bottom;padding-top:0}
tbody th{font-weight:600}
.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
thead .number{white-space:normal}
.strong{font-weight:700;font-size:15px}
.model{display:inline-flex;align-items:baseline;gap:9px;white-space:nowrap;color:var(--ink)}
.model i{width:10px;height:10px;border-radius:50%;flex:none}
.model small{display:block;font-weight:400;font-size:12px;color:var(--soft)}
.up{color:var(--up)}.down{color:var(--down)}.muted,.right{color:var(--muted)}
.plot{width:240px}
svg{display:block}
svg text{font-size:12px;fill:var(--soft);font-variant-numeric:tabular-nums}
svg .name{font-size:13px;fill:var(--ink)}
svg .value{font-weight:700}
svg .grid{stroke:var(--line)}
svg .dot{stroke:var(--surface);stroke-width:2;paint-order:stroke}
.lines{width:100%;min-width:760px;height:auto}
.unit{margin:1px 0 12px}
.bar{display:grid;grid-template-columns:1fr auto;gap:2px 8px;font-size:13px;margin-top:9px}
.bar .name{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.bar .value{font-variant-numeric:tabular-nums;color:var(--soft);white-space:nowrap}
.track{grid-column:1/-1;display:flex;height:8px;border-radius:4px;background:var(--line);overflow:hidden}
.track i{height:100%}
.heats{table-layout:fixed;min-width:760px}
.heats th:first-child{width:200px}
.heats{border-collapse:separate;border-spacing:3px}
.heats td,.heats th{border:0}
.heat{text-align:center!important;border-radius:5px;font-variant-numeric:tabular-nums}
.missed{font-size:13px}
.missed td{vertical-align:top}
.missed .text{min-width:220px}
.missed .model small{display:none}
footer{margin-top:20px;overflow-wrap:anywhere}
@media (max-width:860px){.grid4{grid-template-columns:repeat(2,minmax(0,1fr))}}
@media (max-width:520px){.grid4{grid-template-columns:1fr}main{padding:20px 14px}}
@media print{body{background:#fff}.card{break-inside:avoid}}
"""
