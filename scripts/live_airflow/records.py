"""What an Airflow has recorded: states, XComs, logs and trigger rows, read without asking Airflow."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.live_airflow.database import Database

FINISHED_RUN = frozenset({"success", "failed"})
FINISHED_TASK = frozenset({"success", "failed", "skipped", "upstream_failed", "removed"})


@dataclass(frozen=True)
class TaskState:
    """A row of the table `task_instance`."""

    task_id: str
    map_index: int
    state: str | None
    try_number: int

    @property
    def name(self) -> str:
        """The task id; of a mapped task's instances `task_id[0]`, `task_id[1]`, ..."""
        return self.task_id if self.map_index < 0 else f"{self.task_id}[{self.map_index}]"


class AirflowRecords:
    """The records of one Airflow, running or not: its database, and the files below its home."""

    def __init__(self, home: Path, database: Database, environment: Mapping[str, str]) -> None:
        self.home = home
        self.database = database
        self.environment = dict(environment)

    def query(self, sql: str, parameters: Collection[Any] = ()) -> list[tuple[Any, ...]]:
        """Rows of Airflow's database, read-only; parameters stand as `?`."""
        return self.database.query(sql, parameters)

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
        return {task.name: task.state for task in self.tasks(dag_id, run_id)}

    def try_numbers(self, dag_id: str, run_id: str) -> dict[str, int]:
        """Number of the current or last try by task id, named as in `task_states`."""
        return {task.name: task.try_number for task in self.tasks(dag_id, run_id)}

    def task_state(self, dag_id: str, run_id: str, task_id: str, map_index: int = -1) -> str | None:
        for task in self.tasks(dag_id, run_id):
            if (task.task_id, task.map_index) == (task_id, map_index):
                return task.state
        return None

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
        for table in self.database.tables():
            for row in self.query(f'select * from "{table}"'):
                yield f"table {table}", "\t".join(_text(value) for value in row)
        for trigger in self.trigger_rows():
            yield f"trigger {trigger['id']} (decrypted)", trigger["kwargs"]


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
