"""
Whatever is answered to whichever call: a documented error, or a value that travels anywhere and shows no secret.

An event that does not encode kills a triggerer, for every DAG, and again after each restart.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings

from airflow_provider_siliconflow.api import exceptions
from airflow_provider_siliconflow.api.async_client import AsyncSiliconFlowClient
from airflow_provider_siliconflow.api.client import SiliconFlowClient
from airflow_provider_siliconflow.api.exceptions import SiliconFlowError, TransportError
from airflow_provider_siliconflow.api.models import Batch
from airflow_provider_siliconflow.api.protocol import Page, leaves_effect_open
from airflow_provider_siliconflow.api.settings import ClientSettings
from tests.unit.boundary import mutations
from tests.unit.boundary.hostile import KEY, Server, answer, serving
from tests.unit.boundary.mutations import BATCH, CALLS, SECRETS

pytestmark = pytest.mark.usefixtures("no_proxies")

SETTINGS = ClientSettings(KEY, headers={"X-Team": mutations.HEADER}, max_retries=0, timeout=5.0)
Case = tuple[str, int, dict[str, str], bytes]


def check_value(value: Any) -> None:
    """A value travels: as JSON into Postgres, as MessagePack to the supervisor, as XCom; and it is bounded."""
    try:
        from airflow.sdk.execution_time.comms import _new_encoder
        from airflow.sdk.serde import deserialize, serialize
    except ImportError:
        # Before 3.2 elsewhere, and on Airflow 2 nothing travels as MessagePack.
        from airflow.serialization.serde import deserialize, serialize

        _new_encoder = msgspec.msgpack.Encoder

    text = json.dumps(value, allow_nan=False, ensure_ascii=False)
    assert len(text.encode()) < 300_000
    assert "\\u0000" not in text
    assert msgspec.msgpack.decode(_new_encoder().encode(value)) == value
    assert deserialize(serialize(value)) == value
    for secret in SECRETS:
        assert secret not in text


def check_error(error: Exception) -> None:
    """An error is a documented one, short, and without secrets."""
    assert isinstance(error, SiliconFlowError)
    assert getattr(exceptions, type(error).__name__) is type(error)
    said = " ".join([str(error), str(getattr(error, "trace_id", "")), str(getattr(error, "code", ""))])
    said.encode()
    assert "\0" not in said
    assert len(said) < 4000
    for secret in SECRETS:
        assert secret not in said
    assert 0 <= (getattr(error, "retry_after", None) or 0) <= 900


def check_result(result: Any) -> None:
    if isinstance(result, Page):
        result = list(result.items)
    for item in result if isinstance(result, list) else [result]:
        if isinstance(item, Batch):
            data = item.to_json_dict()
            # Metadata is the author's own; a URL in it is shown whole.
            check_value(
                data | {"metadata": json.loads(json.dumps(data["metadata"]).replace("SIGNATURE", ""))}
            )
            check_value(item.error_messages)
            # It comes back as it went.
            again = Batch.model_validate(item.to_json_dict())
            assert again.to_json_dict() == item.to_json_dict()
            assert (again.status, again.request_counts, again.metadata) == (
                item.status,
                item.request_counts,
                item.metadata,
            )
        elif isinstance(item, str):
            check_value(item)
        else:
            check_value(item.model_dump(mode="json"))


def check_creation(status: int, outcome: Any) -> None:
    """Nothing that may have created a batch is taken for a refusal."""
    if isinstance(outcome, TransportError) and 200 <= status < 300:
        assert outcome.accepted
        assert leaves_effect_open(outcome)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(mutations.answers())
@example(
    ("get", 200, {}, json.dumps(BATCH | {"created_at": 10**400, "request_counts": {"total": 2**70}}).encode())
)
@example(
    (
        "get",
        200,
        {},
        json.dumps(BATCH | {"errors": ["\0" * 2000, "\ud800"], "metadata": {"\0": "\ud800"}}).encode(),
    )
)
@example(("get", 200, {}, json.dumps(BATCH | {"errors": [f"{'x' * 995}{mutations.HEADER}"]}).encode()))
@example(("get", 400, {}, json.dumps({"code": 20015, "message": f"{'x' * 995}{KEY}"}).encode()))
@example(("create", 200, {}, b'{"code": 50505, "message": "busy"}'))
def test_every_call_takes_any_answer(case: Case) -> None:
    name, status, headers, body = case
    call = CALLS[name][0]
    try:
        result = call.answer(status, headers, body)
    except SiliconFlowError as error:
        check_error(error)
        if name == "create":
            check_creation(status, error)
    else:
        check_result(result)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(b"") as server:
        yield server


def serve(server: Server, case: Case) -> None:
    _, status, headers, body = case
    sent = answer(body, status, **{name.replace("-", "_"): value for name, value in headers.items()})

    def send(connection: socket.socket, request: bytes) -> None:
        connection.sendall(sent)

    server.serve = send


def at(server: Server) -> ClientSettings:
    return ClientSettings(
        KEY, f"{server.url}/v1", headers={"X-Team": mutations.HEADER}, max_retries=0, timeout=5.0
    )


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=mutations.answers())
def test_the_blocking_client_takes_any_answer(server: Server, case: Case) -> None:
    serve(server, case)
    with SiliconFlowClient(at(server)) as client:
        try:
            result = client.call(CALLS[case[0]][0])
        except SiliconFlowError as error:
            check_error(error)
        else:
            check_result(result)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=mutations.answers())
def test_the_triggerers_client_takes_any_answer(server: Server, case: Case) -> None:
    async def ask() -> Any:
        async with AsyncSiliconFlowClient(at(server)) as client:
            return await client.call(CALLS[case[0]][0])

    serve(server, case)
    try:
        result = asyncio.run(ask())
    except SiliconFlowError as error:
        check_error(error)
    else:
        check_result(result)
