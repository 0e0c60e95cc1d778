"""`airflow dags test` in a home of its own."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.live_airflow.database import Sqlite
from scripts.live_airflow.settings import airflow_version, base_settings, clean_environment


def run_dag_test(
    python: Path | str,
    dag_file: Path,
    dag_id: str,
    env: Mapping[str, str] | None = None,
    conf: Mapping[str, Any] | None = None,
    *,
    home: Path | None = None,
    timeout: float = 180,
) -> subprocess.CompletedProcess[str]:
    """`airflow dags test` in a home of its own (removed afterwards unless given), on a migrated sqlite.

    Connections must come through `env`: a trigger does not find those in the database there.
    """
    version = airflow_version(python)
    with contextlib.ExitStack() as stack:
        if home is None:
            home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="airflow-dags-test-")))
        home = home.absolute()
        home.mkdir(parents=True, exist_ok=True)
        dag_file = dag_file.absolute()
        database = Sqlite(home / "airflow.db")
        if not database.path.exists():
            database.create(python, version)
        command = [str(python), "-m", "airflow", "dags", "test"]
        command += ["--subdir" if version.startswith("2.") else "--dagfile-path", str(dag_file)]
        if conf is not None:
            command += ["--conf", json.dumps(conf)]
        settings = base_settings(python, home, dag_file.parent, version) | database.settings()
        return subprocess.run(
            [*command, dag_id],
            env=clean_environment() | settings | dict(env or {}),
            cwd=home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
