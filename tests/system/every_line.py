"""
Runs a create task repeatedly. Each run is killed one or more lines of code later than the last, and then retried.

    python -m tests.system.every_line FOLDER ROWS STRIDE store|nostore

STRIDE is the number of lines between two kills. Writes one JSON object per crash to FOLDER/crashes.jsonl: where the
process died, and what the retry returned. The task runs in a forked process with an operator, a context and, with
`store`, a state store that outlives the process. No Airflow runs, so a crash takes only a tenth of a second.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import airflow_provider_siliconflow
from airflow_provider_siliconflow.api import client  # noqa: F401 - imported once, before any fork
from airflow_provider_siliconflow.jobs import downloads, submission  # noqa: F401
from airflow_provider_siliconflow.operators.batch import CreateBatchOperator

PACKAGE = str(Path(airflow_provider_siliconflow.__file__).parent)
#: Code with side effects. A crash in the models or argument checks cannot leave work half done.
TRACED = ("operators/", "jobs/submission.py", "task/", "api/client.py", "hooks/")

# The emulator lists a batch at once.
submission.LIST_LAG = 0.1  # type: ignore[attr-defined]


class StateStore:
    """Airflow's task state store, kept in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def _read(self) -> dict[str, Any]:
        return json.loads(self._path.read_text()) if self._path.exists() else {}

    def _write(self, values: dict[str, Any]) -> None:
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(values))
        part.replace(self._path)

    def get(self, key: str, default: Any = None) -> Any:
        return self._read().get(key, default)

    def set(self, key: str, value: Any, **_: Any) -> None:
        self._write(self._read() | {key: value})

    def delete(self, key: str) -> None:
        self._write({name: value for name, value in self._read().items() if name != key})


def run_task(run_id: str, folder: Path, rows: str, try_number: int, store: bool) -> str:
    task = CreateBatchOperator(
        task_id="create", input_path=rows, wait_for_completion=True, poll_interval=0.01, retries=2
    )
    ti = SimpleNamespace(
        dag_id="dag",
        run_id=run_id,
        task_id="create",
        map_index=-1,
        max_tries=2,
        try_number=try_number,
        start_date=datetime.now(UTC),
        xcom_push=lambda key, value: None,
    )
    context: Any = {"ti": ti, "task": task, "dag_run": SimpleNamespace(start_date=ti.start_date)}
    if store:
        context["task_state_store"] = StateStore(folder / f"{run_id}.json")
    # __wrapped__ bypasses Airflow's guard against manual calls.
    return CreateBatchOperator.execute.__wrapped__(task, context)  # type: ignore[attr-defined, no-any-return]


def die_at(number: int, note: Path) -> None:
    """Kill this process just before it executes the given line of the package, counted from 1."""
    left = number

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        name = frame.f_code.co_filename
        if not name.startswith(PACKAGE) or not name[len(PACKAGE) + 1 :].startswith(TRACED):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                note.write_text(f"{name[len(PACKAGE) + 1 :]}:{frame.f_lineno}")
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


def in_child(work: Any) -> int:
    """Run a function in a forked process and return its exit status, or minus the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(folder: Path, rows: str, stride: int, store: bool) -> None:
    note, answer = folder / "note", folder / "answer"
    number = 1

    def record(crash: dict[str, Any]) -> None:
        with (folder / "crashes.jsonl").open("a") as file:
            file.write(json.dumps(crash) + "\n")

    while True:
        run_id = f"line-{number}"

        def first(number: int = number, run_id: str = run_id) -> None:
            die_at(number, note)
            run_task(run_id, folder, rows, 1, store)

        def second(run_id: str = run_id) -> None:
            answer.write_text(run_task(run_id, folder, rows, 2, store))

        if in_child(first) != -signal.SIGKILL:
            # The task ran to its end: no lines are left.
            record({"lines": number})
            return
        status = in_child(second)
        died = {"run_id": run_id, "at": note.read_text(), "status": status}
        record(died | {"batch_id": answer.read_text() if status == 0 else None})
        number += stride


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] == "store")
