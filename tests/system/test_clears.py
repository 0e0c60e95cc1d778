"""What a manual clear pays for: with "reuse" only for what has no answer, with "resubmit" for everything."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.system.live import AIRFLOW, ROWS, OpenAccount, batches, cancellations, eventually, write_rows

if TYPE_CHECKING:
    from airflow_provider_siliconflow.emulator.server import Emulator
    from scripts.live_airflow import LiveAirflow

#: The prompts of the first rows, by task. A row fails once, or at every attempt.
FIRST_ROWS = {
    "job-partial": ("Say it [[emulator:once=400]]", "Say it [[emulator:error=400]]"),
    "create-nothing": tuple(f"Say {number} [[emulator:once=400]]" for number in range(ROWS)),
}
FINISHED = (
    *("job-success", "job-partial", "job-changed", "job-resubmit", "job-twice"),
    *("create-success", "create-changed", "create-resubmit", "create-nothing"),
)
#: A search of the account after a clear lasts a minute.
PATIENCE = 400.0


class Clears:
    """One run of a DAG, whose tasks have a file of rows and a folder each."""

    def __init__(self, airflow: LiveAirflow, account: Emulator, dag_id: str, folder: Path) -> None:
        self.airflow, self.account, self.dag_id, self.folder = airflow, account, dag_id, folder
        self.run_id = airflow.trigger(dag_id, conf={"folder": str(folder)})
        #: What tasks had pushed before they were cleared.
        self.pushed: dict[str, Any] = {}

    def batches(self, task_id: str) -> list[dict[str, Any]]:
        """Return the batches of a task, oldest first."""
        label = f"{self.dag_id}/{task_id}/{self.run_id}"
        return [
            each for each in batches(self.account) if (each["metadata"] or {}).get("airflow_task") == label
        ]

    def sent(self, task_id: str) -> list[int]:
        """Return the rows of each batch of a task."""
        content = self.account.service.open_content
        return [content(each["input_file_id"]).read_bytes().count(b"\n") for each in self.batches(task_id)]

    def clear(self, *task_ids: str) -> None:
        """Clear tasks, and wait for the end of the next try of each."""
        before = self.airflow.try_numbers(self.dag_id, self.run_id)
        for task_id in task_ids:
            self.pushed[task_id] = self.airflow.xcom(self.dag_id, self.run_id, task_id)
            self.airflow.clear(self.dag_id, self.run_id, task_id)

        def have_ended() -> bool:
            now = self.airflow.try_numbers(self.dag_id, self.run_id)
            return all(
                now[task_id] > before[task_id]
                and self.airflow.task_state(self.dag_id, self.run_id, task_id) == "success"
                for task_id in task_ids
            )

        eventually(have_ended, PATIENCE)
        # On sqlite the scheduler may end a run beside a clear that comes at that moment, whose task never starts then.
        assert self.airflow.wait_for_run(self.dag_id, self.run_id, timeout=PATIENCE) == "success"


@pytest.fixture(scope="module")
def finished(
    live_airflow: LiveAirflow, open_account: OpenAccount, tmp_path_factory: pytest.TempPathFactory
) -> Clears:
    folder = tmp_path_factory.mktemp("clears")
    account = open_account("clears")
    for task_id in FINISHED:
        path = write_rows(folder / f"{task_id}.jsonl", *FIRST_ROWS.get(task_id, ()))
        # A row that fails once does so once in an account.
        path.write_text(path.read_text().replace('"row-', f'"{task_id}-'))
    clears = Clears(live_airflow, account, "clears", folder)
    assert live_airflow.wait_for_run("clears", clears.run_id, timeout=PATIENCE) == "success"
    return clears


@pytest.fixture(scope="module")
def cleared(finished: Clears) -> Clears:
    """The run after each task was cleared once, all at the same time, since some search the account for a minute."""
    for task_id in ("job-changed", "create-changed"):
        write_rows(finished.folder / f"{task_id}.jsonl", "Something else")
    finished.clear(*(task_id for task_id in FINISHED if task_id != "job-twice"))
    return finished


@pytest.mark.parametrize("task_id", ["job-success", "create-success"])
def test_after_success_nothing_is_paid_again(cleared: Clears, task_id: str) -> None:
    assert cleared.sent(task_id) == [ROWS]
    assert cleared.airflow.xcom("clears", cleared.run_id, task_id) == cleared.pushed[task_id]


def test_after_a_partial_failure_only_the_rows_that_failed_are_paid(cleared: Clears) -> None:
    assert cleared.sent("job-partial") == [ROWS, 2]
    manifest = cleared.airflow.xcom("clears", cleared.run_id, "job-partial")
    assert manifest["rows"]["ok"] == ROWS - 1


@pytest.mark.parametrize("task_id", ["job-changed", "create-changed"])
def test_a_changed_prompt_is_new_work(cleared: Clears, task_id: str) -> None:
    assert cleared.sent(task_id) == [ROWS, ROWS]
    first, second = cleared.batches(task_id)
    assert first["input_file_id"] != second["input_file_id"]


@pytest.mark.parametrize("task_id", ["job-resubmit", "create-resubmit"])
def test_resubmit_pays_for_everything(cleared: Clears, task_id: str) -> None:
    assert cleared.sent(task_id) == [ROWS, ROWS]


def test_a_batch_without_a_single_answer_is_submitted_anew(cleared: Clears) -> None:
    assert cleared.sent("create-nothing") == [ROWS, ROWS]
    # The second one has answers, and is kept.
    cleared.clear("create-nothing")
    assert cleared.sent("create-nothing") == [ROWS, ROWS]


def test_twice_in_a_row_and_with_downstream_nothing_is_paid_again(cleared: Clears) -> None:
    for _ in range(2):
        cleared.clear("job-twice")
        cleared.clear("downstream")
        assert cleared.airflow.xcom("clears", cleared.run_id, "downstream") == ROWS
    assert cleared.sent("job-twice") == [ROWS]


def test_the_whole_run_again_pays_for_nothing_that_is_answered(cleared: Clears) -> None:
    reused = ("job-success", "job-twice", "create-success")
    before = {task_id: cleared.sent(task_id) for task_id in reused}
    for task_id in reused:
        cleared.airflow.clear("clears", cleared.run_id, task_id)
    assert cleared.airflow.wait_for_run("clears", cleared.run_id, timeout=PATIENCE) == "success"
    assert {task_id: cleared.sent(task_id) for task_id in reused} == before


def test_tasks_test_on_a_cleared_job_pays_nothing(cleared: Clears) -> None:
    before = cleared.sent("job-success")
    cleared.airflow.run_cli("tasks", "test", "clears", "job-success", cleared.run_id)
    assert cleared.sent("job-success") == before


@pytest.fixture(scope="module")
def under_way(
    live_airflow: LiveAirflow, open_account: OpenAccount, tmp_path_factory: pytest.TempPathFactory
) -> Clears:
    folder = tmp_path_factory.mktemp("clears-under-way")
    # Batches queue for half an hour, until the test has cleared their tasks.
    account = open_account("clears-under-way", speed=1.0, queue_seconds=1800.0)
    for task_id in ("job-deferred", "job-running", "create-deferred", "create-running"):
        write_rows(folder / f"{task_id}.jsonl")
    clears = Clears(live_airflow, account, "clears-under-way", folder)
    for task_id in ("job-deferred", "create-deferred"):
        live_airflow.wait_for_task(clears.dag_id, clears.run_id, task_id, "deferred", timeout=120)
    for task_id in ("job-running", "create-running"):
        eventually(partial(clears.batches, task_id), 60)
    return clears


@pytest.mark.skipif(
    AIRFLOW == (3, 0), reason="on Airflow 3.0 a task cleared while it runs stays `restarting`"
)
def test_work_under_way_goes_on(under_way: Clears) -> None:
    tasks = ("job-deferred", "create-deferred", "job-running", "create-running")
    before = under_way.airflow.try_numbers(under_way.dag_id, under_way.run_id)
    for task_id in tasks:
        under_way.airflow.clear(under_way.dag_id, under_way.run_id, task_id)

    def again() -> bool:
        numbers = under_way.airflow.try_numbers(under_way.dag_id, under_way.run_id)
        return all(numbers[task_id] > before[task_id] for task_id in tasks)

    eventually(again, PATIENCE)
    for task_id in ("job-deferred", "create-deferred"):
        under_way.airflow.wait_for_task(
            under_way.dag_id, under_way.run_id, task_id, "deferred", timeout=PATIENCE
        )
    under_way.account.service.configure({"speed": 10000.0})
    assert under_way.airflow.wait_for_run(under_way.dag_id, under_way.run_id, timeout=PATIENCE) == "success"
    assert {task_id: under_way.sent(task_id) for task_id in tasks} == {task_id: [ROWS] for task_id in tasks}
    assert cancellations(under_way.account) == 0
