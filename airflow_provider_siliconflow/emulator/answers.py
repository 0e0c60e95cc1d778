"""
Answers of the emulated models.

An answer is a pure function of the model, the messages, the parameters and the custom id: never of the batch,
the time or chance. Two runs over the same rows therefore give the same bytes, down to ids and usage.
"""

from __future__ import annotations

import re
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import msgspec

from airflow_provider_siliconflow.emulator.rows import last_user_text, markers_of, without_markers

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

#: ``created`` of the answers lies in the day that follows.
_EPOCH = 1_741_685_413
_CHARACTERS_PER_TOKEN = 4
_REASONING_MODEL = re.compile(r"(^|[-/])(R1|QwQ)([-.]|$)|Thinking", re.IGNORECASE)
_UNIT = 1 << 64

_canonical = msgspec.json.Encoder(order="sorted").encode
_encode = msgspec.json.Encoder().encode

#: Code and message of a failed row, by HTTP-like status.
_ROW_ERRORS = {
    400: ("20015", "The request has invalid parameters."),
    401: ("401", "Api key is invalid"),
    402: ("30001", "Sorry, your account balance is insufficient"),
    403: ("30003", "Model disabled."),
    413: ("20015", "The prompt is longer than the context of the model."),
    429: ("429", "Request was rejected due to rate limiting. Details: TPM limit reached."),
    500: ("50000", "Internal server error."),
    503: ("50505", "Model service overloaded. Please try again later."),
    504: ("50504", "The model did not answer in time."),
}


class KnownAnswer(msgspec.Struct, frozen=True):
    """A question with its right answer."""

    question: str
    answer: str | int | float


class AnswerBook:
    """Questions with known answers, found inside longer prompts."""

    # Questions are looked up by their first characters at every place of the prompt; shorter ones are few.
    _KEY = 16

    def __init__(self, entries: Iterable[KnownAnswer]) -> None:
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
    def read(cls, path: Path) -> AnswerBook:
        """
        Read a JSONL file of ``{"question": ..., "answer": ...}``.

        :raises ValueError: a line that is not such an object, with its number.
        """
        entries = []
        decode = msgspec.json.Decoder(KnownAnswer).decode
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    entry = decode(line)
                except msgspec.DecodeError as error:
                    raise ValueError(f"{path}, line {number}: {error}") from None
                if not entry.question.strip():
                    raise ValueError(f"{path}, line {number}: the question is empty")
                entries.append(KnownAnswer(entry.question.strip(), entry.answer))
        return cls(entries)

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


class Answerer:
    """
    Writes result lines.

    :param book: questions with known answers.
    :param skills: model id to the share of known questions it answers rightly.
    """

    def __init__(self, book: AnswerBook, skills: Mapping[str, float]) -> None:
        self._book = book
        self._skills = skills

    def output_line(self, custom_id: str, body: dict[str, Any]) -> tuple[bytes, bool]:
        """
        Return a line of the output file, and whether it has to be written twice.

        :param body: the body of the row, with what ``replace`` of the batch puts in.
        """
        model = body["model"]
        digest = _digest(custom_id, model, _canonical(body))
        number = int.from_bytes(digest[:8], "big")
        prompt = last_user_text(body)
        markers = markers_of(prompt)
        if markers:
            prompt = without_markers(prompt)

        text = self._text(model, prompt, number)
        if _wants_json(body):
            text = msgspec.json.encode({"answer": text.rpartition("Answer: ")[2]}).decode()
        finish_reason = "stop"
        tokens = _tokens(text)
        limit = body.get("max_tokens")
        if isinstance(limit, int) and tokens > limit:
            text, tokens, finish_reason = text[: limit * _CHARACTERS_PER_TOKEN], limit, "length"
        if "length" in markers:
            text, finish_reason = text[: len(text) // 2], "length"
            tokens = _tokens(text)
        if "empty" in markers:
            text, tokens = "", 0

        message: dict[str, Any] = {"role": "assistant", "content": text}
        prompt_tokens = sum(4 + _tokens(_text_of(one)) for one in body["messages"])
        usage: dict[str, Any] = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": prompt_tokens + tokens,
        }
        if body.get("enable_thinking") is True or _REASONING_MODEL.search(model):
            reasoning = f"The user asks: {prompt[:120]} I check what I know before I answer."
            thought = _tokens(reasoning)
            message["reasoning_content"] = reasoning
            usage["completion_tokens"] += thought
            usage["total_tokens"] += thought
            usage["completion_tokens_details"] = {"reasoning_tokens": thought}
        name = digest.hex()
        line = {
            "id": f"batch_req_{name[:16]}",
            "custom_id": custom_id,
            "response": {
                "body": {
                    "id": name,
                    "object": "chat.completion",
                    "created": _EPOCH + number % 86400,
                    "model": "emulator/another-model" if "wrong-model" in markers else model,
                    "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
                    "usage": usage,
                    "system_fingerprint": "",
                }
            },
            "error": None,
            "trace_id": f"ti_{name[16:]}",
        }
        return _encode(line) + b"\n", "duplicate" in markers

    def _text(self, model: str, prompt: str, number: int) -> str:
        known = self._book.find(prompt)
        if known is None:
            snippet = " ".join(prompt[:160].split())[:80]
            return f"{model.rpartition('/')[2]} was asked: {snippet}"
        if number < self._skills.get(model, 0.5) * _UNIT:
            return f"I compared what I know with the question. Answer: {known.answer}"
        return f"I am fairly sure about this one. Answer: {self._book.wrong_answer(known, number)}"


def error_line(custom_id: str, status: int) -> bytes:
    """Return a line of the error file for a row that failed with an HTTP-like status."""
    code, message = _ROW_ERRORS.get(status, (str(status), f"The request failed with status {status}."))
    return _error(custom_id, code, message)


def expired_line(custom_id: str) -> bytes:
    """Return a line of the error file for a row that was not run in the completion window."""
    return _error(
        custom_id, "batch_expired", "This request could not be executed before the completion window expired."
    )


def transient_status(custom_id: str, model: str, rate: float) -> int | None:
    """Return the status a row fails with on its first run under ``row_error_rate``, None if it succeeds."""
    digest = _digest(custom_id, model, b"row error")
    if int.from_bytes(digest[:8], "big") < rate * _UNIT:
        return 429 if digest[8] & 1 else 503
    return None


def _error(custom_id: str, code: str, message: str) -> bytes:
    name = _digest(custom_id, code, b"").hex()
    error = {"code": code, "message": message}
    return (
        _encode({"id": f"batch_req_{name[:16]}", "custom_id": custom_id, "response": None, "error": error})
        + b"\n"
    )


def _digest(custom_id: str, model: str, rest: bytes) -> bytes:
    state = blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=16)
    state.update(b"\0" + model.encode("utf-8", "surrogatepass") + b"\0")
    state.update(rest)
    return state.digest()


def _tokens(text: str) -> int:
    return -(-len(text) // _CHARACTERS_PER_TOKEN)


def _text_of(message: dict[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else str(content or "")


def _wants_json(body: dict[str, Any]) -> bool:
    wanted = body.get("response_format")
    return isinstance(wanted, dict) and wanted.get("type") in ("json_object", "json_schema")
