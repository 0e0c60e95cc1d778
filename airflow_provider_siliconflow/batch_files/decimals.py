"""Numbers as people wrote them: 0.29 is 29 hundredths, not the binary fraction next to it."""

from __future__ import annotations

from fractions import Fraction


def exact(number: int | float) -> Fraction:
    """
    Return the number that the text of ``number`` says, exactly.

    :param number: finite.
    """
    return Fraction(str(number))


def exceeds(part: int, total: int, rate: int | float) -> bool:
    """
    Whether ``part`` of ``total`` is more than a share: 29 of 100 is not more than 0.29.

    :param rate: the share as its author wrote it, from 0 to 1.
    """
    return part > exact(rate) * total
