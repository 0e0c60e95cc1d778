"""
How a row becomes a request line, and what is wrong with the rows that cannot.

Two ways in: :func:`check_request_file` for a file that is uploaded byte for byte, and :func:`read_rows` for
rows that are written anew. A line is decoded once, by a typed decoder that accepts or refuses; only a refused
line is looked at again, slowly, to say what is wrong with it.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Any, BinaryIO, Literal, NoReturn

import msgspec
from msgspec import UNSET, UnsetType

from airflow_provider_siliconflow.api import arguments
from airflow_provider_siliconflow.api.exceptions import (
    InvalidInputError,
    InvalidRequestFileError,
    LineProblem,
)
from airflow_provider_siliconflow.api.models import valid_text
from airflow_provider_siliconflow.batch_files.sources import LONGEST_LINE, ByteReader, LineReader, Source

#: The service's limits for one input file.
MAX_ROWS = arguments.MAX_FILE_LINES
MAX_BYTES = arguments.MAX_FILE_BYTES

#: The only endpoint and method the service takes in a batch.
ENDPOINT = arguments.CHAT_COMPLETIONS
METHOD = "POST"

#: Problems collected before the search stops.
MAX_PROBLEMS = 20

#: Hashes of custom ids, of 8 bytes each, that one of 256 buckets holds before all of them go to disk.
_BUCKET_HASHES = 512

_CLOSING_BRACE, _QUOTE, _BRACKET, _NULL = b'}"[n'

ROLES = ("system", "user", "assistant")

NonEmptyText = Annotated[str, msgspec.Meta(min_length=1)]


class _Part(msgspec.Struct, gc=False):
    text: str = ""


class _Message(msgspec.Struct, gc=False):
    role: Literal["system", "user", "assistant"]
    # Decoding a text only to throw it away is what would cost most; _text_bytes looks at its kind.
    content: msgspec.Raw


Messages = Annotated[list[_Message], msgspec.Meta(min_length=1)]


class _Body(msgspec.Struct, gc=False):
    messages: Messages
    model: str | None = None


class _FullLine(msgspec.Struct, gc=False):
    custom_id: NonEmptyText
    body: _Body
    method: Literal["POST"] = "POST"
    url: Literal["/v1/chat/completions"] = "/v1/chat/completions"


class _Row(msgspec.Struct, gc=False):
    """A full request line or a short row; which one, the fields that are set tell."""

    custom_id: NonEmptyText | UnsetType = UNSET
    body: _Body | UnsetType = UNSET
    method: Literal["POST"] | UnsetType = UNSET
    url: Literal["/v1/chat/completions"] | UnsetType = UNSET
    messages: Messages | UnsetType = UNSET
    model: str | None = None


_decode_full_line = msgspec.json.Decoder(_FullLine).decode
_decode_row = msgspec.json.Decoder(_Row).decode
_decode_parts = msgspec.json.Decoder(list[_Part]).decode
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode

# ValidationError and UnicodeDecodeError are ValueErrors, msgspec's DecodeError is not in every version.
_REFUSED = (msgspec.DecodeError, ValueError, RecursionError)


@dataclass(frozen=True, slots=True)
class RequestFileSummary:
    """
    What a valid request file holds.

    :param rows: number of request lines.
    :param bytes: size of the file.
    :param sha256: hex digest of the file's bytes.
    :param models: every ``body.model`` in it, sorted.
    :param rows_without_model: lines that name no model, so that ``replace`` has to.
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
    :param custom_id: the row's own or numbered one.
    :param model: ``body.model``, if the row names one.
    :param prompt_tokens: an estimate: a quarter per ASCII character of the messages, one per other character.
    """

    line: bytes
    custom_id: str
    model: str | None
    prompt_tokens: int


class Problems:
    """
    What is wrong with an input, collected until there is enough to show.

    :param name: the file, or the argument that held the rows, as the reader knows it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._found: list[LineProblem] = []
        self._kinds: set[str] = set()

    @property
    def lines(self) -> frozenset[int]:
        """Numbers of the lines that are refused."""
        return frozenset(problem.line for problem in self._found)

    def add(self, line: int, reason: str, custom_id: str | None = None) -> None:
        """
        Note a problem.

        :raises InvalidRequestFileError: that was the last one worth showing.
        """
        self._found.append(LineProblem(line, reason, custom_id))
        if len(self._found) >= MAX_PROBLEMS:
            self.fail(more=True)

    def add_once(self, kind: str, line: int, reason: str) -> None:
        """Note a problem that is likely the same on every line, at the first line that has it."""
        if kind not in self._kinds:
            self._kinds.add(kind)
            self.add(line, reason)

    def fail(self, *, more: bool) -> NoReturn:
        """Raise what was found."""
        raise InvalidRequestFileError(
            self.name, sorted(self._found, key=lambda problem: problem.line), more=more
        )

    def raise_if_any(self) -> None:
        """:raises InvalidRequestFileError: something was found."""
        if self._found:
            self.fail(more=False)


