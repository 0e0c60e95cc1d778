"""
Prices by model, and the cost of tokens.

Imports nothing heavy: the argument ``prices`` is checked when a DAG file is parsed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from airflow_provider_siliconflow.api.exceptions import InvalidInputError

if TYPE_CHECKING:
    from fractions import Fraction

#: ``prompt`` and ``completion`` in CNY per million tokens, and, if they are given, ``cached_prompt`` and ``live``.
Price: TypeAlias = Mapping[str, Any]

#: The keys of a price that must be given, in CNY per million tokens.
PRICE_KEYS = ("prompt", "completion")
#: The price of prompt tokens that come from the service's cache; by default that of other prompt tokens.
CACHED = "cached_prompt"
#: The most tokens that the model thinks for an answer: no price, but like one a fact about the model that only its user
#: knows. It is for ``max_cost``.
THINKING = "thinking"
#: The prices of a row that is asked by itself, not in a batch: a price without this key.
LIVE = "live"

#: A higher price is a mistake, and might make a cost that is too large for a number.
_HIGHEST_PRICE = 1_000_000
_MOST_THINKING = 10_000_000
#: A larger sum is a mistake.
_HIGHEST_COST = 10**12

_EXAMPLE = "{'deepseek-ai/DeepSeek-V3': {'prompt': 1.0, 'completion': 4.0}}"


def check_prices(prices: Any, name: str = "prices") -> None:
    """
    Check prices by model.

    :param prices: ``{model: {"prompt": number, "completion": number}}`` in CNY per million tokens, or ``None``. A price
        may have ``cached_prompt``, ``thinking`` (most tokens), and ``live`` with the same three prices.
    :param name: how messages call them.
    :raises InvalidInputError: it is anything else; the message names the entry and shows what would be right.
    """
    if prices is None:
        return
    if not isinstance(prices, Mapping):
        raise InvalidInputError(f"{name} must be a mapping such as {_EXAMPLE}; got {type(prices).__name__}")
    for model, price in prices.items():
        if not isinstance(model, str):
            raise InvalidInputError(f"{name} must name models, as in {_EXAMPLE}; got the key {model!r}")
        where = f"{name}[{model!r}]"
        if not isinstance(price, Mapping):
            hint = f": prices are given by model, as in {_EXAMPLE}" if model in PRICE_KEYS else ""
            raise InvalidInputError(f"{where} {_MUST_BE}; got {price!r}{hint}")
        _check_price(where, price, (CACHED, THINKING, LIVE))
        if LIVE in price:
            live = price[LIVE]
            if not isinstance(live, Mapping):
                raise InvalidInputError(f"{where}[{LIVE!r}] {_MUST_BE}; got {live!r}")
            _check_price(f"{where}[{LIVE!r}]", live, (CACHED,))


_MUST_BE = "must be a mapping such as {'prompt': 1.0, 'completion': 4.0} in CNY per million tokens"


def _check_price(where: str, price: Mapping[Any, Any], optional: tuple[str, ...]) -> None:
    keys = f"{' and '.join(map(repr, PRICE_KEYS))}, and may have {', '.join(map(repr, optional))}"
    known = (*PRICE_KEYS, *optional)
    unknown = [key for key in price if key not in known]
    missing = [key for key in PRICE_KEYS if key not in price]
    if unknown:
        close = _suggestion(unknown[0], missing, [key for key in known if key not in price])
        raise InvalidInputError(
            f"{where} has the unknown key {unknown[0]!r}{close}; a price has {keys}, in CNY per million tokens"
        )
    if missing:
        raise InvalidInputError(
            f"{where} lacks {missing[0]!r}; a price has {keys}, in CNY per million tokens"
        )
    thinking = price.get(THINKING, 0)
    if isinstance(thinking, bool) or not isinstance(thinking, int) or not 0 <= thinking <= _MOST_THINKING:
        raise InvalidInputError(
            f"{where}[{THINKING!r}] must be a whole number of tokens from 0 to {_MOST_THINKING}; got {thinking!r}"
        )
    for key in (*PRICE_KEYS, CACHED):
        if key not in price:
            continue
        value = price[key]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= _HIGHEST_PRICE or not math.isfinite(value):
            raise InvalidInputError(
                f"{where}[{key!r}] must be a number from 0 to {_HIGHEST_PRICE}, in CNY per million tokens; "
                f"got {value!r}"
            )


def check_max_cost(value: Any) -> None:
    """
    Check the argument ``max_cost``.

    :param value: CNY, or ``None``.
    :raises InvalidInputError: it is not a number of 0 or more.
    """
    if value is None:
        return
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not 0 <= value <= _HIGHEST_COST:
        raise InvalidInputError(f"max_cost must be a number of 0 or more, in CNY; got {value!r}")


def _suggestion(key: Any, missing: list[str], possible: list[str]) -> str:
    import difflib

    close = difflib.get_close_matches(key.lower(), possible, n=1) if isinstance(key, str) else []
    if not close and len(missing) == 1:
        close = missing
    return f" (did you mean {close[0]!r}?)" if close else ""


def price_of(model: str | None, prices: Mapping[str, Price] | None) -> Price | None:
    """
    Return the price of a model; ``None`` if there is none.

    :param model: its name, in any case; ``None`` if the rows name their models.
    :param prices: as checked by :func:`check_prices`.
    """
    if model is None or not prices:
        return None
    by_name = {name.casefold(): price for name, price in prices.items()}
    return prices.get(model) or by_name.get(model.casefold())


def live_prices(prices: Mapping[str, Price] | None) -> dict[str, Price]:
    """
    Return the prices of rows that are asked one by one, by model, of the models that have any.

    :param prices: as checked by :func:`check_prices`.
    """
    return {
        model: {**price[LIVE], **({THINKING: price[THINKING]} if THINKING in price else {})}
        for model, price in (prices or {}).items()
        if LIVE in price
    }


def merge_prices(*sources: Mapping[str, Price] | None) -> dict[str, Price] | None:
    """
    Return the prices of several sources; ``None`` if there are none.

    :param sources: as checked by :func:`check_prices`; of a model that several have, the first one counts.
    """
    merged: dict[str, Price] = {}
    for source in sources:
        known = {name.casefold() for name in merged}
        merged |= {name: price for name, price in (source or {}).items() if name.casefold() not in known}
    return merged or None


def cost(tokens: int, price: float) -> Fraction:
    """
    Return the cost of tokens in CNY, unrounded.

    :param price: CNY per million tokens.
    """
    from airflow_provider_siliconflow.batch_files.decimals import exact

    return tokens * exact(price) / 1_000_000


def prompt_cost(tokens: int, cached: int, price: Price) -> Fraction:
    """
    Return the cost of prompts in CNY, unrounded.

    :param tokens: those of the prompts, cached ones included.
    :param cached: those of them that came from the service's cache.
    """
    cached = min(cached, tokens)
    return cost(tokens - cached, price["prompt"]) + cost(cached, price.get(CACHED, price["prompt"]))


def rounded(amount: Fraction) -> float:
    """Return an amount in CNY, rounded to a millionth. Round only final sums."""
    return float(round(amount, 6))
