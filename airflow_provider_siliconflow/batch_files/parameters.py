"""
Body parameters that an author gives for all rows.

Imports nothing heavy: the argument is checked when a DAG file is parsed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from airflow_provider_siliconflow.api.exceptions import InvalidInputError


def check_parameters(name: str, parameters: Any) -> None:
    """
    Check body parameters that rows get if they lack them.

    :param name: the argument, for messages.
    :param parameters: a mapping such as ``{"temperature": 0.2}``, or ``None``.
    :raises InvalidInputError: it is anything else, contains ``messages``, or cannot be written as JSON.
    """
    if parameters is None:
        return
    if not isinstance(parameters, Mapping):
        raise InvalidInputError(
            f"{name} must be a mapping of body parameters such as {{'temperature': 0.2}}; got "
            f"{type(parameters).__name__}"
        )
    for key in parameters:
        if not isinstance(key, str):
            raise InvalidInputError(f"{name} must name body parameters by strings; got the key {key!r}")
    if "messages" in parameters:
        raise InvalidInputError(f"{name} must not contain 'messages': every row has its own")
    model = parameters.get("model")
    if model is not None and not isinstance(model, str):
        raise InvalidInputError(f"{name}['model'] must be the name of a model; got {model!r}")
    for key, value in parameters.items():
        try:
            to_json({key: value})
        except (TypeError, ValueError, RecursionError) as exc:
            raise InvalidInputError(f"{name}[{key!r}] cannot be written as JSON: {exc}") from exc


def check_retry_parameters(name: str, parameters: Any) -> None:
    """
    Check body parameters of rows that are sent again.

    :raises InvalidInputError: they are not body parameters, or name a model.
    """
    check_parameters(name, parameters)
    if parameters and "model" in parameters:
        raise InvalidInputError(
            f"{name} must not contain 'model': the manifest counts and prices all attempts of a row under one model"
        )


def check_model_parameters(name: str, models: Any) -> None:
    """
    Check the body parameters that single models get.

    :param models: a mapping of models to body parameters; a list of models, or ``None``, has none.
    :raises InvalidInputError: they are not body parameters, or name a model.
    """
    for model, parameters in models.items() if isinstance(models, Mapping) else ():
        argument = f"{name}[{model!r}]"
        if not isinstance(parameters, Mapping):
            raise InvalidInputError(
                f"{argument} must be a mapping of body parameters such as {{'enable_thinking': False}}, or {{}}; got "
                f"{type(parameters).__name__}"
            )
        check_parameters(argument, parameters)
        if "model" in parameters:
            raise InvalidInputError(f"{argument} must not contain 'model'")


def to_json(value: Any) -> bytes:
    """
    Return compact JSON.

    The standard library's encoder, as it refuses what others turn into something else (NaN into null, bytes
    into base64).
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode()
