"""
Rows that are asked one by one: what is sent for a request line, and the result line of its answer.

A result line has the form of a batch's, with the field ``route`` in addition.
"""

from __future__ import annotations

import msgspec

from airflow_provider_siliconflow.api.models import ROUTE_LIVE
from airflow_provider_siliconflow.api.redaction import brief
from airflow_provider_siliconflow.batch_files.parameters import to_json
from airflow_provider_siliconflow.batch_files.rules import decode_fields

#: Parameters that would make the service answer in pieces, which a batch ignores.
_STREAM = ("stream", "stream_options")

_ROUTE = b',"route":' + msgspec.json.encode(ROUTE_LIVE)


def chat_body(line: bytes, model: str | None) -> bytes:
    """
    Return the body of a request line as ``/chat/completions`` takes it.

    :param line: a request line that was checked.
    :param model: the model to ask; ``None`` for the one that the row names.
    """
    body = decode_fields(decode_fields(line)["body"])
    for name in _STREAM:
        body.pop(name, None)
    if model is not None:
        body["model"] = msgspec.Raw(to_json(model))
    return msgspec.json.encode(body)


def answer_line(custom_id: str, completion: bytes, trace_id: str | None) -> bytes:
    """
    Return the result line of an answer, without its newline.

    :param completion: the chat completion as the service sent it, in one line.
    """
    trace = msgspec.json.encode(trace_id)
    return (
        b'{"id":%b,"custom_id":%b,"response":{"status_code":200,"request_id":%b,"body":%b},"error":null%b}'
        % (
            trace,
            msgspec.json.encode(custom_id),
            trace,
            completion,
            _ROUTE,
        )
    )


def without_route(line: bytes) -> bytes:
    """Return a result line without the field that says how its row was asked: another job did not ask it."""
    head = line.rstrip().removesuffix(_ROUTE + b"}")
    return line if head == line.rstrip() else head + b"}"


class _Response(msgspec.Struct, gc=False):
    response: msgspec.Raw = msgspec.Raw(b"null")


def is_answer(line: bytes) -> bool:
    """Whether a result line is that of an answer, see :func:`answer_line`, and so billed whatever it says."""
    try:
        return bytes(msgspec.json.decode(line, type=_Response).response) != b"null"
    except msgspec.DecodeError:
        # Our own error lines are in order; an answer may be damaged.
        return True


def error_line(custom_id: str, code: str, message: str) -> bytes:
    """
    Return the result line of a row that got no answer, without its newline.

    :param code: the service's code, or the HTTP status.
    :param message: why; secrets are removed.
    """
    error = {"code": brief(code, 64), "message": brief(message)}
    line = to_json({"id": None, "custom_id": custom_id, "response": None, "error": error})
    return line[:-1] + _ROUTE + b"}"
