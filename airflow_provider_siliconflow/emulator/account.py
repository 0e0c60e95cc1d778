"""What the service reports about the account: its key, its balance and its models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_provider_siliconflow.emulator.refusals import ServiceError

if TYPE_CHECKING:
    from airflow_provider_siliconflow.emulator.config import EmulatorConfig


def check_key(key: str | None, config: EmulatorConfig) -> None:
    """
    Check an API key; None stands for a request without one.

    :raises ServiceError: 401.
    """
    if not key:
        raise ServiceError(401, "Invalid token")
    accepted = key in config.keys if config.keys else not key.startswith("sk-invalid")
    if not accepted:
        raise ServiceError(401, "Api key is invalid")


def user_info(config: EmulatorConfig) -> dict[str, Any]:
    """Return the answer of ``GET /user/info``."""
    data = {
        "id": "emulated-user",
        "name": "emulator",
        "image": "",
        "email": "",
        "isAdmin": False,
        "balance": "0.00",
        "status": "normal",
        "introduction": "",
        "role": "",
        "chargeBalance": f"{config.balance:.2f}",
        "totalBalance": f"{config.balance:.2f}",
    }
    return {"code": 20000, "message": "OK", "status": True, "data": data}


def models(config: EmulatorConfig, sub_type: str | None) -> dict[str, Any]:
    """Return the answer of ``GET /models``; the account has chat models only."""
    names = config.models if sub_type in (None, "", "chat") else ()
    return {
        "object": "list",
        "data": [{"id": name, "object": "model", "created": 0, "owned_by": ""} for name in names],
    }
