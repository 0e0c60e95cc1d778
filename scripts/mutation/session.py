"""The pytest session in which mutants are made and tested; run in a copy of the tree.

python -m scripts.mutation.session '{"paths": [...], ...}'
"""

from __future__ import annotations

import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import pickle
import random
import sys
import threading
import time
import types
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from scripts.mutation.choosing import IMPORT, Chooser, Coverage
from scripts.mutation.mutants import Module, Mutant, find_mutants
from scripts.mutation.workers import Answer, Reporter, Task, run_all

ROOT = Path.cwd()
PACKAGE = "airflow_provider_siliconflow"

#: A test with a fault in the code may take so many times as long as without, and so many seconds more: on the
#: clock, and of the processor.
SLOWER, LONGER, LONGER_CPU = 10.0, 30.0, 3.0
#: Seconds for one test without a fault, and for importing everything again.
PATIENCE = 600.0


class MutationError(Exception):
    """The run cannot go on; the text says why."""


@dataclass(frozen=True, slots=True)
class Options:
    """
    What to do.

    :param paths: modules to put faults into, relative to the project.
    :param tests: files and folders of tests.
    :param jobs: processes at once.
    :param sample: so many mutants, chosen at random; None for all.
    :param seconds: of the processor for one mutant, by what the tests use without a fault; 0 for all tests.
    :param examples: of one Hypothesis test.
    :param output: file for the results.
    """

    paths: Sequence[str]
    tests: Sequence[str]
    jobs: int
    sample: int | None
    seed: int
    seconds: float
    examples: int
    output: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """
    What became of a mutant.

    :param status: "killed", "timeout", "crash", "survived", "untested" (no test executes it) or "invalid" (it is not
        Python, and does not count).
    :param by: the test that noticed it.
    :param tests: how many tests ran, and how many could have.
    :param seconds: of the processor.
    """

    path: str
    line: int
    function: str
    before: str
    after: str
    status: str
    by: str | None = None
    tests: tuple[int, int] = (0, 0)
    seconds: float = 0.0


