"""
Behind a proxy, an answer that is lost says nothing about whether the request counted: never a second batch.

The proxy is a real one, with a tunnel and TLS in it, and the answers get lost on the real way back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from airflow_provider_siliconflow.api.client import SiliconFlowClient
from airflow_provider_siliconflow.api.exceptions import NotSentError
from airflow_provider_siliconflow.operators.batch import CreateBatchOperator, RunBatchOperator
from tests.support.certificates import CertificateAuthority
from tests.support.proxies import ProxiedService, proxied
from tests.support.tries import QuickClock, Task

if TYPE_CHECKING:
    from airflow_provider_siliconflow.emulator import Emulator

POST_BATCH = "POST /v1/batches"
ENDINGS = ["close", "reset", "half", "gateway-timeout"]

MakeTask = Callable[..., Task]


@pytest.fixture(params=["tls", "plain"])
def way(request: pytest.FixtureRequest, emulator: Emulator, tmp_path: Path) -> Iterator[ProxiedService]:
    """A proxy before the emulator: with TLS in a tunnel, or plain HTTP."""
    with proxied(emulator.base_url, tmp_path / "certificates" if request.param == "tls" else None) as way:
        yield way


@pytest.fixture
def tunnel(emulator: Emulator, tmp_path: Path) -> Iterator[ProxiedService]:
    with proxied(emulator.base_url, tmp_path / "certificates") as way:
        yield way


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> QuickClock:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return QuickClock(monkeypatch)


def use(monkeypatch: pytest.MonkeyPatch, connection: str) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_SILICONFLOW_DEFAULT", connection)


@pytest.fixture
def make_task(tmp_path: Path) -> MakeTask:
    """Makes a task that uploads a file of its own and creates a batch over it."""

    def make(name: str = "create", *, store: bool = True) -> Task:
        path = tmp_path / f"{name}.jsonl"
        messages = [{"role": "user", "content": f"Say {name}"}]
        body = {"model": "Qwen/Qwen3-32B", "messages": messages}
        path.write_text(json.dumps({"custom_id": name, "body": body}) + "\n")
        return Task(lambda: CreateBatchOperator(task_id=name, input_path=str(path)), store=store)

    return make


def batches(emulator: Emulator) -> list[dict[str, Any]]:
    return list(emulator.service.state()["batches"])


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("times", [1, -1], ids=["once", "always"])
@pytest.mark.parametrize("store", [True, False], ids=["store", "nostore"])
def test_a_lost_answer_leads_to_no_second_batch(
    way: ProxiedService,
    emulator: Emulator,
    make_task: MakeTask,
    monkeypatch: pytest.MonkeyPatch,
    times: int,
    ending: str,
    store: bool,
) -> None:
    use(monkeypatch, way.connection())
    loss = way.lose(POST_BATCH, times=times, ending=ending)
    task = make_task(store=store)
    batch_id = task.run()
    assert loss.lost
    assert [batch["id"] for batch in batches(emulator)] == [batch_id]
    assert way.seen[POST_BATCH] == 1


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_lost_answer_leads_to_no_second_upload(
    way: ProxiedService,
    emulator: Emulator,
    make_task: MakeTask,
    monkeypatch: pytest.MonkeyPatch,
    ending: str,
) -> None:
    use(monkeypatch, way.connection())
    way.lose("POST /v1/files", ending=ending)
    make_task().run()
    assert way.seen["POST /v1/files"] == 1
    assert len(batches(emulator)) == 1


# Storage on the loopback would be refused beside an API on the internet: so the API hands out the results.
@pytest.mark.emulator(results_as_file_ids=True)
def test_a_whole_job_behind_a_proxy_that_loses_answers_pays_once(
    tunnel: ProxiedService, emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, tunnel.connection())
    tunnel.lose(POST_BATCH)
    tunnel.lose(".*", chance=0.2, seed=3)
    rows = [f"Say {number}" for number in range(20)]

    def make() -> RunBatchOperator:
        return RunBatchOperator(
            task_id="run",
            requests=rows,
            output_dir=str(tmp_path / "results"),
            models=["Qwen/Qwen3-32B", "Qwen/Qwen3-8B"],
            max_rows_per_batch=4,
            max_in_flight=3,
            poll_interval=0.05,
        )

    manifest = Task(make).run()
    assert len(batches(emulator)) == 10
    assert manifest["rows"]["ok"] == manifest["rows"]["total"] == 40


# What certainly was not sent ------------------------------------------------------------------------------


def dead_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def unreachable(case: str, tunnel: ProxiedService, folder: Path) -> dict[str, Any]:
    """Set the case up; returns what of the connection's extra it changes."""
    if case.isdecimal():
        tunnel.refuse(int(case))
        return {}
    if case == "proxy-away":
        return {"proxies": {"https": f"http://127.0.0.1:{dead_port()}"}}
    if case == "proxy-unknown":
        return {"proxies": {"https": "http://proxy.invalid:3128"}}
    if case == "wrong-password":
        tunnel.credentials = "name:right"
        return {"proxies": {"https": tunnel.proxy_url.replace("://", "://name:wr0ngpassw0rd@")}}
    assert case == "certificate"
    return {"verify": str(CertificateAuthority(folder / "another").bundle)}


UNREACHABLE = ["407", "502", "403", "proxy-away", "proxy-unknown", "wrong-password", "certificate"]


@pytest.mark.parametrize("case", UNREACHABLE)
def test_what_never_left_counts_as_not_sent(
    case: str, tunnel: ProxiedService, emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it may be sent again at once, and the worker neither searches nor leaves an intent behind."""
    from airflow_provider_siliconflow.hooks.siliconflow import SiliconFlowHook

    use(monkeypatch, tunnel.connection(**unreachable(case, tunnel, tmp_path)))
    with (
        SiliconFlowClient(SiliconFlowHook().settings) as client,
        pytest.raises(NotSentError) as caught,
    ):
        client.create_batch(
            input_file_id="file-1",
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata=None,
            replace=None,
        )
    assert "wr0ngpassw0rd" not in str(caught.value)
    assert not [request for request in tunnel.seen if not request.startswith("CONNECT")]


def test_a_name_that_the_proxy_cannot_resolve_counts_as_not_sent(
    tunnel: ProxiedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    from airflow_provider_siliconflow.hooks.siliconflow import SiliconFlowHook

    fields = json.loads(tunnel.connection()) | {"host": "https://another.siliconflow.test/v1"}
    use(monkeypatch, json.dumps(fields))
    with SiliconFlowClient(SiliconFlowHook().settings) as client, pytest.raises(NotSentError):
        client.get_account()
    assert tunnel.seen == {"CONNECT another.siliconflow.test:443": 8}


@pytest.mark.parametrize("status", [407, 502, 403, None])
def test_refused_tunnels_are_sat_out_within_the_try(
    status: int | None,
    tunnel: ProxiedService,
    emulator: Emulator,
    make_task: MakeTask,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(monkeypatch, tunnel.connection())
    refusal = tunnel.refuse(status, times=12)
    task = make_task()
    assert task.run() == batches(emulator)[0]["id"]
    assert refusal.count == 12
    assert tunnel.seen[POST_BATCH] == 1
