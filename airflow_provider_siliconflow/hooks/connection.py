"""
From an Airflow connection to the client's settings: only this module reads a connection and masks its secrets.

Workers and the triggerer get all settings from here, so the key, the values of headers and the passwords of proxies are
registered with Airflow's secret masker before they are used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote, urlsplit

from airflow_provider_siliconflow.hooks.connection_form import CONN_FIELDS, CONN_TYPE

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Connection

    from airflow_provider_siliconflow.api.settings import ClientSettings
    from airflow_provider_siliconflow.batch_files.prices import Price

#: Fields of a connection's extra: those of the form, and ``headers``, which Airflow does not mask in its UI.
EXTRA_FIELDS = (*CONN_FIELDS, "headers")


def read_connection(conn_id: str) -> ClientSettings:
    """
    Return the settings of a connection, on a worker.

    :param conn_id: the connection.
    :raises InvalidInputError: it is not defined, is of another type, or has a field that is missing or wrong.
    """
    from airflow.providers.common.compat.sdk import mask_secret

    connection = _get_connection(conn_id)
    fields = _fields(connection, connection.extra_dejson)
    for secret in _secrets(connection, fields):
        mask_secret(secret)
    return _settings(connection, fields)


def _get_connection(conn_id: str) -> Connection:
    from airflow.providers.common.compat.sdk import AirflowNotFoundException, BaseHook

    from airflow_provider_siliconflow.api.exceptions import InvalidInputError

    try:
        connection = BaseHook.get_connection(conn_id)
    except AirflowNotFoundException as exc:
        raise InvalidInputError(f"connection {conn_id!r} is not defined: {exc}") from exc
    _refuse_other_type(connection)
    return connection


def read_prices(conn_id: str) -> Mapping[str, Price] | None:
    """
    Return the prices in the extra of a connection, on a worker; ``None`` if it has none.

    :param conn_id: the connection.
    :raises InvalidInputError: it is not defined or of another type, or its prices are wrong.
    """
    from airflow_provider_siliconflow.batch_files.prices import check_prices

    connection = _get_connection(conn_id)
    prices = _fields(connection, connection.extra_dejson).get("prices")
    if prices in (None, ""):
        return None
    where = f"connection {connection.conn_id!r}, extra: prices"
    prices = _json_if_text(prices, where)
    check_prices(prices, where)
    return cast("Mapping[str, Price]", prices)


async def aread_connection(conn_id: str) -> ClientSettings:
    """
    Return the settings of a connection, in the triggerer.

    :param conn_id: the connection.
    :raises AirflowNotFoundException: it is not defined, or Airflow cannot read it at the moment.
    :raises InvalidInputError: it is of another type, or has a field that is missing or wrong.
    """
    from airflow.providers.common.compat.connection import get_async_connection, get_async_extra_dejson

    connection = await get_async_connection(conn_id)
    _refuse_other_type(connection)
    fields = _fields(connection, await get_async_extra_dejson(connection))
    for secret in _secrets(connection, fields):
        await _amask_once(secret)
    return _settings(connection, fields)


#: Hashes of the secrets that this triggerer has masked: its thousands of waits share a few connections, and masking a
#: secret takes a round trip between two processes.
_MASKED: set[int] = set()


async def _amask_once(secret: str) -> None:
    if hash(secret) in _MASKED:
        return
    await _amask(secret)
    _MASKED.add(hash(secret))


async def _amask(secret: str) -> None:
    """Mask a secret without blocking the event loop, in this process and in the one that writes its logs."""
    try:
        from airflow.sdk.log import amask_secret
    except ImportError:
        # Before Airflow 3.3.2 the only function blocks, which breaks a triggerer.
        try:
            from airflow.sdk.execution_time import task_runner
            from airflow.sdk.execution_time.comms import MaskSecret
        except ImportError:
            from airflow.providers.common.compat.sdk import mask_secret

            mask_secret(secret)
            return
        supervisor = getattr(task_runner, "SUPERVISOR_COMMS", None)
        if supervisor is not None and hasattr(supervisor, "asend"):
            await supervisor.asend(MaskSecret(value=secret))
    else:
        await amask_secret(secret)


def _refuse_other_type(connection: Connection) -> None:
    """
    Refuse a connection of another type, whose password would be sent to its host as an API key.

    :raises InvalidInputError: it is of another type.
    """
    from airflow_provider_siliconflow.api.exceptions import InvalidInputError

    kind = connection.conn_type
    if kind and kind != CONN_TYPE:
        raise InvalidInputError(
            f"connection {connection.conn_id!r} is of type {kind!r}; conn_id must name a connection of type "
            f"{CONN_TYPE!r}. Nothing was sent."
        )


def _fields(connection: Connection, extra: Any) -> dict[str, Any]:
    """
    Return the fields of a connection's extra.

    :raises InvalidInputError: it is JSON, but not an object.
    """
    from airflow_provider_siliconflow.api.exceptions import InvalidInputError

    if not isinstance(extra, Mapping):
        raise InvalidInputError(
            f"connection {connection.conn_id!r}: the extra must be a JSON object; got {type(extra).__name__}"
        )
    return dict(extra)


def _secrets(connection: Connection, fields: Mapping[str, Any]) -> Iterator[str]:
    """Yield the secrets, as far as they can be found in fields that are not checked yet."""
    found: list[Any] = [connection.password, (connection.password or "").strip()]
    for name in ("headers", "secret_headers"):
        headers = _json_or_none(fields.get(name))
        found += headers.values() if isinstance(headers, Mapping) else []
    proxies = _json_or_none(fields.get("proxies"))
    for proxy in proxies.values() if isinstance(proxies, Mapping) else [proxies]:
        try:
            password = urlsplit(proxy if "://" in proxy else f"http://{proxy}").password
        except (TypeError, ValueError, AttributeError):
            continue
        # As written in the URL, and as sent to the proxy.
        found += [password, unquote(password or "")]
    for secret in dict.fromkeys(each for each in found if isinstance(each, str)):
        if secret:
            yield secret


def _json_or_none(value: Any) -> Any:
    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None


def _settings(connection: Connection, fields: Mapping[str, Any]) -> ClientSettings:
    """
    Check the fields of a connection.

    :raises InvalidInputError: one is missing or wrong; the message names it.
    """
    from airflow_provider_siliconflow.api.exceptions import InvalidInputError
    from airflow_provider_siliconflow.api.settings import DEFAULT_BASE_URL, ClientSettings

    values: dict[str, Any] = {
        name: fields[name]
        for name in EXTRA_FIELDS
        # What the client does not need is checked by those who read it.
        if name != "prices" and fields.get(name) not in (None, "")
    }
    where = f"connection {connection.conn_id!r}, extra"
    for name, convert in (("timeout", float), ("connect_timeout", float), ("max_retries", int)):
        if name in values:
            try:
                values[name] = convert(values[name])
            except (TypeError, ValueError, OverflowError) as exc:
                raise InvalidInputError(f"{where}: {name} must be a number; got {values[name]!r}") from exc
    if "proxies" in values:
        proxies = _json_if_text(values["proxies"], f"{where}: proxies")
        if isinstance(proxies, str):
            proxies = {"http": proxies, "https": proxies}
        values["proxies"] = {
            scheme: proxy if "://" in proxy else f"http://{proxy}"
            for scheme, proxy in _string_map(proxies, f"{where}: proxies").items()
        }
    headers: dict[str, str] = {}
    for name in ("headers", "secret_headers"):
        if name in values:
            found = _json_if_text(values.pop(name), f"{where}: {name}")
            headers |= _string_map(found, f"{where}: {name}")
    if "verify" in values and not isinstance(values["verify"], bool):
        known = {"true": True, "false": False}
        values["verify"] = known.get(str(values["verify"]).lower(), str(values["verify"]))
    return ClientSettings(
        api_key=connection.password or "",
        base_url=_base_url(connection) or DEFAULT_BASE_URL,
        headers=headers,
        **values,
    )


def _base_url(connection: Connection) -> str:
    host = (connection.host or "").strip()
    if not host:
        return ""
    if "://" not in host:
        host = f"https://{host}"
    # The URI form of a connection (siliconflow://:key@host:port/v1, siliconflow://http://...) splits a URL into parts.
    scheme, _, rest = host.partition("://")
    origin, _, path = rest.partition("/")
    port = f":{connection.port}" if connection.port and not re.search(r":\d+$", origin) else ""
    # Browsers add a slash to a host; the root itself has the schema "/".
    path = path.strip("/") or (connection.schema or "v1").strip("/")
    return f"{scheme}://{origin}{port}/{path}"


def _json_if_text(value: Any, where: str) -> Any:
    """Return the value of a field of the form, which is text; an object is written as JSON."""
    from airflow_provider_siliconflow.api.exceptions import InvalidInputError

    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as exc:
        at = f" ({exc.msg} at character {exc.pos + 1})" if isinstance(exc, json.JSONDecodeError) else ""
    # Raised outside the except block, without its cause: that contains the text, possibly with a password.
    raise InvalidInputError(f"{where} starts with '{{' but is not JSON{at}")


def _string_map(value: Any, where: str) -> dict[str, str]:
    from airflow_provider_siliconflow.api.exceptions import InvalidInputError

    if not isinstance(value, Mapping) or not all(
        isinstance(k, str) and isinstance(v, str) for k, v in value.items()
    ):
        raise InvalidInputError(f"{where} must be an object of strings; got {type(value).__name__}")
    return dict(value)
