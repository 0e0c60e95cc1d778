"""What a running task hands to an operator, as far as ours look at it."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


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
