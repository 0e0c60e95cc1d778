"""Fixtures for all tests. Nothing here imports Airflow: the import takes seconds, and many tests do not need it."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from airflow_provider_siliconflow.emulator.server import Emulator

ROOT = Path(__file__).resolve().parent.parent
# Makes `scripts.live_airflow` importable, however pytest was started.
sys.path.insert(0, str(ROOT))

# Seconds per test, in place of the limit in pyproject.toml: less for unit tests, more for the long system tests.
TIMEOUTS = {"unit": 120} | ({"system": 3600} if os.environ.get("EXHAUSTIVE") else {})

# Temporary files go to memory where it has room for them: most of these tests write and delete many small ones, and
# Airflow's database syncs each commit to the disk. In a folder of this run, which removes all of them at its end.
_MEMORY = Path("/dev/shm")
if "TMPDIR" not in os.environ and os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free > 4 << 30:
    os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="airflow-tests-", dir=_MEMORY)
    atexit.register(shutil.rmtree, os.environ["TMPDIR"], ignore_errors=True)
    tempfile.tempdir = None

# Set before anything imports Airflow, which writes its configuration and database below its home. A test run must not
# depend on the user's own Airflow or change it.
_HOME = tempfile.mkdtemp(prefix="airflow-tests-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
for _name in [name for name in os.environ if name.startswith("AIRFLOW")]:
    del os.environ[_name]
os.environ |= {
    "AIRFLOW_HOME": _HOME,
    "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
    "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{_HOME}/airflow.db",
    "AIRFLOW__METRICS__TIMER_UNIT_CONSISTENCY": "True",
    "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
}


def pytest_configure(config: pytest.Config) -> None:
    from hypothesis import settings

    if settings.get_current_profile_name() == "default":
        # How long an example takes says more about the machine than about the code.
        settings.register_profile("no-deadline", deadline=None)
        settings.load_profile("no-deadline")
    for line in (
        "unit: no Airflow process",
        "integration: runs DAGs with `airflow dags test`; seconds",
        "every_airflow: `make test` and `make matrix` also run it on older versions of Airflow",
        "emulator(**settings): settings of the fixture `emulator`, as for running_emulator()",
    ):
        config.addinivalue_line("markers", line)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = ["unit", "integration", "system"]
    places = {item: item.path.relative_to(ROOT / "tests").parts[0] for item in items}
    for item, folder in places.items():
        if folder in order:
            item.add_marker(folder)
        if folder in TIMEOUTS and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TIMEOUTS[folder]))
    if examples := os.environ.get("MAX_EXAMPLES"):
        _limit_examples(items, int(examples))
    # Fast tests first. The system tests come last, so that the live Airflow runs only during them.
    items.sort(key=lambda item: order.index(places[item]) if places[item] in order else -1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """
    With ``--dist loadscope`` all system tests run in one process, and each other test in whichever is free.

    The system tests share a live Airflow, and the last one searches what the others left. They are the largest scope,
    with which pytest-xdist begins.
    """
    if config.getoption("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "system" if nodeid.startswith("tests/system/") else nodeid

    return Scheduling(config, log)


@functools.cache
def _step_back() -> None:
    os.nice(10)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ and item.get_closest_marker("system") is None:
        # A live Airflow may run beside this process, and it takes tasks without a heartbeat for dead.
        _step_back()


def _limit_examples(items: list[pytest.Item], most: int) -> None:
    """Fewer Hypothesis examples than a test asks for itself, where many runs matter more than any one of them."""
    from hypothesis import settings

    for item in items:
        method: Any = getattr(item, "obj", None)
        function = getattr(method, "__func__", method)
        own = getattr(function, "_hypothesis_internal_use_settings", None)
        if own is not None and own.max_examples > most:
            function._hypothesis_internal_use_settings = settings(own, max_examples=most)


class MakeEmulator(Protocol):
    def __call__(self, **settings: object) -> Emulator: ...


@pytest.fixture
def make_emulator() -> Iterator[MakeEmulator]:
    """Start emulators with given settings; all are stopped after the test."""
    from airflow_provider_siliconflow.emulator.server import running_emulator

    with contextlib.ExitStack() as stack:
        yield lambda **settings: stack.enter_context(running_emulator(**settings))


@pytest.fixture
def emulator(request: pytest.FixtureRequest, make_emulator: MakeEmulator) -> Emulator:
    """A new emulator, fast unless `@pytest.mark.emulator(...)` sets another speed."""
    marker = request.node.get_closest_marker("emulator")
    return make_emulator(**({"speed": 1000.0} | dict(marker.kwargs if marker else {})))


@pytest.fixture
def connection_env(emulator: Emulator) -> dict[str, str]:
    """Environment variables that point the default connection of an Airflow in another process to the emulator."""
    return {"AIRFLOW_CONN_SILICONFLOW_DEFAULT": emulator.airflow_connection}


@pytest.fixture
def siliconflow_connection(connection_env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Point the default connection of Airflow code in this process to the emulator and return its id."""
    for name, value in connection_env.items():
        monkeypatch.setenv(name, value)
    return "siliconflow_default"
