"""The rows of an input file: the service's checks at the upload, and the markers in a row."""

from __future__ import annotations

import re
from array import array
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from airflow_provider_siliconflow.emulator.flaws import FLAWS
from airflow_provider_siliconflow.emulator.parameters import CHECKED_PARAMETERS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

ENDPOINT = "/v1/chat/completions"

#: A line is read into memory as a whole, so it needs its own limit.
MAX_LINE_BYTES = 64 * 1024 * 1024
MAX_REPORTED_ERRORS = 20

_MARKER_START = b"[[emulator:"
_MARKER = re.compile(r"\[\[emulator:([^\]]*)\]\]")
_PLAIN_MARKERS = frozenset(
    {"missing", "missing-once", "expire", "duplicate", "wrong-model", *FLAWS, *map("{}-once".format, FLAWS)}
)


class TooManyLinesError(Exception):
    """The file has more lines than the service takes."""


class MarkedRow(msgspec.Struct, frozen=True):
    """A row with markers."""

    row: int
    custom_id: str
    model: str | None
    markers: list[str]


class FileScan(msgspec.Struct):
    """The findings of one pass over an input file."""

    line_count: int = 0
    #: At most ``MAX_REPORTED_ERRORS`` sentences; none means that the file is valid.
    errors: list[str] = []
    models: list[str] = []
    #: 1-based number of the first line without ``body.model``.
    line_without_model: int | None = None
    marked: list[MarkedRow] = []
    #: Those of ``CHECKED_PARAMETERS`` that some row has.
    parameters: list[str] = []


class Row(msgspec.Struct):
    """A complete request line."""

    custom_id: str
    body: dict[str, Any]


class RowName(msgspec.Struct):
    """The part of a request line that decides its outcome."""

    class Body(msgspec.Struct):
        model: str | None = None
        response_format: Any = None
        enable_thinking: Any = None
        thinking_budget: Any = None

    custom_id: str
    body: Body


class _CheckedPart(msgspec.Struct):
    text: str = ""


class _CheckedMessage(msgspec.Struct):
    role: Literal["system", "user", "assistant"]
    content: str | list[_CheckedPart] | None


class _CheckedBody(msgspec.Struct):
    messages: Annotated[list[_CheckedMessage], msgspec.Meta(min_length=1)]
    model: str | None = None


class _CheckedLine(msgspec.Struct):
    custom_id: Annotated[str, msgspec.Meta(min_length=1)]
    body: _CheckedBody
    url: str | None = None
    method: str | None = None


decode_row = msgspec.json.Decoder(Row).decode
decode_row_name = msgspec.json.Decoder(RowName).decode


def user_texts(body: dict[str, Any]) -> list[str]:
    """Return the texts of the user's messages, the last first: that is the one to answer."""
    return [text_of(one) for one in reversed(body["messages"]) if one.get("role") == "user"]


def text_of(message: dict[str, Any]) -> str:
    """Return the text of a message, joining the text parts of a multimodal one."""
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        return "\n".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""


def markers_of(text: str) -> list[str]:
    """Return the markers of a message, for example ``["error=429"]`` of ``... [[emulator:error=429]]``."""
    return _MARKER.findall(text)


def without_markers(text: str) -> str:
    """Return the message as a model would read it."""
    return _MARKER.sub("", text).strip()


def _is_known_marker(marker: str) -> bool:
    name, _, value = marker.partition("=")
    if name == "error":
        return value.isdecimal()
    if name == "once":
        return value.isdecimal() or value in ("missing", "expire")
    return marker in _PLAIN_MARKERS


def _marker_problem(markers: Iterable[str]) -> str | None:
    unknown = [marker for marker in markers if not _is_known_marker(marker)]
    return f"unknown marker [[emulator:{unknown[0]}]]." if unknown else None


def _last_message_problem(body: _CheckedBody) -> str | None:
    last = body.messages[-1]
    if last.role != "user":
        return f"the last message must have the role user, not {last.role}."
    return None if last.content is not None else "the last message's content must not be null."


