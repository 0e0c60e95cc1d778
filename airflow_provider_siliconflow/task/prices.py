"""Prices in Airflow's configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import conf

from airflow_provider_siliconflow.api.exceptions import InvalidInputError

if TYPE_CHECKING:
    from airflow_provider_siliconflow.batch_files.prices import Price

_OPTION = "[siliconflow] prices"


def configured_prices() -> Mapping[str, Price] | None:
    """
    Return ``[siliconflow] prices``; ``None`` if it is not set.

    :raises InvalidInputError: it is not JSON, or not prices by model.
    """
    from airflow_provider_siliconflow.batch_files.prices import check_prices

    text = conf.get("siliconflow", "prices", fallback=None)
    if not text or not text.strip():
        return None
    try:
        prices: Any = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise InvalidInputError(f"{_OPTION} in Airflow's configuration is not JSON: {exc}") from exc
    check_prices(prices, _OPTION)
    found: Mapping[str, Price] | None = prices
    return found
