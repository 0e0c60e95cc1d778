"""What a person would do to a running Airflow: trigger, clear, mark, pause.

Through the REST API on Airflow 3, through Airflow's own functions on 2.11, whose harness runs no webserver.
"""

from __future__ import annotations

import json
import subprocess
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from scripts.live_airflow.errors import LiveAirflowError, tail


@dataclass(frozen=True)
class TaskKey:
    """One task instance; `map_index` is -1 unless the task is mapped."""

    dag_id: str
    run_id: str
    task_id: str
    map_index: int = -1


class Control(ABC):
    @abstractmethod
    def trigger(self, dag_id: str, run_id: str, conf: Mapping[str, Any]) -> None:
        """Start a run of a DAG that is parsed."""

    @abstractmethod
    def pause(self, dag_id: str, *, paused: bool) -> None: ...

    @abstractmethod
    def clear(self, task: TaskKey) -> None: ...

    @abstractmethod
    def mark(self, task: TaskKey, state: str) -> None: ...


class RestControl(Control):
    """Airflow 3's REST API, as an administrator."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._token: str | None = None

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The decoded answer; `path` below /api/v2."""
        if self._token is None:
            with urllib.request.urlopen(f"{self._url}/auth/token", timeout=10) as answer:
                self._token = json.load(answer)["access_token"]
        request = urllib.request.Request(
            f"{self._url}/api/v2{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            detail = error.read().decode(errors="replace")
            raise LiveAirflowError(f"{error.code}: {method} {path}: {detail}") from None
        return json.loads(text) if text else None

    def trigger(self, dag_id: str, run_id: str, conf: Mapping[str, Any]) -> None:
        body = {"dag_run_id": run_id, "logical_date": None, "conf": dict(conf)}
        self.call("POST", f"/dags/{quote(dag_id)}/dagRuns", body)

    def pause(self, dag_id: str, *, paused: bool) -> None:
        self.call("PATCH", f"/dags/{quote(dag_id)}", {"is_paused": paused})

    def clear(self, task: TaskKey) -> None:
        body = {
            "dry_run": False,
            "dag_run_id": task.run_id,
            "task_ids": [task.task_id] if task.map_index < 0 else [[task.task_id, task.map_index]],
            "only_failed": False,
            "reset_dag_runs": True,
        }
        self.call("POST", f"/dags/{quote(task.dag_id)}/clearTaskInstances", body)

    def mark(self, task: TaskKey, state: str) -> None:
        path = f"/dags/{quote(task.dag_id)}/dagRuns/{quote(task.run_id)}/taskInstances/{quote(task.task_id)}"
        if task.map_index >= 0:
            path += f"/{task.map_index}"
        self.call("PATCH", path, {"new_state": state})


# Run by the interpreter with Airflow 2.11, which offers these nowhere but in its webserver.
_AIRFLOW_2_ACTION = """
import json, sys
from airflow.models import DagBag, DagModel
from airflow.utils.session import create_session
from airflow.utils.state import TaskInstanceState
request = json.loads(sys.argv[1])
dag = DagBag(read_dags_from_db=True).get_dag(request["dag_id"])
if dag is None:
    sys.exit("404: no DAG " + request["dag_id"])
if request["action"] == "trigger":
    from airflow.api.common.trigger_dag import trigger_dag
    trigger_dag(request["dag_id"], run_id=request["run_id"], conf=request["conf"])
elif request["action"] == "clear":
    from airflow.models.taskinstance import TaskInstance, clear_task_instances
    with create_session() as session:
        wanted = {key: request[key] for key in ("dag_id", "run_id", "task_id", "map_index")}
        clear_task_instances(session.query(TaskInstance).filter_by(**wanted).all(), session, dag=dag)
elif request["action"] == "mark":
    dag.set_task_instance_state(
        task_id=request["task_id"], map_indexes=[request["map_index"]], run_id=request["run_id"],
        state=TaskInstanceState(request["state"]), commit=True)
elif request["action"] == "pause":
    with create_session() as session:
        session.get(DagModel, request["dag_id"]).is_paused = request["paused"]
"""


class ScriptControl(Control):
    """Airflow 2.11's own functions, called in a process of the interpreter that has them."""

    def __init__(self, python: str, environment: Mapping[str, str], home: Path) -> None:
        self._python = python
        self._environment = environment
        self._home = home

    def _do(self, **request: Any) -> None:
        done = subprocess.run(
            [self._python, "-c", _AIRFLOW_2_ACTION, json.dumps(request)],
            env=dict(self._environment),
            cwd=self._home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise LiveAirflowError(tail(done.stderr, 30))

    def trigger(self, dag_id: str, run_id: str, conf: Mapping[str, Any]) -> None:
        self._do(action="trigger", dag_id=dag_id, run_id=run_id, conf=dict(conf))

    def pause(self, dag_id: str, *, paused: bool) -> None:
        self._do(action="pause", dag_id=dag_id, paused=paused)

    def clear(self, task: TaskKey) -> None:
        self._do(action="clear", **asdict(task))

    def mark(self, task: TaskKey, state: str) -> None:
        self._do(action="mark", **asdict(task), state=state)
