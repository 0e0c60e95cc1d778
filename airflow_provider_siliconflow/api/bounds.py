"""
Limits of values that come from outside: numbers, times, texts and nested values.

Everything that has passed through here can be encoded wherever it may travel: as JSON, as MessagePack (64-bit numbers)
and as JSONB in Postgres (no NUL).
"""

from __future__ import annotations

import math
from typing import Any

from airflow_provider_siliconflow.api.redaction import valid_text

#: The largest count: floating-point numbers, and JSON in a browser, are exact up to here.
MAX_COUNT = 2**53
#: The latest time, in seconds since 1970: about the year 36,800.
MAX_TIME = 2**40
#: Characters of the longest id. A longer one is refused and not cut: its start could be another id.
MAX_ID = 512
#: Characters of the longest status.
MAX_STATUS = 64
#: Characters of the longest short text: a name, an endpoint, a window.
MAX_NAME = 1024
#: Characters of the longest URL. Signed URLs have 2,000 to 4,000.
MAX_URL = 16_384
#: Characters of the longest amount of money.
MAX_AMOUNT = 64


def text_within(value: Any, limit: int) -> str | None:
    """
    Return a text, cut at ``limit`` characters.

    :param value: a text or a number; anything else is ``None``.
    """
    if isinstance(value, str):
        return valid_text(value[:limit])
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(number_within(value))
    return None


def identifier(value: Any) -> str | None:
    """
    Return an id, or ``None``; an id is never cut.

    :param value: a text of 1 to 512 printable characters without spaces, or a whole number.
    """
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_COUNT:
        return str(value)
    if not isinstance(value, str) or len(value) > MAX_ID:
        return None
    # Dots alone would change the path.
    usable = value.isprintable() and value.strip(".") and not any(map(str.isspace, value))
    return value if usable else None


def reference(value: Any) -> str | None:
    """
    Return a URL or a file id, or ``None``; neither is ever cut.

    :param value: a text of 1 to 16,384 characters, or a whole number.
    """
    if isinstance(value, str):
        return value if 0 < len(value) <= MAX_URL and valid_text(value) == value else None
    return identifier(value)


def count(value: Any) -> int:
    """
    Return a count from 0 to 2**53; 0 if there is none.

    :param value: a number or its digits.
    """
    if isinstance(value, str) and value.isdecimal():
        # Python refuses to read more than a few thousand digits.
        value = int(value) if len(value) < 20 else MAX_COUNT
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        return 0
    return int(min(max(value, 0), MAX_COUNT))


def moment(value: Any) -> int | float | None:
    """
    Return a time in seconds since 1970; ``None`` for one that is not a number or beyond any calendar.

    :param value: a number or its digits.
    """
    if isinstance(value, str) and value.isdecimal() and len(value) < 20:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if 0 <= value <= MAX_TIME else None


def number_within(value: int | float) -> int | float:
    """Return a number that fits into 64 bits and is finite; 0 for one that is not a number."""
    if isinstance(value, float) and not math.isfinite(value):
        return 0 if math.isnan(value) else math.copysign(MAX_COUNT, value)
    if isinstance(value, int) and abs(value) > MAX_COUNT:
        return MAX_COUNT if value > 0 else -MAX_COUNT
    return value


class _Budget:
    """How much of one value may still be kept."""

    def __init__(self, items: int, characters: int) -> None:
        self.items, self.characters = items, characters

    def text(self, text: str, limit: int) -> str:
        kept = valid_text(text[: min(limit, self.characters)])
        self.characters -= len(kept)
        return kept


def bounded(
    value: Any, *, depth: int = 4, items: int = 200, characters: int = 20_000, longest: int = 1000
) -> Any:
    """
    Return as much of a JSON value as fits.

    :param value: anything that the service may have sent.
    :param depth: levels of lists and objects; what is deeper becomes ``"..."``.
    :param items: items of all lists and objects together; further ones are left out.
    :param characters: characters of all texts together, keys included.
    :param longest: characters of one text.
    """
    return _bounded(value, depth, longest, _Budget(items, characters))


def _bounded(value: Any, depth: int, longest: int, budget: _Budget) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return number_within(value)
    if not isinstance(value, list | dict):
        return budget.text(value if isinstance(value, str) else str(value), longest)
    if depth <= 0:
        return budget.text("...", longest)
    kept: list[Any] | dict[str, Any] = [] if isinstance(value, list) else {}
    for item in value.items() if isinstance(value, dict) else value:
        if budget.items <= 0 or budget.characters <= 0:
            break
        budget.items -= 1
        if isinstance(kept, list):
            kept.append(_bounded(item, depth - 1, longest, budget))
        else:
            key = budget.text(str(item[0]), 64)
            kept[key] = _bounded(item[1], depth - 1, longest, budget)
    return kept
