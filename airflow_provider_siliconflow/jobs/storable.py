"""
Limits for values that go to Airflow: a trigger's event, a manifest in XCom.

Both pass through a database and several encoders. Postgres does not take NUL, msgpack no numbers beyond 64 bits, UTF-8
no lone surrogates, and every encoder has limits of depth and size. An answer of the service may contain any of these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

#: Largest whole number of a signed 64-bit column.
_LARGEST = (1 << 63) - 1
#: Levels of lists and objects, characters of a text, and entries of a list or object that are kept.
_MOST_LEVELS, _MOST_CHARACTERS, _MOST_ENTRIES = 16, 4000, 100_000


def storable(value: Any, *, levels: int = _MOST_LEVELS) -> Any:
    """
    Return a JSON value that every encoder and database of Airflow takes; anything beyond the limits is cut.

    :param value: JSON types; anything else becomes text.
    :param levels: levels of lists and objects that are kept.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return storable_text(value)
    if isinstance(value, int):
        return int(min(max(value, -_LARGEST), _LARGEST))
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping | list | tuple) and levels <= 0:
        return "..."
    if isinstance(value, Mapping):
        items = [(storable_text(str(key)), item) for key, item in value.items()]
        return {key: storable(item, levels=levels - 1) for key, item in items[:_MOST_ENTRIES]}
    if isinstance(value, list | tuple):
        return [storable(item, levels=levels - 1) for item in value[:_MOST_ENTRIES]]
    return storable_text(str(value))


def storable_text(text: str, limit: int = _MOST_CHARACTERS) -> str:
    """
    Return the start of a text, without NUL and lone surrogates.

    :param limit: most characters.
    """
    text = text[:limit]
    if "\x00" in text:
        text = text.replace("\x00", "\ufffd")
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
