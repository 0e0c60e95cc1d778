"""How a task defers: the one way for the operators and the sensor."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import BaseOperator
    from airflow.triggers.base import BaseTrigger

    from airflow_provider_siliconflow.api.models import Batch
    from airflow_provider_siliconflow.task.state import TaskTry

#: XCom key of the token of a task's present wait; empty once the task has resumed.
WAIT_KEY = "siliconflow_wait"

#: The same in the task state store, which unlike XCom outlives a clear: what a task waits for, and in which generation.
_STORE_KEY = "siliconflow.waiting"
_RETENTION = timedelta(days=31)

#: Airflow's own limit on a deferral comes this many seconds after the trigger's deadline. It is a backstop: the trigger
#: ends with an event that says what happened, and Airflow's limit with an error that does not.
_BACKSTOP = 900.0


def defer(operator: BaseOperator, trigger: BaseTrigger, *, deadline: float | None) -> Any:
    """
    Hand the wait over to the triggerer; ``execute_complete`` resumes.

    :param deadline: epoch seconds at which the trigger ends the wait; ``None`` if that follows from the batches.
    :raises TaskDeferred: always.
    """
    operator.defer(trigger=trigger, method_name="execute_complete", timeout=backstop(deadline))
    raise AssertionError("unreachable")


def backstop(deadline: float | None) -> timedelta:
    """Return Airflow's limit on a deferral that ends at a deadline."""
    from airflow_provider_siliconflow.api.arguments import MAX_WINDOW_HOURS
    from airflow_provider_siliconflow.jobs.waiting import EXPIRY_MARGIN

    if deadline is None:
        # The trigger waits until a while after the batches expire.
        return timedelta(hours=MAX_WINDOW_HOURS, seconds=EXPIRY_MARGIN + _BACKSTOP)
    return timedelta(seconds=max(deadline - time.time(), 0.0) + _BACKSTOP)


# Proof of a kill ----------------------------------------------------------------------------------------------
# Airflow calls a trigger's on_kill() also when the trigger only moves to another triggerer, and when the task was
# woken by the same trigger elsewhere: after a database that hung, or a triggerer that was slow. A token per wait tells
# a task that ended while it waited on this very trigger from all of these.


def record_wait(task_try: TaskTry, batch: Batch | None = None) -> str:
    """
    Record a fresh token of the wait that is about to begin, and return it for the trigger.

    :param batch: recorded beside it where Airflow has a task state store, for :func:`left_waiting`.
    """
    token = secrets.token_hex(16)
    task_try.push(WAIT_KEY, token)
    if batch is not None and task_try.store is not None:
        left = {
            "batch_id": batch.id,
            "input_file_id": batch.input_file_id,
            "generation": task_try.submitter.generation,
        }
        task_try.store.set(_STORE_KEY, left, retention=_RETENTION)
    return token


def end_wait(task_try: TaskTry) -> None:
    """Overwrite the token, first of all when a task resumes: its trigger, if alive elsewhere, then cancels nothing."""
    task_try.push(WAIT_KEY, "")
    forget_left_waiting(task_try)


@dataclass(frozen=True, slots=True)
class LeftWaiting:
    """
    The batch of an older generation, which was cleared while it waited: nobody waits for it any more.

    :param batch_id: its id.
    :param input_file_id: its input file, as the service said.
    """

    batch_id: str
    input_file_id: str | None

    def is_it(self, batch: Batch) -> bool:
        """Whether a batch that the account has under that id is this one, and not of another account."""
        return batch.id == self.batch_id and batch.input_file_id == self.input_file_id


def left_waiting(task_try: TaskTry) -> LeftWaiting | None:
    """Return what an older generation of this task waited for when it was cleared, if Airflow's store still says so."""
    left = None if task_try.store is None else task_try.store.get(_STORE_KEY)
    match left:
        case {"batch_id": str(batch_id), "input_file_id": str() | None as file_id, "generation": int(older)}:
            return LeftWaiting(batch_id, file_id) if older < task_try.submitter.generation else None
    return None


def forget_left_waiting(task_try: TaskTry) -> None:
    """Forget what an older generation, or this one, waited for."""
    if task_try.store is not None:
        task_try.store.delete(_STORE_KEY)


def recorded_wait(ti: Any) -> str | None:
    """
    Return the recorded token, in the triggerer; ``None`` if there is none.

    :param ti: the task instance of a trigger.
    """
    from airflow.sdk.bases.xcom import BaseXCom

    found = BaseXCom.get_one(
        key=WAIT_KEY, dag_id=ti.dag_id, task_id=ti.task_id, run_id=ti.run_id, map_index=ti.map_index
    )
    return found if isinstance(found, str) else None
