"""What the emulated service charges for tokens."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Literal

import msgspec

#: How a row was asked: in a batch, or by itself.
Route = Literal["batch", "live"]

_EXAMPLE = "{'deepseek-ai/DeepSeek-V3': {'prompt': 1, 'completion': 4}}"


class Rates(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """
    CNY per million tokens.

    :param cached_prompt: of prompt tokens that came from the service's cache; None is as ``prompt``.
    """

    prompt: Decimal
    completion: Decimal
    cached_prompt: Decimal | None = None


class Price(Rates, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """
    The rates of a model in a batch.

    :param live: its rates for a row that is asked by itself; None is no price.
    """

    live: Rates | None = None

    def rates(self, route: Route) -> Rates | None:
        """Return the rates of a route."""
        return self if route == "batch" else self.live


def read_prices(given: object) -> dict[str, Price]:
    """
    Read the setting ``prices``.

    :param given: ``{model: {"prompt": ..., "completion": ..., "cached_prompt": ..., "live": {...}}}``.
    :raises ValueError: it is anything else, or a price is not 0 or more.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"prices must be a mapping such as {_EXAMPLE}, not {given!r}")
    return {model: _read(model, price) for model, price in given.items()}


def _read(model: object, given: Any) -> Price:
    if not isinstance(model, str):
        raise ValueError(f"prices must name models, as in {_EXAMPLE}, not {model!r}")
    try:
        price = given if isinstance(given, Price) else msgspec.convert(given, Price)
    except (msgspec.ValidationError, ArithmeticError) as error:
        raise ValueError(f"prices of {model}: {error}") from None
    for rates in (price, price.live):
        for name in ("prompt", "completion", "cached_prompt"):
            value = getattr(rates, name, None)
            if value is not None and not (value.is_finite() and value >= 0):
                raise ValueError(f"prices of {model}: {name} must be 0 or more, not {value}")
    return price
