"""
A batch is cancelled only on proof that a person ended or cleared its task.

Airflow tells a trigger of a kill also when the trigger merely moved, and when another triggerer's copy of it woke the
task: after a database that hung, or a triggerer that was stopped and went on. Here the operators and the trigger play
such stories together, with the XCom and the states that Airflow would have.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from airflow.providers.common.compat.sdk import TaskDeferred

from airflow_provider_siliconflow.api.exceptions import SiliconFlowError
from airflow_provider_siliconflow.operators.batch import CreateBatchOperator, RunBatchOperator
from airflow_provider_siliconflow.task.deferral import WAIT_KEY
from airflow_provider_siliconflow.triggers import batch as trigger_module
from airflow_provider_siliconflow.triggers.batch import BatchTrigger

if TYPE_CHECKING:
    from pytest_mock import MockerFixture

    from airflow_provider_siliconflow.emulator import Emulator

MakeContext = Callable[..., dict[str, Any]]
SetState = Callable[[str | None], Any]

pytestmark = [
    pytest.mark.emulator(speed=0.001),
    pytest.mark.usefixtures("siliconflow_connection", "no_pauses"),
]


def batches(emulator: Emulator) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = emulator.service.state()["batches"]
    return found


def cancelled(emulator: Emulator) -> list[str]:
    return [batch["id"] for batch in batches(emulator) if batch["status"] in ("cancelling", "cancelled")]


class Task:
    """One task of a DAG run on Airflow 3.3: what it has pushed and stored, and its tries."""

    def __init__(self, make: Callable[..., Any], make_context: MakeContext, store: Any) -> None:
        self._make, self._make_context, self._store = make, make_context, store
        self.pushed: dict[str, Any] = {}
        self.try_number, self.max_tries = 1, 3
        self.ti_id = "first"

    def _context(self, task: Any) -> dict[str, Any]:
        context = self._make_context(
            task,
            id=self.ti_id,
            try_number=self.try_number,
            max_tries=self.max_tries,
            pushed=self.pushed,
            xcom_push=lambda key, value: self.pushed.__setitem__(key, json.loads(json.dumps(value))),
            xcom_pull=lambda task_ids, key: self.pushed.get(key),
        )
        return context | {"task_state_store": self._store}

    def defers(self) -> BatchTrigger:
        """Run a try from its start, to its deferral."""
        self.pushed.clear()
        task = self._make()
        with pytest.raises(TaskDeferred) as deferred:
            task.execute(self._context(task))
        return BatchTrigger(**json.loads(json.dumps(deferred.value.trigger.serialize()[1])))

    def resumes(self, event: Any) -> Any:
        """Resume it in another process."""
        task = self._make()
        try:
            return task.execute_complete(self._context(task), event)
        except TaskDeferred as deferred:
            return BatchTrigger(**json.loads(json.dumps(deferred.trigger.serialize()[1])))

    def is_cleared(self) -> None:
        """A manual clear while it does not run."""
        self.max_tries = self.try_number + 3
        self.try_number += 1
        self.ti_id = f"after clear {self.try_number}"


@pytest.fixture
def told_of_a_kill(mocker: MockerFixture) -> Callable[[BatchTrigger, Task, str | None], None]:
    """Lets a triggerer take a trigger for killed, while Airflow has a task in a state."""

    def tell(trigger: BatchTrigger, task: Task, state: str | None) -> None:
        mocker.patch("airflow_provider_siliconflow.task.state.task_state", return_value=state)
        mocker.patch(
            "airflow_provider_siliconflow.task.deferral.recorded_wait",
            side_effect=lambda _: task.pushed.get(WAIT_KEY),
        )
        mocker.patch.object(BatchTrigger, "task_instance", mocker.Mock(), create=True)

        async def run() -> None:
            await trigger.on_kill()
            await asyncio.gather(*trigger_module._CANCELLATIONS)

        asyncio.run(run())

    return tell


@pytest.fixture
def job(make_context: MakeContext, store: Any, tmp_path: Path) -> Task:
    def make(**arguments: Any) -> RunBatchOperator:
        return RunBatchOperator(
            task_id="job",
            requests=["a"] * 4,
            output_dir=str(tmp_path / "out"),
            model="Qwen/Qwen3-8B",
            max_rows_per_batch=1,
            max_in_flight=2,
            deferrable=True,
            retries=3,
            **arguments,
        )

    return Task(make, make_context, store)


@pytest.fixture
def create(make_context: MakeContext, store: Any, make_input: Callable[..., str]) -> Task:
    path = make_input("Hi")

    def make(**arguments: Any) -> CreateBatchOperator:
        return CreateBatchOperator(
            task_id="create",
            input_path=path,
            wait_for_completion=True,
            deferrable=True,
            retries=3,
            **arguments,
        )

    return Task(make, make_context, store)


@pytest.mark.parametrize("state", ["failed", "success", "skipped"])
@pytest.mark.parametrize("which", ["job", "create"])
def test_a_person_ends_a_task_while_it_waits(
    request: pytest.FixtureRequest, emulator: Emulator, told_of_a_kill: Any, which: str, state: str
) -> None:
    task: Task = request.getfixturevalue(which)
    trigger = task.defers()
    told_of_a_kill(trigger, task, state)
    assert len(cancelled(emulator)) == len(batches(emulator)) > 0


@pytest.mark.parametrize("state", ["scheduled", "queued", "running", "deferred", "up_for_retry", None])
def test_the_same_trigger_elsewhere_woke_the_task(
    job: Task, emulator: Emulator, told_of_a_kill: Any, state: str | None
) -> None:
    """The stale one is told of a kill at any moment after that."""
    stale = job.defers()
    told_of_a_kill(stale, job, state)
    assert cancelled(emulator) == []


@pytest.mark.parametrize("state", ["scheduled", "running", "deferred", "failed", "success"])
def test_the_task_has_resumed_since(job: Task, emulator: Emulator, told_of_a_kill: Any, state: str) -> None:
    """Whatever the task has become: it waits for these batches again, or has dealt with them."""
    stale = job.defers()
    assert stale.batch_id is not None
    first, _ = stale.batch_id
    later = job.resumes({"status": "ended", "batches": [{"id": first, "status": "in_progress"}]})
    assert isinstance(later, BatchTrigger)
    assert later.wait_token != stale.wait_token
    told_of_a_kill(stale, job, state)
    assert cancelled(emulator) == []
    # Of the wait that it is in now, a person's end is known at once.
    told_of_a_kill(later, job, "failed")
    assert sorted(cancelled(emulator)) == sorted(later.batch_id or ())


@pytest.mark.parametrize("which", ["job", "create"])
def test_the_task_resumed_and_failed_before_it_waited_again(
    request: pytest.FixtureRequest, emulator: Emulator, told_of_a_kill: Any, which: str
) -> None:
    task: Task = request.getfixturevalue(which)
    stale = task.defers()
    with pytest.raises(SiliconFlowError):
        task.resumes({"status": "error", "message": "m", "batch_ids": ["batch_1"], "retryable": True})
    told_of_a_kill(stale, task, "failed")
    assert cancelled(emulator) == [], "a retry, or a person, takes it up"


@pytest.mark.parametrize("which", ["job", "create"])
@pytest.mark.parametrize("state", [None, "scheduled", "queued", "running", "deferred"])
def test_a_cleared_task_continues_with_what_it_waited_for(
    request: pytest.FixtureRequest, emulator: Emulator, told_of_a_kill: Any, which: str, state: str | None
) -> None:
    task: Task = request.getfixturevalue(which)
    stale = task.defers()
    paid = len(batches(emulator))
    task.is_cleared()
    told_of_a_kill(stale, task, state)
    again = task.defers()
    assert sorted(again.batch_id or ()) == sorted(stale.batch_id or ())
    assert len(batches(emulator)) == paid
    assert cancelled(emulator) == []


@pytest.mark.parametrize("cancels", [True, False])
def test_a_cleared_task_cancels_what_its_older_generation_waited_for(
    create: Task, emulator: Emulator, told_of_a_kill: Any, cancels: bool
) -> None:
    make = create._make
    create._make = lambda: make(cancel_on_kill=cancels, on_clear="resubmit")
    stale = create.defers()
    (old,) = batches(emulator)
    create.is_cleared()
    told_of_a_kill(stale, create, None)
    assert cancelled(emulator) == [], "a state of None may be an orphan that Airflow resets"
    create.defers()
    assert len(batches(emulator)) == 2
    # Without the order to cancel nothing of the wait was recorded either.
    assert cancelled(emulator) == ([old["id"]] if cancels else [])


def test_a_retry_cancels_nothing_of_its_own_generation(create: Task, emulator: Emulator) -> None:
    create.defers()
    # Its worker died before it could resume.
    create.try_number = 2
    create.defers()
    assert len(batches(emulator)) == 1
    assert cancelled(emulator) == []


def test_a_task_that_resumed_before_it_was_cleared_leaves_its_batch_alone(
    create: Task, emulator: Emulator
) -> None:
    """It had dealt with the batch; what a person then pays for again is another one."""
    make = create._make
    create._make = lambda: make(on_clear="resubmit")
    create.defers()
    with pytest.raises(SiliconFlowError):
        create.resumes({"status": "timeout", "message": "m", "batch_ids": [], "retryable": True})
    create.is_cleared()
    create.defers()
    assert len(batches(emulator)) == 2
    assert cancelled(emulator) == []


@pytest.mark.parametrize(
    "left",
    [
        "text",
        {"batch_id": 7, "input_file_id": None, "epoch": 0},
        {"batch_id": "batch_unknown", "input_file_id": None, "epoch": 0},
        {"batch_id": "theirs", "input_file_id": "file-of-another", "epoch": 0},
    ],
)
def test_what_is_not_proven_to_be_the_task_s_own_is_not_cancelled(
    create: Task, store: Any, emulator: Emulator, left: Any
) -> None:
    make = create._make
    create._make = lambda: make(on_clear="resubmit")
    create.defers()
    (theirs,) = batches(emulator)
    if isinstance(left, dict) and left["batch_id"] == "theirs":
        left = left | {"batch_id": theirs["id"]}
    store.set("siliconflow.waiting", left)
    create.is_cleared()
    create.defers()
    assert cancelled(emulator) == []


def test_a_job_that_was_cleared_cancels_what_its_older_generation_left(
    job: Task, emulator: Emulator, told_of_a_kill: Any
) -> None:
    make = job._make
    job._make = lambda: make(on_clear="resubmit")
    stale = job.defers()
    old = set(stale.batch_id or ())
    job.is_cleared()
    told_of_a_kill(stale, job, "scheduled")
    assert cancelled(emulator) == []
    job.defers()
    assert set(cancelled(emulator)) == old


# airflow tasks test -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["job", "create"])
def test_a_task_that_is_resumed_by_hand_waits_on_and_pays_nothing(
    request: pytest.FixtureRequest, emulator: Emulator, which: str
) -> None:
    """``airflow tasks test`` resumes a task that waits, without any event."""
    task: Task = request.getfixturevalue(which)
    trigger = task.defers()
    paid = len(batches(emulator))
    again = task.resumes(None)
    assert isinstance(again, BatchTrigger)
    assert sorted(again.batch_id or ()) == sorted(trigger.batch_id or ())
    assert again.wait_token != trigger.wait_token
    assert len(batches(emulator)) == paid


@pytest.mark.parametrize("which", ["job", "create"])
def test_a_live_task_that_is_run_again_under_its_number_pays_nothing(
    request: pytest.FixtureRequest, emulator: Emulator, which: str
) -> None:
    """``airflow tasks test`` on a task that runs; without a store on older Airflows the account is asked."""
    task: Task = request.getfixturevalue(which)
    task._store = None
    task.defers()
    paid = len(batches(emulator))
    task.ti_id = "another"
    task.defers()
    assert len(batches(emulator)) == paid
    assert cancelled(emulator) == []
