"""Arguments that a template rendered to text, converted back to their types."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

#: How templates begin: Jinja's marks, and those that DAGs commonly use instead.
_MARKS = ("{{", "{%", "[[", "[%", "<<", "<%", "${")


def is_templated(value: Any) -> bool:
    """Whether the value of an argument is only known when the task runs: a template, or another task's output."""
    if isinstance(value, str):
        return any(mark in value for mark in _MARKS)
    return hasattr(value, "resolve")


def is_templated_inside(value: Any) -> bool:
    """Whether a mapping or list contains a value that is only known when the task runs."""
    if isinstance(value, Mapping):
        return any(is_templated(each) or is_templated_inside(each) for pair in value.items() for each in pair)
    if isinstance(value, list | tuple):
        return any(is_templated(each) or is_templated_inside(each) for each in value)
    return False


def rendered_list(value: Any) -> Any:
    """
    Return a list that a template rendered to text as a list again; anything else unchanged.

    The output of a mapped task comes as one of Airflow's lazy sequences.
    """
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return list(value)
    return _read(value, "[", list)


def rendered_mapping(value: Any) -> Any:
    """Return a mapping that a template rendered to text as a mapping again; anything else unchanged."""
    if isinstance(value, Mapping):
        return value
    return _read(value, "{", dict)


def _read(value: Any, first: str, kind: type) -> Any:
    if _is_nothing(value):
        return None
    if not isinstance(value, str) or not value.lstrip().startswith(first):
        return value
    import ast

    for read in (json.loads, ast.literal_eval):
        try:
            found = read(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, kind):
            return found
    return value


def rendered_text(value: Any) -> Any:
    """Return ``None`` for a template that rendered to nothing; anything else unchanged."""
    return None if _is_nothing(value) else value


def rendered_number(value: Any) -> Any:
    """Return a number that a template rendered to text as a number again; anything else unchanged."""
    if _is_nothing(value):
        return None
    if isinstance(value, str):
        try:
            value = float(value) if any(mark in value for mark in ".eEnN") else int(value)
        except ValueError:
            return value
    # JSON and native templates may render a whole number as a float.
    return int(value) if isinstance(value, float) and value.is_integer() else value


def rendered_seconds(value: Any) -> Any:
    """Return a number, a ``timedelta`` or the text of a number as seconds; anything else unchanged."""
    return value.total_seconds() if isinstance(value, timedelta) else rendered_number(value)


def _is_nothing(value: Any) -> bool:
    return isinstance(value, str) and value.strip() in ("", "None", "null")