class CustomIdSet:
    """
    Whether every ``custom_id`` of an input is unique, in memory that does not grow with the input.

    Only hashes are kept, most of them in a temporary file. Equal hashes are a suspicion that
    :meth:`name_duplicates` settles with a second look at the ids themselves.
    """

    def __init__(self) -> None:
        # Buckets, so that the search for equal hashes needs a set of one bucket at a time.
        self._buckets = tuple(array("q") for _ in range(256))
        self._spilled: BinaryIO | None = None
        #: For each time that the buckets were emptied into the file, where each of them begins there.
        self._begins: list[list[int]] = []

    def add(self, custom_id: str) -> None:
        """Take in the ``custom_id`` of one more row."""
        hashed = hash(custom_id)
        bucket = self._buckets[hashed & 255]
        bucket.append(hashed)
        if len(bucket) == _BUCKET_HASHES:
            self._spill()

    def _spill(self) -> None:
        if self._spilled is None:
            self._spilled = tempfile.TemporaryFile(prefix="siliconflow-")  # noqa: SIM115 - lives as long as the set
        begins = []
        for bucket in self._buckets:
            begins.append(self._spilled.tell())
            self._spilled.write(bucket)
            del bucket[:]
        self._begins.append([*begins, self._spilled.tell()])

    def _hashes(self, number: int) -> array[int]:
        """Return all hashes of one bucket."""
        found = array("q", self._buckets[number])
        for begins in self._begins:
            assert self._spilled is not None
            self._spilled.seek(begins[number])
            found.frombytes(self._spilled.read(begins[number + 1] - begins[number]))
        return found

    def suspects(self) -> set[int]:
        """Return the hashes that came more than once."""
        found: set[int] = set()
        for number in range(len(self._buckets)):
            hashes = self._hashes(number)
            if len(hashes) == len(set(hashes)):
                continue
            seen: set[int] = set()
            for hashed in hashes:
                (found if hashed in seen else seen).add(hashed)
        return found

    @staticmethod
    def name_duplicates(suspects: set[int], rows: Iterable[tuple[int, str]], problems: Problems) -> None:
        """
        Note every row whose ``custom_id`` an earlier one has.

        :param suspects: from :meth:`suspects`.
        :param rows: line number and ``custom_id`` of all rows, in order.
        """
        first: dict[str, int] = {}
        for line, custom_id in rows:
            if hash(custom_id) in suspects:
                earlier = first.setdefault(custom_id, line)
                if earlier != line:
                    problems.add(
                        line, f"line {earlier} has the same custom_id; each must be unique", custom_id
                    )


def _text_bytes(messages: list[_Message]) -> int:
    """
    Return the size of the messages' text.

    :raises ValueError: the messages are not a prompt: a content of the wrong kind, or no user at the end.
    """
    size = kind = 0
    for message in messages:
        content = memoryview(message.content)
        kind = content[0]
        if kind == _QUOTE:
            size += len(content) - 2
        elif kind == _BRACKET:
            size += sum(len(part.text.encode()) for part in _decode_parts(content))
        elif kind != _NULL:
            raise ValueError("content")
    if kind == _NULL or message.role != "user":
        raise ValueError("last message")
    return size


