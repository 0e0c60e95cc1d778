"""JSON that no well-behaved service sends: writing it, and changing a correct answer into it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

#: Values that would be unwieldy in a fault, or that Python's own encoder does not take.
_MADE: dict[str, Callable[[int], str]] = {
    "$text": lambda size: '"' + "x" * size + '"',
    "$digits": lambda size: "9" * size or "0",
    "$nested": lambda depth: "[" * depth + "]" * depth or "null",
}


def encode_odd(body: Any) -> bytes:
    r"""
    Write any JSON.

    Lone surrogates and NUL become escapes (``\ud800``, ``\u0000``), integers may have any size, and the objects
    ``{"$text": N}``, ``{"$digits": N}`` and ``{"$nested": N}`` become what they name.

    :raises ValueError: a value cannot be written as JSON.
    """
    made: list[str] = []

    def prepared(value: Any) -> Any:
        if isinstance(value, dict):
            if len(value) == 1:
                ((name, size),) = value.items()
                if name in _MADE and isinstance(size, int):
                    made.append(_MADE[name](size))
                    return f"\ue000{len(made) - 1}\ue001"
            return {name: prepared(one) for name, one in value.items()}
        return [prepared(one) for one in value] if isinstance(value, list) else value

    text = json.dumps(prepared(body), separators=(",", ":"))
    for number, one in enumerate(made):
        text = text.replace(f'"\\ue000{number}\\ue001"', one)
    return text.encode()


def rewritten(
    answer: Any,
    *,
    rename: Mapping[str, str],
    merge: Mapping[str, Any],
    remove: Sequence[str],
    envelope: bool,
) -> Any:
    """
    Change a decoded JSON answer, and return it. A path that does not exist changes nothing.

    :param rename: path to new name.
    :param merge: path to new value; the last name of a path need not exist.
    :param remove: paths.
    :param envelope: put the answer into the service's envelope.
    """
    for path, new in rename.items():
        for holder, name in _places(answer, path):
            if isinstance(holder, dict) and name in holder:
                holder[new] = holder.pop(name)
    for path, value in merge.items():
        for holder, name in _places(answer, path):
            if isinstance(holder, dict):
                holder[name] = value
            else:
                holder[int(name)] = value
    for path in remove:
        # From the end, so that the indexes of a list stay valid until they are reached.
        for holder, name in reversed(_places(answer, path)):
            if isinstance(holder, dict):
                holder.pop(name, None)
            else:
                del holder[int(name)]
    if envelope:
        return {"code": 20000, "message": "Ok", "status": True, "data": answer}
    return answer


def _places(answer: Any, path: str) -> list[tuple[Any, str]]:
    """Return the objects and lists that a path matches, each with the name or index in it."""
    found = [answer]
    *way, last = path.split(".")
    for part in way:
        found = [inner for one in found for inner in _inside(one, part)]
    return [(one, name) for one in found for name in _names(one, last)]


def _inside(value: Any, part: str) -> list[Any]:
    if isinstance(value, dict):
        return [value[name] for name in _names(value, part) if name in value]
    return [value[int(name)] for name in _names(value, part)]


def _names(value: Any, part: str) -> list[str]:
    if isinstance(value, dict):
        return list(value) if part == "*" else [part]
    if isinstance(value, list):
        places = [str(place) for place in range(len(value))]
        return places if part == "*" else [place for place in places if place == part]
    return []
