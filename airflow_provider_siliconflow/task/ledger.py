"""The ledger over Airflow's task state store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context

    from airflow_provider_siliconflow.api.client import SiliconFlowClient
    from airflow_provider_siliconflow.jobs.ledger import Ledger
    from airflow_provider_siliconflow.jobs.submission import Submission

from collections.abc import Set
from datetime import timedelta
from typing import TYPE_CHECKING

from airflow.providers.common.compat.sdk import conf

from airflow_provider_siliconflow.task.state import earliest_start, how_to_search

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context

    from airflow_provider_siliconflow.jobs.ledger import Ledger


#: Names in the task state store beside the keys of work: the generation it was there from the start of, and the batch
#: recorded last.
_GENERATION, _LAST = "generation", "last"
#: Entries outlive the longest batch and the files of the service, whatever the store's own default is.
_RETENTION = timedelta(days=31)


class TaskStateLedger:
    """
    The ledger over Airflow's task state store (3.3+), which survives retries, crashes and deferral.

    It is complete where it was there from the first try of the generation on: an earlier try may have run before
    Airflow was upgraded, or with the store switched off.

    :param store: ``context["task_state_store"]``.
    :param generation: of the tries, see :class:`~.jobs.identity.Submitter`.
    :param first: whether no earlier try of this generation can have submitted anything.
    """

    def __init__(self, store: Any, *, generation: int, first: bool) -> None:
        self._store = store
        self._generation = generation
        if first:
            self.set(_GENERATION, {"number": generation})
        self.complete = first or (self.get(_GENERATION) or {}).get("number") == generation

    @staticmethod
    def _name(key: str) -> str:
        return f"siliconflow.{key}"

    def older_batches(self, key: str) -> Set[str]:
        """Return none: a task that submits a single batch has no older one."""
        return frozenset()

    @property
    def submitted(self) -> str | None:
        """The batch that a try of this generation recorded last, whatever its request was."""
        last = self.get(_LAST) or {}
        return last.get("batch_id") if last.get("generation") == self._generation else None

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the entry of a key."""
        value = self._store.get(self._name(key))
        return value if isinstance(value, dict) else None

    def set(self, key: str, entry: dict[str, Any]) -> None:
        """Write the entry of a key."""
        self._store.set(self._name(key), entry, retention=_RETENTION)
        if batch_id := entry.get("batch_id"):
            last = {"batch_id": batch_id, "generation": self._generation}
            self._store.set(self._name(_LAST), last, retention=_RETENTION)

    def delete(self, key: str) -> None:
        """Forget a key."""
        self._store.delete(self._name(key))


def ledger_of(context: Context) -> Ledger:
    """Return the task's ledger; ``[siliconflow] task_state_store = False`` does without Airflow's store."""
    from airflow_provider_siliconflow.jobs.ledger import NoLedger

    store = context.get("task_state_store")
    if store is None or not conf.getboolean("siliconflow", "task_state_store", fallback=True):
        return NoLedger()
    first = how_to_search(context) in ("none", "once")
    return TaskStateLedger(store, generation=context["ti"].max_tries or 0, first=first)


def open_submission(context: Context, client: SiliconFlowClient, ledger: Ledger | None = None) -> Submission:
    """
    Return what submits for this try.

    :param ledger: what outlives a try; by default Airflow's task state store where there is one.
    """
    from airflow_provider_siliconflow.jobs.submission import Submission

    return Submission(
        client,
        ledger=ledger_of(context) if ledger is None else ledger,
        earlier_tries=how_to_search(context),
        since=earliest_start(context),
    )
