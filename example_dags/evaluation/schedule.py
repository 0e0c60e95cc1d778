"""The time by which a night is wanted."""

from __future__ import annotations

import contextlib
import re
from datetime import datetime, timedelta, timezone

_CLOCK = re.compile(r"([01]?\d|2[0-3]):([0-5]\d)\s*(?:(Z|UTC)|([+-])([01]\d):?([0-5]\d))?")


def live_time(results_by: str | None, now: datetime) -> str | None:
    """
    Return the time at which questions without an answer are asked live, as ISO text with its timezone.

    :param results_by: ``"08:00+08:00"`` is the next eight o'clock at that offset from UTC, ``"08:00"`` in UTC. A text
        such as ``"2026-01-02T08:00:00+08:00"`` is that time. Empty or ``None``: never.
    :param now: with its timezone.
    :raises ValueError: the text is neither.
    """
    text = (results_by or "").strip()
    if not text:
        return None
    if clock := _CLOCK.fullmatch(text):
        hour, minute, _, sign, hours, minutes = clock.groups()
        offset = timedelta(hours=int(hours or 0), minutes=int(minutes or 0)) * (-1 if sign == "-" else 1)
        here = now.astimezone(timezone(offset))
        time = here.replace(hour=int(hour), minute=int(minute), second=0, microsecond=0)
        return (time if time > here else time + timedelta(days=1)).isoformat()
    with contextlib.suppress(ValueError):
        time = datetime.fromisoformat(text)
        if time.tzinfo is not None:
            return time.isoformat()
    raise ValueError(
        f"results_by is {text!r}; it must be a time of day such as '08:00+08:00', or a time with its timezone such as "
        "'2026-01-02T08:00:00+08:00'"
    )
