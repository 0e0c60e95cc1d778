"""What the emulated models know: answers to questions, to whole prompts and to rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class _Line(msgspec.Struct, frozen=True):
    """A line of the file; it has one of the first three."""

    answer: Any
    question: str | None = None
    prompt: str | None = None
    custom_id: str | None = None


class KnownAnswer(msgspec.Struct, frozen=True):
    """A question with its right answer."""

    question: str
    answer: str | int | float


class AnswerBook:
    """
    Questions with known answers, found inside longer prompts.

    :param entries: the questions.
    :param by_prompt: texts of whole user messages, each with what every model answers to it.
    :param by_custom_id: custom ids, each with what every model answers in its row.
    """

    # Questions are looked up by their first characters at every place of the prompt; shorter ones are few.
    _KEY = 16

    def __init__(
        self,
        entries: Iterable[KnownAnswer] = (),
        by_prompt: Mapping[str, Any] | None = None,
        by_custom_id: Mapping[str, Any] | None = None,
    ) -> None:
        self._by_prompt = dict(by_prompt or {})
        self._by_custom_id = dict(by_custom_id or {})
        self._entries = list(entries)
        self._by_start: dict[str, list[KnownAnswer]] = {}
        self._short: list[KnownAnswer] = []
        for entry in self._entries:
            if len(entry.question) < self._KEY:
                self._short.append(entry)
            else:
                self._by_start.setdefault(entry.question[: self._KEY], []).append(entry)
        # The same prompts are asked of several models: remember what was found, by hash to keep it small.
        self._found: dict[int, KnownAnswer | None] = {}

    @classmethod
    def read(cls, path: str | Path) -> AnswerBook:
        """
        Read a JSONL file of ``{"question": ..., "answer": ...}``.

        In place of ``question`` a line may have ``prompt``, a whole user message, or ``custom_id``; its answer is
        then given as it is: a text, or any other JSON value as JSON.

        :raises ValueError: a line that is not such an object, with its number.
        """
        path = Path(path)
        entries = []
        given: dict[str, dict[str, Any]] = {"prompt": {}, "custom_id": {}}
        decode = msgspec.json.Decoder(_Line).decode
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    entry = decode(line)
                    kind, name = _asked(entry)
                    if kind == "question":
                        entries.append(
                            msgspec.convert({"question": name, "answer": entry.answer}, KnownAnswer)
                        )
                    elif name in given[kind]:
                        raise ValueError(f"the {kind} {name[:80]!r} has an answer already")
                    else:
                        given[kind][name] = entry.answer
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{path}, line {number}: {error}") from None
        return cls(entries, given["prompt"], given["custom_id"])

    def given(self, custom_id: str, prompts: Iterable[str]) -> str | None:
        """
        Return the answer that was given for a row, or for the first of its messages that has one.

        :param prompts: the texts of its user messages.
        """
        found = self._by_custom_id.get(custom_id, msgspec.UNSET)
        if found is msgspec.UNSET and self._by_prompt:
            known = (self._by_prompt[prompt] for prompt in prompts if prompt in self._by_prompt)
            found = next(known, msgspec.UNSET)
        if found is msgspec.UNSET:
            return None
        return found if isinstance(found, str) else msgspec.json.encode(found).decode()

    def find(self, prompt: str) -> KnownAnswer | None:
        """Return the longest known question inside the prompt."""
        if not self._entries:
            return None
        key = hash(prompt)
        try:
            return self._found[key]
        except KeyError:
            pass
        found = self._search(prompt)
        if len(self._found) > 200_000:
            self._found.clear()
        self._found[key] = found
        return found

    def _search(self, prompt: str) -> KnownAnswer | None:
        candidates = [entry for entry in self._short if entry.question in prompt]
        size = self._KEY
        starts = self._by_start
        if starts:
            for position in range(len(prompt) - size + 1):
                entries = starts.get(prompt[position : position + size])
                if entries is not None:
                    candidates += [entry for entry in entries if prompt.startswith(entry.question, position)]
        return max(candidates, key=lambda entry: len(entry.question), default=None)

    def wrong_answer(self, right: KnownAnswer, number: int) -> str | int | float:
        """Return the answer of another entry that differs from the right one, chosen by ``number``."""
        count = len(self._entries)
        for step in range(count):
            other = self._entries[(number + step) % count].answer
            if other != right.answer:
                return other
        return "unknown"


def _asked(line: _Line) -> tuple[str, str]:
    """Return what a line gives the answer to: the name of the field, and its text."""
    asked = {"question": line.question, "prompt": line.prompt, "custom_id": line.custom_id}
    found = [(kind, text) for kind, text in asked.items() if text is not None]
    if len(found) != 1:
        raise ValueError("a line has one of question, prompt and custom_id beside its answer")
    ((kind, text),) = found
    if not text.strip():
        raise ValueError(f"the {kind} is empty")
    return kind, text if kind == "custom_id" else text.strip()
