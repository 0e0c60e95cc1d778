"""
What the service takes as arguments: its limits, and checks that name the argument.

Imports nothing heavy, since what is known when a DAG is parsed is checked then.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from airflow_provider_siliconflow.api.exceptions import InvalidInputError

#: The only endpoint that batches are offered for.
CHAT_COMPLETIONS = "/v1/chat/completions"

#: The service's limits.
MIN_WINDOW_HOURS, MAX_WINDOW_HOURS = 24, 336
MAX_METADATA_PAIRS, MAX_METADATA_KEY, MAX_METADATA_VALUE = 16, 64, 512
MAX_FILE_BYTES = 10**9
MAX_FILE_LINES = 5000

#: Metadata keys of this provider: the identity of a piece of work, and, if there is room, a readable name, the task
#: instance, the deployment and the start of the run.
IDENTITY_KEYS = (
    "airflow_work",
    "airflow_task",
    "airflow_submitter",
    "airflow_deployment",
    "airflow_run_start",
)


def check_completion_window(value: Any) -> str:
    """
    Return a completion window as the service takes it (``"<n>h"``).

    :param value: ``"24h"``, a whole number of hours, or a ``timedelta`` of whole hours.
    :raises InvalidInputError: it is none of these, or outside 24 to 336 hours.
    """
    hours: float | None = None
    if isinstance(value, timedelta):
        hours = value.total_seconds() / 3600
    elif isinstance(value, int) and not isinstance(value, bool):
        hours = value
    elif isinstance(value, str) and (match := re.fullmatch(r"\s*(\d{1,9})\s*h?\s*", value)):
        hours = int(match[1])
    if hours is None or hours != int(hours) or not MIN_WINDOW_HOURS <= hours <= MAX_WINDOW_HOURS:
        raise InvalidInputError(
            f"completion_window must be '<n>h', a whole number of hours or a timedelta, from "
            f"{MIN_WINDOW_HOURS}h to {MAX_WINDOW_HOURS}h; got {value!r}"
        )
    return f"{int(hours)}h"


def check_metadata(value: Any, *, identified: bool = False) -> dict[str, str]:
    """
    Return metadata that the service will take.

    :param value: a mapping of strings, or ``None``.
    :param identified: whether the batch carries its identity besides, which takes one pair and five names.
    :raises InvalidInputError: too many pairs, a name of this provider's, or a key or value that is too long or no
        string.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InvalidInputError(f"metadata must be a mapping of strings; got {type(value).__name__}")
    room = MAX_METADATA_PAIRS - identified
    if len(value) > room:
        extra = (
            f" (one of the service's {MAX_METADATA_PAIRS} holds the identity that keeps a retry from paying twice)"
            if identified
            else ""
        )
        raise InvalidInputError(f"metadata may hold at most {room} pairs{extra}; got {len(value)}")
    if identified and (taken := set(IDENTITY_KEYS) & set(value)):
        raise InvalidInputError(f"metadata key {min(taken)!r} is used by this provider; choose another")
    for key, item in value.items():
        if not isinstance(key, str) or not 1 <= len(key) <= MAX_METADATA_KEY or not _can_be_sent(key):
            raise InvalidInputError(
                f"metadata key {key!r} must be a string of 1 to {MAX_METADATA_KEY} characters"
            )
        if isinstance(item, str) and not _can_be_sent(item):
            raise InvalidInputError(f"metadata[{key!r}] is not text that can be sent (a lone surrogate)")
        if not isinstance(item, str) or len(item) > MAX_METADATA_VALUE:
            raise InvalidInputError(
                f"metadata[{key!r}] must be a string of at most {MAX_METADATA_VALUE} characters; "
                f"got {type(item).__name__}{f' of {len(item)}' if isinstance(item, str) else ''}"
            )
    return dict(value)


