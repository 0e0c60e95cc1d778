"""Processes: one component of Airflow, and a family that leaves none behind."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

from scripts.live_airflow.errors import LiveAirflowError, tail

ROOT = Path(__file__).resolve().parents[2]

_MARK = "PROCESS_FAMILY"


@dataclass(frozen=True)
class TaskProcesses:
    """The processes of one running task.

    `task` runs the operator's code. `supervisor` watches it: on Airflow 3 the LocalExecutor's worker, on
    2.11 the process of `airflow tasks run`.
    """

    task: int
    supervisor: int


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
        """Start the watchdog; `kill()` ends it."""
        if self._watchdog is None:
            self._watchdog = subprocess.Popen(
                [sys.executable, "-m", "scripts.live_airflow", self._mark],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                start_new_session=True,
            )

    def pids(self) -> list[int]:
        return [process.pid for process in _marked(self._mark)]

    def kill(self) -> None:
        try:
            kill_marked(self._mark)
        finally:
            if self._watchdog is not None:
                watchdog, self._watchdog = self._watchdog, None
                watchdog.communicate()


def _marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(_MARK) == mark:
                found.append(process)
    return found


def kill_marked(mark: str, timeout: float = 20) -> None:
    """SIGKILL until none is left: a process may have forked between being listed and being killed."""
    deadline = time.monotonic() + timeout
    while processes := [p for p in _marked(mark) if p.status() != psutil.STATUS_ZOMBIE]:
        for process in processes:
            below: list[psutil.Process] = []
            with contextlib.suppress(psutil.NoSuchProcess):
                # They may have written over their mark, as the processes of Postgres do.
                below = process.children(recursive=True)
            for each in (process, *below):
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
        psutil.wait_procs(processes, timeout=0.2)
        if time.monotonic() > deadline:
            raise LiveAirflowError(f"processes survive SIGKILL: {[process.pid for process in processes]}")


class Component:
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
                # A Ctrl-C at the terminal is for the caller, who then stops the components.
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
        return tail(self.log.read_text(errors="replace"), lines) if self.log.exists() else ""
