"""Small charts as inline SVG. Colours are CSS variables of the page, so that they suit light and dark mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

from .formats import percent, short_name, shortened


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


@dataclass(frozen=True)
class Axis:
    """
    The y axis of the line chart.

    :param text: writes a tick.
    :param value: writes a value.
    """

    low: float
    high: float
    ticks: Sequence[float]
    text: Callable[[float], str]
    value: Callable[[float], str]


def share_axis(values: Sequence[float]) -> Axis:
    """Return an axis of shares, which begins at a multiple of 5 % below them."""
    low = max(0.0, math.floor((min(values) - 0.015) * 20) / 20)
    high = min(1.0, math.ceil((max(values) + 0.005) * 20) / 20)
    return Axis(low, high, _ticks(low, high, 6), lambda share: percent(share, 0), percent)


def amount_axis(values: Sequence[float], text: Callable[[float], str]) -> Axis:
    """Return an axis of amounts from 0, with at most five round steps."""
    most = max(max(values), 1e-9)
    power = 10.0 ** math.floor(math.log10(most / 5))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * 5 >= most * (1 - 1e-9))
    count = max(1, math.ceil(most / step - 1e-9))
    return Axis(0.0, count * step, [number * step for number in range(count + 1)], text, text)


def interval_mark(
    value: float, low: float, high: float, colour: str, *, start: float, width: int = 220, height: int = 22
) -> Markup:
    """Return a dot with its interval. All rows of a table share the axis, from ``start`` to 1."""

    def x(share: float) -> float:
        return 6 + (width - 12) * (share - start) / (1 - start)

    middle = height / 2
    ticks = "".join(
        f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="0" y2="{height}" class="grid"/>'
        for tick in _ticks(start, 1.0, 3)
    )
    return Markup(
        f'<svg class="mark" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{percent(value)}, 95 % interval {percent(low)} to {percent(high)}">{ticks}'
        f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{middle}" y2="{middle}" '
        f'stroke="{colour}" stroke-width="3" stroke-linecap="round" opacity=".38"/>'
        f'<circle cx="{x(value):.1f}" cy="{middle}" r="5" fill="{colour}" class="dot"/></svg>'
    )


def interval_axis(start: float, *, width: int = 220) -> Markup:
    """Return the axis of :func:`interval_mark`, for the header of its column."""
    labels = "".join(
        f'<text x="{6 + (width - 12) * (tick - start) / (1 - start):.1f}" y="11" '
        f'text-anchor="{"end" if tick == 1 else "start" if tick == start else "middle"}">{tick * 100:.0f}\u202f%</text>'
        for tick in _ticks(start, 1.0, 3)
    )
    return Markup(
        f'<svg class="mark axis" viewBox="0 0 {width} 14" width="{width}" height="14">{labels}</svg>'
    )


def axis_start(lowest: float) -> float:
    """Return the start of an axis of shares up to 1: the next multiple of 10 % below the lowest value."""
    return max(0.0, math.floor((lowest - 0.01) * 10) / 10)


def line_chart(
    labels: Sequence[str],
    series: Sequence[Series],
    axis: Axis,
    *,
    title: str,
    width: int = 1040,
    height: int = 300,
) -> Markup:
    """
    Return a chart of values over time, with each line labelled at its end.

    :param labels: one per point of the x axis.
    :param title: for readers who cannot see the chart.
    """
    low, high = axis.low, axis.high
    left, right, top, bottom = 58, 232, 12, 30
    bottom_y = height - bottom
    count = len(labels)

    def x(index: int) -> float:
        return left + (width - left - right) * ((index + 0.5) / count if count < 3 else index / (count - 1))

    def y(share: float) -> float:
        return bottom_y - (bottom_y - top) * (share - low) / (high - low)

    parts = [
        f'<line x1="{left}" x2="{width - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" class="grid"/>'
        f'<text x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{escape(axis.text(tick))}</text>'
        for tick in axis.ticks
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
            f"<title>{escape(each.name)}, {escape(labels[i])}: {escape(axis.value(value))}</title></circle>"
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
            f'<text x="{label_x}" y="{place + 4:.1f}" class="name">{escape(shortened(short_name(each.name), 20))} '
            f'<tspan class="value">{escape(axis.value(value))}</tspan></text>'
        )
    return Markup(
        f'<svg class="lines" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )


def bars(rows: Sequence[tuple[str, str, Sequence[tuple[float, str]]]], *, least: float = 0.0) -> Markup:
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
            f'<div class="bar"><span class="name">{escape(short_name(name))}</span>'
            f'<span class="value">{escape(value)}</span><span class="track">{shares}</span></div>'
        )
    return Markup("".join(lines))


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
