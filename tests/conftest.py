"""Fixtures for every test. Nothing here imports Airflow: that takes seconds, and many tests do not need it."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from airflow_provider_siliconflow.emulator.server import Emulator

ROOT = Path(__file__).resolve().parent.parent
# For `scripts.live_airflow`, whichever way pytest was started.
sys.path.insert(0, str(ROOT))

# Seconds for one test, below what pyproject.toml gives to all; the long versions of the system tests need more.
TIMEOUTS = {"unit": 120} | ({"system": 3600} if os.environ.get("EXHAUSTIVE") else {})

# Set before anything can import Airflow, which writes its configuration and database below its home: a test run
# must neither depend on nor change the Airflow of whoever runs it.
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
    for line in (
        "unit: no Airflow process",
        "integration: runs DAGs with `airflow dags test`; seconds",
        "every_airflow: `make test` and `make matrix` run it on older versions of Airflow as well",
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
    # The quick ones first; and the live Airflow runs only when nothing else does.
    items.sort(key=lambda item: order.index(places[item]) if places[item] in order else -1)


class MakeEmulator(Protocol):
    def __call__(self, **settings: object) -> Emulator: ...


@pytest.fixture
def make_emulator() -> Iterator[MakeEmulator]:
    """Starts emulators with given settings; all are stopped after the test."""
    from airflow_provider_siliconflow.emulator.server import running_emulator

    with contextlib.ExitStack() as stack:
        yield lambda **settings: stack.enter_context(running_emulator(**settings))


@pytest.fixture
def emulator(request: pytest.FixtureRequest, make_emulator: MakeEmulator) -> Emulator:
    """A fresh emulator, fast unless `@pytest.mark.emulator(...)` says otherwise."""
    marker = request.node.get_closest_marker("emulator")
    return make_emulator(**({"speed": 1000.0} | dict(marker.kwargs if marker else {})))


@pytest.fixture
def connection_env(emulator: Emulator) -> dict[str, str]:
    """Environment with the default connection, to the emulator, for an Airflow in another process."""
    return {"AIRFLOW_CONN_SILICONFLOW_DEFAULT": emulator.airflow_connection}


@pytest.fixture
def siliconflow_connection(connection_env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The default connection, to the emulator, for Airflow code in this process; its id."""
    for name, value in connection_env.items():
        monkeypatch.setenv(name, value)
    return "siliconflow_default"
