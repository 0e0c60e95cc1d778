"""How the pages write shares, amounts, counts, dates and names."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence


def percent(share: float, digits: int = 1) -> str:
    return f"{share * 100:.{digits}f}\u202f%"


def amount_format(amounts: Sequence[float | None]) -> Callable[[float | None], str]:
    """Return what writes amounts in CNY, with as many decimals as the smallest needs for two significant digits."""
    smallest = min((amount for amount in amounts if amount), default=1.0)
    digits = min(max(1 - math.floor(math.log10(smallest)), 2), 4)
    return lambda amount: "–" if amount is None else f"¥{amount:,.{digits}f}"


def count_text(number: int) -> str:
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.1f}\u202f{unit}"
    return f"{number:,}"


def p_text(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def date_text(date: str) -> str:
    return date.replace("T", " ")[:10]


def short_name(model: str) -> str:
    """Return the name of a model without its owner."""
    return model.rpartition("/")[2]


def shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
