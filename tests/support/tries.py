"""A task with its tries, as Airflow runs them, without Airflow: for tests of what a worker does."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.providers.common.compat.sdk import AirflowFailException

from airflow_provider_siliconflow.jobs.clock import SystemClock


class TaskStateStore:
    """Airflow's task state store: a dictionary that outlives a try."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)

    def set(self, key: str, value: Any, *, retention: Any = None) -> None:
        self.values[key] = value

    def delete(self, key: str) -> None:
        self.values.pop(key, None)


class Task:
    """
    A task instance: hands an operator the contexts of its tries, one after another.

    :param make: makes the operator, anew for each try.
    :param store: whether Airflow has a task state store (3.3+).
    :param retries: tries after the first one.
    """

    def __init__(self, make: Callable[[], Any], *, store: bool = True, retries: int = 20) -> None:
        self._make = make
        self._store = TaskStateStore() if store else None
        self._retries = retries
        self._began = datetime.now(UTC)
        self.tries = 0
        self.errors: list[Exception] = []
        self.pushed: dict[str, Any] = {}

    def run(self) -> Any:
        """
        Run tries until one succeeds.

        :returns: what it returned.
        :raises Exception: of the last try, or one that Airflow makes no retry after.
        """
        while True:
            try:
                return self.run_once()
            except AirflowFailException:
                raise
            except Exception as exc:
                self.errors.append(exc)
                if self.tries > self._retries:
                    raise

    def run_once(self) -> Any:
        """Run the next try."""
        self.tries += 1
        operator = self._make()
        operator.retries = self._retries
        return operator.execute(self._context(operator))

    def _context(self, operator: Any) -> dict[str, Any]:
        # Airflow clears a task's XComs at the begin of each try.
        self.pushed = {}
        instance = SimpleNamespace(
            dag_id="dag",
            run_id="run",
            task_id=operator.task_id,
            map_index=-1,
            max_tries=self._retries,
            try_number=self.tries,
            start_date=datetime.now(UTC),
            xcom_push=lambda key, value: self.pushed.__setitem__(key, value),
        )
        run = SimpleNamespace(start_date=self._began, run_after=None, logical_date=None)
        context = {"ti": instance, "task": operator, "dag_run": run}
        return context | ({} if self._store is None else {"task_state_store": self._store})


class QuickClock:
    """
    Lets pauses pass in a thousandth of a second at most, for the provider's own clock and for `time.sleep`.

    :param slept: seconds that would have been slept.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.slept = 0.0
        pause = time.sleep

        def sleep(seconds: float) -> None:
            self.slept += seconds
            pause(min(seconds, 0.001))

        monkeypatch.setattr(time, "sleep", sleep)
        monkeypatch.setattr(SystemClock, "sleep", lambda _, seconds: sleep(seconds))
        for name in ("time", "monotonic"):
            if hasattr(SystemClock, name):
                now = getattr(time, name)
                monkeypatch.setattr(SystemClock, name, lambda _, now=now: now() + self.slept)