class Session:
    """The plugin that takes over once the tests are collected."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.modules = {
            path: find_mutants(path, (ROOT / path).read_text(encoding="utf-8")) for path in options.paths
        }
        self.failure: str | None = None

    def pytest_configure(self) -> None:
        from hypothesis import Phase, settings

        # The same examples each time; and how small a failing one can be made is of no interest.
        settings.register_profile(
            "mutation",
            phases=[Phase.explicit, Phase.generate],
            derandomize=True,
            database=None,
            deadline=None,
        )
        settings.load_profile("mutation")

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            raise MutationError("the tests cannot be collected")
        try:
            self._run(session)
        except MutationError as error:
            self.failure = str(error)
        return True

    def _run(self, session: pytest.Session) -> None:
        limit_examples(session.items, self.options.examples)
        runner = Runner(session, self.modules)
        say(f"{len(session.items)} tests; running them without a fault")
        coverage, unreliable = runner.measure(self.options.jobs)
        tests: dict[str, list[str]] = defaultdict(list)
        for item in session.items:
            tests[item.nodeid.partition("::")[0]].append(item.nodeid)
        chooser = Chooser(coverage, ROOT, package_files(), tests, unreliable)
        mutants = [mutant for module in self.modules.values() for mutant in module.mutants]
        if self.options.sample is not None and self.options.sample < len(mutants):
            # Left in their order: what a run has tested when it is stopped is a sample too.
            mutants = random.Random(self.options.seed).sample(mutants, self.options.sample)
        outcomes: list[dict[str, Any]] = []
        for outcome in self._test(runner, chooser, coverage, mutants):
            outcomes.append(asdict(outcome))
            Path(self.options.output).write_text(json.dumps(outcomes))

    def _test(
        self, runner: Runner, chooser: Chooser, coverage: Coverage, mutants: Sequence[Mutant]
    ) -> Iterator[Outcome]:
        chosen: dict[Mutant, tuple[list[str], int]] = {}
        kills: dict[tuple[str, object], Counter[str]] = defaultdict(Counter)
        counts: Counter[str] = Counter()
        started = spoken = time.monotonic()
        at_import = {mutant for mutant in mutants if chooser.runs_at_import(mutant)}

        def tasks() -> Iterator[Task[Mutant]]:
            for mutant in mutants:
                tests = sorted(chooser.tests_of(mutant))
                before = kills[mutant.path, mutant.function]
                tests.sort(key=lambda test: (-before[test], coverage.seconds[test]))
                within = list(affordable(tests, coverage.cpu_seconds, self.options.seconds))
                chosen[mutant] = (within, len(tests))
                if within:
                    yield Task(mutant, runner.work(mutant, within, coverage, again=mutant in at_import))

        for answer in run_all(tasks(), self.options.jobs):
            mutant = answer.subject
            outcome = judge(mutant, answer, *chosen[mutant])
            if outcome.by and mutant in at_import and not runner.passes_again(outcome.by):
                outcome = replace(outcome, status="survived", by=None)
            if outcome.by:
                kills[mutant.path, mutant.function][outcome.by] += 1
            counts[outcome.status] += 1
            if outcome.status == "survived":
                say(f"survived: {mutant.text}")
            yield outcome
            if time.monotonic() > spoken + 20:
                spoken = time.monotonic()
                done = ", ".join(f"{number} {status}" for status, number in sorted(counts.items()))
                say(f"{spoken - started:5.0f} s: {counts.total()} of {len(mutants)}: {done}")
        for mutant, (within, _) in chosen.items():
            if not within:
                yield outcome_of(mutant, "untested")


def check_without_fault(how: str, answer: Answer[Any]) -> frozenset[str]:
    """
    Nothing that a test says of a fault counts if it fails without one.

    :returns: tests that failed once and not twice.
    """
    result = answer.result or {"broken": answer.ending}
    if failed := result.get("broken") or "\n".join(f"{t}\n{why}" for t, why in result["failed"].items()):
        raise MutationError(f"without a fault, {how}, these fail:\n{failed}")
    for test, why in result["unreliable"].items():
        say(f"left out, since it failed once without a fault, {how}: {test}\n{why}")
    return frozenset(result["unreliable"])


def judge(mutant: Mutant, answer: Answer[Any], tests: Sequence[str], possible: int) -> Outcome:
    result = answer.result or {}
    if "broken" in result:
        raise MutationError(f"{mutant.text}: {result['broken']}")
    ran = (result.get("ran", 0), possible)
    if answer.ending == "timeout":
        status = "timeout"
    elif answer.ending == "died":
        status = "crash"
    elif "invalid" in result:
        status = "invalid"
    else:
        status = "killed" if result["killed_by"] else "survived"
    return outcome_of(
        mutant, status, by=result.get("killed_by"), tests=ran, seconds=round(answer.cpu_seconds, 2)
    )


def outcome_of(mutant: Mutant, status: str, **more: Any) -> Outcome:
    function = mutant.function[0] if mutant.function else ""
    return Outcome(mutant.path, mutant.line, function, mutant.before, mutant.after, status, **more)


def affordable(tests: Iterable[str], seconds: Mapping[str, float], limit: float) -> Iterator[str]:
    """Tests within a limit of seconds, at least one; all without a limit."""
    spent = 0.0
    for number, test in enumerate(tests):
        spent += seconds[test]
        if limit and number and spent > limit:
            return
        yield test


class Runner:
    """Makes what a child of this process does."""

    def __init__(self, session: pytest.Session, modules: Mapping[str, Module]) -> None:
        self._session = session
        self._modules = modules
        self._items = {item.nodeid: item for item in session.items}
        self._passing: dict[str, bool] = {}
        for path in modules:
            imported = importlib.import_module(module_name(path))
            if Path(imported.__file__ or "").resolve() != ROOT / path:
                raise MutationError(f"{path} is imported from {imported.__file__}, not from {ROOT}")
        self._functions = live_functions(str(ROOT / path) for path in modules)
        if (threads := threading.active_count()) > 1:
            say(f"warning: {threads} threads run in the process that forks")
        gc.collect()
        # Children share what is there already, as long as nobody writes to it.
        gc.freeze()

    def measure(self, jobs: int) -> tuple[Coverage, frozenset[str]]:
        """
        Run all tests without a fault, and see what they execute; and what an import executes.

        :returns: that, and the tests that are not to be relied on.
        """
        folder = Path(os.environ["MUTATION_FOLDER"])
        tasks: list[Task[str]] = [
            Task("at once", lambda reporter: self._measure_tests(reporter, folder / "tests")),
            Task("at import", lambda reporter: self._measure_import(reporter, folder / "import")),
        ]
        unreliable: frozenset[str] = frozenset()
        for answer in run_all(tasks, jobs):
            unreliable |= check_without_fault(answer.subject, answer)
        coverage: Coverage = pickle.loads((folder / "tests").read_bytes())
        at_import: dict[str, list[int]] = pickle.loads((folder / "import").read_bytes())
        for path, lines in at_import.items():
            known = coverage.contexts.setdefault(path, {})
            for line in lines:
                known[line] = known.get(line, frozenset()) | {IMPORT}
        return coverage, unreliable

    def _measure_tests(self, reporter: Reporter, output: Path) -> None:
        cov = start_coverage()
        watch = Watch(reporter, without_fault, switch=cov.switch_context)
        self._run_items(list(self._items), watch)
        cov.stop()
        output.write_bytes(pickle.dumps(Coverage(watch.seconds, watch.cpu_seconds, read_contexts(cov))))
        twice = Watch(reporter, without_fault)
        if watch.failed:
            self._run_items(list(watch.failed), twice)
        reporter.end(failed=twice.failed, unreliable=watch.failed)

    def _measure_import(self, reporter: Reporter, output: Path) -> None:
        forget_ours()
        cov = start_coverage()
        reporter.begin(PATIENCE, PATIENCE)
        # All of them: what a module runs when another one is imported counts too, such as a table that it fills.
        for path in package_files():
            importlib.import_module(module_name(path))
        cov.stop()
        output.write_bytes(pickle.dumps({path: list(lines) for path, lines in read_contexts(cov).items()}))
        reporter.end(failed={}, unreliable={})

    def passes_again(self, test: str) -> bool:
        """Whether a test passes without a fault in the way of a mutant that is seen at import."""

        def work(reporter: Reporter) -> None:
            reporter.begin(PATIENCE, PATIENCE)
            watch = Watch(reporter, without_fault)
            forget_ours()
            run_again([test], watch, stop=True)
            reporter.end(failed=watch.failed)

        if test in self._items and test not in self._passing:
            (answer,) = run_all([Task(test, work)], 1)
            self._passing[test] = answer.result is not None and answer.result.get("failed") == {}
        return self._passing.get(test, True)

    def work(
        self, mutant: Mutant, tests: Sequence[str], coverage: Coverage, *, again: bool
    ) -> Callable[[Reporter], None]:
        """Run tests with the fault in place; `again` when it has to be there at import."""

        def limits(test: str) -> tuple[float, float]:
            return LONGER + SLOWER * coverage.seconds[test], LONGER_CPU + SLOWER * coverage.cpu_seconds[test]

        def work(reporter: Reporter) -> None:
            watch = Watch(reporter, limits)
            mutant.apply()
            path = str(ROOT / mutant.path)
            try:
                code = compile(self._modules[mutant.path].tree, path, "exec")
            except SyntaxError as error:
                reporter.end(invalid=str(error))
                return
            # In both ways: a test may import the module anew.
            sys.meta_path.insert(0, MutatedFinder(module_name(mutant.path), path, code))
            if not again and self._replace(mutant, path, code):
                self._run_items(tests, watch, until_failed_twice=True)
            else:
                forget_ours()
                reporter.begin(PATIENCE, PATIENCE)
                try:
                    importlib.import_module(module_name(mutant.path))
                except BaseException as error:  # noqa: BLE001 - whatever the fault makes of it
                    reporter.end(killed_by=f"its import: {error!r}"[:200], ran=0)
                    return
                run_again(tests, watch, stop=True)
            reporter.end(killed_by=next(iter(watch.failed), None), ran=len(watch.seconds))

        return work

    def _replace(self, mutant: Mutant, path: str, code: types.CodeType) -> bool:
        """Give the live function, and closures that it has made, their faulty code; whether that can be done."""
        assert mutant.function is not None
        wanted = next(
            (c for c in code_objects(code) if (c.co_qualname, c.co_firstlineno) == mutant.function), None
        )
        if wanted is None or not self._functions.get((path, *mutant.function)):
            return False
        pairs = [
            (function, c)
            for c in code_objects(wanted)
            for function in self._functions.get((path, c.co_qualname, c.co_firstlineno), [])
        ]
        # Two lambdas in one line cannot be told apart.
        if len({id(function) for function, _ in pairs}) < len(pairs):
            return False
        if any(function.__code__.co_freevars != c.co_freevars for function, c in pairs):
            return False
        for function, c in pairs:
            function.__code__ = c
        return True

    def _run_items(self, tests: Sequence[str], watch: Watch, *, until_failed_twice: bool = False) -> None:
        manager = self._session.config.pluginmanager
        manager.unregister(name="terminalreporter")
        manager.register(watch)
        items = [self._items[test] for test in tests]
        for item, following in zip(items, [*items[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if until_failed_twice and watch.failed:
                # A test that depends on time fails now and then by itself; that kills no mutant.
                watch.failed.clear()
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                if watch.failed:
                    break
        manager.unregister(watch)


def without_fault(test: str) -> tuple[float, float]:
    return PATIENCE, PATIENCE


class Watch:
    """
    Follows the tests of a child: the plugin that tells the parent how long the next may take.

    :param limits: seconds of a test, on the clock and of the processor.
    :param switch: is told which test runs.
    """

    def __init__(
        self,
        reporter: Reporter,
        limits: Callable[[str], tuple[float, float]],
        switch: Callable[[str], None] | None = None,
    ) -> None:
        self._reporter = reporter
        self._limits = limits
        self._switch = switch
        #: What failed, and why.
        self.failed: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._reporter.begin(*self._limits(item.nodeid))
        if self._switch is not None:
            self._switch(item.nodeid)
        started, cpu_started = time.perf_counter(), time.process_time()
        try:
            return (yield)
        finally:
            self.seconds[item.nodeid] = time.perf_counter() - started
            self.cpu_seconds[item.nodeid] = time.process_time() - cpu_started
            if self._switch is not None:
                self._switch(IMPORT)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed[report.nodeid] = str(report.longrepr)[-1500:]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed[f"the import of {report.nodeid}"] = str(report.longrepr)[-1500:]


class Chosen:
    """Leaves a collection with the chosen tests, in their order."""

    def __init__(self, tests: Sequence[str]) -> None:
        self._order = {test: number for number, test in enumerate(tests)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid in self._order]
        items.sort(key=lambda item: self._order[item.nodeid])


def run_again(tests: Sequence[str], watch: Watch, *, stop: bool) -> None:
    """Run tests in a pytest session of their own, which imports all of ours anew."""
    files = list(dict.fromkeys(test.partition("::")[0] for test in tests))
    arguments = ["-q", "--capture=no", "-p", "no:cacheprovider", *(["-x"] if stop else []), *files]
    code = pytest.main(arguments, plugins=[watch, Chosen(tests)])
    if code == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise MutationError(f"none of the tests is there any more: {tests}")
    if code != pytest.ExitCode.OK and not watch.failed:
        watch.failed["pytest's start"] = f"exit code {code}"


class MutatedFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from given code."""

    def __init__(self, name: str, path: str, code: types.CodeType) -> None:
        self._name = name
        self._path = path
        self._code = code

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        spec = importlib.util.spec_from_loader(fullname, self, origin=self._path)
        if spec is not None:
            spec.has_location = True
        return spec

    def exec_module(self, module: types.ModuleType) -> None:
        exec(self._code, module.__dict__)


