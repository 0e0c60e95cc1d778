"""
One live Airflow for all system tests: starting it takes longer than most of the tests.

`EXHAUSTIVE=1` adds the tests that take too long to run for every change.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.system.live import AIRFLOW, KEY, OpenAccount, connect, secrets_file, write_rows

if TYPE_CHECKING:
    from airflow_provider_siliconflow.emulator.server import Emulator
    from scripts.live_airflow import LiveAirflow

DAGS = Path(__file__).parent / "dags"
# For the modules of cases that a DAG shares with its test.
sys.path.insert(0, str(DAGS))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Last, because it searches the output of all other tests for secrets.
    items.sort(key=lambda item: item.path.name == "test_secrets.py")


@pytest.fixture(scope="session")
def live_emulator() -> Iterator[Emulator]:
    """The emulator of the default connection. Batches take a few seconds.

    All system tests share it, so select batches and requests by what your DAG run sent.
    """
    from airflow_provider_siliconflow.emulator.server import running_emulator

    with running_emulator(speed=20.0, keys=(KEY,)) as emulator:
        yield emulator


@pytest.fixture(scope="session")
def live_airflow(live_emulator: Emulator, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveAirflow]:
    """A running Airflow with the DAGs in `dags/`.

    A test that kills a component must start it again. A test that needs other DAGs or settings makes its own
    LiveAirflow.
    """
    from scripts.live_airflow import LiveAirflow

    env = {
        "AIRFLOW_CONN_SILICONFLOW_DEFAULT": live_emulator.airflow_connection,
        "AIRFLOW__CORE__TEST_CONNECTION": "Enabled",
        # Tasks spend most of their time waiting for the emulator.
        "AIRFLOW__CORE__MAX_ACTIVE_TASKS_PER_DAG": "200",
    }
    if AIRFLOW < (3, 0):
        env |= secrets_file(tmp_path_factory.mktemp("connections"))
    home = tmp_path_factory.mktemp("live") / "airflow"
    with LiveAirflow(home, DAGS, env=env, parallelism=24) as airflow:
        yield airflow


@pytest.fixture(scope="session")
def accounts(live_emulator: Emulator) -> list[Emulator]:
    """Every emulator of the session."""
    return [live_emulator]


@pytest.fixture(scope="session")
def open_account(live_airflow: LiveAirflow, accounts: list[Emulator]) -> Iterator[OpenAccount]:
    """Open separate accounts: emulators, each with an Airflow connection of the given name."""
    from airflow_provider_siliconflow.emulator.server import running_emulator

    with contextlib.ExitStack() as stack:

        def open_account(name: str, *, extra: dict[str, Any] | None = None, **settings: Any) -> Emulator:
            given: dict[str, Any] = {"speed": 20.0, "keys": (KEY,)} | settings
            emulator = stack.enter_context(running_emulator(**given))
            accounts.append(emulator)
            connect(live_airflow, name, emulator.base_url, extra)
            return emulator

        yield open_account


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of rows that all succeed."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")