def _estimate_tokens(line: bytes, text_bytes: int) -> int:
    """
    Estimate the prompt tokens of a request: a quarter per ASCII character, one per other character.

    Only the messages' text counts, as it stands in the line: all that is beyond ASCII is taken to be in it, and
    an escape such as ``\\u4e2d`` counts as its six characters. A figure for a plan, not for a bill.

    :raises UnicodeDecodeError: the line is not UTF-8; the decoder does not look into what it passes over.
    """
    if line.isascii():
        return text_bytes + 3 >> 2
    # Such characters are mostly of three bytes: two more than they are characters.
    wide = len(line) - len(line.decode()) + 1 >> 1
    return wide + (max(text_bytes - 3 * wide, 0) + 3 >> 2)


def _opened(source: Source, name: str) -> AbstractContextManager[ByteReader]:
    """
    Open a file for reading.

    :raises InvalidInputError: there is none.
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
    Check a file that is to be uploaded byte for byte, reading it once in bounded memory.

    :param source: the file.
    :param name: what to call it in messages.
    :param max_rows: lines the service takes in one file.
    :param max_bytes: bytes the service takes in one file.
    :raises InvalidRequestFileError: with up to 20 problems, each with its line and what would be right.
    :raises InvalidInputError: there is no such file.
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
            request = _accept(line)
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
                problems.add(rows, "the last line does not end with a newline; the service wants one: add it")
    if suspects := custom_ids.suspects():
        with source.open("rb") as stream:
            custom_ids.name_duplicates(suspects, _custom_ids_of(stream, rows), problems)
    problems.raise_if_any()
    return RequestFileSummary(rows, reader.bytes, digest.hexdigest(), tuple(sorted(models)), without_model)


def _accept(line: bytes) -> _FullLine | None:
    try:
        request = _decode_full_line(line)
        _text_bytes(request.body.messages)
        if not line.isascii():
            line.decode()
    except _REFUSED:
        return None
    return request


def _custom_ids_of(stream: Any, rows: int) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(LineReader(stream), 1):
        if number > rows:
            return
        request = _accept(line.removeprefix(codecs.BOM_UTF8)) if line is not None else None
        if request is not None:
            yield number, request.custom_id


def read_rows(
    requests: Source | Iterable[Any],
    problems: Problems,
    *,
    defaults: Mapping[str, Any] | None = None,
    max_bytes: int = MAX_BYTES,
) -> Iterator[RequestRow]:
    """
    Read rows and return them as request lines; what cannot be one goes to ``problems``.

    A row is a full request line (``custom_id``, ``body``), a short one (``custom_id``, ``messages`` and other
    body parameters) or a prompt (a string: one user message). A missing ``custom_id`` is numbered
    ``row-0000001``, after the row's position. Fields of a full line are kept as they are, known or not.
    Whether the custom ids are unique is not checked here.

    :param requests: a JSONL file or rows as Python objects (mappings and strings).
    :param problems: takes what is wrong; raises by itself once there is enough.
    :param defaults: body parameters for rows that lack them.
    :param max_bytes: bytes of the longest line, newline included.
    :raises InvalidInputError: ``requests`` or ``defaults`` as a whole is of a wrong kind.
    """
    complete = _Completer(defaults or {})
    if isinstance(requests, str | bytes | bytearray | Mapping):
        raise InvalidInputError(
            f"requests must be a file or a sequence of rows, not one {type(requests).__name__}: "
            "put a single row into a list, give a file as a path object"
        )
    if hasattr(requests, "columns"):
        raise InvalidInputError(
            "requests must be a file or a sequence of rows, not a data frame, whose items are its column names: "
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
    decode = _decode_row
    as_it_is = not complete.adds_defaults
    blank: list[int] = []
    for number, given in enumerate(lines, 1):
        if not isinstance(given, bytes):
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
                and given[-1] == _CLOSING_BRACE
                and len(given) < max_bytes
                and not blank
            ):
                tokens = _estimate_tokens(given, _text_bytes(body.messages))
                yield RequestRow(given, row.custom_id, body.model or None, tokens)
                continue
        except _REFUSED:
            pass
        # A file's byte order mark and line ends are no fault here: the lines are written anew anyway.
        line = (given.removeprefix(codecs.BOM_UTF8) if number == 1 else given).strip(b" \t\r")
        if not line:
            if len(blank) < MAX_PROBLEMS:
                blank.append(number)
            continue
        while blank:
            problems.add(blank.pop(0), "the line is blank; remove it")
        try:
            request = complete(number, line)
        except _REFUSED:
            request = None
        if request is None:
            custom_id, reason = explain(line, as_row=True)
            problems.add(number, reason, custom_id)
        elif len(request.line) >= max_bytes:
            problems.add(
                number,
                f"the request is larger than the {max_bytes} bytes of a whole batch",
                request.custom_id,
            )
        else:
            yield request


class _Completer:
    """Makes a request line of a row: keeps a line that is whole, rebuilds one that lacks something."""

    def __init__(self, defaults: Mapping[str, Any]) -> None:
        if not isinstance(defaults, Mapping) or not all(isinstance(key, str) for key in defaults):
            raise InvalidInputError(
                "defaults must be a mapping of body parameters, such as {'temperature': 0}"
            )
        if "messages" in defaults:
            raise InvalidInputError("defaults must not hold 'messages': every row has its own")
        try:
            self._defaults = {key: msgspec.Raw(to_json(value)) for key, value in defaults.items()}
        except (TypeError, ValueError, RecursionError) as exc:
            raise InvalidInputError(f"defaults cannot be written as JSON: {exc}") from exc
        #: Whether a line that is whole may lack something nevertheless.
        self.adds_defaults = bool(defaults)
        model = defaults.get("model")
        if model is not None and not isinstance(model, str):
            raise InvalidInputError(f"defaults['model'] must be a string, not {model!r}")
        self._default_model = model

    def __call__(self, number: int, line: bytes) -> RequestRow | None:
        """Return the row, or ``None`` if it cannot be a request (or one of ``_REFUSED``)."""
        if line[:1] == b'"':
            prompt = msgspec.json.decode(line, type=str)
            line = b'{"messages":[{"role":"user","content":' + to_json(prompt) + b"}]}"
        row = _decode_row(line)
        body = row.body
        if body is not UNSET:
            messages, model = body.messages, body.model
        elif row.messages is not UNSET:
            messages, model = row.messages, row.model
        else:
            return None
        tokens = _estimate_tokens(line, _text_bytes(messages))
        custom_id = row.custom_id
        if custom_id is UNSET or body is UNSET or row.method is UNSET or row.url is UNSET or self._defaults:
            if custom_id is UNSET:
                custom_id = f"row-{number:07d}"
            line, defaulted = self._rebuild(line, custom_id)
            if "model" in defaulted:
                model = self._default_model
        return RequestRow(line, custom_id, model or None, tokens)

    def _rebuild(self, line: bytes, custom_id: str) -> tuple[bytes, set[str]]:
        fields = _decode_fields(line)
        head = {
            "custom_id": fields.pop("custom_id", None) or msgspec.Raw(to_json(custom_id)),
            "method": fields.pop("method", msgspec.Raw(b'"POST"')),
            "url": fields.pop("url", msgspec.Raw(b'"/v1/chat/completions"')),
        }
        raw_body = fields.pop("body", None)
        if raw_body is None:
            body, fields = fields, {}
        else:
            body = _decode_fields(raw_body)
        lacking = {key: value for key, value in self._defaults.items() if key not in body}
        if raw_body is None or lacking:
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


def to_json(value: Any) -> bytes:
    """
    Return compact JSON.

    The standard library's encoder, as it refuses what others turn into something else (NaN into null, bytes
    into base64).
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode()


