"""The rules for request lines, and explanations of what is wrong with an invalid line."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, NoReturn

import msgspec
from msgspec import UNSET, UnsetType

from airflow_provider_siliconflow.api import arguments
from airflow_provider_siliconflow.api.exceptions import (
    InvalidRequestFileError,
    LineProblem,
)
from airflow_provider_siliconflow.api.redaction import valid_text

#: The service's limits for one input file.
MAX_ROWS = arguments.MAX_FILE_LINES
MAX_BYTES = arguments.MAX_FILE_BYTES

#: The only endpoint and method the service takes in a batch.
ENDPOINT = arguments.CHAT_COMPLETIONS
METHOD = "POST"

#: Problems collected before the search stops.
MAX_PROBLEMS = 20

CLOSING_BRACE, _QUOTE, _BRACKET, _NULL = b'}"[n'

ROLES = ("system", "user", "assistant")

NonEmptyText = Annotated[str, msgspec.Meta(min_length=1)]


class _Part(msgspec.Struct, gc=False):
    text: str = ""


class _Message(msgspec.Struct, gc=False):
    role: Literal["system", "user", "assistant"]
    # Decoding texts only to drop them would be the largest cost; text_bytes checks their type.
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
    """A full request line or a short row, which differ in the fields that are set."""

    custom_id: NonEmptyText | UnsetType = UNSET
    body: _Body | UnsetType = UNSET
    method: Literal["POST"] | UnsetType = UNSET
    url: Literal["/v1/chat/completions"] | UnsetType = UNSET
    messages: Messages | UnsetType = UNSET
    model: str | None = None


_decode_full_line = msgspec.json.Decoder(_FullLine).decode
decode_row = msgspec.json.Decoder(_Row).decode
_decode_parts = msgspec.json.Decoder(list[_Part]).decode
decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode

# ValidationError and UnicodeDecodeError are ValueErrors, msgspec's DecodeError is not in every version.
REFUSED = (msgspec.DecodeError, ValueError, RecursionError)


class Problems:
    """
    The problems of an input, collected until there are enough to show.

    :param name: the file, or the argument with the rows, as the author knows it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._found: list[LineProblem] = []
        self._kinds: set[str] = set()

    @property
    def count(self) -> int:
        """How many lines were refused so far."""
        return len(self._found)

    @property
    def lines(self) -> frozenset[int]:
        """Numbers of the refused lines."""
        return frozenset(problem.line for problem in self._found)

    def add(self, line: int, reason: str, custom_id: str | None = None) -> None:
        """
        Add a problem.

        :raises InvalidRequestFileError: there are enough problems to show.
        """
        self._found.append(LineProblem(line, reason, custom_id))
        if len(self._found) >= MAX_PROBLEMS:
            self.fail(more=True)

    def add_once(self, kind: str, line: int, reason: str) -> None:
        """Add a problem that is probably the same on every line, only for the first line that has it."""
        if kind not in self._kinds:
            self._kinds.add(kind)
            self.add(line, reason)

    def fail(self, *, more: bool) -> NoReturn:
        """Raise an error with the problems."""
        raise InvalidRequestFileError(
            self.name, sorted(self._found, key=lambda problem: problem.line), more=more
        )

    def raise_if_any(self) -> None:
        """:raises InvalidRequestFileError: there are problems."""
        if self._found:
            self.fail(more=False)


def text_bytes(messages: list[_Message]) -> int:
    """
    Return the size of the messages' text.

    :raises ValueError: the messages are not a prompt: a content has the wrong type, or the last role is not user.
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


def estimate_tokens(line: bytes, text_bytes: int) -> int:
    """
    Estimate the prompt tokens of a request: a quarter per ASCII character, one per other character.

    Only the text of the messages counts, as written in the line: all non-ASCII characters are assumed to belong to it,
    and an escape such as ``\\u4e2d`` counts as six characters. The estimate is for planning, not for billing.

    :param line: the request line.
    :param text_bytes: from :func:`text_bytes`.
    :raises UnicodeDecodeError: the line is not UTF-8, which the decoder does not check in skipped parts.
    """
    if line.isascii():
        return text_bytes + 3 >> 2
    # Most of these characters have three bytes, two more than an ASCII character.
    wide = len(line) - len(line.decode()) + 1 >> 1
    return wide + (max(text_bytes - 3 * wide, 0) + 3 >> 2)


def accept(line: bytes) -> _FullLine | None:
    """Return a line of a file that is uploaded unchanged; ``None`` if the service would refuse the line."""
    try:
        request = _decode_full_line(line)
        text_bytes(request.body.messages)
        if not line.isascii():
            line.decode()
    except REFUSED:
        return None
    return request


def _no_constant(constant: str) -> NoReturn:
    raise _NotJSONError(f"the line contains {constant}, which is not JSON; use a number or null")


class _NotJSONError(ValueError):
    pass


def explain(line: bytes, *, as_row: bool = False) -> tuple[str | None, str]:
    """
    Say what is wrong with a line that was refused.

    :param line: the line without its newline.
    :param as_row: whether short rows and prompts are valid too.
    :return: the ``custom_id`` if it can be read, and the reason.
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
            "the line is not a valid request, and has a number with too many digits to say what is wrong",
        )
    except RecursionError:
        return None, "the line is nested too deeply"
    if as_row and isinstance(value, str):
        return None, f"the prompt {_shown(value)} cannot be sent: it contains a lone surrogate"
    if not isinstance(value, dict):
        return None, f"the line is {_kind(value)}; a request line is a JSON object with custom_id and body"
    custom_id = value.get("custom_id")
    named = custom_id if isinstance(custom_id, str) and custom_id else None
    return named, _explain_fields(value, as_row) or _explain_by_decoder(line)


def _explain_fields(row: dict[str, Any], as_row: bool) -> str | None:
    if "custom_id" not in row:
        if not as_row:
            return "custom_id is missing; every line needs a string of its own"
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
        return "body is missing; it must contain the request's messages"
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
                    return f"{at}.content must contain objects such as {{'type': 'text', 'text': '...'}}"
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
        decode_row(line)
    except REFUSED as exc:
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
