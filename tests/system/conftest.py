"""
One live Airflow for all system tests: starting it takes longer than most of them.

`EXHAUSTIVE=1` adds what takes longer than every change should have to wait for.
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
# The cases that a DAG and its test share.
sys.path.insert(0, str(DAGS))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # What was written by all the others is searched for secrets at the end.
    items.sort(key=lambda item: item.path.name == "test_secrets.py")


@pytest.fixture(scope="session")
def live_emulator() -> Iterator[Emulator]:
    """The SiliconFlow that the default connection leads to; batches take a few seconds.

    Shared by all system tests: tell batches and requests apart by what your DAG run sent.
    """
    from airflow_provider_siliconflow.emulator.server import running_emulator

    with running_emulator(speed=20.0, keys=(KEY,)) as emulator:
        yield emulator


@pytest.fixture(scope="session")
def live_airflow(live_emulator: Emulator, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveAirflow]:
    """A running Airflow with the DAGs in `dags/`.

    A test that kills a component starts it again. One that needs other DAGs or settings makes its own LiveAirflow.
    """
    from scripts.live_airflow import LiveAirflow

    env = {
        "AIRFLOW_CONN_SILICONFLOW_DEFAULT": live_emulator.airflow_connection,
        "AIRFLOW__CORE__TEST_CONNECTION": "Enabled",
        # Tasks wait for the emulator most of their time.
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
    """Opens an account of its own, an emulator with an Airflow connection of the given name."""
    from airflow_provider_siliconflow.emulator.server import running_emulator

    with contextlib.ExitStack() as stack:

        def open_account(name: str, *, extra: dict[str, Any] | None = None, **settings: Any) -> Emulator:
            emulator = stack.enter_context(running_emulator(**{"speed": 20.0, "keys": (KEY,)} | settings))
            accounts.append(emulator)
            connect(live_airflow, name, emulator.base_url, extra)
            return emulator

        yield open_account


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of rows that all succeed."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")
