"""
The JSON in the text of an answer, found as a person would find it.

Models put JSON into code fences, think before it, or write a sentence around it. What is found is a part of the text,
unchanged: nothing is repaired.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

_THINKING, _THOUGHT = "<think>", "</think>"
#: The end of thinking whose beginning a chat template left out. No text in JSON has a line that begins or ends so.
_THOUGHT_ALONE = re.compile(r"^[ \t]*</think>|</think>[ \t]*$", re.MULTILINE)
#: A line that opens or closes a code fence.
_FENCE = re.compile(r"^[ \t]*```[^\n`]*$", re.MULTILINE)
_OPENING = re.compile(r"[{\[]")
#: Places at which JSON is looked for in one text; each may cost a pass over the text.
_MOST_STARTS = 64


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


# Only the position of its end is needed, so numbers are not converted; Python refuses those of many digits.
_decoder = json.JSONDecoder(parse_int=len, parse_float=len, parse_constant=_refuse)


def json_in(text: str) -> str | None:
    """
    Return the JSON in a text: the text itself, or what remains without thinking, a code fence and other text.

    JSON with other text around it is found only if it is the only object, or, without any object, the only array.

    :param text: the answer.
    :returns: a part of ``text``; ``None`` if there is no JSON, or more than one candidate.
    """
    rest = text.strip()
    if _is_json(rest):
        return rest
    rest = without_thinking(rest)
    marks = list(_FENCE.finditer(rest))
    if len(marks) == 2:
        fenced = rest[marks[0].end() : marks[1].start()].strip()
        if _is_json(fenced):
            return fenced
    return rest if _is_json(rest) else _only_value(rest)


def without_thinking(text: str) -> str:
    """Return a text without the thinking before it; nothing if the text ends within the thinking."""
    text = text.strip()
    if text.startswith(_THINKING):
        return text.partition(_THOUGHT)[2].strip()
    alone = _THOUGHT_ALONE.search(text)
    return text[alone.end() :].strip() if alone and _THINKING not in text[: alone.start()] else text


def _is_json(text: str) -> bool:
    return _end_of_value(text, 0) == len(text)


def _end_of_value(text: str, start: int) -> int | None:
    try:
        end: int = _decoder.raw_decode(text, start)[1]
    except (ValueError, RecursionError):
        return None
    return end


def _only_value(text: str) -> str | None:
    found: dict[str, list[str]] = {"{": [], "[": []}
    position = 0
    for _ in range(_MOST_STARTS):
        opening: Any = _OPENING.search(text, position)
        if opening is None:
            break
        start = opening.start()
        end = _end_of_value(text, start)
        if end is not None:
            found[text[start]].append(text[start:end])
        position = end or start + 1
    else:
        return None
    values = found["{"] or found["["]
    return values[0] if len(values) == 1 else None
