"""Accounts with faulty responses. The DAG `faults` and its test share them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def _fault(match: str, kind: str, **more: Any) -> dict[str, Any]:
    return {"match": match, "kind": kind, **more}


def _refusal(status: int, code: int | None, message: str, **more: Any) -> dict[str, Any]:
    body = {"code": code, "message": message, "data": None}
    return _fault("POST /batches", "status", status=status, body=body, **more)


@dataclass(frozen=True)
class Account:
    """
    An account with faulty responses.

    :param extra: the extra of the connection.
    :param settings: the settings of the emulator.
    :param foreign: number of batches in the account that belong to others.
    :param foreign_age: age of those batches in seconds.
    """

    faults: tuple[dict[str, Any], ...]
    extra: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    foreign: int = 0
    foreign_age: float = 0.0


_RESET = _fault("POST /batches", "reset-after")

#: The batch or file is created, but the response is lost.
LOST_ANSWERS = {
    "reset": Account((_RESET,)),
    "http-500": Account((_fault("POST /batches", "status-after", status=500),)),
    "http-502": Account((_fault("POST /batches", "status-after", status=502),)),
    "http-504": Account((_fault("POST /batches", "status-after", status=504),)),
    "empty": Account((_fault("POST /batches", "empty"),)),
    "truncated": Account((_fault("POST /batches", "truncated-json"),)),
    "slower-than-timeout": Account((_fault("POST /batches", "slow", seconds=6),), extra={"timeout": 2}),
    "late-list": Account((_RESET,), settings={"list_lag_seconds": 7}),
    "cursor-ignored": Account((_RESET,), settings={"ignore_cursor": True}, foreign=250),
    "crowded": Account((_RESET,), foreign=10_000, foreign_age=2 * 86400),
    "crowded-today": Account((_RESET,), settings={"list_lag_seconds": 4}, foreign=10_000, foreign_age=60),
    "upload-reset": Account((_fault("POST /files", "reset-after"),)),
    "upload-502": Account((_fault("POST /files", "status-after", status=502),)),
}

#: Nothing is created, and the response says so. The test replaces `$DATE` with an HTTP date.
REFUSALS = {
    "http-429": Account((_refusal(429, None, "Request was rejected due to rate limiting."),)),
    "http-429-seconds": Account(
        (_refusal(429, None, "rate limiting", headers={"Retry-After": "4"}),), extra={"max_retries": 0}
    ),
    "http-429-date": Account(
        (_refusal(429, None, "rate limiting", headers={"Retry-After": "$DATE"}),), extra={"max_retries": 0}
    ),
    "http-503-50505": Account((_refusal(503, 50505, "Model service overloaded.", times=2),)),
    "http-503-50603": Account((_refusal(503, 50603, "System is too busy now.", times=2),)),
    "upload-429": Account((_fault("POST /files", "status", status=429),)),
    "no-connection": Account(()),
}

#: Every other poll fails, each in a different way, until each has failed once.
_NOISES: tuple[dict[str, Any], ...] = (
    {"kind": "status", "status": 500},
    {"kind": "html", "status": 502},
    {"kind": "html", "status": 200},
    {"kind": "truncated-json"},
    {"kind": "empty"},
    {"kind": "reset"},
    {"kind": "status", "status": 429, "headers": {"Retry-After": "1"}},
    {"kind": "status", "status": 503},
    {"kind": "status", "status": 404},
)
_NOISE = tuple(_fault("GET /batches/*", skip=number, **fault) for number, fault in enumerate(_NOISES))
_REVOKED = (_fault("GET /batches/*", "status", status=401, times=-1, skip=1),)
#: These batches end when the test has seen enough, however long a machine takes to start the tasks.
_SLOW = {"speed": 1.0, "queue_seconds": 36000.0}
WAITS = {
    "wait-noisy-deferred": Account(_NOISE, settings=_SLOW),
    "wait-noisy-poke": Account(_NOISE, settings=_SLOW),
    "wait-noisy-reschedule": Account(_NOISE[:3], settings=_SLOW),
    "wait-401-deferred": Account(_REVOKED, settings=_SLOW),
    "wait-401-poke": Account(_REVOKED, settings=_SLOW),
}
