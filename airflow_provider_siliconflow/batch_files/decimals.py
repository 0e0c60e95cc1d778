"""Numbers as they were written: 0.29 is exactly 29 hundredths, not the nearest binary fraction."""

from __future__ import annotations

from fractions import Fraction


def exact(number: int | float) -> Fraction:
    """
    Return exactly the number that the decimal text of ``number`` shows.

    :param number: finite.
    """
    return Fraction(str(number))


def exceeds(part: int, total: int, rate: int | float) -> bool:
    """
    Whether ``part`` of ``total`` exceeds a share: 29 of 100 does not exceed 0.29.

    :param rate: the share as written by the DAG's author, from 0 to 1.
    """
    return part > exact(rate) * total
