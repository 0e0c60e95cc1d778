"""The record that outlives a try: the requests that were about to be sent, and their results."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol, TypeVar

from airflow_provider_siliconflow.api.exceptions import JobTakenOverError
from airflow_provider_siliconflow.batch_files.atomic_files import write_json
from airflow_provider_siliconflow.jobs.folder import read_json, read_object, remove_tree
from airflow_provider_siliconflow.jobs.identity import Submitter
from airflow_provider_siliconflow.jobs.states import (
    IN_DOUBT,
    Ended,
    Planned,
    Sending,
    Sent,
    State,
    Uploaded,
    Uploading,
    UploadState,
    check_transition,
    decode,
    decode_upload,
    encode,
    encode_upload,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Keys of work and of uploads are hashes in hexadecimal; a ledger of ours has no other keys.
_KEY = re.compile(r"[0-9A-Za-z_.-]{1,64}")
#: Sizes of the largest ledger and owner file that are read, in bytes. 10,000 batches take about 2 MB.
_MAX_LEDGER_BYTES, _MAX_OWNER_BYTES = 64 << 20, 1 << 16


class Ledger(Protocol):
    """
    A record that outlives a try: the requests that were about to be sent, and their results.

    ``complete`` means that a key without an entry was certainly never sent. ``damaged`` means that entries are lost, so
    that the account must be searched for every key without an entry.
    """

    complete: bool
    damaged: bool

    def state(self, key: str) -> State:
        """Return the state of a piece of work; :class:`~.states.Planned` if nothing is recorded."""
        ...

    def record(self, key: str, state: State) -> None:
        """
        Record the new state of a piece of work.

        A :class:`~.states.Sending` survives a crash once this returns. Its result may be written later, with the next
        intent: a try that finds only the intent searches for the result.

        :raises ImpossibleTransitionError: the state cannot follow the one before.
        :raises JobTakenOverError: a newer try has taken over the job; nothing may be sent.
        """
        ...

    def retire(self, key: str) -> None:
        """
        Plan a piece of work again whose batch died, and keep that batch among the retired ones.

        :raises ImpossibleTransitionError: its batch has not ended, or is completed.
        """
        ...

    def retired(self, key: str) -> tuple[Ended, ...]:
        """Return the batches of a piece of work that died before the current one; rows may be paid for."""
        ...

    def recorded_batches(self) -> Mapping[str, int]:
        """
        Return the batches that are recorded under any key, dead ones included, with their numbers.

        Of two batches with numbers above 0, the one with the larger number is certainly newer; 0 says nothing.
        """
        ...

    def earlier_work(self, key: str) -> tuple[str, State] | None:
        """
        Return the key and state of the work that the same task recorded earlier, for another input.

        ``None`` if it recorded none, or if it has many pieces of work at once.
        """
        ...

    def next_number(self) -> int:
        """Return a number for the next intent or answer, larger than all earlier ones."""
        ...

    def upload(self, key: str) -> UploadState:
        """Return the state of an upload; :class:`~.states.Planned` if nothing is recorded."""
        ...

    def record_upload(self, key: str, state: UploadState) -> None:
        """Record the new state of an upload; an :class:`~.states.Uploading` survives a crash once this returns."""
        ...


class NoLedger:
    """
    A ledger in memory, which does not outlive the try: every retry searches the account.

    Within the try it is a ledger like the others.
    """

    complete = False
    damaged = False

    def __init__(self) -> None:
        self._work: dict[str, State] = {}
        self._uploads: dict[str, UploadState] = {}
        self._retired: dict[str, tuple[Ended, ...]] = {}
        self._number = 0

    def state(self, key: str) -> State:
        """Return the state of a piece of work."""
        return self._work.get(key, Planned())

    def record(self, key: str, state: State) -> None:
        """Record the new state of a piece of work."""
        check_transition(key, self.state(key), state)
        _put(self._work, key, state)
        self._number = max(self._number, _number_of(state))

    def retire(self, key: str) -> None:
        """Plan a piece of work again whose batch died, and keep that batch among the retired ones."""
        state = self.state(key)
        self.record(key, Planned())
        if isinstance(state, Ended):
            self._retired[key] = (*self.retired(key), state)

    def retired(self, key: str) -> tuple[Ended, ...]:
        """Return the batches of a piece of work that died before the current one; rows may be paid for."""
        return self._retired.get(key, ())

    def recorded_batches(self) -> Mapping[str, int]:
        """Return the batches that are recorded under any key, with their numbers."""
        return {
            state.batch_id: state.number for state in self._all_states() if isinstance(state, Sent | Ended)
        }

    def _all_states(self) -> Iterator[State]:
        yield from self._work.values()
        for states in self._retired.values():
            yield from states

    def earlier_work(self, key: str) -> tuple[str, State] | None:
        """Return ``None``: other tries leave no record here."""
        return None

    def next_number(self) -> int:
        """Return a number that is larger than all earlier ones."""
        return self._number + 1

    def upload(self, key: str) -> UploadState:
        """Return the state of an upload."""
        return self._uploads.get(key, Planned())

    def record_upload(self, key: str, state: UploadState) -> None:
        """Record the new state of an upload."""
        _put(self._uploads, key, state)


@dataclass(frozen=True, slots=True)
class Owner:
    """
    The try that owns a job.

    :param token: random; it distinguishes two tries, whatever else they have in common.
    :param try_id: Airflow's id of the try (the task instance's ``id`` on Airflow 3), or ``""``. It shows a resumption
        after a deferral that the job is its own.
    :param host: the host it runs on; like ``pid`` and ``at``, for people who read the file.
    """

    token: str
    dag_id: str
    run_id: str
    task_id: str
    map_index: int
    try_number: int
    try_id: str
    host: str
    pid: int
    at: float

    @classmethod
    def new(cls, submitter: Submitter, *, try_number: int, try_id: str = "") -> Owner:
        """Return an owner with a fresh token for this process."""
        return cls(
            token=secrets.token_hex(16),
            dag_id=submitter.dag_id,
            run_id=submitter.run_id,
            task_id=submitter.task_id,
            map_index=submitter.map_index,
            try_number=try_number,
            try_id=try_id,
            host=socket.gethostname(),
            pid=os.getpid(),
            at=time.time(),
        )

    def __str__(self) -> str:
        """Describe the try, for messages."""
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(self.at))
        return f"try {self.try_number} of {self.task_id} (pid {self.pid} on {self.host}, since {when} UTC)"


class FolderLedger(NoLedger):
    """
    A ledger in a file, which is written completely at each change.

    The result of an intent is written with the next intent or by :meth:`flush`; until then a later try has only the
    intent to go by. So each batch needs one write, and a crash leaves at most one intent open.

    Two tries may be alive at once. Each calls :meth:`claim` when it starts, which writes its token to ``owner.json``
    beside the ledger. Every write of a try that has claimed the job reads the token again, and fails if it is not its
    own. An intent is checked before and after it is written: since a newer try reads the ledger after writing its
    token, either it sees the intent, or this try sees the token.

    :param path: the file.
    :param complete: whether a key without an entry was certainly never sent.
    :param is_new: whether the job is new, so that no file is expected; otherwise a ledger without its file is not
        complete.
    """

    def __init__(self, path: Any, *, complete: bool, is_new: bool = False) -> None:
        super().__init__()
        self._path = path
        self._owner_path = path.parent / "owner.json"
        self._expected_complete = complete
        self._is_new = is_new
        self._token: str | None = None
        self._read()

    def _read(self) -> None:
        parts, is_read = self._stored()
        self._unwritten = False
        self._work = dict(_entries(parts.get("work"), decode))
        self._uploads = dict(_entries(parts.get("uploads"), decode_upload))
        self._retired = dict(_entries(parts.get("retired"), _decode_retired))
        self._deadline = _decode_deadline(parts.get("deadline"))
        self._written_by = parts.get("owner")
        self._number = max((_number_of(each) for each in self._all_states()), default=0)
        # If the file is damaged or missing, only the account can be asked, also by every later try.
        self.complete = (
            self._expected_complete
            and is_read
            and parts.get("complete", True) is True
            and all(map(_is_whole, (parts.get(name, {}) for name in ("work", "uploads", "retired"))))
        )
        self.damaged = self._expected_complete and not self.complete

    def _stored(self) -> tuple[dict[str, Any], bool]:
        """Return the content of the file, and whether it is certainly complete."""
        try:
            found = read_object(
                self._path, otherwise="the account is searched for what was sent", max_bytes=_MAX_LEDGER_BYTES
            )
        except FileNotFoundError:
            return {}, self._is_new
        return ({}, False) if found is None else (found, True)

    # States -----------------------------------------------------------------------------------------------

    def record(self, key: str, state: State) -> None:
        """Record the new state of a piece of work; an intent is written before this returns."""
        if self.state(key) == state:
            # A repeated intent adds no information, but the owner is checked for every intent.
            if isinstance(state, Sending):
                self.check_owner()
            return
        self._set(key, state)
        if isinstance(state, Sending):
            self._write()
            # A newer try that claimed the job in the meantime has not seen this intent, and may be sending.
            self.check_owner()
        elif isinstance(state, Planned):
            self._write()

    def record_all(self, states: Mapping[str, State]) -> None:
        """Record the states of several pieces of work in one write, with everything that is not written yet."""
        for key, state in states.items():
            check_transition(key, self.state(key), state)
        for key, state in states.items():
            self._set(key, state)
        self.flush()

    def _set(self, key: str, state: State) -> None:
        super().record(key, state)
        self._unwritten = True

    def retire(self, key: str) -> None:
        """
        Plan a piece of work again whose batch died, and keep that batch among the retired ones, in one write.

        :raises ImpossibleTransitionError: its batch has not ended, or is completed.
        """
        state = self.state(key)
        self._set(key, Planned())
        if isinstance(state, Ended):
            self._retired[key] = (*self.retired(key), state)
        self._write()

    @property
    def deadline(self) -> float | None:
        """When this try's wait ends, in epoch seconds; ``None`` leaves it to the batches."""
        return self._deadline

    @deadline.setter
    def deadline(self, value: float | None) -> None:
        self._deadline = value
        self._unwritten = True
        self.flush()

    def record_upload(self, key: str, state: UploadState) -> None:
        """Record the new state of an upload; an intent is written before this returns."""
        if self.upload(key) == state:
            return
        super().record_upload(key, state)
        self._unwritten = True
        if not isinstance(state, Uploaded):
            self._write()

    def work(self) -> Iterator[tuple[str, State]]:
        """Yield the key and state of each recorded piece of work."""
        yield from list(self._work.items())

    @property
    def open_batches(self) -> tuple[str, ...]:
        """What may run and be billed: ids of batches that have not ended, and keys of work with unknown outcome."""
        return tuple(
            state.batch_id if isinstance(state, Sent) else key
            for key, state in self._work.items()
            if isinstance(state, Sent | Sending)
        )

    def remove_folder(self) -> bool:
        """
        Remove the folder of the ledger, unless batches of it may still run.

        :returns: whether it was removed.
        :raises JobTakenOverError: a newer try has taken over the job.
        """
        self.check_owner()
        if open_batches := self.open_batches:
            log.warning(
                "%s is kept as the only record of %d batches that have not ended, or may exist (%s)",
                self._path.parent,
                len(open_batches),
                ", ".join(open_batches[:5]),
            )
            return False
        remove_tree(self._path.parent)
        return True

    def flush(self) -> None:
        """Write everything that is not written yet."""
        if self._unwritten:
            self._write()

    def _write(self) -> None:
        self.check_owner()
        write_json(
            self._path,
            {
                "owner": self._token or self._written_by,
                "complete": self.complete,
                "deadline": self._deadline,
                "work": {key: encode(state) for key, state in self._work.items()},
                "uploads": {key: encode_upload(state) for key, state in self._uploads.items()},
                "retired": {key: [encode(each) for each in states] for key, states in self._retired.items()},
            },
        )
        self._unwritten = False

    # The owner --------------------------------------------------------------------------------------------

    def owner(self) -> Owner | None:
        """Return the try that claimed the job last; ``None`` if none did, or its file is damaged."""
        return _decode_owner(
            read_json(self._owner_path, otherwise="the job counts as unclaimed", max_bytes=_MAX_OWNER_BYTES)
        )

    def claim(self, owner: Owner) -> None:
        """
        Take the job over from the try that had it, and read the record of that try.

        :param owner: this try, with a fresh token.
        """
        before = self.owner()
        if before is not None:
            log.info("This try takes over the job from %s", before)
        write_json(self._owner_path, asdict(owner))
        self._read()
        if before is not None:
            self._distrust_others(before.token)
        self._token = owner.token
        self._write()

    def _distrust_others(self, token: str) -> None:
        """
        Treat the record as damaged if an older try overwrote it after the last owner had claimed the job.

        That happens if the older try was suspended between its check and its write.
        """
        if self._written_by != token:
            log.warning(
                "%s was written by a try that no longer owned the job; the account is searched", self._path
            )
            self.complete, self.damaged = False, True

    def continue_as(self, token: str) -> None:
        """
        Continue with a job that another process of the same try has claimed.

        :param token: the token of its owner.
        :raises JobTakenOverError: a newer try has claimed the job since.
        """
        self._token = token
        self.check_owner()
        self._distrust_others(token)

    def check_owner(self) -> None:
        """
        Check that no other try has claimed the job; a job that this process did not claim is not checked.

        :raises JobTakenOverError: another try has; nothing may be sent or written any more.
        """
        if self._token is None:
            return
        owner = self.owner()
        if owner is None:
            raise JobTakenOverError(
                f"{self._owner_path} is gone: another try of this task has finished the job, or somebody removed its "
                "folder. This try sends and writes nothing more; a retry finds the submitted batches in the account."
            )
        if owner.token != self._token:
            raise JobTakenOverError(
                f"Another try of this task has taken over the job: {owner}. This try stops and sends nothing more. "
                "Its batches are not lost: the other try continues with them."
            )


