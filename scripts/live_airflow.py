"""A real Airflow, run from its parts on sqlite and free ports, for tests and for the demo.

    with LiveAirflow(home=tmp_path, dags=Path("example_dags")) as airflow:
        run_id = airflow.trigger("my_dag")
        assert airflow.wait_for_run("my_dag", run_id) == "success"

Airflow 3: api-server, scheduler (LocalExecutor), dag-processor, triggerer. Airflow 2.11: scheduler
(LocalExecutor, which sqlite bears here: few writers, and a log of its own for them) and triggerer. The
intervals at which Airflow looks at things are set low, so that a test waits for its own work and not for
Airflow's clocks.

States, XComs and trigger rows are read straight from the database, read-only: that is the same on every
version and does not depend on a server being up, which matters in tests that kill servers. Changes go where a
person's would go: through the REST API on Airflow 3, through Airflow's own functions on 2.11.

Needs psutil and cryptography, which every Airflow installs; `python` may have another one than the caller.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import quote

import psutil

T = TypeVar("T")

FINISHED_RUN = frozenset({"success", "failed"})
FINISHED_TASK = frozenset({"success", "failed", "skipped", "upstream_failed", "removed"})

_JOB_TYPES = {"scheduler": "SchedulerJob", "dag-processor": "DagProcessorJob"}

_MARK = "PROCESS_FAMILY"


class LiveAirflowError(Exception):
    """Airflow did not start, or did not do in time what was asked of it."""


@dataclass(frozen=True)
class TaskProcesses:
    """The processes of one running task.

    `task` runs the operator's code. `supervisor` watches it: on Airflow 3 the LocalExecutor's worker, on
    2.11 the process of `airflow tasks run`.
    """

    task: int
    supervisor: int


@dataclass(frozen=True)
class TaskState:
    """A row of the table `task_instance`."""

    task_id: str
    map_index: int
    state: str | None
    try_number: int


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def airflow_version(python: Path | str) -> str:
    """The version of Airflow that `python` imports, without the seconds that importing Airflow takes."""
    code = "from importlib.metadata import version; print(version('apache-airflow'))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LiveAirflowError(f"{python} has no Airflow: {done.stderr.strip()}")
    return done.stdout.strip()


def _clean_environment() -> dict[str, str]:
    """The caller's environment without what would point Airflow at another home or set it up differently."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("AIRFLOW")}
    # A proxy must not see requests between Airflow's own parts.
    for key in ("NO_PROXY", "no_proxy"):
        environment[key] = ",".join(filter(None, [environment.get(key), "localhost,127.0.0.1"]))
    return environment


def _base_settings(python: Path | str, home: Path, dags: Path, version: str) -> dict[str, str]:
    folder = str(Path(python).absolute().parent)
    settings = {
        # The executors of 2.11 look for `airflow` there.
        "PATH": os.pathsep.join([folder, os.environ.get("PATH", os.defpath)]),
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(dags),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
        "AIRFLOW__CORE__FERNET_KEY": base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
        # Two writers at once are normal here, and sqlite's own patience of five seconds too short.
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home}/airflow.db?timeout=60",
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


