"""The environment variables that Airflow's components run with."""

from __future__ import annotations

import base64
import os
import secrets
import subprocess
from pathlib import Path

from scripts.live_airflow.errors import LiveAirflowError


def airflow_version(python: Path | str) -> str:
    """The version of Airflow that `python` imports, without the seconds that importing Airflow takes."""
    code = "from importlib.metadata import version; print(version('apache-airflow'))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LiveAirflowError(f"{python} has no Airflow: {done.stderr.strip()}")
    return done.stdout.strip()


def clean_environment() -> dict[str, str]:
    """The caller's environment without what would point Airflow at another home or set it up differently."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("AIRFLOW")}
    # A proxy must not see requests between Airflow's own components.
    for key in ("NO_PROXY", "no_proxy"):
        environment[key] = ",".join(filter(None, [environment.get(key), "localhost,127.0.0.1"]))
    return environment


def base_settings(python: Path | str, home: Path, dags: Path, version: str) -> dict[str, str]:
    """What every call of Airflow needs, but for its database, which brings settings of its own."""
    folder = str(Path(python).absolute().parent)
    settings = {
        # The executors of 2.11 look for `airflow` there.
        "PATH": os.pathsep.join([folder, os.environ.get("PATH", os.defpath)]),
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(dags),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
        "AIRFLOW__CORE__FERNET_KEY": base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
        "AIRFLOW__DATABASE__LOAD_DEFAULT_CONNECTIONS": "False",
        "AIRFLOW__LOGGING__BASE_LOG_FOLDER": str(home / "logs"),
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
        "PYTHONUNBUFFERED": "1",
    }
    if version.startswith("2."):
        settings["AIRFLOW__CORE__EXECUTOR"] = "SequentialExecutor"
        # Silences two warnings that Airflow 2.11 prints on each import of itself.
        settings["AIRFLOW__METRICS__TIMER_UNIT_CONSISTENCY"] = "True"
    return settings


def live_settings(
    version: str,
    port: int,
    execution_port: int,
    *,
    parallelism: int,
    task_heartbeat_timeout: int,
    triggerer_timeout: int,
) -> dict[str, str]:
    """What the components of a live Airflow need beyond `base_settings`: quick clocks, and one another.

    :param port: of the web interface and its API
    :param execution_port: of the API for tasks
    """
    settings = {
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
        "AIRFLOW__CORE__PARALLELISM": str(parallelism),
        "AIRFLOW__CORE__MIN_SERIALIZED_DAG_UPDATE_INTERVAL": "1",
        "AIRFLOW__CORE__KILLED_TASK_CLEANUP_TIME": "10",
        "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.3",
        "AIRFLOW__SCHEDULER__SCHEDULER_HEARTBEAT_SEC": "1",
        "AIRFLOW__SCHEDULER__JOB_HEARTBEAT_SEC": "2",
        "AIRFLOW__SCHEDULER__TRIGGER_TIMEOUT_CHECK_INTERVAL": "2",
        "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "10",
        "AIRFLOW__TRIGGERER__JOB_HEARTBEAT_SEC": "1",
        "AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": str(triggerer_timeout),
    }
    if version.startswith("2."):
        return settings | {
            "AIRFLOW__SCHEDULER__DAG_DIR_LIST_INTERVAL": "2",
            "AIRFLOW__SCHEDULER__MIN_FILE_PROCESS_INTERVAL": "5",
            "AIRFLOW__CORE__MIN_SERIALIZED_DAG_FETCH_INTERVAL": "1",
            "AIRFLOW__SCHEDULER__LOCAL_TASK_JOB_HEARTBEAT_SEC": "2",
            "AIRFLOW__SCHEDULER__SCHEDULER_ZOMBIE_TASK_THRESHOLD": str(task_heartbeat_timeout),
            "AIRFLOW__SCHEDULER__ZOMBIE_DETECTION_INTERVAL": "2",
            "AIRFLOW__WEBSERVER__SECRET_KEY": secrets.token_hex(16),
        }
    return settings | {
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"http://localhost:{execution_port}/execution/",
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW__API__BASE_URL": f"http://localhost:{port}",
        "AIRFLOW__API__WORKERS": "1",
        "AIRFLOW__API__SECRET_KEY": secrets.token_hex(16),
        # All components must share it; left alone, each makes its own.
        "AIRFLOW__API_AUTH__JWT_SECRET": secrets.token_hex(32),
        "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "2",
        "AIRFLOW__DAG_PROCESSOR__BUNDLE_REFRESH_CHECK_INTERVAL": "1",
        "AIRFLOW__DAG_PROCESSOR__DISABLE_BUNDLE_VERSIONING": "True",
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": str(task_heartbeat_timeout),
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "2",
        # How soon a task learns that a person marked it failed or cleared it.
        "AIRFLOW__WORKERS__MIN_HEARTBEAT_INTERVAL": "2",
    }
