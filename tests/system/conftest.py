"""One live Airflow for all system tests: starting it takes longer than most of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from airflow_provider_siliconflow.emulator.server import Emulator
    from scripts.live_airflow import LiveAirflow

DAGS = Path(__file__).parent / "dags"


@pytest.fixture(scope="session")
def live_emulator() -> Iterator[Emulator]:
    """The SiliconFlow that `live_airflow` is connected to; a batch takes about six seconds.

    Shared by all system tests: tell batches and requests apart by what your DAG run sent. Not faster than that:
    when a trigger fires within a second of its task's deferral, Airflow's scheduler may take the end of the
    worker that deferred for the end of the resumed task, and fail it.
    """
    from airflow_provider_siliconflow.emulator.server import running_emulator

    with running_emulator(queue_seconds=5.0, finalizing_seconds=1.0) as emulator:
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
    }
    with LiveAirflow(tmp_path_factory.mktemp("live") / "airflow", DAGS, env=env) as airflow:
        yield airflow
