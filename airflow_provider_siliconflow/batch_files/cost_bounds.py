"""
What rows can cost at most, before they are sent.

A token is at least a byte, so the prompt of a row has at most as many tokens as its messages have bytes, with what the
model's chat template adds. The answer has at most ``max_tokens``. Thinking comes on top of that: the service's
``max_tokens`` does not limit it, and ``thinking_budget`` ends it only with Qwen3 models, while others may go on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from typing import Any

import msgspec

from airflow_provider_siliconflow.api.exceptions import IncompleteResultsError, InvalidInputError
from airflow_provider_siliconflow.api.sources import Source
from airflow_provider_siliconflow.batch_files.atomic_files import open_own
from airflow_provider_siliconflow.batch_files.bodies import raw_parameters, with_defaults
from airflow_provider_siliconflow.batch_files.decimals import exact
from airflow_provider_siliconflow.batch_files.lines import LineReader
from airflow_provider_siliconflow.batch_files.prices import CACHED, THINKING, Price, live_prices, price_of

#: Tokens that a chat template adds: to each message, and to the whole (a system prompt of the model's own).
MESSAGE_TOKENS, TEMPLATE_TOKENS = 32, 256
#: A template writes tools and schemas in a form of its own: so many tokens a byte, and so many for its instructions.
_REWRITTEN, _INSTRUCTIONS = 4, 1024
#: The longest thinking that the service states for any model, in tokens.
LONGEST_THINKING = 40_000
#: Models that stop thinking at ``thinking_budget``, as the service states.
_STOPS_AT_BUDGET = "qwen3"
#: Models that only think: the service refuses ``enable_thinking`` for them, or may ignore it.
_ALWAYS_THINKS = re.compile(r"(^|[-/])(R1|QwQ|Z1)([-.]|$)|Thinking", re.IGNORECASE)

#: Parameters that the model does not read.
_UNREAD = frozenset(
    {
        *("model", "messages", "max_tokens", "n", "enable_thinking", "thinking_budget", "reasoning_effort"),
        *(
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "frequency_penalty",
            "presence_penalty",
            "repetition_penalty",
        ),
        *("stop", "seed", "stream", "stream_options", "logprobs", "top_logprobs", "logit_bias", "user"),
    }
)
#: Parameters by which a row may think whatever ``enable_thinking`` says.
_OTHER_SWITCHES = frozenset({"chat_template_kwargs", "thinking", "reasoning", "reasoning_effort"})

#: The share of ``max_cost`` that one batch may cost at most, unless it has a single row: the rest of a budget that is
#: too small for another batch is smaller than that.
_SHARE = 8


class UnboundedRowError(ValueError):
    """What a row can cost at most is not known; the text says why."""


@dataclass(slots=True)
class TokenBound:
    """
    Most tokens that rows can be billed.

    :param prompt: of the prompts.
    :param answers: of the answers without thinking.
    :param thinking: answers that may think.
    :param budgets: the sum of their ``thinking_budget``.
    :param open_ended: those of them without ``thinking_budget``.
    :param switched_off: answers that do not think, if the model obeys ``enable_thinking``.
    """

    prompt: int = 0
    answers: int = 0
    thinking: int = 0
    budgets: int = 0
    open_ended: int = 0
    switched_off: int = 0

    def add(self, other: TokenBound) -> None:
        """Add the tokens of other rows."""
        self.prompt += other.prompt
        self.answers += other.answers
        self.thinking += other.thinking
        self.budgets += other.budgets
        self.open_ended += other.open_ended
        self.switched_off += other.switched_off


class _Message(msgspec.Struct, gc=False):
    content: msgspec.Raw = msgspec.Raw(b"null")


class _Part(msgspec.Struct, gc=False):
    type: str = "text"


class _Line(msgspec.Struct, gc=False):
    body: dict[str, msgspec.Raw]


_decode_line = msgspec.json.Decoder(_Line).decode
_decode_messages = msgspec.json.Decoder(list[_Message]).decode
_decode_parts = msgspec.json.Decoder(list[_Part]).decode
_decode_model = msgspec.json.Decoder(str | None).decode


def bound_row(line: bytes) -> tuple[str, TokenBound]:
    """
    Return the model that a request line names, or ``""``, and the most tokens that it can be billed.

    :param line: a valid request line.
    :raises UnboundedRowError: there is no bound.
    """
    body = _decode_line(line).body
    messages = body["messages"]
    count = 0
    for message in _decode_messages(messages):
        count += 1
        content = memoryview(message.content)
        if content[0] == 0x5B and any(part.type != "text" for part in _decode_parts(content)):
            raise UnboundedRowError("a message has a part that is not text, whose tokens are not known")
    prompt = len(memoryview(messages)) + count * MESSAGE_TOKENS + TEMPLATE_TOKENS
    read = body.keys() - _UNREAD
    for name in read:
        prompt += _REWRITTEN * (len(name) + len(memoryview(body[name])))
    if read - {"response_format"}:
        prompt += _INSTRUCTIONS

    most = _whole(body, "max_tokens")
    if most is None:
        raise UnboundedRowError("max_tokens is missing, without which the row can cost any sum")
    answers = 1 if (given := _whole(body, "n")) is None else given
    found = TokenBound(prompt, most * answers)
    raw = body.get("enable_thinking")
    if raw is None or bytes(raw) != b"false" or not _OTHER_SWITCHES.isdisjoint(body):
        budget = _whole(body, "thinking_budget")
        found.thinking = answers
        found.budgets = (budget or 0) * answers
        found.open_ended = answers if budget is None else 0
    else:
        found.switched_off = answers
    model = body.get("model")
    return (_decode_model(model) or "") if model is not None else "", found


def _whole(body: Mapping[str, msgspec.Raw], name: str) -> int | None:
    """
    Return a parameter that is a whole number above 0; ``None`` if it is not given.

    :raises UnboundedRowError: it is anything else.
    """
    raw = body.get(name)
    if raw is None:
        return None
    value = msgspec.json.decode(raw)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
        raise UnboundedRowError(f"{name} must be a whole number above 0; it is {str(value)[:40]}")
    return value


def bound_file(requests: Source, *, own_models: bool) -> dict[str, TokenBound]:
    """
    Return the most tokens that the rows of a request file can be billed.

    :param own_models: whether to return them by the models that the rows name; otherwise all are under ``""``.
    :raises IncompleteResultsError: the file is damaged.
    :raises InvalidInputError: a row has no bound.
    """
    found: dict[str, TokenBound] = {}
    with open_own(requests) as stream:
        for number, line in enumerate(LineReader(stream), 1):
            try:
                model, bound = bound_row(line or b"")
            except UnboundedRowError as exc:
                raise InvalidInputError(f"max_cost: line {number} of {requests}: {exc}") from None
            except (msgspec.DecodeError, ValueError, KeyError, RecursionError):
                raise IncompleteResultsError(
                    f"line {number} of the request file {requests} is damaged. Its batches and their results at the "
                    "service are untouched"
                ) from None
            found.setdefault(model if own_models else "", TokenBound()).add(bound)
    return found


class Tariff:
    """
    The most that tokens can cost in a job.

    :param models: the models that all rows run over; empty if the rows name theirs.
    :param prices: by model, as checked.
    :param max_cost: CNY.
    :param sent_again: what turns the request line of a row into that of its next attempt; ``None`` if it stays as it
        is.
    :param variants: for each model, body parameters that rows get if they lack them; empty if no model has any.
    :param live: whether the rows are asked one by one, at the prices for that.
    """

    def __init__(
        self,
        models: tuple[str, ...],
        prices: Mapping[str, Price] | None,
        max_cost: Fraction,
        *,
        sent_again: Callable[[bytes], bytes] | None = None,
        variants: Sequence[Mapping[str, Any]] = (),
        live: bool = False,
    ) -> None:
        self.models = models
        self._live = live
        self._sent_again = sent_again
        self._variants = [
            (model, raw_parameters(params)) for model, params in zip(models, variants, strict=False)
        ]
        self.max_cost = max_cost
        self._prices = live_prices(prices) if live else prices or {}
        # Whole numbers for the loop over the rows: a price times this is one.
        self._unit = lcm(
            *(
                exact(price[name]).denominator
                for price in self._prices.values()
                for name in ("prompt", "completion", CACHED)
                if name in price
            )
        )
        self._rates: dict[str, _Rates] = {}
        #: The most that a batch of several rows may cost, in the units of :meth:`weigh`.
        self.most_per_batch = int(max_cost / _SHARE * self._unit * 1_000_000)
        self._most_prompts = max_cost * self._unit * 1_000_000
        self._prompts = 0
        for model in models:
            self.rates(model)

    def rates(self, model: str) -> _Rates:
        """
        Return the rates of a model.

        :raises InvalidInputError: it has no price.
        """
        rates = self._rates.get(model)
        if rates is None:
            price = price_of(model, self._prices)
            if price is None:
                needed = " of rows that are asked live ('live')" if self._live else ""
                raise InvalidInputError(
                    f"max_cost needs the price{needed} of every model, and prices has none for {model!r}. Nothing was "
                    "sent. Add it to the argument prices, to the connection's extra or to [siliconflow] prices in "
                    "Airflow's configuration"
                )
            rates = self._rates[model] = _Rates.of(model, price, self._unit)
        return rates

    def weigh(self, line: bytes) -> int:
        """
        Return the most that a row can cost over the dearest of its models, in a unit of this tariff.

        :raises UnboundedRowError: there is no bound.
        :raises InvalidInputError: its model has no price.
        """
        if self._variants:
            return max(
                self.rates(model).cost(bound_row(with_defaults(line, params))[1])
                for model, params in self._variants
            )
        own, bound = bound_row(line)
        return max(self.rates(model).cost(bound) for model in self.models or (own,))

    def check(self, line: bytes) -> None:
        """
        Check that the cost of a row has a bound, in each of its attempts.

        :raises UnboundedRowError: there is no bound.
        :raises InvalidInputError: its model has no price.
        """
        self.weigh(line)
        if self._sent_again is not None:
            try:
                self.weigh(self._sent_again(line))
            except UnboundedRowError as exc:
                raise UnboundedRowError(f"with retry_params, {exc}") from None

    def allows_prompt(self, model: str | None, tokens: int) -> bool:
        """
        Count the estimated prompt of a row; return whether those so far cost no more than ``max_cost``.

        :param model: the model that the row names.
        """
        self._prompts += tokens * sum(
            self.rates(each).cheapest_prompt for each in self.models or (model or "",)
        )
        return self._prompts <= self._most_prompts

    def cost(self, bounds: Mapping[str, TokenBound], model: str | None) -> Fraction:
        """
        Return the most that rows can cost in CNY.

        :param bounds: as of :func:`bound_file`.
        :param model: the model they run over; ``None`` for the models they name.
        """
        amount = sum(self.rates(model or own).cost(bound) for own, bound in bounds.items())
        return Fraction(amount, self._unit * 1_000_000)


@dataclass(frozen=True, slots=True)
class _Rates:
    """
    What a token of a model costs, in units of a tariff.

    :param prompt: the dearer of the prices of prompts.
    :param cheapest_prompt: the cheaper of them.
    :param thinking: most tokens of thinking in an answer, as the author states it; ``None`` if he does not.
    :param stops_at_budget: whether ``thinking_budget`` certainly limits the thinking.
    :param always_thinks: whether ``enable_thinking`` may not switch it off.
    """

    model: str
    prompt: int
    cheapest_prompt: int
    completion: int
    thinking: int | None
    stops_at_budget: bool
    always_thinks: bool

    @classmethod
    def of(cls, model: str, price: Price, unit: int) -> _Rates:
        prompts = [int(exact(price[name]) * unit) for name in ("prompt", CACHED) if name in price]
        completion = int(exact(price["completion"]) * unit)
        thinking: Any = price.get(THINKING)
        return cls(
            model,
            max(prompts),
            min(prompts),
            completion,
            thinking,
            stops_at_budget=_STOPS_AT_BUDGET in model.casefold(),
            always_thinks=_ALWAYS_THINKS.search(model) is not None,
        )

    def cost(self, bound: TokenBound) -> int:
        """
        Return the most that rows can cost.

        :raises UnboundedRowError: they may think without a limit.
        """
        switched_off = bound.switched_off if self.always_thinks else 0
        if self.thinking is not None:
            thinking = (bound.thinking + switched_off) * self.thinking
        elif bound.open_ended:
            raise UnboundedRowError(
                f"{self.model} may think about it, which max_tokens does not limit: set enable_thinking=False or "
                f"thinking_budget, or state in prices[{self.model!r}] how many tokens it thinks at most, such as "
                "'thinking': 0 for a model that does not think"
            )
        elif self.stops_at_budget:
            thinking = bound.budgets + switched_off * LONGEST_THINKING
        else:
            thinking = (bound.thinking + switched_off) * LONGEST_THINKING
        return bound.prompt * self.prompt + (bound.answers + thinking) * self.completion
