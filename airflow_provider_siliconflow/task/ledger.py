"""The ledger over Airflow's task state store."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow_provider_siliconflow.api.client import SiliconFlowClient
    from airflow_provider_siliconflow.jobs.ledger import Ledger, Owner
    from airflow_provider_siliconflow.jobs.states import Ended, State, UploadState
    from airflow_provider_siliconflow.jobs.submission import Submission
    from airflow_provider_siliconflow.task.state import TaskTry


#: Names in the task state store apart from the keys of work: the last try that wrote there, the try that may send, and
#: the last recorded work.
_TRY, _FENCE, _LAST = "try", "fence", "last"
#: Dead batches that are kept for each piece of work.
_MOST_RETIRED = 20
#: How long entries are kept, whatever the store's default is: longer than the longest batch and the service's files.
_RETENTION = timedelta(days=31)


class TaskStateLedger:
    """
    The ledger over Airflow's task state store (3.3+), which survives retries, crashes and deferral.

    It is complete if it was available in every try so far. An earlier try may have run before Airflow was upgraded,
    with the store switched off, or before a clear, which discards the store on some versions of Airflow. Each try
    records its number, so an unbroken sequence of numbers is the proof.

    Two tries may be alive at once if Airflow has lost the heartbeat of one. Each writes its token here when it begins,
    and reads it again before and after it records an intent. A try that finds another token stops.

    :param store: ``context["task_state_store"]``.
    :param epoch: of the tries, see :class:`~.jobs.identity.Submitter`.
    :param owner: this try, with a fresh token.
    """

    #: A damaged entry is read as in doubt, and a discarded store breaks the sequence of tries.
    damaged = False

    def __init__(self, store: Any, *, epoch: int, owner: Owner) -> None:
        self._store = store
        self._epoch = epoch
        self._token = owner.token
        self._known: dict[str, State] = {}
        # Write the token before anything is read: from here on an older try can record nothing more.
        self._set(_FENCE, {"token": owner.token, "who": str(owner)})
        last = self._get(_TRY)
        self.complete = owner.try_number <= 1 or (
            isinstance(last, dict)
            and last.get("complete") is True
            and last.get("number") in (owner.try_number - 1, owner.try_number)
        )
        self._set(_TRY, {"number": owner.try_number, "complete": self.complete})

    def check_owner(self) -> None:
        """
        Check that no other try has taken over the work.

        :raises JobTakenOverError: another try has; nothing may be sent any more.
        """
        from airflow_provider_siliconflow.api.exceptions import JobTakenOverError

        fence = self._get(_FENCE)
        if isinstance(fence, dict) and fence.get("token") == self._token:
            return
        who = fence.get("who") if isinstance(fence, dict) else None
        raise JobTakenOverError(
            f"Another try of this task has taken over the work: {str(who or 'its record is gone')[:300]}. This try "
            "stops and sends nothing more. Its batch is not lost: the other try continues with it."
        )

    @staticmethod
    def _name(key: str) -> str:
        return f"siliconflow.{key}"

    def state(self, key: str) -> State:
        """Return the state of a piece of work."""
        from airflow_provider_siliconflow.jobs.states import decode

        if key not in self._known:
            self._known[key] = decode(self._get(key))
        return self._known[key]

    def record(self, key: str, state: State) -> None:
        """Record the new state of a piece of work."""
        from airflow_provider_siliconflow.jobs.states import Sending, check_transition, encode

        before = self.state(key)
        if isinstance(state, Sending):
            self.check_owner()
        if state == before:
            return
        check_transition(key, before, state)
        self._set(key, encode(state))
        self._known[key] = state
        if isinstance(state, Sending):
            if not isinstance(before, Sending):
                self._set(_LAST, {"key": key, "epoch": self._epoch})
            # A newer try that began in the meantime has not seen this intent, and may be sending.
            self.check_owner()

    def retire(self, key: str) -> None:
        """Plan a piece of work again whose batch died, and keep that batch among the retired ones."""
        from airflow_provider_siliconflow.jobs.states import Ended, Planned, encode

        state = self.state(key)
        if isinstance(state, Ended):
            kept = [encode(each) for each in (*self.retired(key), state)]
            self._set(f"{key}.retired", kept[-_MOST_RETIRED:])
        self.record(key, Planned())

    def retired(self, key: str) -> tuple[Ended, ...]:
        """Return the batches of a piece of work that died before the current one."""
        from airflow_provider_siliconflow.jobs.states import Ended, decode

        stored = self._get(f"{key}.retired")
        states = map(decode, stored if isinstance(stored, list) else ())
        return tuple(state for state in states if isinstance(state, Ended))

    def recorded_batches(self) -> Mapping[str, int]:
        """Return none: the store cannot be searched, and a task that submits a single batch has no others."""
        return {}

    def earlier_work(self, key: str) -> tuple[str, State] | None:
        """Return the last work that a try since the last manual clear recorded, if it has another key."""
        from airflow_provider_siliconflow.jobs.states import decode

        last = self._get(_LAST)
        if not isinstance(last, dict) or last.get("epoch") != self._epoch:
            return None
        earlier = last.get("key")
        if not isinstance(earlier, str) or earlier == key:
            return None
        return earlier, decode(self._get(earlier))

    def next_number(self) -> int:
        """Return the only number: a task that submits a single batch has one intent."""
        return 1

    def upload(self, key: str) -> UploadState:
        """Return the state of an upload."""
        from airflow_provider_siliconflow.jobs.states import decode_upload

        return decode_upload(self._get(key))

    def record_upload(self, key: str, state: UploadState) -> None:
        """Record the new state of an upload."""
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
    Return the submission of a try.

    :param ledger: the record that outlives the try; by default Airflow's task state store if it exists.
    """
    from airflow_provider_siliconflow.jobs.ledger import NoLedger
    from airflow_provider_siliconflow.jobs.submission import Submission

    if ledger is None:
        ledger = NoLedger() if task_try.store is None else ledger_of(task_try)
    return Submission(client, ledger=ledger, earlier_tries=task_try.search, since=task_try.since)


def ledger_of(task_try: TaskTry) -> TaskStateLedger:
    """Return the ledger over the store of a try, which takes over the work from any other try."""
    return TaskStateLedger(task_try.store, epoch=task_try.submitter.epoch, owner=task_try.new_owner())
