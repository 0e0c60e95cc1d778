"""DAGs through `airflow dags test`, against an emulator."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import pytest


class DagTest(Protocol):
    def __call__(
        self,
        dag_file: Path,
        dag_id: str,
        conf: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]: ...


@pytest.fixture
def airflow_home(tmp_path: Path) -> Path:
    """AIRFLOW_HOME of `dag_test`, to look at its database (`airflow.db`) and logs afterwards."""
    return tmp_path / "airflow"


@pytest.fixture
def dag_test(airflow_home: Path, connection_env: dict[str, str]) -> DagTest:
    """Runs `airflow dags test` with the default connection set to the test's emulator."""
    from scripts.live_airflow import run_dag_test

    def run(
        dag_file: Path,
        dag_id: str,
        conf: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        return run_dag_test(
            sys.executable, dag_file, dag_id, {**connection_env, **(env or {})}, conf, home=airflow_home
        )

    return run
