"""What became of the rows sent to one model, in figures."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from airflow_provider_siliconflow.api.redaction import brief

#: Distinct error messages that are counted apart; the rest is counted together.
MAX_MESSAGES = 200
OTHER_MESSAGES = "(other messages)"
_MESSAGE_CHARACTERS = 300


@dataclass(slots=True)
class Usage:
    """Tokens, as the service counted them. ``reasoning`` is a part of ``completion``."""

    prompt: int = 0
    completion: int = 0
    reasoning: int = 0
    total: int = 0

    def add(self, other: Usage) -> None:
        """Add ``other`` to this."""
        self.prompt += other.prompt
        self.completion += other.completion
        self.reasoning += other.reasoning
        self.total += other.total


@dataclass(slots=True)
class ModelTally:
    """
    What became of the rows sent to one model; of some shards or all of them, see :meth:`add`.

    :param rows: rows of the input.
    :param finish_reasons: of the rows that are ok.
    :param truncated: rows that are ok, but cut at ``max_tokens`` (finish reason ``length``).
    :param empty: rows that are ok, but without any text (a model that only reasoned, for one).
    :param mismatches: answers by another model than the one asked.
    :param duplicates: result lines refused because their batch had one for that row already.
    :param foreign: result lines of rows that were never asked.
    :param balance_errors: rows that failed because the account could not pay.
    :param usage: tokens of the answers kept.
    :param billed: tokens of all answers of all rounds, those that a later one replaced included.
    :param messages: how often the service said what, see :meth:`most_common_errors`.
    :param ok_in_round: rows by the round that answered them.
    """

    rows: int = 0
    ok: int = 0
    error: int = 0
    expired: int = 0
    missing: int = 0
    truncated: int = 0
    empty: int = 0
    mismatches: int = 0
    duplicates: int = 0
    foreign: int = 0
    balance_errors: int = 0
    usage: Usage = field(default_factory=Usage)
    billed: Usage = field(default_factory=Usage)
    finish_reasons: dict[str, int] = field(default_factory=dict)
    messages: dict[str, int] = field(default_factory=dict)
    ok_in_round: dict[int, int] = field(default_factory=dict)

    def add(self, other: ModelTally) -> None:
        """Add the figures of other rows to this."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.usage.add(other.usage)
        self.billed.add(other.billed)
        for reason, count in other.finish_reasons.items():
            self.finish_reasons[reason] = self.finish_reasons.get(reason, 0) + count
        for number, count in other.ok_in_round.items():
            self.ok_in_round[number] = self.ok_in_round.get(number, 0) + count
        for message, count in other.messages.items():
            self.add_message(message, count)

    def add_message(self, message: str, count: int = 1) -> None:
        """Count an error message; only so many different ones are told apart."""
        # A row's error may name a signed URL of its prompt; this goes into XCom and logs.
        message = brief(message, _MESSAGE_CHARACTERS)
        if message not in self.messages and len(self.messages) >= MAX_MESSAGES:
            message = OTHER_MESSAGES
        self.messages[message] = self.messages.get(message, 0) + count

    def most_common_errors(self, limit: int = 5) -> dict[str, int]:
        """Return the most common error messages and how many rows have them."""
        return dict(Counter(self.messages).most_common(limit))


_COUNTS = (
    *("rows", "ok", "error", "expired", "missing", "truncated", "empty"),
    *("mismatches", "duplicates", "foreign", "balance_errors"),
)
