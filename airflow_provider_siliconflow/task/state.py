"""What Airflow knows of a task: who it is, its earlier tries, its state now."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import conf

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import BaseOperator, Context

    from airflow_provider_siliconflow.jobs.identity import Submitter
    from airflow_provider_siliconflow.jobs.ledger import Owner
    from airflow_provider_siliconflow.jobs.submission import Search


log = logging.getLogger(__name__)
#: States that a task is given by a person who ends it, or by Airflow for one: a run that is marked failed, or that ran
#: into its timeout. Not ``removed``: a DAG file that is broken for a moment does that, and it is undone.
ENDED_STATES = frozenset({"failed", "success", "skipped"})
#: The state of a task that is cleared while it runs.
_CLEARED_STATE = "restarting"
#: Seconds to wait for the state of a task that is being ended; Airflow leaves it five.
_STATE_PATIENCE = 2.0


@cache
def airflow_version() -> tuple[int, int]:
    """Return Airflow's major and minor version."""
    from airflow import __version__

    major, minor = __version__.split(".")[:2]
    return int(major), int(minor)


@dataclass(frozen=True, slots=True)
class TaskTry:
    """
    One try of a task: all that this provider takes from Airflow's context.

    :param ti: the task instance.
    :param submitter: this task instance in this generation of tries.
    :param search: how hard a batch of an earlier try has to be searched for if no complete record is kept.
    :param since: a time before which no try of this run can have submitted, in epoch seconds.
    :param store: Airflow's task state store, or ``None``.
    """

    ti: Any
    submitter: Submitter
    search: Search
    since: float
    store: Any

    @classmethod
    def of(cls, context: Context) -> TaskTry:
        """Return the try that a context is of."""
        from airflow_provider_siliconflow.jobs.identity import Submitter

        ti = context["ti"]
        map_index = getattr(ti, "map_index", None)
        submitter = Submitter(
            dag_id=ti.dag_id,
            run_id=ti.run_id,
            task_id=ti.task_id,
            map_index=-1 if map_index is None else map_index,
            generation=ti.max_tries or 0,
            deployment_id=conf.get("siliconflow", "deployment_id", fallback=None) or None,
        )
        # A first try looks once, since it may not be the first: `airflow tasks test` runs a live task again under the
        # same number, and a run may be deleted and made again under its id. The number alone counts: `retries` may
        # have been edited between two tries.
        search: Search = "once" if ti.try_number <= 1 else "patiently"
        store = context.get("task_state_store")
        return cls(ti, submitter, search, _earliest_start(context), store if _records_in_store() else None)

    @property
    def number(self) -> int:
        """The number of the try, from 1."""
        return int(self.ti.try_number)

    def new_owner(self) -> Owner:
        """Return this try as the owner of its work, with a fresh token."""
        from airflow_provider_siliconflow.jobs.ledger import Owner

        return Owner.new(
            self.submitter, try_number=self.number, try_id=str(getattr(self.ti, "id", None) or "")
        )

    def push(self, key: str, value: Any) -> None:
        """Push to XCom."""
        self.ti.xcom_push(key=key, value=value)


def _records_in_store() -> bool:
    """``[siliconflow] task_state_store = False`` does without Airflow's store."""
    return bool(conf.getboolean("siliconflow", "task_state_store", fallback=True))


def _earliest_start(context: Context) -> float:
    # The run's own start moves when somebody clears another task of it, so the earliest of all is taken.
    run = context["dag_run"]
    times = [
        getattr(run, "start_date", None),
        getattr(run, "run_after", None),
        getattr(run, "logical_date", None),
        getattr(context["ti"], "start_date", None),
    ]
    known = [time.timestamp() for time in times if time is not None]
    return min(known) if known else 0.0


def task_state(ti: Any) -> str | None:
    """
    Return the state that Airflow has of a task instance now; ``None`` where it has none.

    :param ti: the task instance of a context or of a trigger.
    """
    if airflow_version() < (3, 0):
        state = ti.current_state()
    else:
        from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance

        states = RuntimeTaskInstance.get_task_states(
            dag_id=ti.dag_id, task_ids=[ti.task_id], run_ids=[ti.run_id], map_index=ti.map_index
        )
        by_task = states.get(ti.run_id) or {}
        # A mapped task is answered under "task_id_<map index>".
        name = ti.task_id if ti.map_index is None or ti.map_index < 0 else f"{ti.task_id}_{ti.map_index}"
        state = by_task.get(name, by_task.get(ti.task_id))
    return None if state is None else str(getattr(state, "value", state))


def is_ended_by_a_person(ti: Any) -> bool:
    """
    Whether it is certain that a person ended or cleared a running task.

    A deployment, an eviction and Airflow itself, which took the task for dead or lost its database, send the same
    signal. The task's state tells them apart: a person's makes it failed, success, skipped or restarting, before the
    signal. A state that cannot be read in time is no proof.

    :param ti: the task instance of the context.
    """
    found: list[str | None] = []
    errors: list[Exception] = []

    def ask() -> None:
        try:
            found.append(task_state(ti))
        except Exception as exc:  # noqa: BLE001
            errors.append(exc)

    # In a thread, since the signal may have come in the middle of the main one's own talk with Airflow.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_STATE_PATIENCE)
    if not found:
        why = errors[0] if errors else f"no answer within {_STATE_PATIENCE:.0f} s"
        log.warning(
            "The task is being ended, and its state cannot be read (%s), so it is not known by whom. Nothing is "
            "cancelled; a retry takes the batches up.",
            why,
        )
        return False
    if found[0] in ENDED_STATES or found[0] == _CLEARED_STATE:
        return True
    log.warning(
        "The task is being ended in state %s, which nobody set by hand: the worker is stopping, or Airflow is ending "
        "this try. Nothing is cancelled; a retry takes the batches up.",
        found[0],
    )
    return False


def may_end_in_trigger(operator: BaseOperator) -> bool:
    """
    Whether a trigger may end this task without a worker: nothing of it would be lost by that.

    Asset events of outlets, a ``post_execute``, a subclass's own ending and listeners (lineage) run on a worker
    only.
    """
    if operator.outlets or getattr(operator, "_post_execute_hook", None) is not None:
        return False
    ours = ("airflow.", "airflow_provider_siliconflow.")
    for name in ("execute_complete", "post_execute"):
        if not getattr(operator, name).__module__.startswith(ours):
            return False
    if airflow_version() < (3, 3):
        return False
    try:
        from airflow.sdk.listener import get_listener_manager
    except ImportError:
        from airflow.listeners.listener import get_listener_manager
    return not get_listener_manager().has_listeners