def forget_ours() -> None:
    """Take every module of the project out of `sys.modules`, but for this program."""
    ours = []
    for name, module in list(sys.modules.items()):
        places = [getattr(module, "__file__", None), *getattr(module, "__path__", [])]
        if any(place and Path(place).is_relative_to(ROOT) for place in places):
            ours.append(name)
    for name in ours:
        if name not in ("scripts", "__main__") and not name.startswith("scripts.mutation"):
            del sys.modules[name]


def live_functions(paths: Iterable[str]) -> dict[tuple[str, str, int], list[types.FunctionType]]:
    """Every function object that was made from these files."""
    wanted = set(paths)
    found: dict[tuple[str, str, int], list[types.FunctionType]] = defaultdict(list)
    for thing in gc.get_objects():
        if isinstance(thing, types.FunctionType) and thing.__code__.co_filename in wanted:
            code = thing.__code__
            found[code.co_filename, code.co_qualname, code.co_firstlineno].append(thing)
    return found


def code_objects(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from code_objects(constant)


def limit_examples(items: Iterable[pytest.Item], examples: int) -> None:
    """Fewer Hypothesis examples than a test asks for itself: its own number is for finding what nobody thought of."""
    from hypothesis import settings

    for item in items:
        method: Any = getattr(item, "obj", None)
        function = getattr(method, "__func__", method)
        own = getattr(function, "_hypothesis_internal_use_settings", None)
        if own is not None and own.max_examples > examples:
            function._hypothesis_internal_use_settings = settings(own, max_examples=examples)


def start_coverage() -> Any:
    import coverage

    os.environ["COVERAGE_CORE"] = "ctrace"
    cov = coverage.Coverage(data_file=None, config_file=False, include=[str(ROOT / PACKAGE / "*")])
    cov.start()
    return cov


def read_contexts(cov: Any) -> dict[str, dict[int, frozenset[str]]]:
    data = cov.get_data()
    return {
        str(Path(file).relative_to(ROOT)): {
            line: frozenset(contexts) for line, contexts in data.contexts_by_lineno(file).items()
        }
        for file in data.measured_files()
    }


def package_files() -> list[str]:
    files = sorted((ROOT / PACKAGE).rglob("*.py"))
    return [str(path.relative_to(ROOT)) for path in files if path.name != "__main__.py"]


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    options = Options(**json.loads(sys.argv[1]))
    session = Session(options)
    code = pytest.main(
        ["-qq", "--capture=no", "--no-summary", "-p", "no:cacheprovider", *options.tests], plugins=[session]
    )
    if session.failure is not None:
        say(f"error: {session.failure}")
        return 2
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
