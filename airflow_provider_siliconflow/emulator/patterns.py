"""Texts that match a regular expression, for the strings of a JSON schema."""

from __future__ import annotations

import re
import string
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_ATTEMPTS = 40
_DIGITS, _WORD, _SPACE = string.digits, string.ascii_letters + string.digits + "_", " \t"
_PRINTABLE = "".join(map(chr, range(32, 127)))
_SETS = {"d": _DIGITS, "w": _WORD, "s": _SPACE}
_NAMED = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "0": "\0"}
_REPEAT = re.compile(r"([*+?]|\{(\d+)(,(\d*))?\})[?+]?")


class PatternError(ValueError):
    """No text was found that matches the pattern."""


def matching_text(pattern: str, choose: Callable[[int], int], fits: Callable[[str], bool]) -> str:
    """
    Return a text that matches a pattern.

    Every text is checked with :mod:`re` before it is returned, so a construct that is read too loosely
    (a look-ahead is skipped) costs attempts but never gives a wrong text.

    :param choose: returns a number from 0 up to its argument, exclusive.
    :param fits: what else the text must satisfy.
    :raises PatternError: no such text was found.
    """
    try:
        compiled = re.compile(pattern)
        for _ in range(_ATTEMPTS):
            text = _Reader(pattern, choose).alternatives()
            if fits(text) and compiled.search(text):
                return text
    except (re.error, RecursionError, OverflowError) as error:
        raise PatternError(f"the pattern {pattern!r} is not supported: {error}") from None
    raise PatternError(f"no text was found that matches the pattern {pattern!r}")


class _Reader:
    """Reads a pattern from left to right and writes one text for it."""

    def __init__(self, pattern: str, choose: Callable[[int], int]) -> None:
        self._pattern = pattern
        self._choose = choose
        self._at = 0

    def alternatives(self) -> str:
        """Read up to the end of the group, and return the text of one of its alternatives."""
        texts = [self._sequence()]
        while self._take("|"):
            texts.append(self._sequence())
        return texts[self._choose(len(texts))]

    def _sequence(self) -> str:
        text = ""
        while self._at < len(self._pattern) and self._pattern[self._at] not in "|)":
            start = self._at
            first = self._atom()
            end = self._at
            repeat = _REPEAT.match(self._pattern, end)
            if repeat is None:
                text += first
                continue
            for _ in range(self._count(repeat)):
                # Read again for each repetition, so that each makes its own choices.
                self._at = start
                text += self._atom()
            self._at = repeat.end()
        return text

    def _count(self, repeat: re.Match[str]) -> int:
        sign, least, comma, most = repeat.groups()
        if least is None:
            low, high = {"*": (0, 4), "+": (1, 4), "?": (0, 1)}[sign]
        else:
            low = int(least)
            high = low if comma is None else int(most) if most else low + 4
        return low + self._choose(min(high, low + 8) - low + 1)

    def _atom(self) -> str:
        character = self._next()
        if character == "(":
            return self._group()
        if character == "[":
            return self._one_of(self._character_class())
        if character == ".":
            return self._one_of(_WORD)
        if character in "^$":
            return ""
        if character == "\\":
            return self._one_of(self._escaped())
        return character

    def _group(self) -> str:
        ahead = re.compile(r"\?(?:[=!]|<[=!])").match(self._pattern, self._at)
        named = re.compile(r"\?(?::|P?<\w+>|[a-zA-Z-]+:)").match(self._pattern, self._at)
        if named is not None:
            self._at = named.end()
        elif ahead is not None:
            self._at = ahead.end()
        text = self.alternatives()
        self._take(")")
        return "" if ahead is not None else text

    def _character_class(self) -> str:
        negated = self._take("^")
        found = ""
        first = True
        while first or not self._take("]"):
            first = False
            character = self._next()
            characters = self._escaped(in_class=True) if character == "\\" else character
            is_range = self._pattern[self._at : self._at + 1] == "-" and self._pattern[
                self._at + 1 : self._at + 2
            ] not in ("]", "")
            if is_range and len(characters) == 1:
                self._at += 1
                last = self._next()
                if last == "\\":
                    last = self._escaped(in_class=True)
                # A range over a whole alphabet needs no more than its beginning.
                characters = "".join(
                    map(chr, range(ord(characters), min(ord(last), ord(characters) + 255) + 1))
                )
            found += characters
        if not negated:
            return found
        return "".join(one for one in _WORD + _PRINTABLE if one not in found)

    def _escaped(self, *, in_class: bool = False) -> str:
        character = self._next()
        if character in _SETS:
            return _SETS[character]
        if character.lower() in _SETS:
            return "".join(one for one in _PRINTABLE if one not in _SETS[character.lower()])
        if character in "xu":
            digits = self._pattern[self._at : self._at + (2 if character == "x" else 4)]
            self._at += len(digits)
            return chr(int(digits, 16))
        if character in "bBAZ" and not in_class:
            return ""
        return _NAMED.get(character, character)

    def _one_of(self, characters: str) -> str:
        return characters[self._choose(len(characters))] if characters else ""

    def _next(self) -> str:
        character = self._pattern[self._at : self._at + 1]
        self._at += 1
        return character

    def _take(self, character: str) -> bool:
        if self._pattern[self._at : self._at + 1] != character:
            return False
        self._at += 1
        return True