def _can_be_sent(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_replace(value: Any) -> dict[str, Any] | None:
    """
    Return a ``replace`` object that the service will take.

    :param value: a mapping such as ``{"model": "..."}``, or ``None``.
    :raises InvalidInputError: it is no mapping, is not JSON, or its model is not a name.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise InvalidInputError(
            f"replace must be an object such as {{'model': 'deepseek-ai/DeepSeek-V3'}}; got {type(value).__name__}"
        )
    if "model" in value:
        _model_name("replace['model']", value["model"])
    _check_json("replace", value)
    return dict(value) or None


def check_models(model: Any, models: Any) -> tuple[str, ...]:
    """
    Return the models that a job runs over; empty if the rows name theirs.

    :param model: one model, or ``None``.
    :param models: several, as a list or as the keys of a mapping; or ``None``.
    :raises InvalidInputError: both are given, a list is empty or names a model twice, or a name is none.
    """
    if model is not None and models is not None:
        raise InvalidInputError("give either model or models, not both")
    if model is not None:
        return (_model_name("model", model),)
    if models is None:
        return ()
    if isinstance(models, str | bytes) or not isinstance(models, Sequence | Mapping):
        raise InvalidInputError(
            f"models must be a list of model names, or a mapping of them to body parameters; got {models!r}"
        )
    if not models:
        raise InvalidInputError("models is empty; leave it out if the rows name their models")
    names = tuple(_model_name(f"models[{number}]", name) for number, name in enumerate(models))
    # Folders are named after them, and some file systems do not tell case.
    if len({name.casefold() for name in names}) != len(names):
        raise InvalidInputError(f"models names one twice: {list(names)!r}")
    return names


def _model_name(argument: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InvalidInputError(
            f"{argument} must be the name of a model such as 'deepseek-ai/DeepSeek-V3'; got {value!r}"
        )
    return value.strip()


def _check_json(argument: str, value: Mapping[str, Any]) -> None:
    try:
        # UTF-8 has no lone surrogates.
        json.dumps(dict(value), allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as exc:
        raise InvalidInputError(f"{argument} must be JSON: {exc}") from exc


def check_endpoint(value: Any) -> str:
    """
    Return the endpoint.

    :raises InvalidInputError: it is not the one the service offers batches for.
    """
    if value != CHAT_COMPLETIONS:
        raise InvalidInputError(f"endpoint must be {CHAT_COMPLETIONS!r}, the only one; got {value!r}")
    return CHAT_COMPLETIONS


#: Seconds of the longest time that may be given: three centuries.
_LONGEST_TIME = 1e10

#: Most attempts a row may get.
MAX_ROW_ATTEMPTS = 10

_MOST = {
    "max_rows_per_batch": MAX_FILE_LINES,
    "max_bytes_per_batch": MAX_FILE_BYTES,
    "max_in_flight": None,
    "max_row_attempts": MAX_ROW_ATTEMPTS,
}


def check_limits(**limits: Any) -> None:
    """
    Check the limits of a job, as many of them as are given.

    :param limits: by name; ``max_in_flight`` and ``max_error_rate`` may be ``None``.
    :raises InvalidInputError: one is not a whole number in its range, or not a share.
    """
    for name, value in limits.items():
        if value is None and name in ("max_in_flight", "max_error_rate"):
            continue
        if name == "max_error_rate":
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise InvalidInputError(f"max_error_rate must be a share from 0 to 1; got {value!r}")
            continue
        most = _MOST[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most and value > most):
            limit = f" of at most {most}" if most else ""
            raise InvalidInputError(f"{name} must be a whole number above 0{limit}; got {value!r}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """
    Return a value that must be one of a few.

    :raises InvalidInputError: it is none of them.
    """
    if not isinstance(value, str) or value not in choices:
        raise InvalidInputError(f"{name} must be {' or '.join(map(repr, choices))}; got {value!r}")
    return value


def check_seconds(name: str, value: Any) -> None:
    """
    Check a time.

    :raises InvalidInputError: it is not a number of seconds above 0, or no time that a calendar can hold.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _LONGEST_TIME:
        raise InvalidInputError(
            f"{name} must be a number of seconds above 0 (and below {_LONGEST_TIME:.0e}), or a timedelta; got {value!r}"
        )


#: The latest ``live_after``, in seconds: nothing of a batch is left after the longest window.
_LATEST_LIVE = MAX_WINDOW_HOURS * 3600


@dataclass(frozen=True, slots=True)
class LiveAfter:
    """
    When the rows that are still open are asked one by one.

    :param seconds: this long after the job began; ``None`` if ``at`` is given.
    :param at: epoch seconds.
    """

    seconds: float | None = None
    at: float | None = None

    def time(self, began: float) -> float:
        """
        Return the time in epoch seconds.

        :param began: when the job began, in epoch seconds.
        """
        return self.at if self.at is not None else began + (self.seconds or 0.0)


def check_live_after(name: str, value: Any) -> LiveAfter:
    """
    Read when the open rows are asked one by one.

    :param name: what the argument is called.
    :param value: seconds, a ``timedelta``, a ``datetime`` with a time zone, or the ISO text of one.
    :raises InvalidInputError: it is none of these.
    """
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, int | float) and not isinstance(value, bool):
        if 0 <= value <= _LATEST_LIVE:
            return LiveAfter(seconds=float(value))
    elif isinstance(value, str | datetime):
        at = value if isinstance(value, datetime) else _time_of(value)
        if at is not None and at.tzinfo is None:
            raise InvalidInputError(
                f"{name} must have a time zone, such as '{at.isoformat()}+08:00'; got {str(value)!r}"
            )
        if at is not None:
            return LiveAfter(at=max(at.timestamp(), 0.0))
    raise InvalidInputError(
        f"{name} must be seconds from 0 to {_LATEST_LIVE}, a timedelta, or a time with its zone such as "
        f"'2026-01-31T08:00:00+08:00'; got {value!r}"
    )


def _time_of(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text.strip())
    except ValueError:
        return None


def check_concurrency(name: str, value: Any) -> int:
    """
    Check how many requests may be under way at once.

    :raises InvalidInputError: it is no whole number from 1 to 1000.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1000:
        raise InvalidInputError(f"{name} must be a whole number from 1 to 1000; got {value!r}")
    return value


def check_identifier(name: str, value: Any) -> str:
    """
    Return an id of a batch or a file.

    :param name: the argument, for the message.
    :raises InvalidInputError: it is empty or no string (often: the upstream task pushed no XCom).
    """
    if not isinstance(value, str) or not value.strip() or value.strip() in ("None", "null"):
        raise InvalidInputError(
            f"{name} must be an id such as 'batch_...' or 'file-...'; got {value!r}. "
            "If it is templated, check that the upstream task pushed it."
        )
    return value.strip()


def check_identifiers(name: str, value: Any) -> list[str]:
    """Return a list of ids from one id or several; see :func:`check_identifier`."""
    values: Iterable[Any] = value if isinstance(value, list | tuple | set | frozenset) else [value]
    ids = list(dict.fromkeys(check_identifier(name, item) for item in values))
    if not ids:
        raise InvalidInputError(f"{name} must name at least one batch; got an empty list")
    return ids
