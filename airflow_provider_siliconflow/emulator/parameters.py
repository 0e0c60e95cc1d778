"""The parameters of a row that a model may refuse."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_provider_siliconflow.emulator.response_format import wants_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from airflow_provider_siliconflow.emulator.config import EmulatorConfig

CHECKED_PARAMETERS = ("response_format", "enable_thinking", "thinking_budget")
_LEAST_BUDGET, _LARGEST_BUDGET = 128, 32768

#: Code and message of what :func:`refused_parameter` returns.
PARAMETER_ERRORS = {
    "json-mode": ("20024", "Json mode is not supported for this model."),
    "enable-thinking": ("20015", "Value error, current model does not support parameter `enable_thinking`."),
    "budget-type": ("20015", "thinking_budget: Must be an integer"),
    "budget-low": ("20015", f"thinking_budget: Must be greater than or equal to {_LEAST_BUDGET}"),
    "budget-high": ("20015", f"thinking_budget: Must be less than or equal to {_LARGEST_BUDGET}"),
}


def can_be_refused(parameters: Iterable[str], config: EmulatorConfig) -> bool:
    """Return whether a row with these parameters may be refused for one of them."""
    refusing = {
        "response_format": bool(config.no_json_models),
        "enable_thinking": bool(config.no_thinking_models),
        "thinking_budget": True,
    }
    return any(refusing.get(name, False) for name in parameters)


def refused_parameter(model: str, parameters: Mapping[str, Any], config: EmulatorConfig) -> str | None:
    """Return why a model refuses the parameters of a row, a key of ``PARAMETER_ERRORS``; None if it takes them."""
    if model in config.no_json_models and wants_json(parameters):
        return "json-mode"
    if model in config.no_thinking_models and parameters.get("enable_thinking") is not None:
        return "enable-thinking"
    budget = parameters.get("thinking_budget")
    if budget is None:
        return None
    if type(budget) is not int:
        return "budget-type"
    if budget < _LEAST_BUDGET:
        return "budget-low"
    return "budget-high" if budget > _LARGEST_BUDGET else None
