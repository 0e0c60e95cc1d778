"""Which tests execute a fault, and how long each takes."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from scripts.mutation.mutants import Mutant, mentioned

#: Coverage's context while no test runs.
IMPORT = ""


@dataclass(slots=True)
class Coverage:
    """
    What a run of all tests without any fault showed.

    :param seconds: duration by test.
    :param cpu_seconds: what of it the test used of the processor, which does not depend on how busy the machine is.
    :param contexts: by module and line the tests that execute it, `IMPORT` among them.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    contexts: dict[str, dict[int, frozenset[str]]] = field(default_factory=dict)

    def of_lines(self, path: str, lines: Iterable[int]) -> set[str]:
        known = self.contexts.get(path, {})
        return {test for line in lines for test in known.get(line, ())}

    def of_module(self, path: str) -> set[str]:
        return self.of_lines(path, self.contexts.get(path, ()))


class Chooser:
    """
    Chooses the tests of a mutant.

    :param root: of the project.
    :param package: the Python files whose functions may use what a mutant changes.
    :param tests: ids of all tests, by their file.
    :param unreliable: tests that are never chosen.
    """

    def __init__(
        self,
        coverage: Coverage,
        root: Path,
        package: Iterable[str],
        tests: Mapping[str, Iterable[str]],
        unreliable: frozenset[str] = frozenset(),
    ) -> None:
        self._coverage = coverage
        self.unreliable = unreliable
        self._mentions: dict[str, set[tuple[str, int]]] = defaultdict(set)
        for path in package:
            for name, line in mentioned(ast.parse((root / path).read_text(encoding="utf-8"))):
                self._mentions[name].add((path, line))
        self._test_files = [
            ((root / path).read_text(encoding="utf-8"), frozenset(ids)) for path, ids in tests.items()
        ]

    def runs_at_import(self, mutant: Mutant) -> bool:
        """Whether modules have to be imported again for the mutant to be seen."""
        if mutant.function is None:
            return True
        return IMPORT in self._coverage.of_lines(mutant.path, mutant.lines)

    def tests_of(self, mutant: Mutant) -> frozenset[str]:
        """Every test that can notice the mutant."""
        found = self._coverage.of_lines(mutant.path, mutant.lines)
        if self.runs_at_import(mutant):
            for name in mutant.names:
                for path, line in self._mentions[name]:
                    found |= self._coverage.of_lines(path, [line])
                for text, ids in self._test_files:
                    if name in text:
                        found |= ids
            if not found - {IMPORT}:
                found = self._coverage.of_module(mutant.path)
        return frozenset(found - {IMPORT} - self.unreliable)
