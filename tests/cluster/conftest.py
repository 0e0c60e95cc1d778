"""
A cluster for tests of what no single process can show: Postgres, two triggerers, everything supervised.

Started once for all tests. It needs Debian's `postgresql` (or any other, on the PATH) and the dependency group
`cluster`; without them these tests fail and say so. `REPETITIONS` says how often the scenarios that depend on
chance are run.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.cluster.jobs import KEY, OpenAccount

if TYPE_CHECKING:
    from airflow_provider_siliconflow.emulator.server import Emulator
    from scripts.live_airflow.cluster import LiveCluster

DAGS = Path(__file__).parent / "dags"
REPETITIONS = int(os.environ.get("REPETITIONS", "1"))

#: Seconds without a heartbeat after which a triggerer counts as dead: Airflow's own default.
TRIGGERER_THRESHOLD = 30
#: The same for a running task, well below Airflow's own.
TASK_THRESHOLD = 20


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "repetition" in metafunc.fixturenames:
        metafunc.parametrize("repetition", range(REPETITIONS))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(3600))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveCluster]:
    from scripts.live_airflow.cluster import LiveCluster

    with LiveCluster(
        tmp_path_factory.mktemp("cluster") / "airflow",
        DAGS,
        triggerers=2,
        schedulers=int(os.environ.get("SCHEDULERS", "1")),
        parallelism=8,
        triggerer_timeout=TRIGGERER_THRESHOLD,
        task_heartbeat_timeout=TASK_THRESHOLD,
        env={
            "AIRFLOW__CORE__MAX_ACTIVE_TASKS_PER_DAG": "64",
            # What is left `queued` without anybody to run it is queued again.
            "AIRFLOW__SCHEDULER__TASK_QUEUED_TIMEOUT": "60",
            "AIRFLOW__SCHEDULER__TASK_QUEUED_TIMEOUT_CHECK_INTERVAL": "10",
        },
    ) as cluster:
        cluster.api("POST", "/pools", {"name": "narrow", "slots": 1})
        yield cluster


@pytest.fixture
def open_account(cluster: LiveCluster, request: pytest.FixtureRequest) -> Iterator[OpenAccount]:
    """Opens accounts of the test's own, emulators with an Airflow connection each."""
    from airflow_provider_siliconflow.emulator.server import running_emulator

    with contextlib.ExitStack() as stack:

        def open_account(name: str, **settings: Any) -> Emulator:
            emulator = stack.enter_context(running_emulator(**{"keys": (KEY,)} | settings))
            connection = {
                "connection_id": name,
                "conn_type": "siliconflow",
                "host": emulator.base_url,
                "password": KEY,
            }
            cluster.api("POST", "/connections", connection)
            return emulator

        yield open_account


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Iterator[dict[str, object]]:
    """What a test measured: printed, and appended to the file that `CLUSTER_REPORT` names."""
    found: dict[str, object] = {"test": request.node.name}
    yield found
    line = json.dumps(found)
    print(f"\n{line}")
    if path := os.environ.get("CLUSTER_REPORT"):
        with open(path, "a") as file:
            file.write(line + "\n")
