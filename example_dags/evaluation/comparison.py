"""A paired comparison of two nights: which questions changed, and whether chance explains it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from .scoring import ScoredRow

#: Changed questions that are kept by name; the counts cover all.
MOST_NAMED = 200


def mcnemar_p(better: int, worse: int) -> float:
    """
    Return the two-sided p-value of the exact McNemar test.

    If a model is as good as before, a question that changed is as likely to have become better as worse. The p-value is
    the probability that so many fair coins fall at least as unevenly.

    :param better: questions that were wrong and are right now.
    :param worse: questions that were right and are wrong now.
    """
    changed = better + worse
    ways, term = 0, 1
    for heads in range(min(better, worse) + 1):
        ways += term
        term = term * (changed - heads) // (heads + 1)
    return float(min(Fraction(1), Fraction(2 * ways, 2**changed)))


@dataclass
class Comparison:
    """
    One model in two nights.

    :param better: ids of questions that were wrong and are right now; at most :data:`MOST_NAMED`.
    :param worse: ids of questions that were right and are wrong now; at most as many.
    :param better_count: all of the former.
    :param worse_count: all of the latter.
    :param common: questions that both nights have.
    :param p: of the exact McNemar test.
    :param before: the date of the earlier night.
    :param why_not: why there is no comparison; the rest is then empty.
    """

    model: str
    better: list[str] = field(default_factory=list)
    worse: list[str] = field(default_factory=list)
    better_count: int = 0
    worse_count: int = 0
    common: int = 0
    p: float = 1.0
    before: str = ""
    why_not: str = ""

    def dropped(self, p: float) -> bool:
        """Return whether the model became significantly worse: more questions for the worse, and at most this p."""
        return self.worse_count > self.better_count and self.p <= p

    def rose(self, p: float) -> bool:
        """Return whether the model became significantly better."""
        return self.better_count > self.worse_count and self.p <= p

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Comparison:
        return cls(**data)


def compare(
    model: str, now: Mapping[str, ScoredRow], earlier: Mapping[str, ScoredRow], before: str
) -> Comparison:
    """
    Compare the scored answers of two nights, over the questions that both have.

    :param before: the date of the earlier night.
    """
    common = [name for name in now if name in earlier]
    better = [name for name in common if now[name].right and not earlier[name].right]
    worse = [name for name in common if earlier[name].right and not now[name].right]
    return Comparison(
        model,
        better[:MOST_NAMED],
        worse[:MOST_NAMED],
        len(better),
        len(worse),
        len(common),
        mcnemar_p(len(better), len(worse)),
        before,
    )