def _no_constant(constant: str) -> NoReturn:
    raise _NotJSONError(f"the line holds {constant}, which JSON does not have; use a number or null")


class _NotJSONError(ValueError):
    pass


def explain(line: bytes, *, as_row: bool = False) -> tuple[str | None, str]:
    """
    Say what is wrong with a line that was refused.

    :param line: the line without its newline.
    :param as_row: whether short rows and prompts would have been right too.
    :return: the ``custom_id`` where it can be read, and the reason.
    """
    try:
        text = line.decode()
    except UnicodeDecodeError as exc:
        return None, f"the line is not UTF-8 (byte {exc.start + 1}); save the file as UTF-8"
    if not text.strip():
        return None, "the line is blank; remove it"
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except _NotJSONError as exc:
        return None, str(exc)
    except json.JSONDecodeError as exc:
        return None, f"the line is not valid JSON ({exc.msg}, column {exc.colno})"
    except ValueError:
        # Python's own limit on the digits of a number.
        return (
            None,
            "the line is no request, and holds a number of too many digits to say what is wrong with it",
        )
    except RecursionError:
        return None, "the line is nested too deeply"
    if as_row and isinstance(value, str):
        return None, f"the prompt {_shown(value)} is not text that can be sent (a lone surrogate)"
    if not isinstance(value, dict):
        return None, f"the line is {_kind(value)}; a request line is a JSON object with custom_id and body"
    custom_id = value.get("custom_id")
    named = custom_id if isinstance(custom_id, str) and custom_id else None
    return named, _explain_fields(value, as_row) or _explain_by_decoder(line)