def body_problem(body: object, format_problem: Callable[[object], str | None]) -> str | None:
    """
    Check a body that comes without a line around it, as the lines of a file are checked.

    :return: what is wrong with it, None if it is valid.
    """
    try:
        checked = msgspec.convert(body, _CheckedBody)
    except msgspec.ValidationError as error:
        return f"{error}."
    assert isinstance(body, dict)
    return (
        _last_message_problem(checked)
        or format_problem(body.get("response_format"))
        or _marker_problem(marker for text in user_texts(body) for marker in markers_of(text))
    )


def scan_file(
    path: Path, max_lines: int, format_problem: Callable[[object], str | None] = lambda _: None
) -> tuple[FileScan, array[int]]:
    """
    Check every line of an input file as the service documents it.

    :param path: the spooled upload.
    :param max_lines: lines the service takes.
    :param format_problem: returns what is wrong with a ``response_format``.
    :return: the findings, and the byte offset of every line followed by the size of the file.
    :raises TooManyLinesError: the file has more lines; it is not read further.
    """
    scan = FileScan(errors=[], models=[], marked=[], parameters=[])
    offsets = array("Q")
    seen: set[str] = set()
    models: set[str] = set()
    position = 0
    with path.open("rb", buffering=1 << 20) as lines:
        while line := lines.readline(MAX_LINE_BYTES + 1):
            if scan.line_count == max_lines:
                raise TooManyLinesError
            scan.line_count += 1
            offsets.append(position)
            position += len(line)
            if len(line) > MAX_LINE_BYTES:
                scan.errors.append(f"Line {scan.line_count}: longer than {MAX_LINE_BYTES} bytes.")
                break
            problem = _check_line(line, scan, seen, models, format_problem)
            if problem is not None:
                scan.errors.append(f"Line {scan.line_count}: {problem}")
                if len(scan.errors) == MAX_REPORTED_ERRORS:
                    # The rest is only counted, so that the limit on lines still holds.
                    scan.line_count += sum(1 for _ in lines)
                    break
    offsets.append(position)
    if scan.line_count > max_lines:
        raise TooManyLinesError
    if scan.line_count == 0:
        scan.errors.append("The file has no lines.")
    scan.models = sorted(models)
    return scan, offsets


def line_offsets(path: Path) -> array[int]:
    """Return the byte offset of every line of a valid file, followed by its size."""
    offsets = array("Q", [0])
    with path.open("rb", buffering=1 << 20) as lines:
        for line in lines:
            offsets.append(offsets[-1] + len(line))
    return offsets


def _check_line(
    line: bytes,
    scan: FileScan,
    seen: set[str],
    models: set[str],
    format_problem: Callable[[object], str | None],
) -> str | None:
    try:
        # Decoded completely, since the results need all of it.
        decoded = msgspec.json.decode(line)
        checked = msgspec.convert(decoded, _CheckedLine)
    except UnicodeDecodeError:
        return "not valid UTF-8."
    except RecursionError:
        return "nested too deeply."
    except msgspec.DecodeError as error:
        return f"{error}." if line.strip() else "the line is empty."
    if checked.custom_id in seen:
        return f"custom_id {checked.custom_id!r} is not unique."
    seen.add(checked.custom_id)
    problem = _last_message_problem(checked.body)
    if problem is not None:
        return problem
    if checked.url is not None and checked.url != ENDPOINT:
        return f"url must be {ENDPOINT}, not {checked.url!r}."
    if checked.method is not None and checked.method != "POST":
        return f"method must be POST, not {checked.method!r}."
    if checked.body.model is None:
        scan.line_without_model = scan.line_without_model or scan.line_count
    else:
        models.add(checked.body.model)
    body = decoded["body"]
    for name in CHECKED_PARAMETERS:
        if body.get(name) is not None and name not in scan.parameters:
            scan.parameters.append(name)
    problem = format_problem(body.get("response_format"))
    if problem is not None:
        return problem
    if _MARKER_START in line:
        markers = markers_of("\n".join(user_texts(body)))
        problem = _marker_problem(markers)
        if problem is not None:
            return problem
        if markers:
            scan.marked.append(
                MarkedRow(scan.line_count - 1, checked.custom_id, checked.body.model, markers),
            )
    return None
