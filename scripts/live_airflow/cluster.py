"""An Airflow as a company runs it: on Postgres, several triggerers and schedulers, each restarted when it exits."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from scripts.live_airflow.airflow import LiveAirflow
from scripts.live_airflow.errors import LiveAirflowError
from scripts.live_airflow.postgres import Postgres
from scripts.live_airflow.processes import Component

#: Seconds between an exit and the restart, as service managers have it.
_RESTART_PAUSE = 1.0


@dataclass(frozen=True)
class Restart:
    """A component that exited by itself and was started again."""

    component: str
    returncode: int | None
    at: float


class _Supervised(Component):
    """A component whose exit is no failure: it is started again."""

    @property
    def died(self) -> bool:
        return False


class LiveCluster(LiveAirflow):
    """A `LiveAirflow` on Postgres with several triggerers and schedulers, each of them supervised.

    :param triggerers: components `triggerer`, `triggerer-2`, ...
    :param schedulers: components `scheduler`, `scheduler-2`, ..., each with a LocalExecutor of its own
    :param arguments: as for `LiveAirflow`
    """

    database: Postgres

    def __init__(
        self,
        home: Path,
        dags: Path,
        *,
        triggerers: int = 2,
        schedulers: int = 1,
        env: Mapping[str, str] | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(home, dags, env=env, database=Postgres(), **arguments)
        if self.is_airflow_2:
            raise LiveAirflowError("the cluster is for Airflow 3")
        for number in range(2, triggerers + 1):
            self._add(f"triggerer-{number}", "triggerer", "--skip-serve-logs")
        for number in range(2, schedulers + 1):
            self._add(f"scheduler-{number}", "scheduler", "--skip-serve-logs")
        self.restarts: list[Restart] = []
        self._job_ids: dict[str, int] = {}
        self._stopping = threading.Event()
        self._supervisor: threading.Thread | None = None

    def _add(self, name: str, *arguments: str) -> Component:
        log = self.home / f"{name}.log"
        component = _Supervised(name, [self.python, "-m", "airflow", *arguments], self.environment, log)
        self.components[name] = component
        return component

    # Start and stop

    def start_all(self) -> None:
        """Start every component and wait until each is healthy; triggerers one after another.

        So it is known which row of the table `job` is whose.
        """
        self.home.mkdir(parents=True, exist_ok=True)
        try:
            self.database.create(self.python, self.version)
            self._family.watch()
            parts = list(self.components.values())
            others = [part for part in parts if not part.name.startswith("triggerer")]
            for part in others:
                part.start()
            for part in parts:
                if part not in others:
                    self.start(part.name)
            self._wait_healthy(others)
        except BaseException:
            self.stop()
            raise
        self._supervisor = threading.Thread(target=self._supervise, name="supervisor", daemon=True)
        self._supervisor.start()

    def start(self, component: str) -> None:
        """Start a component that was killed, and wait until it is healthy."""
        super().start(component)
        if component.startswith("triggerer"):
            self._job_ids[component] = self._newest_triggerer()

    def stop(self) -> None:
        """Kill every process of this Airflow and its database; does nothing the second time."""
        self._stopping.set()
        if self._supervisor is not None:
            self._supervisor.join()
        try:
            super().stop()
        finally:
            self.database.stop()

    def _supervise(self) -> None:
        while not self._stopping.wait(0.2):
            for part in list(self.components.values()):
                if part.process is None or part.running or part.killed:
                    continue
                self.restarts.append(Restart(part.name, part.process.returncode, time.time()))
                if self._stopping.wait(_RESTART_PAUSE):
                    return
                # What it made may have outlived it, as in a container it would not.
                part.start()
                if part.name.startswith("triggerer"):
                    self._job_ids.pop(part.name, None)

    def _newest_triggerer(self) -> int:
        (row,) = self.query("select max(id) from job where job_type = 'TriggererJob'")
        return int(row[0])

    # Freeze

    def triggers_of(self) -> Counter[str]:
        """How many triggers each triggerer runs, by component; `""` stands for none, or one that is gone."""
        names = {number: name for name, number in self._job_ids.items()}
        rows = self.query("select triggerer_id, count(*) from trigger group by triggerer_id")
        found: Counter[str] = Counter(dict.fromkeys(self._job_ids, 0))
        for triggerer, count in rows:
            found[names.get(triggerer, "")] += count
        return found

    def tasks_of(self, component: str, dag_id: str, run_id: str) -> list[str]:
        """Ids of a run's deferred tasks whose triggers a triggerer runs."""
        rows = self.query(
            "select task_instance.task_id from task_instance join trigger on trigger.id = task_instance.trigger_id"
            " where dag_id = ? and run_id = ? and triggerer_id = ?",
            (dag_id, run_id, self._job_ids.get(component)),
        )
        return sorted(task_id for (task_id,) in rows)

    @contextlib.contextmanager
    def frozen(self, component: str) -> Iterator[None]:
        """Stop a component's whole tree with SIGSTOP, as when its machine is suspended, and let it go on after."""
        part = self.components[component]
        if part.process is None or not part.running:
            raise LiveAirflowError(f"{component} is not running")
        with frozen([part.process.pid]):
            yield

    @contextlib.contextmanager
    def frozen_task(self, dag_id: str, run_id: str, task_id: str) -> Iterator[None]:
        """Stop a running task and its supervisor with SIGSTOP, and let them go on after.

        The task's heartbeat is lost meanwhile, so that the scheduler begins another try.
        """
        pids = self.task_pids(dag_id, run_id, task_id)
        with frozen([pids.supervisor, pids.task]):
            yield

    def wait_until_deferred(self, dag_id: str, run_id: str, tasks: int, timeout: float = 180) -> None:
        """Wait until so many tasks of a run are deferred, and a triggerer has each one's trigger."""

        def deferred() -> bool | None:
            states = Counter(self.task_states(dag_id, run_id).values())
            if states["failed"]:
                raise LiveAirflowError(self._where(dag_id, run_id))
            return True if states["deferred"] >= tasks and not self.triggers_of()[""] else None

        self._until(deferred, timeout, lambda: self._where(dag_id, run_id))

    def wait_until_settled(self, dag_id: str, run_id: str, timeout: float = 180) -> None:
        """Wait until no task of a run is about to be worked on, and a triggerer has each deferred one's trigger."""
        moving = {"scheduled", "queued", "running", "restarting"}

        def settled() -> bool | None:
            states = self.task_states(dag_id, run_id).values()
            return None if moving & set(states) or self.triggers_of()[""] else True

        self._until(settled, timeout, lambda: self._where(dag_id, run_id))

    def run_cli_for(self, seconds: float, *arguments: str) -> str:
        """Run `airflow ...` for so long at most, then end it as a person does with Ctrl-C; its output."""
        process = subprocess.Popen(
            [self.python, "-m", "airflow", *arguments],
            env=self.environment,
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            return process.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            try:
                return process.communicate(timeout=30)[0]
            except subprocess.TimeoutExpired:
                process.kill()
                return process.communicate()[0]


@contextlib.contextmanager
def frozen(pids: list[int]) -> Iterator[None]:
    """Stop these processes and all below them with SIGSTOP, and let them go on after."""
    stopped: list[psutil.Process] = []
    try:
        for pid in pids:
            process = psutil.Process(pid)
            # The parent first: it forks no more then.
            process.suspend()
            stopped.append(process)
            for child in process.children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.suspend()
                    stopped.append(child)
        yield
    finally:
        for process in reversed(stopped):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
