"""What form an answer is asked for: JSON, and of which schema."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import msgspec

from airflow_provider_siliconflow.emulator.patterns import PatternError
from airflow_provider_siliconflow.emulator.schemas import SchemaError, SchemaWriter

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

log = logging.getLogger(__name__)

_KEPT = 1000
#: Places of a prompt at which a schema is looked for.
_MOST_STARTS = 50
#: What tells a schema from other JSON in a prompt, an example of an answer for one.
_SIGNS = ('"properties"', '"$defs"')

_canonical = msgspec.json.Encoder(order="sorted").encode
_decode_at = json.JSONDecoder().raw_decode


class SchemaBook:
    """The schemas that rows ask for: each is read once, since all rows of a job have the same."""

    def __init__(self) -> None:
        self._writers: dict[bytes, SchemaWriter | SchemaError] = {}
        self._in_text: dict[int, SchemaWriter | None] = {}

    def problem(self, wanted: object) -> str | None:
        """Return what is wrong with a ``response_format``, None if it can be satisfied."""
        if wanted is None:
            return None
        if not isinstance(wanted, dict) or not isinstance(wanted.get("type"), str):
            return "response_format must be an object with a type."
        if wanted["type"] != "json_schema":
            return None
        given = wanted.get("json_schema")
        schema = given.get("schema") if isinstance(given, dict) else None
        if not isinstance(schema, dict):
            return "response_format.json_schema.schema must be an object."
        writer = self._writer(schema)
        if isinstance(writer, SchemaError):
            return f"response_format: the emulator cannot satisfy this schema: {writer}."
        return None

    def writer_for(self, body: dict[str, Any], texts: Iterable[str]) -> SchemaWriter | None:
        """
        Return what makes the answer of a row: of its ``response_format``, or of a schema in its messages.

        :param texts: the messages of the system and the user.
        """
        wanted = body.get("response_format")
        if isinstance(wanted, dict) and wanted.get("type") == "json_schema":
            writer = self._writer(wanted["json_schema"]["schema"])
            return None if isinstance(writer, SchemaError) else writer
        for text in texts:
            if any(sign in text for sign in _SIGNS):
                found = self._found_in(text)
                if found is not None:
                    return found
        return None

    def _writer(self, schema: dict[str, Any]) -> SchemaWriter | SchemaError:
        key = _canonical(schema)
        writer = self._writers.get(key)
        if writer is None:
            try:
                writer = SchemaWriter(schema)
            except (SchemaError, PatternError) as error:
                writer = SchemaError(str(error))
            _keep(self._writers, key, writer)
        return writer

    def _found_in(self, text: str) -> SchemaWriter | None:
        key = hash(text)
        if key not in self._in_text:
            _keep(self._in_text, key, self._search(text))
        return self._in_text.get(key)

    def _search(self, text: str) -> SchemaWriter | None:
        position = -1
        for _ in range(_MOST_STARTS):
            position = text.find("{", position + 1)
            if position < 0:
                return None
            try:
                value, end = _decode_at(text, position)
            except (ValueError, RecursionError):
                continue
            if isinstance(value.get("properties"), dict) or isinstance(value.get("$defs"), dict):
                writer = self._writer(value)
                if isinstance(writer, SchemaWriter):
                    return writer
                log.warning("A prompt has a JSON schema that the emulator cannot satisfy: %s", writer)
            position = end - 1
        return None


def wants_json(body: Mapping[str, Any]) -> bool:
    """Return whether a row asks for JSON by its ``response_format``."""
    wanted = body.get("response_format")
    return isinstance(wanted, dict) and wanted.get("type") in ("json_object", "json_schema")


def _keep(kept: dict[Any, Any], key: object, value: object) -> None:
    if len(kept) >= _KEPT:
        kept.clear()
    kept[key] = value
