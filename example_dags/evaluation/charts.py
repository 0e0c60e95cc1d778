"""Small charts as inline SVG. Colours are CSS variables of the page, so that they suit light and dark mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Series:
    """
    A line of the line chart.

    :param values: one per point of the x axis; ``None`` for a missing value.
    :param colour: a CSS colour.
    """

    name: str
    values: Sequence[float | None]
    colour: str


def percent(share: float, digits: int = 1) -> str:
    return f"{share * 100:.{digits}f}\u202f%"


def interval_mark(
    value: float, low: float, high: float, colour: str, *, start: float, width: int = 220, height: int = 22
) -> str:
    """Return a dot with its interval. All rows of a table share the axis, from ``start`` to 1."""

    def x(share: float) -> float:
        return 6 + (width - 12) * (share - start) / (1 - start)

    middle = height / 2
    ticks = "".join(
        f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="0" y2="{height}" class="grid"/>'
        for tick in _ticks(start, 1.0, 3)
    )
    return (
        f'<svg class="mark" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{percent(value)}, 95 % interval {percent(low)} to {percent(high)}">{ticks}'
        f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{middle}" y2="{middle}" '
        f'stroke="{colour}" stroke-width="3" stroke-linecap="round" opacity=".38"/>'
        f'<circle cx="{x(value):.1f}" cy="{middle}" r="5" fill="{colour}" class="dot"/></svg>'
    )


def interval_axis(start: float, *, width: int = 220) -> str:
    """Return the axis of :func:`interval_mark`, for the header of its column."""
    labels = "".join(
        f'<text x="{6 + (width - 12) * (tick - start) / (1 - start):.1f}" y="11" '
        f'text-anchor="{"end" if tick == 1 else "start" if tick == start else "middle"}">{tick * 100:.0f}\u202f%</text>'
        for tick in _ticks(start, 1.0, 3)
    )
    return f'<svg class="mark axis" viewBox="0 0 {width} 14" width="{width}" height="14">{labels}</svg>'


def axis_start(lowest: float) -> float:
    """Return the start of an axis of shares up to 1: the next multiple of 10 % below the lowest value."""
    return max(0.0, math.floor((lowest - 0.01) * 10) / 10)


def line_chart(
    labels: Sequence[str], series: Sequence[Series], *, width: int = 1040, height: int = 300
) -> str:
    """
    Return a chart of shares over time, with each line labelled at its end.

    :param labels: one per point of the x axis.
    """
    known = [value for each in series for value in each.values if value is not None]
    low = max(0.0, math.floor((min(known) - 0.015) * 20) / 20)
    high = min(1.0, math.ceil((max(known) + 0.005) * 20) / 20)
    left, right, top, bottom = 46, 232, 12, 30
    bottom_y = height - bottom
    count = len(labels)

    def x(index: int) -> float:
        return left + (width - left - right) * ((index + 0.5) / count if count < 3 else index / (count - 1))

    def y(share: float) -> float:
        return bottom_y - (bottom_y - top) * (share - low) / (high - low)

    parts = [
        f'<line x1="{left}" x2="{width - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" class="grid"/>'
        f'<text x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick * 100:.0f}\u202f%</text>'
        for tick in _ticks(low, high, 6)
    ]
    every = math.ceil(count / 10)
    parts += [
        f'<text x="{x(index):.1f}" y="{height - 8}" text-anchor="{_anchor(index, count)}">{escape(label)}</text>'
        for index, label in enumerate(labels)
        # Counted from the end, so that the latest point always has a label.
        if (count - 1 - index) % every == 0
    ]
    for each in series:
        points = [(x(i), y(value), value, i) for i, value in enumerate(each.values) if value is not None]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py, _, _ in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{each.colour}" stroke-width="2"/>')
        parts += [
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" fill="{each.colour}" class="dot">'
            f"<title>{escape(each.name)}, {escape(labels[i])}: {percent(value)}</title></circle>"
            for px, py, value, i in points
        ]
    ends = []
    for each in series:
        last = max((i for i, value in enumerate(each.values) if value is not None), default=None)
        if last is not None:
            ends.append(
                (y(value) if (value := each.values[last]) is not None else 0.0, x(last), each, value or 0.0)
            )
    ends.sort(key=lambda end: end[0])
    places = _spread([end[0] for end in ends], gap=19, low=top + 2, high=bottom_y)
    label_x = width - right + 26
    for (from_y, from_x, each, value), place in zip(ends, places, strict=True):
        parts.append(
            f'<path d="M{from_x + 7:.1f},{from_y:.1f} L{label_x - 6},{place:.1f}" '
            f'stroke="{each.colour}" opacity=".45" fill="none"/>'
            f'<text x="{label_x}" y="{place + 4:.1f}" class="name">{escape(_short(each.name))} '
            f'<tspan class="value">{percent(value)}</tspan></text>'
        )
    return (
        f'<svg class="lines" viewBox="0 0 {width} {height}" role="img" aria-label="Accuracy by night">'
        f"{''.join(parts)}</svg>"
    )


def bars(rows: Sequence[tuple[str, str, Sequence[tuple[float, str]]]], *, least: float = 0.0) -> str:
    """
    Return horizontal bars on a common scale.

    :param rows: name, value as text, and the parts of the bar as pairs of amount and CSS colour.
    :param least: smallest value that a full bar can represent, so that small shares do not fill the bar.
    """
    most = max((sum(amount for amount, _ in parts) for _, _, parts in rows), default=0)
    most = max(most, least) or 1.0
    lines = []
    for name, value, parts in rows:
        shares = "".join(
            f'<i style="width:{amount / most * 100:.2f}%;background:{colour}"></i>'
            for amount, colour in parts
            if amount
        )
        lines.append(
            f'<div class="bar"><span class="name">{escape(_short(name))}</span>'
            f'<span class="value">{escape(value)}</span><span class="track">{shares}</span></div>'
        )
    return "".join(lines)


def _ticks(low: float, high: float, most: int) -> list[float]:
    for step in (0.05, 0.1, 0.2, 0.25, 0.5, 1.0):
        if (high - low) / step <= most + 1e-9:
            break
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 4) for number in range(first, last + 1)]


def _spread(places: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Return the sorted places, moved apart so that labels do not overlap."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, low, moved[-1] + gap if moved else low))
    limit = high
    for index in range(len(moved) - 1, -1, -1):
        moved[index] = min(moved[index], limit)
        limit = moved[index] - gap
    return moved


def _anchor(index: int, count: int) -> str:
    return "middle" if 0 < index < count - 1 or count < 3 else "start" if index == 0 else "end"


def _short(model: str) -> str:
    """Return the name of a model without its owner."""
    return model.rpartition("/")[2]