def _template_database(python: Path | str, version: str, cache: Path | None) -> Path:
    """A migrated, empty database, made once per environment: migrating takes much longer than copying."""
    if cache is None:
        prefix = Path(python).absolute().parent.parent
        cache = prefix if os.access(prefix, os.W_OK) else Path(tempfile.gettempdir())
    template = cache / f"airflow-{version}-template.db"
    if template.exists():
        return template
    with tempfile.TemporaryDirectory(prefix="airflow-migrate-") as folder:
        home = Path(folder)
        (home / "dags").mkdir()
        environment = _clean_environment() | _base_settings(python, home, home / "dags", version)
        done = subprocess.run(
            [str(python), "-m", "airflow", "db", "migrate"],
            env=environment,
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            raise LiveAirflowError(f"airflow db migrate failed:\n{_tail(done.stdout)}")
        with contextlib.closing(sqlite3.connect(home / "airflow.db")) as database:
            # Lets the many readers go on while one process writes; the setting stays in the file.
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        # Renamed into place: another test process may be doing the same at this moment.
        partial = cache / f".{template.name}.{os.getpid()}"
        shutil.copyfile(home / "airflow.db", partial)
        partial.replace(template)
    return template


def _tail(text: str, lines: int = 40) -> str:
    return "\n".join(text.splitlines()[-lines:])


def _decode(value: Any) -> Any:
    """An XCom value as the task returned it: Airflow 3 stores the JSON text again as JSON."""
    for _ in range(2):
        if isinstance(value, bytes):
            value = value.decode()
        if not isinstance(value, str):
            return value
        try:
            value = json.loads(value)
        except ValueError:
            return value
    return value


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


class ProcessFamily:
    """Processes that do not outlive their maker: a context manager that kills them all when it is left.

    Every process started with `environment` belongs to it, and all that these start, whatever their parent or
    process group: on Airflow 3 each task leads a group of its own, and the children of a killed process have
    no parent to be found by. A watchdog process does the killing when the maker itself is killed outright.
    """

    def __init__(self) -> None:
        self._mark = secrets.token_hex(8)
        self._watchdog: subprocess.Popen[bytes] | None = None
        # Without the second, a long process title overwrites the environment block in which the mark is looked for.
        self.environment = {_MARK: self._mark, "SPT_NOENV": "1"}

    def __enter__(self) -> ProcessFamily:
        self.watch()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def watch(self) -> None:
        if self._watchdog is None:
            self._watchdog = subprocess.Popen(
                [sys.executable, str(Path(__file__).absolute()), "--watchdog", self._mark],
                stdin=subprocess.PIPE,
                start_new_session=True,
            )

    def pids(self) -> list[int]:
        return [process.pid for process in _marked(self._mark)]

    def kill(self) -> None:
        try:
            _kill_marked(self._mark)
        finally:
            if self._watchdog is not None:
                watchdog, self._watchdog = self._watchdog, None
                watchdog.communicate()


class _Component:
    """One Airflow process with its log file."""

    def __init__(self, name: str, command: list[str], environment: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.command = command
        self.environment = dict(environment)
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None
        self.jobs_before = 0
        self.killed = False

    def start(self) -> None:
        if self.running:
            raise LiveAirflowError(f"{self.name} is already running")
        self.killed = False
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                env=self.environment,
                cwd=self.environment["AIRFLOW_HOME"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A Ctrl-C at the terminal is for the caller, who then stops the parts.
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def died(self) -> bool:
        """Whether it ended by itself."""
        return self.process is not None and not self.running and not self.killed

    def tail(self, lines: int = 40) -> str:
        return _tail(self.log.read_text(errors="replace"), lines) if self.log.exists() else ""


class LiveAirflow:
    """A running Airflow; a context manager, or `start_all()` and `stop()`.

    :param home: AIRFLOW_HOME, made when missing; must not hold an older database
    :param dags: the DAG folder
    :param python: interpreter with Airflow and the provider
    :param env: added to every component's environment (`AIRFLOW_CONN_...`, `AIRFLOW__SECTION__KEY`); wins
        over this class's own settings
    :param task_heartbeat_timeout: seconds after which the scheduler gives up a task whose supervisor is gone
    :param triggerer_timeout: seconds after which another triggerer takes over the triggers of a dead one;
        lower, and on a busy machine it takes them from a live one
    :param start_timeout: seconds for all components to become healthy
    :param cache: folder for the migrated template database (default: the interpreter's environment)
    """

    def __init__(
        self,
        home: Path,
        dags: Path,
        python: Path | str = sys.executable,
        env: Mapping[str, str] | None = None,
        *,
        parallelism: int = 4,
        task_heartbeat_timeout: int = 15,
        triggerer_timeout: int = 15,
        start_timeout: float = 180,
        cache: Path | None = None,
    ) -> None:
        self.home = Path(home).absolute()
        self.dags = Path(dags).absolute()
        self.python = str(python)
        self.version = airflow_version(python)
        self.start_timeout = start_timeout
        self._cache = cache
        self._family = ProcessFamily()
        self._token: str | None = None
        self.port = _free_port()
        self.environment = _clean_environment() | _base_settings(python, self.home, self.dags, self.version)
        self.environment |= self._family.environment
        self.environment |= {
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
        if self.is_airflow_2:
            self.environment |= {
                "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
                # Airflow 2 otherwise refuses to run tasks side by side on sqlite.
                "_AIRFLOW__SKIP_DATABASE_EXECUTOR_COMPATIBILITY_CHECK": "1",
                "AIRFLOW__SCHEDULER__DAG_DIR_LIST_INTERVAL": "2",
                "AIRFLOW__SCHEDULER__MIN_FILE_PROCESS_INTERVAL": "5",
                "AIRFLOW__CORE__MIN_SERIALIZED_DAG_FETCH_INTERVAL": "1",
                "AIRFLOW__SCHEDULER__LOCAL_TASK_JOB_HEARTBEAT_SEC": "2",
                "AIRFLOW__SCHEDULER__SCHEDULER_ZOMBIE_TASK_THRESHOLD": str(task_heartbeat_timeout),
                "AIRFLOW__SCHEDULER__ZOMBIE_DETECTION_INTERVAL": "2",
                "AIRFLOW__WEBSERVER__SECRET_KEY": secrets.token_hex(16),
            }
        else:
            self.environment |= {
                "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
                "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
                "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"http://localhost:{self.port}/execution/",
                "AIRFLOW__API__HOST": "127.0.0.1",
                "AIRFLOW__API__PORT": str(self.port),
                "AIRFLOW__API__BASE_URL": f"http://localhost:{self.port}",
                "AIRFLOW__API__WORKERS": "1",
                "AIRFLOW__API__SECRET_KEY": secrets.token_hex(16),
                # All parts must share it; left alone, each makes its own.
                "AIRFLOW__API_AUTH__JWT_SECRET": secrets.token_hex(32),
                "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "2",
                "AIRFLOW__DAG_PROCESSOR__BUNDLE_REFRESH_CHECK_INTERVAL": "1",
                "AIRFLOW__DAG_PROCESSOR__DISABLE_BUNDLE_VERSIONING": "True",
                "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": str(task_heartbeat_timeout),
                "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "2",
                # How soon a task learns that a person marked it failed or cleared it.
                "AIRFLOW__WORKERS__MIN_HEARTBEAT_INTERVAL": "2",
            }
        self.environment |= dict(env or {})
        self.components: dict[str, _Component] = {}
        self._add("scheduler", "scheduler", "--skip-serve-logs")
        self._add("triggerer", "triggerer", "--skip-serve-logs")
        if not self.is_airflow_2:
            self._add("api-server", "api-server")
            self._add("dag-processor", "dag-processor")

    @property
    def is_airflow_2(self) -> bool:
        return self.version.startswith("2.")

    @property
    def url(self) -> str:
        """Base URL of the web interface (Airflow 3)."""
        return f"http://localhost:{self.port}"

    @property
    def database(self) -> Path:
        return self.home / "airflow.db"

    def _add(self, name: str, *arguments: str) -> _Component:
        log = self.home / f"{name}.log"
        component = _Component(name, [self.python, "-m", "airflow", *arguments], self.environment, log)
        self.components[name] = component
        return component

    # Start and stop

    def __enter__(self) -> LiveAirflow:
        self.start_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start_all(self) -> None:
        """Start every component and wait until each is healthy."""
        self.home.mkdir(parents=True, exist_ok=True)
        if self.database.exists():
            raise LiveAirflowError(
                f"{self.home} already holds a database: a live Airflow needs a home of its own"
            )
        shutil.copyfile(_template_database(self.python, self.version, self._cache), self.database)
        self._family.watch()
        try:
            for component in self.components.values():
                component.start()
            self._wait_healthy(list(self.components.values()))
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Kill every process of this Airflow, tasks and triggers included; does nothing the second time."""
        try:
            self._family.kill()
        finally:
            for component in self.components.values():
                if component.process is not None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        component.process.wait(timeout=10)

    def processes(self) -> list[int]:
        """The ids of all live processes of this Airflow."""
        return self._family.pids()

    def start(self, component: str) -> None:
        """Start a component that was killed, and wait until it is healthy."""
        part = self.components[component]
        part.jobs_before = self.query("select coalesce(max(id), 0) from job")[0][0]
        part.start()
        self._wait_healthy([part])

    def start_extra_triggerer(self) -> str:
        """Start one more triggerer; returns its component name."""
        number = sum(name.startswith("triggerer") for name in self.components) + 1
        part = self._add(f"triggerer-{number}", "triggerer", "--skip-serve-logs")
        self.start(part.name)
        return part.name

    def kill(self, component: str, sig: int = signal.SIGKILL, *, tree: bool | None = None) -> None:
        """Send a signal to a component and wait until it has ended.

        SIGKILL goes to its whole tree, as when its container dies (the scheduler's includes running tasks),
        any other signal to its main process, for an orderly stop. `tree` overrides that.
        """
        part = self.components[component]
        if part.process is None or not part.running:
            raise LiveAirflowError(f"{component} is not running")
        part.killed = True
        main = psutil.Process(part.process.pid)
        family = [main]
        if tree if tree is not None else sig == signal.SIGKILL:
            # Children too: on Airflow 3 each task leads a process group of its own.
            family += main.children(recursive=True)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(sig)
        try:
            part.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            raise LiveAirflowError(
                f"{component} did not end within 60 s of signal {sig}:\n{part.tail()}"
            ) from None

    def _wait_healthy(self, parts: list[_Component]) -> None:
        deadline = time.monotonic() + self.start_timeout
        waiting = list(parts)
        while waiting:
            for part in waiting:
                if not part.running:
                    raise LiveAirflowError(
                        f"{part.name} ended at its start; the end of its log:\n{part.tail()}"
                    )
            waiting = [part for part in waiting if not self._healthy(part)]
            if waiting and time.monotonic() > deadline:
                logs = "\n".join(f"--- {part.name}:\n{part.tail()}" for part in waiting)
                names = ", ".join(part.name for part in waiting)
                raise LiveAirflowError(f"not healthy after {self.start_timeout:.0f} s: {names}\n{logs}")
            time.sleep(0.2)

    def _healthy(self, part: _Component) -> bool:
        if part.name == "api-server":
            try:
                self.api("GET", "/version")
            except (LiveAirflowError, OSError):
                return False
            return True
        job = _JOB_TYPES.get(part.name, "TriggererJob")
        # Only a row made since: a killed component's row goes on saying `running`.
        return bool(
            self.query(
                "select 1 from job where job_type = ? and state = 'running' and id > ?",
                (job, part.jobs_before),
            )
        )

    # Ask Airflow to do something

    def api(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """A call of Airflow 3's REST API (`path` below /api/v2) as an administrator; the decoded answer."""
        if self.is_airflow_2:
            raise LiveAirflowError("the Airflow 2 harness runs no webserver")
        if self._token is None:
            with urllib.request.urlopen(f"{self.url}/auth/token", timeout=10) as answer:
                self._token = json.load(answer)["access_token"]
        request = urllib.request.Request(
            f"{self.url}/api/v2{path}",
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

    def run_cli(self, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run `airflow ...` against this Airflow."""
        return subprocess.run(
            [self.python, "-m", "airflow", *arguments],
            env=self.environment,
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def _airflow_2(self, **request: Any) -> None:
        done = subprocess.run(
            [self.python, "-c", _AIRFLOW_2_ACTION, json.dumps(request)],
            env=self.environment,
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise LiveAirflowError(_tail(done.stderr, 30))

    def trigger(
        self,
        dag_id: str,
        run_id: str | None = None,
        conf: Mapping[str, Any] | None = None,
        *,
        timeout: float = 60,
    ) -> str:
        """Start a run, after waiting up to `timeout` seconds for the DAG to be parsed; returns the run id."""
        run_id = run_id or f"run-{secrets.token_hex(4)}"
        patience = time.monotonic() + min(timeout, 15)

        def parsed() -> bool | None:
            if self.query("select 1 from serialized_dag where dag_id = ?", (dag_id,)):
                return True
            # Every file has been looked at by then: one with an error is not going to bring the DAG.
            if time.monotonic() > patience and self.query("select 1 from import_error"):
                raise LiveAirflowError(f"no DAG {dag_id} in {self.dags}: {self._import_errors()}")
            return None

        self._until(parsed, timeout, lambda: f"no DAG {dag_id} in {self.dags}: {self._import_errors()}")
        if self.is_airflow_2:
            self._airflow_2(action="trigger", dag_id=dag_id, run_id=run_id, conf=dict(conf or {}))
        else:
            body = {"dag_run_id": run_id, "logical_date": None, "conf": dict(conf or {})}
            self.api("POST", f"/dags/{quote(dag_id)}/dagRuns", body)
        return run_id

    def _import_errors(self) -> str:
        rows = self.query("select filename, stacktrace from import_error")
        return "; ".join(f"{name}: {_tail(trace or '', 15)}" for name, trace in rows) or "no import errors"

    def unpause(self, dag_id: str, *, paused: bool = False) -> None:
        """Unpause (or pause) a DAG; DAGs start unpaused here."""
        if self.is_airflow_2:
            self._airflow_2(action="pause", dag_id=dag_id, paused=paused)
        else:
            self.api("PATCH", f"/dags/{quote(dag_id)}", {"is_paused": paused})

    def clear(self, dag_id: str, run_id: str, task_id: str, map_index: int = -1) -> None:
        """Clear one task, as a person does in the web interface; the run goes on."""
        if self.is_airflow_2:
            self._airflow_2(
                action="clear", dag_id=dag_id, run_id=run_id, task_id=task_id, map_index=map_index
            )
            return
        body = {
            "dry_run": False,
            "dag_run_id": run_id,
            "task_ids": [task_id] if map_index < 0 else [[task_id, map_index]],
            "only_failed": False,
            "reset_dag_runs": True,
        }
        self.api("POST", f"/dags/{quote(dag_id)}/clearTaskInstances", body)

    def mark_failed(self, dag_id: str, run_id: str, task_id: str, map_index: int = -1) -> None:
        """Mark one task failed, as a person does in the web interface."""
        self._mark_state(dag_id, run_id, task_id, map_index, "failed")

    def mark_success(self, dag_id: str, run_id: str, task_id: str, map_index: int = -1) -> None:
        """Mark one task successful, as a person does in the web interface."""
        self._mark_state(dag_id, run_id, task_id, map_index, "success")

    def _mark_state(self, dag_id: str, run_id: str, task_id: str, map_index: int, state: str) -> None:
        if self.is_airflow_2:
            self._airflow_2(
                action="mark", dag_id=dag_id, run_id=run_id, task_id=task_id, map_index=map_index, state=state
            )
            return
        path = f"/dags/{quote(dag_id)}/dagRuns/{quote(run_id)}/taskInstances/{quote(task_id)}"
        if map_index >= 0:
            path += f"/{map_index}"
        self.api("PATCH", path, {"new_state": state})

    # Look

    def query(self, sql: str, parameters: Collection[Any] = ()) -> list[tuple[Any, ...]]:
        """Rows of Airflow's database, read-only."""
        # A reader of a WAL database has to wait only while it is being recovered after a kill.
        with contextlib.closing(
            sqlite3.connect(f"file:{quote(str(self.database))}?mode=ro", uri=True, timeout=10)
        ) as database:
            return database.execute(sql, tuple(parameters)).fetchall()

    def run_state(self, dag_id: str, run_id: str) -> str | None:
        rows = self.query("select state from dag_run where dag_id = ? and run_id = ?", (dag_id, run_id))
        return rows[0][0] if rows else None

    def tasks(self, dag_id: str, run_id: str) -> list[TaskState]:
        """Every task instance of a run, in the order of task id and map index."""
        rows = self.query(
            "select task_id, map_index, state, try_number from task_instance"
            " where dag_id = ? and run_id = ? order by task_id, map_index",
            (dag_id, run_id),
        )
        return [TaskState(*row) for row in rows]

    def task_states(self, dag_id: str, run_id: str) -> dict[str, str | None]:
        """State by task id; a mapped task's instances are `task_id[0]`, `task_id[1]`, ..."""
        return {_name(task): task.state for task in self.tasks(dag_id, run_id)}

    def try_numbers(self, dag_id: str, run_id: str) -> dict[str, int]:
        """Number of the current or last try by task id, named as in `task_states`."""
        return {_name(task): task.try_number for task in self.tasks(dag_id, run_id)}

    def task_state(self, dag_id: str, run_id: str, task_id: str, map_index: int = -1) -> str | None:
        for task in self.tasks(dag_id, run_id):
            if (task.task_id, task.map_index) == (task_id, map_index):
                return task.state
        return None

    def wait_for_run(
        self, dag_id: str, run_id: str, timeout: float = 120, states: Collection[str] = FINISHED_RUN
    ) -> str:
        """Wait until the run is in one of `states` (default: success, failed); returns the state."""

        def state() -> str | None:
            now = self.run_state(dag_id, run_id)
            return now if now in states else None

        return self._until(state, timeout, lambda: self._where(dag_id, run_id))

    def wait_for_task(
        self,
        dag_id: str,
        run_id: str,
        task_id: str,
        states: str | Collection[str] = FINISHED_TASK,
        timeout: float = 60,
        map_index: int = -1,
        try_number: int | None = None,
    ) -> str:
        """Wait until the task is in one of `states` (and, when given, at least at `try_number`)."""
        wanted = {states} if isinstance(states, str) else set(states)

        def state() -> str | None:
            for task in self.tasks(dag_id, run_id):
                if (task.task_id, task.map_index) != (task_id, map_index):
                    continue
                if task.state in wanted and task.try_number >= (try_number or 0):
                    return task.state
            return None

        return self._until(
            state, timeout, lambda: f"{task_id} not in {sorted(wanted)}: {self._where(dag_id, run_id)}"
        )

    def _until(self, look: Callable[[], T | None], timeout: float, describe: Callable[[], str]) -> T:
        deadline = time.monotonic() + timeout
        while True:
            found = look()
            if found is not None:
                return found
            if died := [part for part in self.components.values() if part.died]:
                logs = "\n".join(f"{part.name} died; the end of its log:\n{part.tail()}" for part in died)
                raise LiveAirflowError(f"{describe()}\n{logs}")
            if time.monotonic() > deadline:
                raise LiveAirflowError(f"after {timeout:.0f} s: {describe()}")
            time.sleep(0.1)

    def _where(self, dag_id: str, run_id: str) -> str:
        tasks = self.tasks(dag_id, run_id)
        states = ", ".join(f"{_name(task)}={task.state} (try {task.try_number})" for task in tasks)
        return f"{dag_id} {run_id} is {self.run_state(dag_id, run_id)}: {states}"

    def xcom(
        self, dag_id: str, run_id: str, task_id: str, key: str = "return_value", map_index: int = -1
    ) -> Any:
        """An XCom as the task pushed it; None when there is none."""
        rows = self.query(
            "select value from xcom"
            " where dag_id = ? and run_id = ? and task_id = ? and key = ? and map_index = ?",
            (dag_id, run_id, task_id, key, map_index),
        )
        return _decode(rows[0][0]) if rows else None

    def task_log_files(
        self, dag_id: str, run_id: str, task_id: str, map_index: int = -1, try_number: int | None = None
    ) -> list[Path]:
        folder = self.home / "logs" / f"dag_id={dag_id}" / f"run_id={run_id}" / f"task_id={task_id}"
        if map_index >= 0:
            folder /= f"map_index={map_index}"
        attempt = "*" if try_number is None else f"{try_number}.log*"
        return sorted(folder.glob(f"attempt={attempt}"))

    def task_log(
        self, dag_id: str, run_id: str, task_id: str, map_index: int = -1, try_number: int | None = None
    ) -> str:
        """The text of a task's log files, the triggerer's part included; all tries unless one is named."""
        files = self.task_log_files(dag_id, run_id, task_id, map_index, try_number)
        return "\n".join(path.read_text(errors="replace") for path in files)

    def task_pids(
        self, dag_id: str, run_id: str, task_id: str, map_index: int = -1, *, timeout: float = 30
    ) -> TaskProcesses:
        """The processes of a running task, waiting up to `timeout` seconds for it to run."""

        def find() -> TaskProcesses | None:
            rows = self.query(
                "select pid from task_instance where dag_id = ? and run_id = ? and task_id = ?"
                " and map_index = ? and state = 'running'",
                (dag_id, run_id, task_id, map_index),
            )
            if not rows or not rows[0][0]:
                return None
            try:
                process = psutil.Process(rows[0][0])
                if self.is_airflow_2 and not process.cmdline()[0].startswith("airflow task runner"):
                    # The row first names the process that starts the task, then the task's own.
                    return None
                return TaskProcesses(task=process.pid, supervisor=process.ppid())
            except psutil.NoSuchProcess:
                return None

        return self._until(find, timeout, lambda: f"{task_id} does not run: {self._where(dag_id, run_id)}")

    def kill_task(
        self,
        dag_id: str,
        run_id: str,
        task_id: str,
        map_index: int = -1,
        *,
        supervisor: bool = False,
        timeout: float = 30,
    ) -> TaskProcesses:
        """SIGKILL a running task's process; with `supervisor`, that one first, as when the machine dies.

        On Airflow 3.0 always both: there, a supervisor that outlives its task fails it without its retries
        (apache/airflow#55753).
        """
        pids = self.task_pids(dag_id, run_id, task_id, map_index, timeout=timeout)
        supervisor = supervisor or self.version.startswith("3.0.")
        for pid in [pids.supervisor, pids.task] if supervisor else [pids.task]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return pids

    def trigger_rows(self) -> list[dict[str, Any]]:
        """Rows of the table `trigger`, with `kwargs` decrypted to text."""
        columns = ["id", "classpath", "created_date", "triggerer_id", "kwargs"]
        rows = self.query(f"select {', '.join(columns)} from trigger")
        return [
            dict(zip(columns, row, strict=True)) | {"kwargs": self._decrypt(row[-1] or "")} for row in rows
        ]

    def _decrypt(self, text: str) -> str:
        from cryptography.fernet import Fernet, InvalidToken

        try:
            return Fernet(self.environment["AIRFLOW__CORE__FERNET_KEY"]).decrypt(text.encode()).decode()
        except InvalidToken:
            return text

    def all_text(self) -> Iterator[tuple[str, str]]:
        """All that this Airflow has written down, as (where, text): every log line, every row of every table.

        Trigger rows come twice, as stored and decrypted. For a search for secrets.
        """
        for path in sorted(self.home.rglob("*")):
            if path.is_file() and path.suffix not in {".db", ".db-wal", ".db-shm", ".pid"}:
                with path.open(errors="replace") as file:
                    for number, line in enumerate(file, 1):
                        yield f"{path.relative_to(self.home)}:{number}", line
        for (table,) in self.query("select name from sqlite_master where type = 'table'"):
            for row in self.query(f'select * from "{table}"'):
                yield f"table {table}", "\t".join(_text(value) for value in row)
        for trigger in self.trigger_rows():
            yield f"trigger {trigger['id']} (decrypted)", trigger["kwargs"]

    def logs(self) -> dict[str, str]:
        """Each component's own log."""
        return {name: part.log.read_text(errors="replace") for name, part in self.components.items()}


def readable_log(text: str) -> str:
    """Airflow 3's JSON log lines as a person reads them; other lines as they are."""
    lines = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
            event = f"{record['timestamp'][11:19]} {record.get('level', 'info').upper()} {record['event']}"
        except (ValueError, KeyError, TypeError):
            lines.append(line)
            continue
        if event.partition(" ")[2].startswith(("INFO ::group::", "INFO ::endgroup::")):
            continue
        lines.append(event)
        for error in record.get("error_detail") or []:
            lines.append(f"  {error.get('exc_type')}: {error.get('exc_value')}")
            frames = (error.get("frames") or [])[-3:]
            lines += [
                f"    {frame.get('filename')}:{frame.get('lineno')} {frame.get('name')}" for frame in frames
            ]
    return "\n".join(lines)


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _name(task: TaskState) -> str:
    return task.task_id if task.map_index < 0 else f"{task.task_id}[{task.map_index}]"


def _marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(_MARK) == mark:
                found.append(process)
    return found


def _kill_marked(mark: str, timeout: float = 20) -> None:
    """SIGKILL until none is left: a process may have forked between being listed and being killed."""
    deadline = time.monotonic() + timeout
    while processes := [p for p in _marked(mark) if p.status() != psutil.STATUS_ZOMBIE]:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=0.2)
        if time.monotonic() > deadline:
            raise LiveAirflowError(f"processes survive SIGKILL: {[process.pid for process in processes]}")


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
    """`airflow dags test` in a home of its own (removed afterwards unless given), on a migrated database.

    Connections must come through `env`: a trigger does not find those in the database there.
    """
    version = airflow_version(python)
    with contextlib.ExitStack() as stack:
        if home is None:
            home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="airflow-dags-test-")))
        home = home.absolute()
        home.mkdir(parents=True, exist_ok=True)
        dag_file = dag_file.absolute()
        if not (home / "airflow.db").exists():
            shutil.copyfile(_template_database(python, version, None), home / "airflow.db")
        command = [str(python), "-m", "airflow", "dags", "test"]
        command += ["--subdir" if version.startswith("2.") else "--dagfile-path", str(dag_file)]
        if conf is not None:
            command += ["--conf", json.dumps(conf)]
        settings = _base_settings(python, home, dag_file.parent, version)
        return subprocess.run(
            [*command, dag_id],
            env=_clean_environment() | settings | dict(env or {}),
            cwd=home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )


def _watch(mark: str) -> None:
    # End of input: the process that started us has ended, one way or another.
    sys.stdin.buffer.read()
    _kill_marked(mark)


if __name__ == "__main__":
    if sys.argv[1:2] != ["--watchdog"]:
        sys.exit(__doc__)
    _watch(sys.argv[2])
