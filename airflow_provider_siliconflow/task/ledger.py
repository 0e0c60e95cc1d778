"""The ledger over Airflow's task state store."""

from __future__ import annotations

from collections.abc import Set
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow_provider_siliconflow.api.client import SiliconFlowClient
    from airflow_provider_siliconflow.jobs.ledger import Ledger
    from airflow_provider_siliconflow.jobs.states import State, UploadState
    from airflow_provider_siliconflow.jobs.submission import Submission
    from airflow_provider_siliconflow.task.state import TaskTry


#: Name in the task state store beside the keys of work: the last try that wrote there.
_TRY = "try"
#: Entries outlive the longest batch and the files of the service, whatever the store's own default is.
_RETENTION = timedelta(days=31)


class TaskStateLedger:
    """
    The ledger over Airflow's task state store (3.3+), which survives retries, crashes and deferral.

    It is complete if it was there in every try so far. An earlier try may have run before Airflow was upgraded, with
    the store switched off, or before a clear, at which some versions of Airflow discard the store. Each try leaves its
    number, so a chain of numbers without a gap is the proof.

    :param store: ``context["task_state_store"]``.
    :param try_number: of this try, from 1.
    """

    def __init__(self, store: Any, *, try_number: int) -> None:
        self._store = store
        self._known: dict[str, State] = {}
        last = self._get(_TRY)
        self.complete = try_number <= 1 or (
            isinstance(last, dict)
            and last.get("complete") is True
            and last.get("number") in (try_number - 1, try_number)
        )
        self._set(_TRY, {"number": try_number, "complete": self.complete})

    @staticmethod
    def _name(key: str) -> str:
        return f"siliconflow.{key}"

    def older_batches(self, key: str) -> Set[str]:
        """Return none: a task that submits a single batch has no older one."""
        return frozenset()

    def state(self, key: str) -> State:
        """Return what a piece of work is."""
        from airflow_provider_siliconflow.jobs.states import decode

        if key not in self._known:
            self._known[key] = decode(self._get(key))
        return self._known[key]

    def record(self, key: str, state: State) -> None:
        """Record what a piece of work is now."""
        from airflow_provider_siliconflow.jobs.states import check_transition, encode

        before = self.state(key)
        if state == before:
            return
        check_transition(key, before, state)
        self._set(key, encode(state))
        self._known[key] = state

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


def open_submission(task_try: TaskTry, client: SiliconFlowClient, ledger: Ledger | None = None) -> Submission:
    """
    Return what submits for a try.

    :param ledger: what outlives the try; by default Airflow's task state store if there is one.
    """
    from airflow_provider_siliconflow.jobs.ledger import NoLedger
    from airflow_provider_siliconflow.jobs.submission import Submission

    if ledger is None:
        store = task_try.store
        ledger = NoLedger() if store is None else TaskStateLedger(store, try_number=task_try.number)
    return Submission(client, ledger=ledger, earlier_tries=task_try.search, since=task_try.since)
