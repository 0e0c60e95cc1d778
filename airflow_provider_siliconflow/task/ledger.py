"""The ledger over Airflow's task state store."""

from __future__ import annotations

from collections.abc import Set
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import conf

from airflow_provider_siliconflow.task.state import earliest_start, how_to_search

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context

    from airflow_provider_siliconflow.api.client import SiliconFlowClient
    from airflow_provider_siliconflow.jobs.ledger import Ledger
    from airflow_provider_siliconflow.jobs.states import State, UploadState
    from airflow_provider_siliconflow.jobs.submission import Submission


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
        self._known: dict[str, State] = {}
        if first:
            self._set(_GENERATION, {"number": generation})
        self.complete = first or self._get(_GENERATION) == {"number": generation}

    @staticmethod
    def _name(key: str) -> str:
        return f"siliconflow.{key}"

    def older_batches(self, key: str) -> Set[str]:
        """Return none: a task that submits a single batch has no older one."""
        return frozenset()

    @property
    def submitted(self) -> str | None:
        """The batch that a try of this generation recorded last, whatever its request was."""
        last = self._get(_LAST)
        if not isinstance(last, dict) or last.get("generation") != self._generation:
            return None
        return last.get("batch_id")

    def state(self, key: str) -> State:
        """Return what a piece of work is."""
        from airflow_provider_siliconflow.jobs.states import decode

        if key not in self._known:
            self._known[key] = decode(self._get(key))
        return self._known[key]

    def record(self, key: str, state: State) -> None:
        """Record what a piece of work is now."""
        from airflow_provider_siliconflow.jobs.states import Sent, check_transition, encode

        before = self.state(key)
        if state == before:
            return
        check_transition(key, before, state)
        self._set(key, encode(state))
        self._known[key] = state
        if isinstance(state, Sent):
            self._set(_LAST, {"batch_id": state.batch_id, "generation": self._generation})

    def retire(self, key: str) -> None:
        """Plan a piece of work anew whose batch died."""
        from airflow_provider_siliconflow.jobs.states import Planned

        self.record(key, Planned())

    def next_number(self) -> int:
        """Return the only number there is: a task that submits a single batch has one intent."""
        return 1

    def upload(self, key: str) -> UploadState:
        """Return what an upload is."""
        from airflow_provider_siliconflow.jobs.states import decode_upload

        return decode_upload(self._get(key))

    def record_upload(self, key: str, state: UploadState) -> None:
        """Record what an upload is now."""
        from airflow_provider_siliconflow.jobs.states import encode_upload

        self._set(key, encode_upload(state))

    def _get(self, name: str) -> Any:
        return self._store.get(self._name(name))

    def _set(self, name: str, value: Any) -> None:
        if value is None:
            self._store.delete(self._name(name))
        else:
            self._store.set(self._name(name), value, retention=_RETENTION)


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
