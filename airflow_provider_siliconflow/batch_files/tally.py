"""The outcomes of the rows sent to one model, in figures."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from airflow_provider_siliconflow.api.redaction import brief

#: Distinct error messages that are counted separately; the rest are counted together.
MAX_MESSAGES = 200
OTHER_MESSAGES = "(other messages)"
#: Characters of a message that are kept.
MESSAGE_CHARACTERS = 300

#: Distinct finish reasons, and reasons of invalid answers, that are counted separately; the rest are counted together.
MAX_REASONS = 20
OTHER_REASONS = "(other reasons)"
_REASON_CHARACTERS = 64


@dataclass(slots=True)
class Usage:
    """Tokens, as the service counted them. ``prompt`` includes ``cached``, ``completion`` includes ``reasoning``."""

    prompt: int = 0
    completion: int = 0
    reasoning: int = 0
    total: int = 0
    cached: int = 0

    def add(self, other: Usage) -> None:
        """Add ``other`` to this."""
        self.prompt += other.prompt
        self.completion += other.completion
        self.reasoning += other.reasoning
        self.total += other.total
        self.cached += other.cached

    def without(self, other: Usage) -> Usage:
        """Return this less a part of it."""
        return Usage(
            self.prompt - other.prompt,
            self.completion - other.completion,
            self.reasoning - other.reasoning,
            self.total - other.total,
            self.cached - other.cached,
        )


@dataclass(slots=True)
class ModelTally:
    """
    The outcomes of the rows sent to one model, for one or more shards, see :meth:`add`.

    :param rows: rows of the input.
    :param invalid: rows whose answer is not what the job asked for.
    :param finish_reasons: finish reasons of the rows that are ok, see :meth:`add_finish_reason`.
    :param truncated: rows that are ok, but cut at ``max_tokens`` (finish reason ``length``).
    :param empty: rows that are ok, but have no text (for example of a model that only reasoned).
    :param without_usage: rows that are ok, but do not state their tokens, so that ``billed`` is too low.
    :param mismatches: answers of another model than the requested one.
    :param duplicates: result lines that were left out because their batch already had one for the row.
    :param foreign: result lines of rows that were never sent.
    :param invalid_input: rows that are invalid and were not sent; they count as ``error`` too.
    :param balance_errors: rows that failed because the account could not pay.
    :param cached: rows that are ok by an answer of an earlier job.
    :param live: rows that are ok by an answer to the row alone, not in a batch.
    :param usage: tokens of the answers that were kept.
    :param billed: tokens of all answers of all rounds, including those that a later one replaced.
    :param billed_live: those of them that were asked row by row, at another price.
    :param saved: tokens of the cached answers, which are not billed.
    :param messages: number of rows by error message, see :meth:`add_message`.
    :param invalid_reasons: number of invalid rows by reason, see :meth:`add_invalid_reason`.
    :param ok_in_round: number of rows by the round that answered them.
    """

    rows: int = 0
    ok: int = 0
    error: int = 0
    invalid: int = 0
    expired: int = 0
    missing: int = 0
    truncated: int = 0
    empty: int = 0
    without_usage: int = 0
    mismatches: int = 0
    duplicates: int = 0
    foreign: int = 0
    balance_errors: int = 0
    cached: int = 0
    invalid_input: int = 0
    live: int = 0
    usage: Usage = field(default_factory=Usage)
    billed: Usage = field(default_factory=Usage)
    billed_live: Usage = field(default_factory=Usage)
    saved: Usage = field(default_factory=Usage)
    finish_reasons: dict[str, int] = field(default_factory=dict)
    messages: dict[str, int] = field(default_factory=dict)
    invalid_reasons: dict[str, int] = field(default_factory=dict)
    ok_in_round: dict[int, int] = field(default_factory=dict)

    def add(self, other: ModelTally) -> None:
        """Add the figures of other rows to this."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.usage.add(other.usage)
        self.billed.add(other.billed)
        self.billed_live.add(other.billed_live)
        self.saved.add(other.saved)
        for reason, count in other.finish_reasons.items():
            self.add_finish_reason(reason, count)
        for number, count in other.ok_in_round.items():
            self.ok_in_round[number] = self.ok_in_round.get(number, 0) + count
        for message, count in other.messages.items():
            self.add_message(message, count)
        for reason, count in other.invalid_reasons.items():
            self.add_invalid_reason(reason, count)

    def add_finish_reason(self, reason: str, count: int = 1) -> None:
        """Count rows by their finish reason; at most 20 distinct ones are counted separately."""
        _count(self.finish_reasons, reason, count, _REASON_CHARACTERS, MAX_REASONS, OTHER_REASONS)

    def add_message(self, message: str, count: int = 1) -> None:
        """Count rows by their error message; at most 200 distinct ones are counted separately."""
        _count(self.messages, message, count, MESSAGE_CHARACTERS, MAX_MESSAGES, OTHER_MESSAGES)

    def add_invalid_reason(self, reason: str, count: int = 1) -> None:
        """Count invalid rows by their reason; at most 20 distinct ones are counted separately."""
        _count(self.invalid_reasons, reason, count, MESSAGE_CHARACTERS, MAX_REASONS, OTHER_REASONS)

    def most_common_errors(self, limit: int = 5) -> dict[str, int]:
        """Return the most common error messages with their numbers of rows."""
        return dict(Counter(self.messages).most_common(limit))


def _count(counts: dict[str, int], text: str, count: int, characters: int, most: int, others: str) -> None:
    """Count a text from outside, which goes into XCom and logs and may contain a signed URL."""
    if text not in counts:
        text = brief(text, characters)
        if text not in counts and len(counts) >= most:
            text = others
    counts[text] = counts.get(text, 0) + count


_COUNTS = (
    *("rows", "ok", "error", "invalid", "expired", "missing", "truncated", "empty", "without_usage"),
    *("mismatches", "duplicates", "foreign", "balance_errors", "cached", "invalid_input", "live"),
)
