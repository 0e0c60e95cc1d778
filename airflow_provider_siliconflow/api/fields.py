"""
Kinds of fields of what the service sends: each takes any value, and keeps what is within bounds.

A value of another kind than expected counts as missing, so that an odd field never hides the object around it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from airflow_provider_siliconflow.api.bounds import (
    MAX_AMOUNT,
    MAX_COUNT,
    MAX_ID,
    MAX_NAME,
    MAX_STATUS,
    MAX_TIME,
    MAX_URL,
    bounded,
    count,
    identifier,
    moment,
    reference,
    text_within,
)
from airflow_provider_siliconflow.api.redaction import redact_all, valid_text

#: The status of a batch whose answer has none. Like every unknown status it is pending.
UNKNOWN_STATUS = "unknown"

#: Pairs of metadata that are kept, and characters of a key and of a value: more than the service takes.
_MOST_PAIRS, _LONGEST_KEY, _LONGEST_VALUE = 64, 128, 1024
#: Characters of metadata that came as JSON in a text.
_LONGEST_METADATA = 65_536

# Readers ----------------------------------------------------------------------------------------------------


def _status(value: Any) -> str:
    return (text_within(value, MAX_STATUS) if isinstance(value, str) else None) or UNKNOWN_STATUS


def _window(value: Any) -> str | int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value if abs(value) <= MAX_COUNT else None
    return text_within(value, MAX_STATUS)


def _optional_count(value: Any) -> int | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return count(value) if is_number or (isinstance(value, str) and value.isdecimal()) else None


def _text_or_empty(value: Any) -> str:
    return text_within(value, MAX_NAME) or ""


def as_object(value: Any) -> Any:
    """Return an object; anything else is an empty one."""
    return value if isinstance(value, dict | BaseModel) else {}


def _errors(value: Any) -> Any:
    return None if value is None else redact_all(bounded(value))


def _metadata(value: Any) -> dict[str, str]:
    """Read metadata: an object, a text that holds one as JSON, or a list of pairs or of objects."""
    if isinstance(value, str) and len(value) <= _LONGEST_METADATA:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return {}
    found: dict[str, str] = {}
    # Counted as they come: pairs of one and the same key have no end otherwise.
    for key, item in islice(_pairs(value), _MOST_PAIRS):
        if isinstance(key, str):
            text = item if isinstance(item, str) else json.dumps(bounded(item))
            found[valid_text(key[:_LONGEST_KEY])] = valid_text(text[:_LONGEST_VALUE])
    return found


def _pairs(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict):
        yield from value.items()
    for entry in value if isinstance(value, list) else ():
        if isinstance(entry, dict) and "key" in entry:
            yield entry["key"], entry.get("value")
        elif isinstance(entry, dict):
            yield from entry.items()
        elif isinstance(entry, list | tuple) and len(entry) == 2:
            yield entry[0], entry[1]


# Kinds ------------------------------------------------------------------------------------------------------


class Taken:
    """
    Annotates a field: a value that fits is kept as it is, any other is passed through a function.

    Nearly all values fit, and pydantic checks them without calling Python: a triggerer reads thousands of answers.

    :param fits: the schema of values that the function would return unchanged.
    :param otherwise: reads any value, and never raises.
    :param optional: whether ``None`` fits.
    """

    def __init__(self, fits: CoreSchema, otherwise: Callable[[Any], Any], *, optional: bool = True) -> None:
        self._fits = core_schema.nullable_schema(fits) if optional else fits
        self._otherwise = otherwise

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return the schema of the field."""
        otherwise = core_schema.no_info_plain_validator_function(self._otherwise)
        return core_schema.union_schema(
            [self._fits, otherwise],
            mode="left_to_right",
            serialization=core_schema.simple_ser_schema("any"),
        )


def _ascii(limit: int, first: str = "") -> CoreSchema:
    """Return the schema of the most common texts, those of printable ASCII."""
    return core_schema.str_schema(strict=True, max_length=limit, pattern=f"^{first}[ -~]*$")


def _whole(limit: int) -> CoreSchema:
    return core_schema.int_schema(strict=True, ge=0, le=limit)


def _text(limit: int) -> Taken:
    return Taken(_ascii(limit), partial(text_within, limit=limit))


_ID = core_schema.str_schema(strict=True, max_length=MAX_ID, pattern="^[A-Za-z0-9_][!-~]*$")
_URL = core_schema.str_schema(strict=True, max_length=MAX_URL, pattern="^[A-Za-z0-9][!-~]*$")
_PAIRS = core_schema.dict_schema(
    _ascii(_LONGEST_KEY), _ascii(_LONGEST_VALUE), strict=True, max_length=_MOST_PAIRS
)

Id = Annotated[str, BeforeValidator(identifier)]
OptionalId = Annotated[str | None, Taken(_ID, identifier)]
#: A URL or a file id.
Reference = Annotated[str | None, Taken(_URL, reference)]
Count = Annotated[int, Taken(_whole(MAX_COUNT), count, optional=False)]
OptionalCount = Annotated[int | None, Taken(_whole(MAX_COUNT), _optional_count)]
#: Seconds since 1970.
Moment = Annotated[int | float | None, Taken(_whole(MAX_TIME), moment)]
Name = Annotated[str | None, _text(MAX_NAME)]
Amount = Annotated[str | None, _text(MAX_AMOUNT)]
Status = Annotated[str, Taken(_ascii(MAX_STATUS, "[a-z]"), _status, optional=False)]
Window = Annotated[str | int | None, Taken(_ascii(MAX_STATUS), _window)]
Errors = Annotated[Any, Taken(core_schema.none_schema(), _errors)]
Metadata = Annotated[dict[str, str], Taken(_PAIRS, _metadata, optional=False)]
#: A text that is empty rather than ``None``.
Text = Annotated[str, Taken(_ascii(MAX_NAME), _text_or_empty, optional=False)]
