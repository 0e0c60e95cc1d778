"""
The argument ``prices``, and the cost of tokens.

Imports nothing heavy: the argument is checked when a DAG file is parsed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from airflow_provider_siliconflow.api.exceptions import InvalidInputError

if TYPE_CHECKING:
    from fractions import Fraction

#: CNY per million tokens of ``prompt`` and of ``completion``.
Price: TypeAlias = Mapping[str, float]

#: The keys of a price, in CNY per million tokens.
PRICE_KEYS = ("prompt", "completion")

#: A higher price is a mistake, and might make a cost that is too large for a number.
_HIGHEST_PRICE = 1_000_000

_EXAMPLE = "{'deepseek-ai/DeepSeek-V3': {'prompt': 1.0, 'completion': 4.0}}"


def check_prices(prices: Any) -> None:
    """
    Check the argument ``prices``.

    :param prices: ``{model: {"prompt": number, "completion": number}}`` in CNY per million tokens, or ``None``.
    :raises InvalidInputError: it is anything else; the message names the entry and shows what would be right.
    """
    if prices is None:
        return
    if not isinstance(prices, Mapping):
        raise InvalidInputError(f"prices must be a mapping such as {_EXAMPLE}; got {type(prices).__name__}")
    for model, price in prices.items():
        if not isinstance(model, str):
            raise InvalidInputError(f"prices must name models, as in {_EXAMPLE}; got the key {model!r}")
        where = f"prices[{model!r}]"
        if not isinstance(price, Mapping):
            hint = f": prices are given by model, as in {_EXAMPLE}" if model in PRICE_KEYS else ""
            raise InvalidInputError(
                f"{where} must be a mapping such as {{'prompt': 1.0, 'completion': 4.0}} in CNY per million tokens; "
                f"got {price!r}{hint}"
            )
        _check_price(where, price)


def _check_price(where: str, price: Mapping[Any, Any]) -> None:
    keys = " and ".join(map(repr, PRICE_KEYS))
    unknown = [key for key in price if key not in PRICE_KEYS]
    missing = [key for key in PRICE_KEYS if key not in price]
    if unknown:
        raise InvalidInputError(
            f"{where} has the unknown key {unknown[0]!r}{_suggestion(unknown[0], missing)}; a price has {keys}, in CNY "
            "per million tokens"
        )
    if missing:
        raise InvalidInputError(
            f"{where} lacks {missing[0]!r}; a price has {keys}, in CNY per million tokens"
        )
    for key in PRICE_KEYS:
        value = price[key]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= _HIGHEST_PRICE or not math.isfinite(value):
            raise InvalidInputError(
                f"{where}[{key!r}] must be a number from 0 to {_HIGHEST_PRICE}, in CNY per million tokens; "
                f"got {value!r}"
            )


def _suggestion(key: Any, missing: list[str]) -> str:
    import difflib

    close = difflib.get_close_matches(key.lower(), missing, n=1) if isinstance(key, str) else []
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


def cost(tokens: int, price: float) -> Fraction:
    """
    Return the cost of tokens in CNY, unrounded.

    :param price: CNY per million tokens.
    """
    from airflow_provider_siliconflow.batch_files.decimals import exact

    return tokens * exact(price) / 1_000_000


def rounded(amount: Fraction) -> float:
    """Return an amount in CNY, rounded to a millionth. Round only final sums."""
    return float(round(amount, 6))
