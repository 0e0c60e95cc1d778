"""
The states of a piece of work and the transitions between them; both are defined only here.

A piece of work is one batch that must be created exactly once::

    Planned -> Sending -> Sent -> Ended -> Planned      a batch that died is replaced
    Planned -> Refused -> Planned                       the next try asks again

``Sending`` is written before the request leaves and means that the batch may exist. Code that finds it searches the
account, whatever else is known. A file to be uploaded once has similar states: see :data:`UploadState`.

A ledger stores these states, possibly in a place to which others can write. So :func:`decode` trusts nothing: a damaged
or unknown entry is read as :data:`IN_DOUBT`, which makes the reader search.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

from airflow_provider_siliconflow.api.exceptions import SiliconFlowError
from airflow_provider_siliconflow.api.models import TERMINAL_STATUSES, Batch, BatchStatus

#: Longest id, message and status that are kept, in characters.
MAX_ID, _MAX_MESSAGE, _MAX_STATUS = 256, 2000, 64
#: Messages that are kept of an ended batch, and earlier files that are kept of an upload.
MAX_ERRORS, MAX_EARLIER_FILES = 3, 16
#: Largest number that is accepted: every JSON reader can hold it.
_MAX_NUMBER = 2**53 - 1
#: The service's ids consist of letters, digits and marks that need no escape in a path.
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:~+=@-]*")
_COUNTS = ("total", "completed", "failed")


class ImpossibleTransitionError(SiliconFlowError):
    """A piece of work cannot make this transition. Nothing was sent and nothing was recorded."""

    retryable = False


# Batches --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Planned:
    """Nothing is recorded. In a complete ledger this means that nothing was ever sent."""


@dataclass(frozen=True, slots=True)
class Sending:
    """
    The request was about to leave, so a batch may exist.

    :param number: increases with each intent and each answer that a ledger records: a batch with a smaller number other
        than 0 existed before this request was first about to leave.
    :param at: when this was recorded, in epoch seconds of the worker's clock.
    :param accepted: whether the service's answer may mean "created". If so, the account is searched from now on, and
        the request is never sent again.
    """

    number: int
    at: float
    accepted: bool = False


@dataclass(frozen=True, slots=True)
class Sent:
    """
    The batch exists.

    :param batch_id: its id.
    :param number: the number of the answer that named it, see :class:`Sending`; 0 if a search found it.
    :param terminal_since: when it was first seen in a terminal status without being settled, in epoch seconds of the
        worker's clock; 0 if that has not happened. See :mod:`~.jobs.settled`.
    """

    batch_id: str
    number: int = 0
    terminal_since: float = 0.0


@dataclass(frozen=True, slots=True)
class Ended:
    """
    The batch is in a terminal status.

    :param batch_id: its id.
    :param number: as in :class:`Sent`.
    :param status: ``completed``, ``expired``, ``failed`` or ``cancelled``.
    :param counts: ``total``, ``completed`` and ``failed``, in rows.
    :param errors: the service's first messages about the batch as a whole, at most three.
    :param at: when it was first seen in that status, in epoch seconds of the worker's clock; 0 if unknown.
    """

    batch_id: str
    number: int
    status: str
    counts: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    errors: tuple[str, ...] = ()
    at: float = 0.0

    @classmethod
    def of(cls, batch: Batch, number: int, *, at: float = 0.0) -> Ended:
        """
        Return the record of an ended batch.

        :param number: as in :class:`Sent`.
        :param at: when it was first seen in its status; 0 if it belongs to an earlier try, so that this is unknown.
        """
        counts = batch.request_counts
        numbers = {"total": counts.total, "completed": counts.completed, "failed": counts.failed}
        return cls(batch.id, number, batch.status, numbers, tuple(batch.error_messages[:MAX_ERRORS]), at)

    def __post_init__(self) -> None:
        """Limit the counts and messages, and freeze the counts."""
        counts = {name: _clamped(self.counts.get(name)) for name in _COUNTS if name in self.counts}
        object.__setattr__(self, "counts", MappingProxyType(counts))
        object.__setattr__(
            self, "errors", tuple(_cut(text, _MAX_MESSAGE) for text in self.errors[:MAX_ERRORS])
        )

    def __hash__(self) -> int:
        """Hash without the counts: a mapping has no hash."""
        return hash((self.batch_id, self.number, self.status))


@dataclass(frozen=True, slots=True)
class Refused:
    """
    The service refused the batch in this try.

    :param status: HTTP status of the refusal.
    :param message: the service's message, at most 2,000 characters.
    """

    status: int
    message: str

    def __post_init__(self) -> None:
        """Limit the message."""
        object.__setattr__(self, "message", _cut(self.message, _MAX_MESSAGE))


State: TypeAlias = Planned | Sending | Sent | Ended | Refused

#: The state of an entry that cannot be trusted: something may have been sent, so the account is searched.
IN_DOUBT = Sending(number=0, at=0.0)

#: Which state may follow which; :func:`check_transition` adds the rules that depend on their content.
TRANSITIONS: Mapping[type[State], frozenset[type[State]]] = MappingProxyType(
    {
        # Sent: an earlier try's batch was found in the account.
        Planned: frozenset({Sending, Sent, Refused}),
        # Planned: the service certainly created nothing. Sending: its answer left that open.
        Sending: frozenset({Sending, Planned, Sent, Refused}),
        # Sent: the account has the work under another id. Sending: the record proved wrong, so the account decides.
        Sent: frozenset({Sent, Sending, Ended}),
        # Planned: the batch died, or answered no row, and is to be replaced. Sending: as above.
        Ended: frozenset({Planned, Sending}),
        Refused: frozenset({Planned}),
    }
)


def check_transition(key: str, before: State, after: State) -> None:
    """
    Refuse an impossible transition. Recording the same state again is not a transition and always allowed.

    :param key: identity of the work, for the message.
    :raises ImpossibleTransitionError: ``after`` cannot follow ``before``.
    """
    if after == before:
        return
    possible = type(after) in TRANSITIONS[type(before)]
    match before, after:
        case Sending(accepted=True), Sending(accepted=False) | Planned() | Refused():
            # A batch that may have been created is only superseded by a batch.
            possible = False
        case Sending(number=old), Sending(number=new):
            possible = new == old or old == 0
        case Sent(batch_id=sent), Ended(batch_id=ended):
            possible = sent == ended
        case Ended(status=BatchStatus.COMPLETED, counts=counts), Planned():
            # Replacing it would pay twice, unless it certainly answered no row.
            possible = counts.get("total", 0) > 0 and counts.get("completed") == 0
    if not possible:
        raise ImpossibleTransitionError(
            f"Work {key} cannot change from {before} to {after}. This step sent nothing. Either the provider has a "
            "bug, or the ledger was edited by hand."
        )


def encode(state: State) -> dict[str, Any] | None:
    """Return what a ledger stores for a state, as JSON types; ``None`` if it stores nothing."""
    match state:
        case Planned():
            return None
        case Sending(number, at, accepted):
            return {"state": "sending", "number": number, "at": at, "accepted": accepted}
        case Sent(batch_id, number, terminal_since):
            return {
                "state": "sent",
                "batch_id": batch_id,
                "number": number,
                "terminal_since": terminal_since,
            }
        case Ended(batch_id, number, status, counts, errors, at):
            return {
                "state": "ended",
                "batch_id": batch_id,
                "number": number,
                "status": status,
                "counts": dict(counts),
                "errors": list(errors),
                "at": at,
            }
        case Refused(status, message):
            return {"state": "refused", "status": status, "message": message}


def decode(entry: Any) -> State:
    """
    Read what a ledger stored for a piece of work.

    :param entry: JSON of any shape, or ``None`` if nothing is stored.
    :returns: the state; :data:`IN_DOUBT` if the entry is damaged or unknown.
    """
    if entry is None:
        return Planned()
    if not isinstance(entry, dict):
        return IN_DOUBT
    try:
        return _decode(dict(entry))
    except (TypeError, ValueError, KeyError, OverflowError):
        return IN_DOUBT


def _decode(entry: dict[str, Any]) -> State:
    match entry.pop("state"):
        case "sending":
            return Sending(_number(entry["number"]), _time(entry["at"]), _flag(entry["accepted"]))
        case "sent":
            return Sent(
                checked_id(entry["batch_id"]), _number(entry["number"]), _time(entry["terminal_since"])
            )
        case "ended":
            return Ended(
                checked_id(entry["batch_id"]),
                _number(entry["number"]),
                _terminal(entry["status"]),
                {
                    name: _number(value)
                    for name, value in _mapping(entry["counts"]).items()
                    if name in _COUNTS
                },
                tuple(_text(message, _MAX_MESSAGE) for message in _list(entry["errors"])),
                _time(entry["at"]),
            )
        case "refused":
            return Refused(_number(entry["status"]), _text(entry["message"], _MAX_MESSAGE))
    raise ValueError("not a known state")


# Uploads --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Uploading:
    """
    The upload was about to begin, so a file may exist.

    :param at: when this was recorded, in epoch seconds of the worker's clock.
    :param earlier: earlier files of the same work; batches over them are still ours.
    """

    at: float
    earlier: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Uploaded:
    """
    The file exists.

    :param file_id: its id.
    :param earlier: files of the same work that it replaced, newest last; batches over them are still ours.
    """

    file_id: str
    earlier: tuple[str, ...] = ()


#: ``Uploading`` and ``Uploaded`` may follow each other in any order, since an upload is free of charge.
UploadState: TypeAlias = Planned | Uploading | Uploaded


def files_of(state: UploadState) -> tuple[str, ...]:
    """Return the files that are recorded for an upload, the current one last."""
    match state:
        case Planned():
            return ()
        case Uploading(earlier=earlier):
            return earlier
        case Uploaded(file_id, earlier):
            return (*earlier, file_id)


def encode_upload(state: UploadState) -> dict[str, Any] | None:
    """Return what a ledger stores for an upload, as JSON types; ``None`` if it stores nothing."""
    match state:
        case Planned():
            return None
        case Uploading(at, earlier):
            return {"state": "uploading", "at": at, "earlier": list(earlier)}
        case Uploaded(file_id, earlier):
            return {"state": "uploaded", "file_id": file_id, "earlier": list(earlier)}


def decode_upload(entry: Any) -> UploadState:
    """
    Read what a ledger stored for an upload.

    :param entry: JSON of any shape, or ``None`` if nothing is stored.
    :returns: the state; :class:`Uploading` if the entry is damaged or unknown, since a file may exist.
    """
    if entry is None:
        return Planned()
    if not isinstance(entry, dict):
        return Uploading(at=0.0)
    try:
        earlier = tuple(checked_id(each) for each in _list(entry["earlier"]))[-MAX_EARLIER_FILES:]
        if entry["state"] == "uploading":
            return Uploading(_time(entry["at"]), earlier)
        if entry["state"] == "uploaded":
            return Uploaded(checked_id(entry["file_id"]), earlier)
    except (TypeError, ValueError, KeyError, OverflowError):
        pass
    return Uploading(at=0.0)


# Checks of stored values ----------------------------------------------------------------------------------


def checked_id(value: Any) -> str:
    """
    Return an id of the service.

    :raises ValueError: it is not a text, too long, or has characters that ids of the service do not have.
    """
    if not isinstance(value, str) or len(value) > MAX_ID or not _ID.fullmatch(value):
        raise ValueError("not an id")
    return value


def _number(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_NUMBER:
        raise ValueError("not a count")
    return value


def _clamped(value: Any) -> int:
    usable = isinstance(value, int) and not isinstance(value, bool)
    return min(max(value, 0), _MAX_NUMBER) if usable else 0


def _time(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MAX_NUMBER:
        raise ValueError("not a time")
    return float(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError("not a flag")
    return value


def _text(value: Any, most: int) -> str:
    if not isinstance(value, str):
        raise TypeError("not a text")
    return _cut(value, most)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError("not a list")
    return value


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError("not a mapping")
    return value


def _terminal(value: Any) -> str:
    if value not in TERMINAL_STATUSES:
        raise ValueError("not a terminal status")
    return str(value)


def _cut(text: str, most: int) -> str:
    """Return the start of a text without characters that stores and logs cannot hold."""
    return text[:most].replace("\x00", "\ufffd").encode("utf-8", "replace").decode("utf-8")
