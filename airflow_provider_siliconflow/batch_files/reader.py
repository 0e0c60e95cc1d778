"""From rows to request lines: files that are uploaded byte for byte are checked, other rows are written again."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import UNSET

from airflow_provider_siliconflow.api.exceptions import InvalidInputError, LineProblem
from airflow_provider_siliconflow.api.sources import ByteReader, Source
from airflow_provider_siliconflow.batch_files.bodies import raw_parameters, with_instruction
from airflow_provider_siliconflow.batch_files.custom_ids import CustomIdSet, numbered_id
from airflow_provider_siliconflow.batch_files.lines import LONGEST_LINE, LineReader
from airflow_provider_siliconflow.batch_files.parameters import check_parameters, to_json
from airflow_provider_siliconflow.batch_files.rules import (
    CLOSING_BRACE,
    MAX_BYTES,
    MAX_ROWS,
    REFUSED,
    Problems,
    accept,
    decode_fields,
    decode_row,
    estimate_tokens,
    explain,
    text_bytes,
)


@dataclass(frozen=True, slots=True)
class RequestFileSummary:
    """
    The figures of a valid request file.

    :param rows: number of request lines.
    :param bytes: size of the file.
    :param sha256: hex digest of the file's bytes.
    :param models: every ``body.model`` in it, sorted.
    :param rows_without_model: lines that name no model, so that ``replace`` must name one.
    """

    rows: int
    bytes: int
    sha256: str
    models: tuple[str, ...]
    rows_without_model: int = 0


class RequestRow(msgspec.Struct, frozen=True, gc=False):
    """
    One row as a request line, without a newline.

    :param line: compact JSON, UTF-8.
    :param custom_id: the row's own, or one made from its position.
    :param model: ``body.model``, if the row names one.
    :param prompt_tokens: an estimate: a quarter per ASCII character of the messages, one per other character.
    """

    line: bytes
    custom_id: str
    model: str | None
    prompt_tokens: int


def _opened(source: Source, name: str) -> AbstractContextManager[ByteReader]:
    """
    Open a file for reading.

    :raises InvalidInputError: it does not exist, or is a folder.
    """
    try:
        return source.open("rb")
    except FileNotFoundError as exc:
        raise InvalidInputError(f"{name} does not exist; nothing was uploaded") from exc
    except IsADirectoryError as exc:
        raise InvalidInputError(f"{name} is a folder; give the path of a JSONL file") from exc


def check_request_file(
    source: Source, *, name: str, max_rows: int = MAX_ROWS, max_bytes: int = MAX_BYTES
) -> RequestFileSummary:
    """
    Check a file that will be uploaded byte for byte; it is read once, in bounded memory.

    :param source: the file.
    :param name: how messages call the file.
    :param max_rows: lines the service takes in one file.
    :param max_bytes: bytes the service takes in one file.
    :raises InvalidRequestFileError: lines are invalid; the error lists up to 20 problems, each with its line.
    :raises InvalidInputError: the file does not exist.
    """
    problems = Problems(name)
    custom_ids = CustomIdSet()
    digest = hashlib.sha256()
    models: set[str] = set()
    rows = without_model = 0
    with _opened(source, name) as stream:
        longest = min(max_bytes, LONGEST_LINE)
        reader = LineReader(stream, longest=longest, digest=digest)
        for rows, line in enumerate(reader, 1):
            if rows > max_rows:
                problems.add(
                    rows,
                    f"the file has more than the {max_rows} lines a batch takes; split it into several",
                )
                break
            if reader.bytes > max_bytes:
                problems.add(
                    rows,
                    f"the file has more than the {max_bytes} bytes a batch takes; split it into several",
                )
                break
            if line is None:
                problems.add(rows, f"the line is longer than {longest} bytes; is this a JSONL file?")
                continue
            if line[-1:] == b"\r":
                problems.add_once("crlf", rows, "the line ends with CRLF; convert the file's line ends to LF")
                line = line[:-1]
            if rows == 1 and line.startswith(codecs.BOM_UTF8):
                problems.add_once(
                    "bom", rows, "the file starts with a byte order mark; save it as UTF-8 without BOM"
                )
                line = line[len(codecs.BOM_UTF8) :]
            request = accept(line)
            if request is None:
                custom_id, reason = explain(line)
                problems.add(rows, reason, custom_id)
                continue
            custom_ids.add(request.custom_id)
            if request.body.model:
                models.add(request.body.model)
            else:
                without_model += 1
        else:
            if not rows:
                problems.add(1, "the file is empty; a batch needs at least one request line")
            elif not reader.ends_with_newline:
                problems.add(
                    rows, "the last line does not end with a newline, which the service needs; add one"
                )
    if suspects := custom_ids.suspects():
        with source.open("rb") as stream:
            custom_ids.name_duplicates(suspects, _custom_ids_of(stream, rows), problems)
    problems.raise_if_any()
    return RequestFileSummary(rows, reader.bytes, digest.hexdigest(), tuple(sorted(models)), without_model)


def _custom_ids_of(stream: Any, rows: int) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(LineReader(stream), 1):
        if number > rows:
            return
        request = accept(line.removeprefix(codecs.BOM_UTF8)) if line is not None else None
        if request is not None:
            yield number, request.custom_id


def read_rows(
    requests: Source | Iterable[Any],
    problems: Problems,
    *,
    defaults: Mapping[str, Any] | None = None,
    defaults_name: str = "defaults",
    instruction: str | None = None,
    max_bytes: int = MAX_BYTES,
) -> Iterator[RequestRow]:
    """
    Read rows and return them as request lines; invalid rows go to ``problems``.

    A row is a full request line (``custom_id``, ``body``), a short one (``custom_id``, ``messages`` and other
    body parameters) or a prompt (a string: one user message). A missing ``custom_id`` becomes ``row-0000001`` and so
    on, after the row's position. Fields of a full line are kept unchanged, whether known or not. This does not check
    whether the custom ids are unique.

    :param requests: a JSONL file or rows as Python objects (mappings and strings).
    :param problems: gets the problems; raises an error once there are enough.
    :param defaults: body parameters for rows that lack them.
    :param defaults_name: the argument with these parameters, for messages.
    :param instruction: text for the model that is added to the messages of every row.
    :param max_bytes: bytes of the longest line, including the newline.
    :raises InvalidInputError: ``requests`` or ``defaults`` as a whole has the wrong type.
    """
    complete = _Completer(defaults, defaults_name, instruction)
    if isinstance(requests, str | bytes | bytearray | Mapping):
        raise InvalidInputError(
            f"requests must be a file or a sequence of rows, not one {type(requests).__name__}: "
            "put a single row into a list, give a file as a path object"
        )
    if hasattr(requests, "columns"):
        raise InvalidInputError(
            "requests must be a file or a sequence of rows, not a data frame, which iterates over its column names: "
            "give its rows as dicts"
        )
    if callable(getattr(requests, "open", None)):
        return _rows_of_file(requests, complete, problems, max_bytes)  # type: ignore[arg-type]
    if not isinstance(requests, Iterable):
        raise InvalidInputError(
            f"requests must be a file or a sequence of rows, not {type(requests).__name__}"
        )
    return _request_rows(_lines_of_objects(requests), complete, problems, max_bytes)


def _rows_of_file(
    source: Source, complete: _Completer, problems: Problems, max_bytes: int
) -> Iterator[RequestRow]:
    with _opened(source, problems.name) as stream:
        lines = LineReader(stream, longest=min(max_bytes, LONGEST_LINE))
        yield from _request_rows(lines, complete, problems, max_bytes)


def _request_rows(
    lines: Iterable[bytes | LineProblem | None], complete: _Completer, problems: Problems, max_bytes: int
) -> Iterator[RequestRow]:
    decode = decode_row
    as_it_is = not complete.changes_all
    # Blank lines at the end are no rows, so a blank line is a problem only once another line follows.
    blank = 0
    for number, given in enumerate(lines, 1):
        if not isinstance(given, bytes):
            blank = _refuse_blank(number, blank, problems)
            if given is None:
                problems.add(number, "the line is too long for a request; is this a JSONL file?")
            else:
                problems.add(number, given.reason, given.custom_id)
            continue
        # This loop is what a million rows wait for: a line that is whole goes through this half of it only.
        try:
            row = decode(given)
            body = row.body
            if (
                as_it_is
                and body is not UNSET
                and row.custom_id is not UNSET
                and row.url is not UNSET
                and row.method is not UNSET
                and given[-1] == CLOSING_BRACE
                and len(given) < max_bytes
                and not blank
            ):
                tokens = estimate_tokens(given, text_bytes(body.messages))
                yield RequestRow(given, row.custom_id, body.model or None, tokens)
                continue
        except REFUSED:
            pass
        # A file's byte order mark and line ends are no fault here: the lines are written anew anyway.
        line = (given.removeprefix(codecs.BOM_UTF8) if number == 1 else given).strip(b" \t\r")
        if not line:
            blank += 1
            continue
        blank = _refuse_blank(number, blank, problems)
        try:
            request = complete(number, line)
        except REFUSED:
            request = None
        if request is None:
            custom_id, reason = explain(line, as_row=True)
            problems.add(number, reason, custom_id)
        elif len(request.line) >= max_bytes:
            problems.add(
                number,
                f"the request is larger than the {max_bytes} bytes of an entire batch",
                request.custom_id,
            )
        else:
            yield request


def _refuse_blank(number: int, blank: int, problems: Problems) -> int:
    """Refuse the blank lines before a line; return how many blank lines are open then: none."""
    for earlier in range(number - blank, number):
        problems.add(earlier, "the line is blank; remove it")
    return 0


class _Completer:
    """Turns a row into a request line: keeps a complete line, and completes any other."""

    def __init__(self, defaults: Mapping[str, Any] | None, name: str, instruction: str | None = None) -> None:
        check_parameters(name, defaults)
        self._defaults = raw_parameters(defaults or {})
        self._default_model = (defaults or {}).get("model")
        self._instruction = instruction
        #: Whether a full line may still lack something.
        self.changes_all = bool(defaults or instruction)

    def __call__(self, number: int, line: bytes) -> RequestRow | None:
        """Return the row, or ``None`` if it cannot be a request (or one of ``REFUSED``)."""
        if line[:1] == b'"':
            prompt = msgspec.json.decode(line, type=str)
            line = b'{"messages":[{"role":"user","content":' + to_json(prompt) + b"}]}"
        row = decode_row(line)
        body = row.body
        if body is not UNSET:
            messages, model = body.messages, body.model
        elif row.messages is not UNSET:
            messages, model = row.messages, row.model
        else:
            return None
        tokens = estimate_tokens(line, text_bytes(messages))
        custom_id = row.custom_id
        is_short = body is UNSET or row.method is UNSET or row.url is UNSET
        if custom_id is UNSET or is_short or self.changes_all:
            if custom_id is UNSET:
                custom_id = numbered_id(number)
            line, defaulted = self._rebuild(line, custom_id)
            if "model" in defaulted:
                model = self._default_model
            if self._instruction is not None:
                tokens = estimate_tokens(line, text_bytes(messages) + len(self._instruction.encode()))
        return RequestRow(line, custom_id, model or None, tokens)

    def _rebuild(self, line: bytes, custom_id: str) -> tuple[bytes, set[str]]:
        fields = decode_fields(line)
        head = {
            "custom_id": fields.pop("custom_id", None) or msgspec.Raw(to_json(custom_id)),
            "method": fields.pop("method", msgspec.Raw(b'"POST"')),
            "url": fields.pop("url", msgspec.Raw(b'"/v1/chat/completions"')),
        }
        raw_body = fields.pop("body", None)
        if raw_body is None:
            body, fields = fields, {}
        else:
            body = decode_fields(raw_body)
        lacking = {key: value for key, value in self._defaults.items() if key not in body}
        if self._instruction is not None:
            body["messages"] = with_instruction(body["messages"], self._instruction)
        if raw_body is None or lacking or self._instruction is not None:
            raw_body = msgspec.Raw(msgspec.json.encode({**body, **lacking}))
        return msgspec.json.encode({**head, "body": raw_body, **fields}), set(lacking)


def _lines_of_objects(rows: Iterable[Any]) -> Iterator[bytes | LineProblem]:
    for number, row in enumerate(rows, 1):
        if isinstance(row, Mapping):
            row = dict(row)
        elif not isinstance(row, str):
            reason = f"the row is of type {type(row).__name__}; give a dict or a prompt string"
            yield LineProblem(number, reason)
            continue
        try:
            line = to_json(row)
        except (TypeError, ValueError, RecursionError) as exc:
            custom_id = row.get("custom_id") if isinstance(row, dict) else None
            reason = f"the row cannot be written as JSON: {exc}"
            yield LineProblem(number, reason, custom_id if isinstance(custom_id, str) else None)
        else:
            yield line
