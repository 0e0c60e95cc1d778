"""
Which answers a job accepts, how the service is asked for such answers, and what a row gets that is sent again.

An answer is judged anew whenever results are collected, in whichever process, so a function of the author must say the
same of the same answer each time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from airflow_provider_siliconflow.api.answer_texts import without_thinking
from airflow_provider_siliconflow.api.models import BatchResult, Outcome
from airflow_provider_siliconflow.api.redaction import valid_text
from airflow_provider_siliconflow.api.sources import Source
from airflow_provider_siliconflow.batch_files.bodies import raw_parameters, sent_again
from airflow_provider_siliconflow.batch_files.custom_ids import custom_id_of
from airflow_provider_siliconflow.batch_files.lines import LONGEST_LINE
from airflow_provider_siliconflow.batch_files.output_types import (
    AnswerType,
    StructuredOutput,
    UnacceptableAnswerError,
    answer_type,
    check_accept,
    check_structured_output,
)
from airflow_provider_siliconflow.batch_files.parameters import check_retry_parameters, to_json
from airflow_provider_siliconflow.batch_files.result_lines import read_results
from airflow_provider_siliconflow.batch_files.verdicts import (
    Judge,
    UnjudgedError,
    UnreadableLineError,
    read_result,
)

if TYPE_CHECKING:
    from airflow_provider_siliconflow.batch_files.output_types import Accept, OutputType

log = logging.getLogger(__name__)

_TRUNCATED = "the answer was cut off at max_tokens (finish reason length)"
_EMPTY = "the answer is empty"
_NOT_ACCEPTED = "the answer was not accepted"
_UNREADABLE = "the result line cannot be read as a whole"

#: Characters of the longest answer that the next attempt shows to the model: more would cost more than it helps.
_LONGEST_SHOWN = 32_000

#: Outcomes of rows that no model answered.
_UNANSWERED = (Outcome.MISSING, Outcome.EXPIRED)

_INSTRUCTION = "Answer with JSON that satisfies this JSON schema, and with nothing else:\n"
_REPLY = "This answer cannot be used: {}.\nAnswer again, completely, with nothing but JSON that satisfies the schema."


@dataclass(frozen=True, slots=True)
class Acceptance:
    """
    What a job asks of its answers.

    :param output_type: the type of the answers, if one was given.
    :param accept: the author's own check, if one was given.
    :param structured_output: how the service is asked for answers of the type; ``None`` without one.
    :param retry_params: body parameters of rows that are sent again.
    """

    output_type: AnswerType | None = None
    accept: Accept | None = None
    structured_output: StructuredOutput | None = None
    retry_params: Mapping[str, Any] | None = None
    _logged: set[tuple[str, str]] = field(default_factory=set, compare=False, repr=False)

    # How the service is asked -----------------------------------------------------------------------------

    @property
    def defaults(self) -> dict[str, Any]:
        """Body parameters for rows that lack them."""
        if self.output_type is None or self.structured_output == "prompt":
            return {}
        wanted: dict[str, Any] = {"type": self.structured_output}
        if self.structured_output == "json_schema":
            wanted["json_schema"] = {"name": self.output_type.name, "schema": self.output_type.schema}
        return {"response_format": wanted}

    @property
    def instruction(self) -> str | None:
        """Text that is added to the messages of every row."""
        if self.output_type is None or self.structured_output == "json_schema":
            return None
        return _INSTRUCTION + to_json(self.output_type.schema).decode()

    @property
    def content(self) -> dict[str, Any]:
        """Everything that goes into the bodies of rows, as JSON types; empty if nothing does."""
        found = {**self.defaults, "instruction": self.instruction, "retry_params": self.retry_params}
        return {name: value for name, value in found.items() if value}

    # Judging ----------------------------------------------------------------------------------------------

    @property
    def judge(self) -> Judge | None:
        """What decides whether an answer is accepted; ``None`` if every answer is."""
        return None if self.output_type is None and self.accept is None else self._judge

    def _judge(self, line: bytes, text: str | None, finish_reason: str | None) -> str | None:
        is_empty = text is None or not text.strip()
        # A call of a tool has no text, and only the author's own check can say whether it is right.
        if is_empty and (self.output_type is not None or not _calls_tools(line)):
            return _EMPTY
        if finish_reason == "length":
            return _TRUNCATED
        parsed = None
        if self.output_type is not None and text is not None:
            try:
                parsed = self.output_type.read(text)
            except UnacceptableAnswerError as exc:
                return str(exc)
            # Pydantic lets errors of the author's validators through, but for ValueError and AssertionError.
            except Exception as exc:
                raise self._unjudged("output_type", exc) from exc
        return None if self.accept is None else self._accepted(self.accept, line, parsed)

    def _accepted(self, accept: Accept, line: bytes, parsed: Any) -> str | None:
        result = _result_of(line)
        if result is None:
            return _UNREADABLE
        try:
            said = accept(result.with_parsed(parsed))
        except Exception as exc:
            raise self._unjudged("accept", exc) from exc
        if isinstance(said, str):
            return said.strip() or _NOT_ACCEPTED
        if said is True or said is False:
            return None if said else _NOT_ACCEPTED
        raise UnjudgedError(
            f"accept returned an instance of {type(said).__name__}; it must return True, False or the reason why not"
        )

    def _unjudged(self, argument: str, error: Exception) -> UnjudgedError:
        kind = (argument, type(error).__name__)
        if kind not in self._logged:
            # It may be raised for a million rows.
            self._logged.add(kind)
            log.error("%s raised an error", argument, exc_info=error)
        try:
            said = str(error)
        # The text is made by the author's code as well.
        except Exception:  # noqa: BLE001
            said = "its text cannot be made"
        return UnjudgedError(f"{argument} raised {type(error).__name__}: {said}")

    # The next attempt -------------------------------------------------------------------------------------

    @property
    def with_retry_params(self) -> Callable[[bytes], bytes] | None:
        """What gives a request line the ``retry_params``; ``None`` if there are none."""
        if not self.retry_params:
            return None
        params = raw_parameters(self.retry_params)
        return lambda line: sent_again(line, params, None) or line

    def next_attempt(
        self, errors: Source, max_bytes: int, *, keeps_unanswered: bool = False
    ) -> Callable[[bytes], bytes] | None:
        """
        Return what turns the request line of a row into that of its next attempt; ``None`` if it stays as it is.

        The lines must come in the order of the results.

        :param errors: the results of the rows that are not ok, in the order of the rows.
        :param max_bytes: bytes of the longest line, including the newline.
        :param keeps_unanswered: whether a row without any result stays as it is: perhaps it was never sent.
        """
        if self.output_type is None and not self.retry_params:
            return None
        # Lines that only a judge could read have nothing to show.
        results = read_results(errors, on_unreadable=lambda problem: None)
        return _NextAttempt(
            raw_parameters(self.retry_params or {}),
            results if self.output_type is not None or keeps_unanswered else None,
            min(max_bytes, LONGEST_LINE),
            shows=self.output_type is not None,
            keeps_unanswered=keeps_unanswered,
        )


def _calls_tools(line: bytes) -> bool:
    result = _result_of(line) if b'"tool_calls"' in line else None
    return result is not None and bool(result.tool_calls)


def _result_of(line: bytes) -> BatchResult | None:
    """Return the result in a line; ``None`` if only the parts that a verdict needs can be read."""
    try:
        return read_result(line)
    except UnreadableLineError:
        return None


class _NextAttempt:
    """Turns request lines into those of the next attempt, one after the other."""

    def __init__(
        self,
        params: Mapping[str, msgspec.Raw],
        results: Iterator[BatchResult] | None,
        max_bytes: int,
        *,
        shows: bool,
        keeps_unanswered: bool,
    ) -> None:
        self._params = params
        self._results = results
        self._max_bytes = max_bytes
        self._shows = shows
        self._keeps_unanswered = keeps_unanswered

    def __call__(self, line: bytes) -> bytes:
        """Return the line of the next attempt. What does not fit into a batch is left out."""
        result = self._result(line)
        if self._keeps_unanswered and (result is None or result.outcome in _UNANSWERED):
            return line
        exchange = self._exchange(result) if self._shows else None
        for params, shown in ((self._params, exchange), (self._params, None)):
            again = sent_again(line, params, shown)
            if again is not None and len(again) < self._max_bytes:
                return again
        return line

    def _result(self, line: bytes) -> BatchResult | None:
        """Return the result of the last attempt; ``None`` if there is none."""
        if self._results is None:
            return None
        custom_id = custom_id_of(line)
        return next((each for each in self._results if each.custom_id == custom_id), None)

    @staticmethod
    def _exchange(result: BatchResult | None) -> tuple[str, str] | None:
        """Return the answer of the last attempt and the reply to it; ``None`` if there is nothing to show."""
        if result is None or not result.invalid:
            return None
        answer = without_thinking(result.text or "")
        if not answer or len(answer) > _LONGEST_SHOWN:
            return None
        reason = result.error_message or _NOT_ACCEPTED
        return valid_text(answer), _REPLY.format(reason.rstrip("."))


def check_acceptance(
    *, output_type: OutputType | None, accept: Any, structured_output: Any, retry_params: Any
) -> Acceptance:
    """
    Check the arguments of a job that concern its answers.

    :raises InvalidInputError: an argument is wrong; the message names it.
    """
    check_accept("accept", accept)
    check_retry_parameters("retry_params", retry_params)
    asked = check_structured_output("structured_output", structured_output)
    if output_type is None:
        return Acceptance(accept=accept, retry_params=retry_params)
    return Acceptance(answer_type("output_type", output_type), accept, asked or "json_object", retry_params)
