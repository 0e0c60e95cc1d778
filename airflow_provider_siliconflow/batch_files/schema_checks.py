"""
Checks of JSON schemas whose cost is bounded by the size of the answer.

Those of ``jsonschema`` collect every problem of each branch of ``anyOf`` and ``oneOf``, and compare every item of a
list with every other one: an answer of a megabyte may take gigabytes or hours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jsonschema import ValidationError
from jsonschema.validators import extend


def with_bounded_checks(kind: Any) -> Any:
    """Return a validator class of ``jsonschema`` that decides alike, and names one problem per failed check."""
    return extend(kind, {name: check for name, check in _CHECKS.items() if name in kind.VALIDATORS})


def _any_of(validator: Any, branches: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if not any(_passing(validator, branches, instance)):
        yield ValidationError("matches none of anyOf")


def _one_of(validator: Any, branches: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if sum(_passing(validator, branches, instance)) != 1:
        yield ValidationError("matches none or several of oneOf")


def _passing(validator: Any, branches: Any, instance: Any) -> Iterator[bool]:
    for index, branch in enumerate(branches):
        yield next(validator.descend(instance, branch, schema_path=index), None) is None


def _unique_items(validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if wanted and isinstance(instance, list) and len(set(map(_comparable, instance))) < len(instance):
        yield ValidationError("has items that are equal")


def _comparable(value: Any) -> Any:
    """Return something hashable that is equal for equal JSON values: 1 and 1.0 are, true and 1 are not."""
    if isinstance(value, bool):
        return bool, value
    if isinstance(value, list):
        return list, tuple(map(_comparable, value))
    if isinstance(value, dict):
        return dict, frozenset((name, _comparable(each)) for name, each in value.items())
    return value


_CHECKS = {"anyOf": _any_of, "oneOf": _one_of, "uniqueItems": _unique_items}
