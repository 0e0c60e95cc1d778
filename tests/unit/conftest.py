"""What a running task hands to an operator, as far as ours look at it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pytest_mock import MockerFixture


@pytest.fixture
def make_context() -> Callable[..., dict[str, Any]]:
    """Makes the context of a task's first try; what it pushes to XCom is in ``context["ti"].pushed``."""

    def make(task: Any, **ti: Any) -> dict[str, Any]:
        pushed: dict[str, Any] = {}
        instance = SimpleNamespace(
            **{
                "dag_id": "dag",
                "run_id": "run",
                "task_id": task.task_id,
                "map_index": -1,
                "max_tries": 0,
                "try_number": 1,
                "start_date": datetime.now(UTC),
                "pushed": pushed,
                "xcom_push": lambda key, value: pushed.__setitem__(key, value),
            }
            | ti
        )
        run = SimpleNamespace(start_date=datetime.now(UTC), run_after=None, logical_date=None)
        return {"ti": instance, "task": task, "dag_run": run}

    return make


@pytest.fixture
def make_input(tmp_path: Path) -> Callable[..., str]:
    """Writes a batch input file, one row per text; its path."""

    def make(*texts: str, model: str | None = "Qwen/Qwen3-32B") -> str:
        body = {} if model is None else {"model": model}
        lines = [
            {"custom_id": f"r{n}", "body": body | {"messages": [{"role": "user", "content": text}]}}
            for n, text in enumerate(texts)
        ]
        path = tmp_path / "input.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(path)

    return make


class TaskStore:
    """Airflow's task state store, as far as it is used."""

    def __init__(self) -> None:
        self.entries: dict[str, Any] = {}
        self.retentions: set[Any] = set()

    def get(self, key: str, default: Any = None) -> Any:
        return self.entries.get(key, default)

    def set(self, key: str, value: Any, *, retention: Any = None) -> None:
        # What is stored passes through JSON.
        self.entries[key] = json.loads(json.dumps(value))
        self.retentions.add(retention)

    def delete(self, key: str) -> None:
        self.entries.pop(key, None)


@pytest.fixture
def store() -> TaskStore:
    """An empty task state store."""
    return TaskStore()


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches of the account are patient: a minute, which need not pass here."""
    from airflow_provider_siliconflow.jobs.clock import SystemClock

    slept = 0.0

    def sleep(_: SystemClock, seconds: float) -> None:
        nonlocal slept
        slept += seconds

    monkeypatch.setattr(SystemClock, "sleep", sleep)
    monkeypatch.setattr(SystemClock, "time", lambda _: time.time() + slept)
    monkeypatch.setattr(SystemClock, "monotonic", lambda _: time.monotonic() + slept)


@pytest.fixture
def set_state(mocker: MockerFixture) -> Callable[[str | None], Any]:
    """Lets Airflow say which state every task is in; the double, to say something else."""

    def set_state(state: str | None) -> Any:
        return mocker.patch("airflow_provider_siliconflow.task.state.task_state", return_value=state)

    return set_state


@pytest.fixture
def make_batch(siliconflow_connection: str, make_input: Callable[..., str]) -> Callable[..., str]:
    """Uploads a file of one row per text and creates a batch over it; its id."""

    def make(*texts: str) -> str:
        from airflow_provider_siliconflow.hooks.siliconflow import SiliconFlowHook

        hook = SiliconFlowHook(siliconflow_connection)
        return hook.create_batch(hook.upload_file(make_input(*texts)).id).id

    return make
