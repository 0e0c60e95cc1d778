"""
Answers of the emulated models.

An answer depends only on the model, the messages, the parameters and the custom id, not on the batch, the time or
chance. So two runs over the same rows give the same bytes, including ids and usage.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import msgspec

from airflow_provider_siliconflow.emulator.draws import Draw, digest_of, share_of
from airflow_provider_siliconflow.emulator.flaws import FLAWS, with_flaws
from airflow_provider_siliconflow.emulator.parameters import PARAMETER_ERRORS
from airflow_provider_siliconflow.emulator.response_format import wants_json
from airflow_provider_siliconflow.emulator.rows import markers_of, text_of, user_texts, without_markers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow_provider_siliconflow.emulator.answer_book import AnswerBook
    from airflow_provider_siliconflow.emulator.response_format import SchemaBook
    from airflow_provider_siliconflow.emulator.schemas import SchemaWriter

#: ``created`` of the answers is within a day after this time.
_EPOCH = 1_741_685_413
_CHARACTERS_PER_TOKEN = 4
_REASONING_MODEL = re.compile(r"(^|[-/])(R1|QwQ)([-.]|$)|Thinking", re.IGNORECASE)
_canonical = msgspec.json.Encoder(order="sorted").encode
_encode = msgspec.json.Encoder().encode

#: Where a schema has room for a known answer.
_ANSWER_FIELDS = ("answer", "verdict")

#: Code and message of a failed row, by HTTP-like status or by what is wrong with its parameters.
_ROW_ERRORS = {
    "400": ("20015", "The request has invalid parameters."),
    "401": ("401", "Api key is invalid"),
    "402": ("30001", "Sorry, your account balance is insufficient"),
    "403": ("30003", "Model disabled."),
    "413": ("20015", "The prompt is longer than the context of the model."),
    "429": ("429", "Request was rejected due to rate limiting. Details: TPM limit reached."),
    "500": ("50000", "Internal server error."),
    "503": ("50505", "Model service overloaded. Please try again later."),
    "504": ("50504", "The model did not answer in time."),
    **PARAMETER_ERRORS,
}


class Usage(msgspec.Struct, frozen=True):
    """
    Tokens of one answer or of many.

    :param prompt: of the prompts, the cached ones included.
    :param cached: those of the prompts that came from the service's cache.
    :param completion: of the answers, thinking included.
    :param rows: answers counted here.
    """

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    rows: int = 1

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt + other.prompt,
            self.cached + other.cached,
            self.completion + other.completion,
            self.rows + other.rows,
        )


class Answer(msgspec.Struct, frozen=True):
    """What a model answers."""

    text: str
    thinking: str | None
    finish_reason: str
    usage: Usage


class Completion(msgspec.Struct, frozen=True):
    """
    An answer as the service sends it.

    :param body: the ``chat.completion`` object.
    :param digest: stands for the row: custom id, model and body.
    :param markers: those of the row.
    """

    body: dict[str, Any]
    usage: Usage
    digest: bytes
    markers: list[str]


class AnswerStyle(msgspec.Struct, frozen=True):
    """
    How the rows of a batch are answered beside what is in them.

    :param cached_share: share of a prompt's tokens that came from the service's cache.
    :param thinking_tokens: tokens of the thinking; 0 is a sentence.
    """

    cached_share: float = 0.0
    thinking_tokens: int = 0


class Answerer:
    """
    Answers rows.

    :param book: known answers.
    :param skills: model id to the share of known questions that it answers correctly.
    :param schemas: the schemas that rows ask for.
    """

    def __init__(self, book: AnswerBook, skills: Mapping[str, float], schemas: SchemaBook) -> None:
        self._book = book
        self._skills = skills
        self._schemas = schemas

    def answer(
        self, custom_id: str, body: dict[str, Any], flaw: str | None = None, style: AnswerStyle | None = None
    ) -> Answer:
        """
        Answer a row.

        :param body: the body of the row, with what ``replace`` of the batch puts in.
        :param flaw: what is wrong with the answer beside what the markers ask for.
        """
        return self._answer(custom_id, body, flaw, style or AnswerStyle())[0]

    def output_line(
        self, custom_id: str, body: dict[str, Any], flaw: str | None = None, style: AnswerStyle | None = None
    ) -> tuple[bytes, bool]:
        """Return a line of the output file, and whether it has to be written twice. Arguments as of :meth:`answer`."""
        completion = self.completion(custom_id, body, flaw, style)
        name = completion.digest.hex()
        line = {
            "id": f"batch_req_{name[:16]}",
            "custom_id": custom_id,
            "response": {"body": completion.body},
            "error": None,
            "trace_id": f"ti_{name[16:]}",
        }
        return _encode(line) + b"\n", "duplicate" in completion.markers

    def completion(
        self, custom_id: str, body: dict[str, Any], flaw: str | None = None, style: AnswerStyle | None = None
    ) -> Completion:
        """Return the ``chat.completion`` object of a row. Arguments as of :meth:`answer`."""
        answer, digest, markers = self._answer(custom_id, body, flaw, style or AnswerStyle())
        model = body["model"]
        message: dict[str, Any] = {"role": "assistant", "content": answer.text}
        used = answer.usage
        usage: dict[str, Any] = {
            "prompt_tokens": used.prompt,
            "completion_tokens": used.completion,
            "total_tokens": used.prompt + used.completion,
        }
        if answer.thinking is not None:
            message["reasoning_content"] = answer.thinking
            usage["completion_tokens_details"] = {"reasoning_tokens": _tokens(answer.thinking)}
        if used.cached:
            usage["prompt_tokens_details"] = {"cached_tokens": used.cached}
        content = {
            "id": digest.hex(),
            "object": "chat.completion",
            "created": _EPOCH + int.from_bytes(digest[:8], "big") % 86400,
            "model": "emulator/another-model" if "wrong-model" in markers else model,
            "choices": [{"index": 0, "message": message, "finish_reason": answer.finish_reason}],
            "usage": usage,
            "system_fingerprint": "",
        }
        return Completion(content, used, digest, markers)

    def _answer(
        self, custom_id: str, body: dict[str, Any], flaw: str | None, style: AnswerStyle
    ) -> tuple[Answer, bytes, list[str]]:
        model = body["model"]
        digest = digest_of(custom_id, model, _canonical(body))
        number = int.from_bytes(digest[:8], "big")
        prompts = user_texts(body)
        markers = [marker for prompt in prompts for marker in markers_of(prompt)]
        if markers:
            prompts = [without_markers(prompt) for prompt in prompts]
        flaws = FLAWS.intersection(markers if flaw is None else [*markers, flaw])

        system = [text_of(one) for one in body["messages"] if one["role"] == "system"]
        writer = self._schemas.writer_for(body, [*system, *reversed(prompts)])
        text = self._book.given(custom_id, prompts)
        if text is None:
            text = self._text(model, prompts, digest, writer, as_json=wants_json(body))
        if flaws:
            text = with_flaws(text, flaws, number, writer)
        finish_reason = "stop"
        tokens = _tokens(text)
        limit = body.get("max_tokens")
        if isinstance(limit, int) and tokens > limit:
            text, tokens, finish_reason = text[: limit * _CHARACTERS_PER_TOKEN], limit, "length"
        if "length" in flaws:
            text, finish_reason = text[: len(text) // 2], "length"
            tokens = _tokens(text)
        if "empty" in flaws:
            text, tokens = "", 0

        prompt_tokens = sum(4 + _tokens(_text_of(one)) for one in body["messages"])
        thinking = None
        if body.get("enable_thinking") is True or _REASONING_MODEL.search(model):
            thinking = _thinking(prompts[0], style.thinking_tokens, body.get("thinking_budget"))
            tokens += _tokens(thinking)
        usage = Usage(prompt_tokens, int(prompt_tokens * style.cached_share), tokens)
        return Answer(text, thinking, finish_reason, usage), digest, markers

    def _text(
        self, model: str, prompts: list[str], digest: bytes, writer: SchemaWriter | None, *, as_json: bool
    ) -> str:
        known = next(filter(None, map(self._book.find, prompts)), None)
        right = share_of(digest) < self._skills.get(model, 0.5)
        number = int.from_bytes(digest[:8], "big")
        reply: str | int | float
        if known is None:
            snippet = " ".join(prompts[0][:160].split())[:80]
            reply = text = f"{model.rpartition('/')[2]} was asked: {snippet}"
        elif right:
            reply = known.answer
            text = f"I compared what I know with the question. Answer: {reply}"
        else:
            reply = self._book.wrong_answer(known, number)
            text = f"I am fairly sure about this one. Answer: {reply}"
        if writer is not None:
            value = writer.value(Draw(number), prompts[-1][:160].split())
            field = next((name for name in _ANSWER_FIELDS if isinstance(value, dict) and name in value), None)
            if known is not None and field is not None:
                # As the schema wants it: a number, or one of the choices.
                fitting = [one for one in (reply, str(reply)) if writer.allows(field, one)]
                value[field] = fitting[0] if fitting else value[field]
            text = _encode(value).decode()
        elif as_json:
            text = _encode({"answer": str(reply)}).decode()
        return text


def error_line(custom_id: str, reason: str) -> bytes:
    """Return a line of the error file for a row that failed: with an HTTP-like status, or for a parameter."""
    return _error(custom_id, *row_error(reason))


def row_error(reason: str) -> tuple[str, str]:
    """Return code and message of a row that failed: with an HTTP-like status, or for a parameter."""
    return _ROW_ERRORS.get(reason, (reason, f"The request failed with status {reason}."))


def expired_line(custom_id: str) -> bytes:
    """Return a line of the error file for a row that was not run in the completion window."""
    return _error(
        custom_id, "batch_expired", "This request could not be executed before the completion window expired."
    )


def transient_status(custom_id: str, model: str, rate: float) -> int | None:
    """Return the status with which a row fails on its first run under ``row_error_rate``; None if it succeeds."""
    digest = digest_of(custom_id, model, b"row error")
    if share_of(digest) < rate:
        return 429 if digest[8] & 1 else 503
    return None


def _error(custom_id: str, code: str, message: str) -> bytes:
    name = digest_of(custom_id, code, b"").hex()
    error = {"code": code, "message": message}
    return (
        _encode({"id": f"batch_req_{name[:16]}", "custom_id": custom_id, "response": None, "error": error})
        + b"\n"
    )


def _thinking(prompt: str, tokens: int, budget: object) -> str:
    sentence = f"The user asks: {prompt[:120]} I check what I know before I answer."
    if tokens:
        size = tokens * _CHARACTERS_PER_TOKEN
        sentence = (sentence * (1 + size // len(sentence)))[:size]
    # max_tokens bounds the answer alone; this is bounded only by its own budget.
    return sentence[: budget * _CHARACTERS_PER_TOKEN] if isinstance(budget, int) else sentence


def _tokens(text: str) -> int:
    return -(-len(text) // _CHARACTERS_PER_TOKEN)


def _text_of(message: dict[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else str(content or "")
