"""The score, and the faults that no test noticed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

#: Statuses of a mutant that the tests noticed.
NOTICED = ("killed", "timeout", "crash")


def score(outcomes: Iterable[dict[str, Any]]) -> float:
    """Share of the mutants that were noticed; those that no test executes count as missed."""
    statuses = Counter(outcome["status"] for outcome in outcomes)
    total = statuses.total() - statuses["invalid"]
    return sum(statuses[status] for status in NOTICED) / total if total else 1.0


def report(outcomes: Sequence[dict[str, Any]], seconds: float) -> str:
    by_path = defaultdict(list)
    for outcome in outcomes:
        by_path[outcome["path"]].append(outcome)
    missed = [outcome for outcome in outcomes if outcome["status"] in ("survived", "untested")]
    lines = [_line(outcome) for outcome in sorted(missed, key=lambda o: (o["path"], o["line"]))]
    lines.append("")
    for path, found in sorted(by_path.items()):
        lines.append(f"{score(found):7.1%}  {_counts(found)}  {path}")
    cpu = sum(outcome["seconds"] for outcome in outcomes)
    lines.append(
        f"{score(outcomes):7.1%}  {_counts(outcomes)}  in {seconds:.0f} s, {cpu:.0f} s of the processor for mutants"
    )
    return "\n".join(lines)


def _counts(outcomes: Iterable[dict[str, Any]]) -> str:
    statuses = Counter(outcome["status"] for outcome in outcomes)
    return ", ".join(f"{number} {status}" for status, number in sorted(statuses.items()))


def _line(outcome: dict[str, Any]) -> str:
    ran, possible = outcome["tests"]
    tests = "no test" if not possible else f"{ran} of {possible} tests" if ran < possible else f"{ran} tests"
    place = f"{outcome['path']}:{outcome['line']}"
    return f"{place}: {outcome['status']} ({tests}): {_cut(outcome['before'])}  ->  {_cut(outcome['after'])}"


def _cut(text: str, limit: int = 120) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."
