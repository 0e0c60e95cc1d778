"""Between a running Airflow task and the rooms below: its identity, its ledger, its way to fail."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import AirflowFailException, AirflowSkipException, conf

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import BaseOperator, Context

    from airflow_provider_siliconflow.api.client import SiliconFlowClient
    from airflow_provider_siliconflow.jobs.identity import Submitter
    from airflow_provider_siliconflow.jobs.submission import Ledger, Search, Submission

log = logging.getLogger(__name__)


@cache
def airflow_version() -> tuple[int, int]:
    """Return Airflow's major and minor version."""
    from airflow import __version__

    major, minor = __version__.split(".")[:2]
    return int(major), int(minor)


@contextlib.contextmanager
def task_errors(*, fail_fast: bool, soft_fail: bool = False) -> Iterator[None]:
    """
    Turn errors that no retry can mend into ``AirflowFailException``.

    :param fail_fast: ``False`` leaves every error to the task's retries.
    :param soft_fail: skip the task instead of failing it.
    """
    from airflow_provider_siliconflow.api.exceptions import SiliconFlowError

    try:
        yield
    except SiliconFlowError as exc:
        if soft_fail:
            raise AirflowSkipException(f"Skipping, since soft_fail is set: {exc}") from exc
        if fail_fast and not exc.retryable:
            raise AirflowFailException(f"{exc} (A retry would end the same way, so none is made.)") from exc
        raise


def submitter_of(context: Context) -> Submitter:
    """Return who submits: this task instance in this generation of tries."""
    from airflow_provider_siliconflow.jobs.identity import Submitter

    ti = context["ti"]
    map_index = getattr(ti, "map_index", None)
    return Submitter(
        dag_id=ti.dag_id,
        run_id=ti.run_id,
        task_id=ti.task_id,
        map_index=-1 if map_index is None else map_index,
        generation=ti.max_tries or 0,
    )


def open_submission(context: Context, client: SiliconFlowClient, ledger: Ledger | None = None) -> Submission:
    """
    Return what submits for this try.

    :param ledger: what outlives a try; by default Airflow's task state store where there is one.
    """
    from airflow_provider_siliconflow.jobs.submission import Submission

    return Submission(
        client,
        ledger=ledger_of(context) if ledger is None else ledger,
        earlier_tries=_search(context),
        since=_earliest_start(context),
    )


def _search(context: Context) -> Search:
    """
    Say how hard an earlier try of this generation has to be looked for.

    A clear by a person starts a new generation at a higher try number; the arithmetic that shows it is off
    when ``retries`` was edited between two tries, so only the very first try searches nothing at all.
    """
    ti = context["ti"]
    if ti.try_number <= 1:
        return "none"
    first_of_generation = (ti.max_tries or 0) - (context["task"].retries or 0) + 1
    return "once" if ti.try_number <= first_of_generation else "patiently"


def _earliest_start(context: Context) -> float:
    """
    Return a time before which no try of this run can have submitted (epoch seconds).

    The run's own start moves when somebody clears another task of it, so the earliest of all is taken.
    """
    run = context["dag_run"]
    times = [
        getattr(run, "start_date", None),
        getattr(run, "run_after", None),
        getattr(run, "logical_date", None),
        getattr(context["ti"], "start_date", None),
    ]
    known = [time.timestamp() for time in times if time is not None]
    return min(known) if known else 0.0


class TaskStateLedger:
    """
    The ledger over Airflow's task state store (3.3+), which survives retries, crashes and deferral.

    :param store: ``context["task_state_store"]``.
    """

    complete = True

    def __init__(self, store: Any) -> None:
        self._store = store

    @staticmethod
    def _name(key: str) -> str:
        return f"siliconflow.{key}"

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the entry of a key."""
        value = self._store.get(self._name(key))
        return value if isinstance(value, dict) else None

    def set(self, key: str, entry: dict[str, Any]) -> None:
        """Write the entry of a key."""
        self._store.set(self._name(key), entry)

    def delete(self, key: str) -> None:
        """Forget a key."""
        self._store.delete(self._name(key))


def ledger_of(context: Context) -> Ledger:
    """Return the task's ledger; ``[siliconflow] task_state_store = False`` does without Airflow's store."""
    from airflow_provider_siliconflow.jobs.submission import NoLedger

    store = context.get("task_state_store")
    if store is None or not conf.getboolean("siliconflow", "task_state_store", fallback=True):
        return NoLedger()
    return TaskStateLedger(store)


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


def rendered_list(value: Any) -> Any:
    """
    Return a list that a template rendered to text as a list again; anything else as it is.

    What a mapped task returned comes as a sequence of Airflow's own, which reads its items one by one.
    """
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return list(value)
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    import ast

    for read in (json.loads, ast.literal_eval):
        try:
            items = read(value)
        except (ValueError, SyntaxError):
            continue
        if isinstance(items, list):
            return items
    return value
