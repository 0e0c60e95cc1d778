"""Numbers within the limits of a JSON schema."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_SPAN = 99
_STEPS = 100


def numbers_within(schema: Mapping[str, Any], *, whole: bool) -> list[int | float]:
    """
    Return some numbers that a schema allows, in order; none if there is none.

    :param whole: the numbers have no fraction.
    """
    low, open_low = _limit(schema, "minimum", "exclusiveMinimum", max)
    high, open_high = _limit(schema, "maximum", "exclusiveMaximum", min)
    if low is None:
        low, open_low = (Fraction(0), False) if high is None or high >= 0 else (high - _SPAN, False)
    if high is None:
        high, open_high = low + _SPAN, False
    step = Fraction(str(schema["multipleOf"])) if schema.get("multipleOf") else None
    if step is None and whole:
        step = Fraction(1)
    elif step is not None and whole:
        # A whole multiple of 0.4 is a multiple of 2.
        step = Fraction(step.numerator)
    if step is None:
        return _between(low, high, open_low, open_high)
    first, last = math.ceil(low / step), math.floor(high / step)
    first += open_low and first * step == low
    last -= open_high and last * step == high
    multiples = (count * step for count in range(first, min(last, first + _SPAN) + 1))
    return [int(number) if number.denominator == 1 else float(number) for number in multiples]


def _between(low: Fraction, high: Fraction, open_low: bool, open_high: bool) -> list[int | float]:
    if low == high and not (open_low or open_high):
        return [float(low)]
    found: list[int | float] = []
    for count in range(1, _STEPS):
        exact = low + (high - low) * Fraction(count, _STEPS)
        # With few digits where they are enough.
        numbers = (float(round(exact, digits)) for digits in (2, 6, 12, 18))
        # As it is written: the float 0.89 is a little more than 0.89.
        found += [number for number in numbers if low < Fraction(str(number)) < high][:1]
    return found


def _limit(
    schema: Mapping[str, Any], name: str, exclusive: str, stricter: Callable[..., Fraction]
) -> tuple[Fraction | None, bool]:
    """Return a limit, and whether it is excluded itself."""
    limit = Fraction(str(schema[name])) if name in schema else None
    other = schema.get(exclusive)
    # The older form: true beside the limit.
    if isinstance(other, bool) or other is None:
        return limit, other is True
    excluded = Fraction(str(other))
    if limit is None or stricter(limit, excluded) == excluded:
        return excluded, True
    return limit, False