def _is_whole(part: Any) -> bool:
    """Whether a part of a ledger has only valid keys."""
    return isinstance(part, dict) and all(map(_KEY.fullmatch, part))


def _entries(stored: Any, read: Callable[[Any], T]) -> Iterator[tuple[str, T]]:
    """Yield the entries of one part of a ledger; a damaged entry is in doubt, and never trusted."""
    if not isinstance(stored, dict):
        return
    for key, entry in stored.items():
        if not _KEY.fullmatch(key):
            log.warning("The ledger contains an invalid key, which is dropped: %.80r", key)
            continue
        # Planned states are not stored, so an entry of one is damaged too.
        state = read({} if entry is None else entry)
        if state == IN_DOUBT or (isinstance(state, Uploading) and not state.at):
            log.warning("The ledger's entry %s is damaged; the account is searched for it", key)
        yield key, state


def _put(entries: dict[str, Any], key: str, state: State | UploadState) -> None:
    """Store a state; planned ones are not stored."""
    if isinstance(state, Planned):
        entries.pop(key, None)
    else:
        entries[key] = state


def _number_of(state: State) -> int:
    return state.number if isinstance(state, Sending | Sent | Ended) else 0


def _decode_retired(stored: Any) -> tuple[Ended, ...]:
    found = map(decode, stored if isinstance(stored, list) else ())
    return tuple(state for state in found if isinstance(state, Ended))


def _decode_deadline(stored: Any) -> float | None:
    usable = isinstance(stored, int | float) and not isinstance(stored, bool) and 0 <= stored < 2**53
    return float(stored) if usable else None


def _decode_owner(stored: Mapping[str, Any] | None) -> Owner | None:
    if stored is None:
        return None
    with contextlib.suppress(KeyError, TypeError, ValueError):
        owner = Owner(**{each.name: stored[each.name] for each in fields(Owner)})
        texts = (owner.token, owner.dag_id, owner.run_id, owner.task_id, owner.try_id, owner.host)
        numbers = (owner.map_index, owner.try_number, owner.pid, owner.at)
        if all(isinstance(text, str) and len(text) <= 1000 for text in texts) and all(
            isinstance(number, int | float) and abs(number) < 2**53 for number in numbers
        ):
            return owner
    return None
