"""How a task defers: shared by the operators and the sensor."""

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

#: XCom key of the token of a task's current wait; empty once the task has resumed.
WAIT_KEY = "siliconflow_wait"

#: Key of the batch and epoch of a wait in the task state store, which unlike XCom outlives a clear.
_STORE_KEY = "siliconflow.waiting"
_RETENTION = timedelta(days=31)

#: Airflow's own limit on a deferral comes this many seconds after the trigger's deadline. It is a backstop, since its
#: error does not say what happened; the event of the trigger does.
_BACKSTOP = 900.0


def defer(operator: BaseOperator, trigger: BaseTrigger, *, deadline: float | None) -> Any:
    """
    Defer the wait to the triggerer; ``execute_complete`` resumes.

    :param deadline: epoch seconds at which the trigger ends the wait; ``None`` if it depends on the batches.
    :raises TaskDeferred: always.
    """
    operator.defer(trigger=trigger, method_name="execute_complete", timeout=backstop(deadline))
    raise AssertionError("unreachable")


def backstop(deadline: float | None) -> timedelta:
    """Return Airflow's limit on a deferral whose trigger ends at a deadline."""
    from airflow_provider_siliconflow.api.arguments import MAX_WINDOW_HOURS
    from airflow_provider_siliconflow.jobs.waiting import EXPIRY_MARGIN

    if deadline is None:
        # The trigger waits until an hour after the batches expire.
        return timedelta(hours=MAX_WINDOW_HOURS, seconds=EXPIRY_MARGIN + _BACKSTOP)
    return timedelta(seconds=max(deadline - time.time(), 0.0) + _BACKSTOP)


# Proof of a kill ----------------------------------------------------------------------------------------------
# Airflow also calls a trigger's on_kill() if the trigger only moves to another triggerer, and if the same trigger has
# resumed the task elsewhere, after a database hung or a triggerer was slow. A token per wait distinguishes a task that
# ended while it waited on this trigger from all of these cases.


def record_wait(task_try: TaskTry, batch: Batch | None = None) -> str:
    """
    Record a fresh token for the wait that is about to begin, and return it for the trigger.

    :param batch: recorded with it if Airflow has a task state store, for :func:`left_waiting`.
    """
    token = secrets.token_hex(16)
    task_try.push(WAIT_KEY, token)
    if batch is not None and task_try.store is not None:
        left = {
            "batch_id": batch.id,
            "input_file_id": batch.input_file_id,
            "epoch": task_try.submitter.epoch,
        }
        task_try.store.set(_STORE_KEY, left, retention=_RETENTION)
    return token


def end_wait(task_try: TaskTry) -> None:
    """Overwrite the token as soon as a task resumes, so that a copy of its trigger elsewhere cancels nothing."""
    task_try.push(WAIT_KEY, "")
    forget_left_waiting(task_try)


@dataclass(frozen=True, slots=True)
class LeftWaiting:
    """
    The batch for which a task waited when it was cleared, so that nothing waits for the batch any more.

    :param batch_id: its id.
    :param input_file_id: its input file, as the service stated it.
    """

    batch_id: str
    input_file_id: str | None

    def is_it(self, batch: Batch) -> bool:
        """Whether the account's batch with that id is this one, and does not belong to another account."""
        return batch.id == self.batch_id and batch.input_file_id == self.input_file_id


def left_waiting(task_try: TaskTry) -> LeftWaiting | None:
    """Return the batch for which this task waited when it was cleared by hand, if still recorded."""
    left = None if task_try.store is None else task_try.store.get(_STORE_KEY)
    match left:
        case {"batch_id": str(batch_id), "input_file_id": str() | None as file_id, "epoch": int(older)}:
            return LeftWaiting(batch_id, file_id) if older < task_try.submitter.epoch else None
    return None


def forget_left_waiting(task_try: TaskTry) -> None:
    """Delete the record of the batch for which this try, or one before a clear, waited."""
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
