"""Changes to the body of a request line: an instruction for all rows, and what a row that is sent again gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from airflow_provider_siliconflow.batch_files.parameters import to_json
from airflow_provider_siliconflow.batch_files.rules import decode_fields

#: Messages that the service documents as the most of a request.
_MOST_MESSAGES = 10


class _Message(msgspec.Struct, gc=False):
    role: str
    content: msgspec.Raw = msgspec.Raw(b"null")


_decode_list = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode_message = msgspec.json.Decoder(_Message).decode


def with_defaults(line: bytes, defaults: Mapping[str, msgspec.Raw]) -> bytes:
    """
    Return a request line with body parameters that it lacks.

    :param line: a request line that was checked.
    """
    fields = decode_fields(line)
    body = decode_fields(fields["body"])
    lacking = {key: value for key, value in defaults.items() if key not in body}
    if not lacking:
        return line
    return msgspec.json.encode({**fields, "body": msgspec.Raw(msgspec.json.encode({**body, **lacking}))})


def raw_parameters(parameters: Mapping[str, Any]) -> dict[str, msgspec.Raw]:
    """Return body parameters as they are written into lines."""
    return {key: msgspec.Raw(to_json(value)) for key, value in parameters.items()}


def with_instruction(messages: msgspec.Raw, instruction: str) -> msgspec.Raw:
    """
    Return messages with an instruction for the model.

    It goes into the system message if there is one at the start, since chat templates expect no second; otherwise into
    a new one. So all rows begin alike, and the service may take the beginning from its cache. If there is no room for
    another message, it goes into the last one.

    :param messages: a list of messages that were checked, as JSON.
    """
    items = _decode_list(messages)
    place = 0
    if _decode_message(items[0]).role != "system":
        if len(items) < _MOST_MESSAGES:
            items.insert(0, _message("system", instruction))
            return _list(items)
        place = -1
    content = msgspec.json.decode(_decode_message(items[place]).content)
    if isinstance(content, list):
        content.append({"type": "text", "text": instruction})
    else:
        content = f"{content}\n\n{instruction}" if content else instruction
    fields = decode_fields(items[place])
    items[place] = msgspec.Raw(msgspec.json.encode({**fields, "content": content}))
    return _list(items)


def sent_again(
    line: bytes, params: Mapping[str, msgspec.Raw], exchange: tuple[str, str] | None
) -> bytes | None:
    """
    Return a request line as it is sent again.

    :param line: a request line that was checked.
    :param params: body parameters, which replace those of the line.
    :param exchange: the model's answer to the last attempt and the reply to it, which are added to the messages.
    :returns: the line; ``None`` if ``exchange`` does not fit into it.
    """
    fields = decode_fields(line)
    body = {**decode_fields(fields["body"]), **params}
    if exchange is not None:
        items = _decode_list(body["messages"])
        if len(items) + 2 > _MOST_MESSAGES:
            return None
        answer, reply = exchange
        items += [_message("assistant", answer), _message("user", reply)]
        body["messages"] = _list(items)
    fields["body"] = msgspec.Raw(msgspec.json.encode(body))
    return msgspec.json.encode(fields)


def _message(role: str, content: str) -> msgspec.Raw:
    return msgspec.Raw(to_json({"role": role, "content": content}))


def _list(items: Sequence[msgspec.Raw]) -> msgspec.Raw:
    return msgspec.Raw(b"[%b]" % b",".join(items))
