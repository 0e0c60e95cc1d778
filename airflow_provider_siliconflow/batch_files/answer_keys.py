"""
The key of an answer: a hash of the model and of the body in canonical form.

Two requests have the same key if they ask the same model for the same thing, whatever their ``custom_id``, the order of
their keys and the way their JSON is written. Numbers are compared as JSON numbers of the same kind: ``1`` and ``1.0``
are different, since services tell them apart.
"""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

#: Bytes of a key.
KEY_BYTES = 32


class _Line(msgspec.Struct, gc=False):
    body: dict[str, Any]


_decode = msgspec.json.Decoder(_Line).decode
_encode = msgspec.json.Encoder(order="sorted").encode

_REFUSED = (msgspec.DecodeError, msgspec.EncodeError, ValueError, TypeError, RecursionError)


def read_request(line: bytes) -> tuple[bytes, str | None] | None:
    """
    Read a request line.

    :returns: the digest of its body without the model, and the model that it names; ``None`` if the body has no
        canonical form, as with a lone surrogate. Such a row has no key.
    """
    try:
        body = _decode(line).body
        model = body.pop("model", None)
        digest = hashlib.sha256(_encode(body)).digest()
    except _REFUSED:
        return None
    return digest, model or None


def answer_key(digest: bytes, model: str) -> bytes:
    """
    Return the key of an answer.

    :param digest: from :func:`read_request`.
    :param model: the model that is asked, which may be another one than the body names.
    """
    return hashlib.sha256(digest + model.encode("utf-8", "surrogatepass")).digest()