def _explain_fields(row: dict[str, Any], as_row: bool) -> str | None:
    if "custom_id" not in row:
        if not as_row:
            return "custom_id is missing; every line needs its own, a string"
    elif not isinstance(row["custom_id"], str) or not row["custom_id"]:
        return f"custom_id must be a string that is not empty, not {_shown(row['custom_id'])}"
    if row.get("method", METHOD) != METHOD:
        return f"method must be {METHOD!r} or left out, not {_shown(row['method'])}"
    if row.get("url", ENDPOINT) != ENDPOINT:
        return f"url must be {ENDPOINT!r} or left out, not {_shown(row['url'])}"
    if "body" in row:
        body = row["body"]
        if not isinstance(body, dict):
            return f"body must be an object, not {_kind(body)}"
        return _explain_body(body, "body.")
    if not as_row:
        return "body is missing; it holds the request's messages"
    if "messages" not in row:
        return "the row has neither body nor messages"
    return _explain_body(row, "")


def _explain_body(body: dict[str, Any], where: str) -> str | None:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        return f"{where}messages must be a list of at least one message, not {_shown(messages)}"
    for position, message in enumerate(messages):
        at = f"{where}messages[{position}]"
        if not isinstance(message, dict):
            return f"{at} must be an object with role and content, not {_kind(message)}"
        if message.get("role") not in ROLES:
            return f"{at}.role must be one of {', '.join(ROLES)}, not {_shown(message.get('role'))}"
        if "content" not in message:
            return f"{at}.content is missing"
        content = message["content"]
        if isinstance(content, list):
            for part in content:
                if not isinstance(part, dict) or not isinstance(part.get("text", ""), str):
                    return f"{at}.content must hold objects such as {{'type': 'text', 'text': '...'}}"
        elif content is not None and not isinstance(content, str):
            return f"{at}.content must be a string or a list of parts, not {_kind(content)}"
    if messages[-1]["role"] != "user":
        return f"the last message must have the role user, not {_shown(messages[-1]['role'])}"
    if messages[-1]["content"] is None:
        return "the last message's content must not be null"
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        return f"{where}model must be a string, not {_shown(model)}"
    return None


def _explain_by_decoder(line: bytes) -> str:
    try:
        _decode_row(line)
    except _REFUSED as exc:
        return f"the line is not a valid request ({exc})"
    return "the line is not a valid request"


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "a JSON boolean"
    if value is None:
        return "null"
    names = ((dict, "an object"), (list, "a list"), (str, "a string"), (int | float, "a number"))
    return next((name for kind, name in names if isinstance(value, kind)), type(value).__name__)


def _shown(value: Any) -> str:
    text = valid_text(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= 60 else text[:57] + "..."
