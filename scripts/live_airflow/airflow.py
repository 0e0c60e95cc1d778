"""A running Airflow: `LiveAirflow`."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import psutil

from scripts.live_airflow.control import Control, RestControl, ScriptControl, TaskKey
from scripts.live_airflow.database import Database, Sqlite
from scripts.live_airflow.errors import LiveAirflowError, tail
from scripts.live_airflow.processes import Component, ProcessFamily, TaskProcesses, free_port
from scripts.live_airflow.records import FINISHED_RUN, FINISHED_TASK, AirflowRecords
from scripts.live_airflow.settings import airflow_version, base_settings, clean_environment, live_settings

T = TypeVar("T")

_JOB_TYPES = {"scheduler": "SchedulerJob", "dag-processor": "DagProcessorJob"}


class LiveAirflow(AirflowRecords):
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
    :param database: sqlite below `home`, unless another one is passed
    :param cache: folder for sqlite's migrated template (default: the interpreter's environment)
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
        database: Database | None = None,
        cache: Path | None = None,
    ) -> None:
        home = Path(home).absolute()
        self.dags = Path(dags).absolute()
        self.python = str(python)
        self.version = airflow_version(python)
        self.start_timeout = start_timeout
        self.port, self._execution_port = free_port(), free_port()
        self._family = ProcessFamily()
        database = database or Sqlite(home / "airflow.db", cache)
        environment = clean_environment() | base_settings(python, home, self.dags, self.version)
        environment |= live_settings(
            self.version,
            self.port,
            self._execution_port,
            parallelism=parallelism,
            task_heartbeat_timeout=task_heartbeat_timeout,
            triggerer_timeout=triggerer_timeout,
        )
        environment |= self._family.environment | database.settings() | dict(env or {})
        super().__init__(home, database, environment)
        self._rest = None if self.is_airflow_2 else RestControl(self.url)
        self._control: Control = self._rest or ScriptControl(self.python, self.environment, home)
        self.components: dict[str, Component] = {}
        self._add("scheduler", "scheduler", "--skip-serve-logs")
        self._add("triggerer", "triggerer", "--skip-serve-logs")
        if not self.is_airflow_2:
            # Two servers, because in one they block each other on sqlite for as long as it is patient. Airflow writes
            # its audit log on the server's event loop; a task's request which holds the database's lock at that moment
            # cannot commit without that loop. Here, whoever holds the lock is in another process and goes on.
            self._add("api-server", "api-server", "--apps", "core")
            port = str(self._execution_port)
            self._add("execution-api", "api-server", "--apps", "execution", "--port", port)
            self._add("dag-processor", "dag-processor")

    @property
    def is_airflow_2(self) -> bool:
        return self.version.startswith("2.")

    @property
    def url(self) -> str:
        """Base URL of the web interface (Airflow 3)."""
        return f"http://localhost:{self.port}"

    def _add(self, name: str, *arguments: str) -> Component:
        log = self.home / f"{name}.log"
        component = Component(name, [self.python, "-m", "airflow", *arguments], self.environment, log)
        self.components[name] = component
        return component

    # Start and stop

    def __enter__(self) -> Self:
        self.start_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start_all(self) -> None:
        """Start every component and wait until each is healthy."""
        self.home.mkdir(parents=True, exist_ok=True)
        self.database.create(self.python, self.version)
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

    def _wait_healthy(self, parts: list[Component]) -> None:
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

    def _healthy(self, part: Component) -> bool:
        if part.name == "api-server":
            try:
                self.api("GET", "/version")
            except (LiveAirflowError, OSError):
                return False
            return True
        if part.name == "execution-api":
            url = f"http://localhost:{self._execution_port}/execution/health"
            try:
                with urllib.request.urlopen(url, timeout=10):
                    return True
            except OSError:
                return False
        # `triggerer-2` is a triggerer.
        job = _JOB_TYPES.get(part.name.rstrip("-0123456789"), "TriggererJob")
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
        if self._rest is None:
            raise LiveAirflowError("the Airflow 2 harness runs no webserver")
        return self._rest.call(method, path, body)

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
        self._control.trigger(dag_id, run_id, conf or {})
        return run_id

    def _import_errors(self) -> str:
        rows = self.query("select filename, stacktrace from import_error")
        return "; ".join(f"{name}: {tail(trace or '', 15)}" for name, trace in rows) or "no import errors"

    def unpause(self, dag_id: str, *, paused: bool = False) -> None:
        """Unpause (or pause) a DAG; DAGs start unpaused here."""
        self._control.pause(dag_id, paused=paused)

    def clear(self, dag_id: str, run_id: str, task_id: str, map_index: int = -1) -> None:
        """Clear one task, as a person does in the web interface; the run goes on."""
        self._control.clear(TaskKey(dag_id, run_id, task_id, map_index))

    def mark_failed(self, dag_id: str, run_id: str, task_id: str, map_index: int = -1) -> None:
        """Mark one task failed, as a person does in the web interface."""
        self._control.mark(TaskKey(dag_id, run_id, task_id, map_index), "failed")

    def mark_success(self, dag_id: str, run_id: str, task_id: str, map_index: int = -1) -> None:
        """Mark one task successful, as a person does in the web interface."""
        self._control.mark(TaskKey(dag_id, run_id, task_id, map_index), "success")

    # Wait

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
        states = ", ".join(f"{task.name}={task.state} (try {task.try_number})" for task in tasks)
        return f"{dag_id} {run_id} is {self.run_state(dag_id, run_id)}: {states}"

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

    def logs(self) -> dict[str, str]:
        """Each component's own log."""
        return {name: part.log.read_text(errors="replace") for name, part in self.components.items()}
