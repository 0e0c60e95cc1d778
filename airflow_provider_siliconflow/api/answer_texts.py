"""
The JSON in the text of an answer, found as a person would find it.

Models put JSON into code fences, think before it, or write a sentence around it. What is found is a part of the text,
unchanged: nothing is repaired.
"""

from __future__ import annotations

import json
import re
from itertools import islice
from typing import Any, NoReturn

_THINKING, _THOUGHT = "<think>", "</think>"
#: The end of thinking whose beginning a chat template left out. No text in JSON has a line that begins or ends so.
_THOUGHT_ALONE = re.compile(r"^[ \t]*</think>|</think>[ \t]*$", re.MULTILINE)
#: A line that opens or closes a code fence.
_FENCE = re.compile(r"^[ \t]*```[^\n`]*$", re.MULTILINE)
_OPENING = re.compile(r"[{\[]")
#: Places at which JSON is looked for in one text, and passes over the text that they may cost in all.
_MOST_STARTS, _MOST_PASSES = 64, 8


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
    # More than two say nothing, and may be millions.
    marks = list(islice(_FENCE.finditer(rest), 3))
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
    return _value_at(text, 0)[0] == len(text)


def _value_at(text: str, start: int) -> tuple[int | None, int]:
    """Return where the value that begins at a place ends, if there is one, and how far the text was read for it."""
    try:
        end: int = _decoder.raw_decode(text, start)[1]
    except json.JSONDecodeError as exc:
        return None, exc.pos
    except (ValueError, RecursionError):
        return None, len(text)
    return end, end


def _only_value(text: str) -> str | None:
    found: dict[str, list[str]] = {"{": [], "[": []}
    position, left = 0, _MOST_PASSES * len(text)
    for _ in range(_MOST_STARTS):
        opening: Any = _OPENING.search(text, position)
        if opening is None:
            break
        start = opening.start()
        end, reached = _value_at(text, start)
        left -= reached - start
        if left < 0:
            return None
        if end is not None:
            found[text[start]].append(text[start:end])
        position = end or start + 1
    else:
        return None
    values = found["{"] or found["["]
    return values[0] if len(values) == 1 else None
