"""What Airflow knows about a task: its identity, its earlier tries and its current state."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from datetime import UTC
from functools import cache
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import conf

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import BaseOperator, Context

    from airflow_provider_siliconflow.jobs.identity import Submitter
    from airflow_provider_siliconflow.jobs.ledger import Owner
    from airflow_provider_siliconflow.jobs.submission import Search


log = logging.getLogger(__name__)
#: States of a task that was ended by hand, directly or with its run, or by the timeout of its run. Not ``removed``: a
#: DAG file that is briefly broken causes that state, and it is reverted.
ENDED_STATES = frozenset({"failed", "success", "skipped"})
#: The state of a running task that was cleared.
_CLEARED_STATE = "restarting"
#: Seconds to wait for the state of a task that is being ended; Airflow leaves it five seconds.
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
    One try of a task: everything that this provider takes from Airflow's context.

    :param ti: the task instance.
    :param submitter: this task instance in this generation of tries.
    :param search: how to search for a batch of an earlier try if there is no complete record.
    :param since: a time before which no try of this run can have submitted, in epoch seconds.
    :param store: Airflow's task state store, or ``None``.
    """

    ti: Any
    submitter: Submitter
    search: Search
    since: float
    store: Any

    @classmethod
    def of(cls, context: Context, *, on_clear: str = "reuse") -> TaskTry:
        """
        Return the try of a context.

        :param on_clear: ``"reuse"`` keeps the identity of the work over a manual clear; ``"resubmit"`` changes it.
        """
        from airflow_provider_siliconflow.jobs.identity import Submitter

        ti, run = context["ti"], context["dag_run"]
        map_index = getattr(ti, "map_index", None)
        # A manual clear raises it, an automatic retry does not.
        epoch = ti.max_tries or 0
        submitter = Submitter(
            dag_id=ti.dag_id,
            run_id=ti.run_id,
            task_id=ti.task_id,
            map_index=-1 if map_index is None else map_index,
            generation=0 if on_clear == "reuse" else epoch,
            deployment_id=conf.get("siliconflow", "deployment_id", fallback=None) or None,
            epoch=epoch,
            run_start=_start_of(run),
            run_was_cleared=getattr(run, "clear_number", None) != 0,
        )
        # Even a first try searches once, since it may not be the first: `airflow tasks test` runs a live task again
        # under the same number, and a run may be deleted and created again under its id. Only the number counts, since
        # `retries` may have been edited between two tries.
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
    """Whether Airflow's store is used; ``[siliconflow] task_state_store = False`` switches it off."""
    return bool(conf.getboolean("siliconflow", "task_state_store", fallback=True))


def _start_of(run: Any) -> str:
    """Return when Airflow started a run, in ISO format; ``""`` if it does not say."""
    start = getattr(run, "start_date", None)
    return "" if start is None else str(start.astimezone(UTC).isoformat(timespec="microseconds"))


def _earliest_start(context: Context) -> float:
    # The run's own start moves if another of its tasks is cleared, so the earliest of all times is used.
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
    Return the current state of a task instance; ``None`` if it has none.

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
        # The answer names a mapped task "task_id_<map index>".
        name = ti.task_id if ti.map_index is None or ti.map_index < 0 else f"{ti.task_id}_{ti.map_index}"
        state = by_task.get(name, by_task.get(ti.task_id))
    return None if state is None else str(getattr(state, "value", state))


def is_ended_by_a_person(ti: Any, *, clear_ends: bool = True) -> bool:
    """
    Whether it is certain that a running task was ended or cleared by hand.

    A deployment, an eviction, and Airflow itself after losing a heartbeat or its database send the same signal. The
    task's state makes the difference: if the task is ended by hand, it is failed, success, skipped or restarting before
    the signal is sent. A state that cannot be read in time proves nothing.

    :param ti: the task instance of the context.
    :param clear_ends: whether a clear counts; not if the next try continues with the work.
    """
    found: list[str | None] = []
    errors: list[Exception] = []

    def ask() -> None:
        try:
            found.append(task_state(ti))
        except Exception as exc:  # noqa: BLE001
            errors.append(exc)

    # In a thread, since the signal may have interrupted the main thread while it was communicating with Airflow.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_STATE_PATIENCE)
    if not found:
        why = errors[0] if errors else f"no answer within {_STATE_PATIENCE:.0f} s"
        log.warning(
            "The task is being ended, but its state cannot be read (%s), so the reason is unknown. Nothing is "
            "cancelled; a retry continues with the batches.",
            why,
        )
        return False
    if found[0] == _CLEARED_STATE and not clear_ends:
        log.info("The task was cleared. Nothing is cancelled; the next try continues with the batches.")
        return False
    if found[0] in ENDED_STATES or found[0] == _CLEARED_STATE:
        return True
    log.warning(
        "The task is being ended in state %s, which was not set by hand: the worker is stopping, or Airflow is ending "
        "this try. Nothing is cancelled; a retry continues with the batches.",
        found[0],
    )
    return False


def may_end_in_trigger(operator: BaseOperator) -> bool:
    """
    Whether a trigger may end this task without a worker, so that nothing is lost.

    Asset events of outlets, ``post_execute``, an overridden ending of a subclass and listeners (lineage) only run on a
    worker.
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
