"""
Values that satisfy a JSON schema.

Covers what pydantic and hand-written schemas for language models use. A keyword that is not covered makes a
schema impossible rather than its values wrong, and :class:`SchemaError` says which.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from airflow_provider_siliconflow.emulator.draws import Draw
from airflow_provider_siliconflow.emulator.numbers import numbers_within
from airflow_provider_siliconflow.emulator.patterns import PatternError, matching_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_UNSUPPORTED = frozenset(
    {
        "not",
        "if",
        "contains",
        "dependencies",
        "dependentRequired",
        "dependentSchemas",
        "patternProperties",
        "propertyNames",
        "unevaluatedItems",
        "$dynamicRef",
        "$recursiveRef",
    }
)
#: Deeper than this, what may be left out is left out.
_FULL_DEPTH = 3
_MOST_CHARACTERS = 1_000_000
_MOST_ITEMS = 10_000
#: A keyword that tells the type where ``type`` is absent.
_TYPE_BY_KEYWORD = {
    "properties": "object",
    "required": "object",
    "additionalProperties": "object",
    "minProperties": "object",
    "items": "array",
    "prefixItems": "array",
    "minItems": "array",
    "uniqueItems": "array",
    "pattern": "string",
    "format": "string",
    "minLength": "string",
    "maxLength": "string",
    "minimum": "number",
    "maximum": "number",
    "exclusiveMinimum": "number",
    "exclusiveMaximum": "number",
    "multipleOf": "number",
}
_PYTHON_TYPES: dict[type, str] = {
    type(None): "null",
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
}
_ANY: dict[str, Any] = {}
_ANNOTATIONS = frozenset({"title", "description", "default", "examples", "deprecated", "discriminator"})
#: How a keyword that two merged schemas have is merged; of any other, the first is kept.
_MERGED_BY: dict[str, Callable[[Any, Any], Any]] = {
    **dict.fromkeys(("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"), max),
    **dict.fromkeys(("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"), min),
    "required": lambda one, other: [*one, *(name for name in other if name not in one)],
    "properties": lambda one, other: {
        **one,
        **{name: {"allOf": [one[name], schema]} if name in one else schema for name, schema in other.items()},
    },
    "enum": lambda one, other: [value for value in one if value in other],
}

_canonical = msgspec.json.Encoder(order="sorted").encode


class SchemaError(ValueError):
    """No value can be made for a schema."""


def type_of(value: object) -> str:
    """Return the JSON type of a value."""
    return _PYTHON_TYPES[type(value)]


class SchemaWriter:
    """
    Makes values of one schema.

    :param root: the whole schema.
    :raises SchemaError: it has no value, or a keyword that is not covered.
    """

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = dict(root)
        self._problem = "nothing satisfies it"
        # By identity: the schemas live as long as their root, and the merged ones are kept here.
        self._resolved: dict[int, tuple[object, dict[str, Any]]] = {}
        self._heights: dict[int, float] = {}
        self._found_numbers: dict[tuple[int, str], list[int | float]] = {}
        self._visited: set[int] = set()
        self._open: set[int] = set()
        try:
            self._settle_heights()
            if self._height(self._root) == math.inf:
                raise SchemaError(self._problem)
            self._value(self._root, Draw(0), ["text"], 0)
        except (TypeError, AttributeError, KeyError, ZeroDivisionError, RecursionError) as error:
            raise SchemaError(f"it is no JSON schema: {error}") from None
        except (SchemaError, PatternError):
            raise
        except ValueError as error:
            raise SchemaError(f"it is no JSON schema: {error}") from None

    def value(self, draw: Draw, words: Sequence[str]) -> Any:
        """
        Return a value.

        :param draw: decides which.
        :param words: what free texts are made of.
        """
        try:
            return self._value(self._root, draw, words or ["text"], 0)
        except (SchemaError, PatternError):
            # An unlucky choice, such as too few different items. This one was tried at the start.
            return self._value(self._root, Draw(0), ["text"], 0)

    def types(self, name: str | None = None) -> frozenset[str]:
        """Return the JSON types of the value, or of one of its properties; none when any is allowed."""
        if name is None:
            return self._types(self._root)
        return self._types(self._resolve(self._root).get("properties", {}).get(name, {}))

    def required(self) -> list[str]:
        """Return the properties that the value must have."""
        return list(self._resolve(self._root).get("required", ()))

    def allows(self, name: str, value: Any) -> bool:
        """Return whether a text or number surely may be the value of a property."""
        schema = self._resolve(self._resolve(self._root).get("properties", {}).get(name, {}))
        if "enum" in schema:
            return value in schema["enum"]
        if schema.keys() - _ANNOTATIONS - {"type"}:
            return False
        allowed = self._types(schema)
        return not allowed or type_of(value) in allowed or ("number" in allowed and type(value) is int)

    # -- what a schema says -----------------------------------------------------------------------------

    def _resolve(self, schema: object) -> dict[str, Any]:
        """Return a schema with its ``$ref`` and ``allOf`` merged in."""
        if schema is True:
            return _ANY
        if not isinstance(schema, dict):
            raise SchemaError("nothing satisfies false" if schema is False else f"{schema!r} is no schema")
        if "$ref" not in schema and "allOf" not in schema:
            return schema
        found = self._resolved.get(id(schema))
        if found is None:
            if id(schema) in self._open:
                raise SchemaError("a $ref leads to itself")
            self._open.add(id(schema))
            try:
                merged = {name: value for name, value in schema.items() if name not in ("$ref", "allOf")}
                parts = list(schema.get("allOf", ()))
                if "$ref" in schema:
                    parts.append(self._referenced(schema["$ref"]))
                for part in parts:
                    merged = _merged(merged, self._resolve(part))
            finally:
                self._open.remove(id(schema))
            found = self._resolved[id(schema)] = (schema, merged)
        return found[1]

    def _referenced(self, reference: object) -> object:
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise SchemaError(f"the $ref {reference!r} does not lead into the schema")
        found: Any = self._root
        for step in reference[1:].split("/")[1:]:
            name = step.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
                found = found[int(name)]
            elif isinstance(found, dict) and name in found:
                found = found[name]
            else:
                raise SchemaError(f"the $ref {reference!r} leads to nothing")
        return found

    def _branches(self, schema: dict[str, Any]) -> list[dict[str, Any]] | None:
        """Return the alternatives of a schema, each with what holds for all."""
        for keyword in ("anyOf", "oneOf"):
            if keyword not in schema:
                continue
            found = self._resolved.get(id(schema[keyword]))
            if found is None:
                rest = {name: value for name, value in schema.items() if name != keyword}
                plain = not rest.keys() - _ANNOTATIONS
                branches = [
                    self._resolve(one) if plain else _merged(rest, self._resolve(one))
                    for one in schema[keyword]
                ]
                found = self._resolved[id(schema[keyword])] = (schema[keyword], {"branches": branches})
            return list(found[1]["branches"])
        return None

    def _types(self, schema: object) -> frozenset[str]:
        schema = self._resolve(schema)
        if "const" in schema:
            return frozenset({type_of(schema["const"])})
        if "enum" in schema:
            return frozenset(map(type_of, schema["enum"]))
        branches = self._branches(schema)
        if branches is not None:
            each = [self._types(branch) for branch in branches]
            return frozenset().union(*each) if all(each) else frozenset()
        return frozenset(_listed_types(schema))

    # -- how deep its smallest value is -----------------------------------------------------------------

    def _settle_heights(self) -> None:
        """
        Find the depth of the smallest value of every schema; infinite where there is none.

        A schema may contain itself, so begin with infinity everywhere and repeat until nothing changes.
        """
        while True:
            before = dict(self._heights)
            self._visited.clear()
            self._measure(self._root)
            if self._heights == before:
                return

    def _height(self, schema: object) -> float:
        try:
            return self._heights.get(id(self._resolve(schema)), math.inf)
        except SchemaError as error:
            self._problem = str(error)
            return math.inf

    def _measure(self, given: object) -> float:
        try:
            schema = self._resolve(given)
            if id(schema) not in self._visited:
                self._visited.add(id(schema))
                self._heights[id(schema)] = self._measured(schema)
        except (SchemaError, PatternError) as error:
            self._problem = str(error)
            return math.inf
        return self._heights.get(id(schema), math.inf)

    def _measured(self, schema: dict[str, Any]) -> float:
        unsupported = sorted(_UNSUPPORTED & schema.keys())
        if unsupported:
            raise SchemaError(f"{unsupported[0]} is not supported")
        if "const" in schema:
            return 0
        if "enum" in schema:
            if not schema["enum"]:
                raise SchemaError("an enum has no values")
            return 0
        branches = self._branches(schema)
        if branches is not None:
            return min(map(self._measure, branches), default=math.inf)
        return min(self._possible_types(schema))[0]

    def _possible_types(self, schema: dict[str, Any]) -> list[tuple[float, str]]:
        """Return the types that a value can have, each with the depth of its smallest value."""
        names = _listed_types(schema) or ("string",)
        if len(names) == 1:
            return [(self._measured_type(schema, names[0]), names[0])]
        found = []
        for name in names:
            try:
                height = self._measured_type(schema, name)
            except (SchemaError, PatternError) as error:
                self._problem = str(error)
            else:
                found.append((height, name))
        return [one for one in found if one[0] < math.inf] or [(math.inf, names[0])]

    def _measured_type(self, schema: dict[str, Any], name: str) -> float:
        if name == "object":
            properties = schema.get("properties", {})
            heights = {one: self._measure(properties[one]) for one in properties}
            extra = schema.get("additionalProperties", True)
            extra_height = self._measure(extra) if extra is not False else math.inf
            needed = [heights.get(one, extra_height) for one in schema.get("required", ())]
            if schema.get("minProperties", 0) > len(properties):
                needed.append(extra_height)
            return 1 + max(needed, default=0)
        if name == "array":
            heads, rest = _items(schema)
            needed = [self._measure(one) for one in heads]
            rest_height = self._measure(rest) if rest is not False else math.inf
            if schema.get("minItems", 0) > len(heads):
                needed.append(rest_height)
            if schema.get("minItems", 0) > min(schema.get("maxItems", math.inf), _MOST_ITEMS):
                raise SchemaError("an array has too many items")
            return 1 + max(needed, default=0)
        if name == "string":
            if schema.get("minLength", 0) > min(schema.get("maxLength", math.inf), _MOST_CHARACTERS):
                raise SchemaError("a text must be longer than it may be")
            if "pattern" in schema:
                _matching(schema, lambda limit: 0 if limit < 3 else limit // 2)
            return 0
        if name in ("number", "integer"):
            if not self._numbers(schema, name):
                raise SchemaError("no number lies within the limits")
            return 0
        if name in ("boolean", "null"):
            return 0
        raise SchemaError(f"the type {name!r} is not known")

    # -- making values ----------------------------------------------------------------------------------

    def _value(self, given: object, draw: Draw, words: Sequence[str], depth: int) -> Any:
        schema = self._resolve(given)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return schema["enum"][draw.below(len(schema["enum"]))]
        branches = self._branches(schema)
        if branches is not None:
            possible = [branch for branch in branches if self._height(branch) < math.inf]
            if any(_listed_types(branch) in (("number",), ("integer",)) for branch in possible):
                # Pydantic's Decimal: a number, or any text by its schema, yet not in truth.
                possible = [
                    branch
                    for branch in possible
                    if branch.keys() - _ANNOTATIONS != {"type"} or branch["type"] != "string"
                ]
            if depth > _FULL_DEPTH:
                return self._value(min(possible, key=self._height), draw, words, depth)
            return self._value(possible[draw.below(len(possible))], draw, words, depth)
        names = _listed_types(schema) or ("string",)
        name = names[0]
        if len(names) > 1:
            types = self._possible_types(schema)
            name = (types[draw.below(len(types))] if depth <= _FULL_DEPTH else min(types))[1]
        if name == "object":
            return self._object(schema, draw, words, depth)
        if name == "array":
            return self._array(schema, draw, words, depth)
        if name == "string":
            return _text(schema, draw, words)
        if name in ("number", "integer"):
            numbers = self._numbers(schema, name)
            return numbers[draw.below(len(numbers))]
        return bool(draw.below(2)) if name == "boolean" else None

    def _numbers(self, schema: dict[str, Any], name: str) -> list[int | float]:
        found = self._found_numbers.get((id(schema), name))
        if found is None:
            found = numbers_within(schema, whole=name == "integer")
            self._found_numbers[id(schema), name] = found
        return found

    def _object(self, schema: dict[str, Any], draw: Draw, words: Sequence[str], depth: int) -> dict[str, Any]:
        properties = schema.get("properties", {})
        required = schema.get("required", ())
        room = schema.get("maxProperties", math.inf) - len(required)
        wanted = schema.get("minProperties", 0)
        made: dict[str, Any] = {}
        for name, one in properties.items():
            if name not in required:
                # The first ones fill up what minProperties asks for.
                optional = depth <= _FULL_DEPTH and draw.below(4)
                if room < 1 or not (optional or len(required) < wanted) or self._height(one) == math.inf:
                    continue
                room -= 1
            made[name] = self._value(one, draw, words, depth + 1)
        extra = schema.get("additionalProperties", True)
        for name in required:
            if name not in made:
                made[name] = self._value(extra, draw, words, depth + 1)
        if not properties and isinstance(extra, dict) and depth <= _FULL_DEPTH and room >= 1:
            wanted = max(wanted, len(required) + 1)
        while len(made) < wanted:
            made[f"key_{len(made) + 1}"] = self._value(extra, draw, words, depth + 1)
        return made

    def _array(self, schema: dict[str, Any], draw: Draw, words: Sequence[str], depth: int) -> list[Any]:
        heads, rest = _items(schema)
        least, most = schema.get("minItems", 0), schema.get("maxItems", math.inf)
        made = [self._value(one, draw, words, depth + 1) for one in heads[: int(min(most, len(heads)))]]
        count = max(least, len(made))
        if depth <= _FULL_DEPTH and rest is not False and self._height(rest) < math.inf:
            count = int(min(most, count + 1 + draw.below(2)))
        seen = {_canonical(one) for one in made}
        for _ in range(20 * (count - len(made))):
            if len(made) == count:
                break
            one = self._value(rest, draw, words, depth + 1)
            if schema.get("uniqueItems") and _canonical(one) in seen:
                continue
            seen.add(_canonical(one))
            made.append(one)
        if len(made) < least:
            raise SchemaError("an array has too few different items")
        return made


def _listed_types(schema: dict[str, Any]) -> tuple[str, ...]:
    given = schema.get("type")
    if isinstance(given, str):
        return (given,)
    if isinstance(given, list):
        return tuple(given)
    for keyword, name in _TYPE_BY_KEYWORD.items():
        if keyword in schema:
            return (name,)
    return ()


def _items(schema: dict[str, Any]) -> tuple[list[Any], Any]:
    """Return the schemas of the first items, and that of the others."""
    items = schema.get("items", True)
    if isinstance(items, list):
        return items, schema.get("additionalItems", True)
    return schema.get("prefixItems", []), items


def _merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    merged = {**other, **one}
    for name in one.keys() & other.keys():
        if name in _MERGED_BY:
            merged[name] = _MERGED_BY[name](one[name], other[name])
    return merged


def _matching(schema: dict[str, Any], choose: Callable[[int], int]) -> str:
    least, most = schema.get("minLength", 0), schema.get("maxLength", math.inf)
    return matching_text(schema["pattern"], choose, lambda text: least <= len(text) <= most)


def _text(schema: dict[str, Any], draw: Draw, words: Sequence[str]) -> str:
    if "pattern" in schema:
        return _matching(schema, draw.below)
    write = _FORMATS.get(schema.get("format", ""))
    if write is not None:
        return write(draw)
    start, count = draw.below(len(words)), 1 + draw.below(4)
    text = " ".join(words[(start + step) % len(words)] for step in range(count))
    least, most = schema.get("minLength", 0), schema.get("maxLength", math.inf)
    if len(text) < least:
        text += "." * (least - len(text))
    return text if len(text) <= most else text[: int(most)]


def _date(draw: Draw) -> str:
    return f"{2000 + draw.below(30)}-{1 + draw.below(12):02}-{1 + draw.below(28):02}"


def _time(draw: Draw) -> str:
    return f"{draw.below(24):02}:{draw.below(60):02}:{draw.below(60):02}Z"


_FORMATS: dict[str, Callable[[Draw], str]] = {
    "date": _date,
    "time": _time,
    "date-time": lambda draw: f"{_date(draw)}T{_time(draw)}",
    "duration": lambda draw: f"PT{1 + draw.below(59)}M",
    "email": lambda draw: f"user{draw.below(10_000)}@example.com",
    "hostname": lambda draw: f"host{draw.below(10_000)}.example.com",
    "uri": lambda draw: f"https://example.com/{draw.below(10_000)}",
    "uuid": lambda draw: str(uuid.UUID(int=draw.below(1 << 53) << 64 | draw.below(1 << 53), version=4)),
    "ipv4": lambda draw: f"192.0.2.{draw.below(256)}",
    "ipv6": lambda draw: f"2001:db8::{1 + draw.below(9999)}",
}
