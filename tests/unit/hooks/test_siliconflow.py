"""The hook: testing a connection, and the calls that need its care."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from airflow_provider_siliconflow.api.exceptions import (
    BatchTimeoutError,
    BatchWaitError,
    InsufficientBalanceError,
    InvalidInputError,
    InvalidRequestFileError,
    SubmissionUnknownError,
)
from airflow_provider_siliconflow.hooks.siliconflow import SiliconFlowHook

if TYPE_CHECKING:
    from airflow_provider_siliconflow.emulator import Emulator

MODEL = "Qwen/Qwen3-32B"
LINE = {"custom_id": "r0", "body": {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}}
CONTENT = json.dumps(LINE).encode() + b"\n"


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | dict[str, Any]], SiliconFlowHook]:
    """Defines the default connection, as URI or JSON, and returns a hook for it."""

    def make(connection: str | dict[str, Any]) -> SiliconFlowHook:
        if isinstance(connection, dict):
            connection = json.dumps({"conn_type": "siliconflow", "password": "sk-secret-key"} | connection)
        monkeypatch.setenv("AIRFLOW_CONN_SILICONFLOW_DEFAULT", connection)
        return SiliconFlowHook()

    return make


@pytest.fixture
def hook(siliconflow_connection: str) -> SiliconFlowHook:
    return SiliconFlowHook(siliconflow_connection)


@pytest.mark.parametrize("scheme", ["s3", "nosuch"])
def test_a_scheme_that_nothing_registers_is_the_input_s_fault(
    hook: SiliconFlowHook, emulator: Emulator, scheme: str
) -> None:
    message = f"{scheme}:// needs a provider.*{'apache-airflow-providers-amazon' if scheme == 's3' else ''}"
    with pytest.raises(InvalidInputError, match=f"output_dir: {message}"):
        hook.download_results("batch_1", f"{scheme}://bucket/results")
    with pytest.raises(InvalidInputError, match=f"source: {message}"):
        hook.upload_file(f"{scheme}://bucket/rows.jsonl")
    with pytest.raises(InvalidInputError, match="source is empty"):
        hook.upload_file(" ")
    assert emulator.request_counts == {}


@pytest.mark.emulator(balance=7.5)
def test_test_connection(hook: SiliconFlowHook, emulator: Emulator) -> None:
    ok, message = hook.test_connection()
    assert ok
    for part in (emulator.base_url, "emulator", "7.50 CNY"):
        assert part in message
    # It costs nothing: nothing was uploaded or created.
    assert emulator.request_counts == {"GET /user/info": 1}


def test_test_connection_with_another_regions_key(connect: Any, emulator: Emulator) -> None:
    ok, message = connect({"host": emulator.base_url, "password": "sk-invalid-key"}).test_connection()
    assert not ok
    for part in ("Api key is invalid", "api.siliconflow.cn", "api.siliconflow.com", "trace id"):
        assert part in message
    assert "sk-invalid-key" not in message


@pytest.mark.parametrize("host", ["http://127.0.0.1:9/v1", "http://no-such-host.invalid/v1"])
def test_test_connection_without_a_network(connect: Any, host: str) -> None:
    ok, message = connect({"host": host}).test_connection()
    assert not ok
    assert "did not reach" in message
    assert "sk-secret-key" not in message


def test_test_connection_with_a_host_that_is_no_api(connect: Any, emulator: Emulator) -> None:
    emulator.faults.add("GET /user/info:html=200,times=-1")
    ok, message = connect({"host": emulator.base_url}).test_connection()
    assert not ok
    assert "an HTML page" in message
    # A person waits for the answer: it is not asked for again and again.
    assert emulator.request_counts == {"GET /user/info": 1}


@pytest.mark.parametrize("kind", ["bytes", "Path", "str", "URI", "ObjectStoragePath", "relative"])
def test_upload_from_anywhere(
    hook: SiliconFlowHook, emulator: Emulator, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from airflow.providers.common.compat.sdk import ObjectStoragePath

    path = tmp_path / "rows.jsonl"
    path.write_bytes(CONTENT)
    monkeypatch.chdir(tmp_path)
    source: Any = {
        "bytes": CONTENT,
        "Path": path,
        "str": str(path),
        "URI": path.as_uri(),
        "ObjectStoragePath": ObjectStoragePath(path.as_uri()),
        "relative": "rows.jsonl",
    }[kind]
    file = hook.upload_file(source)
    assert emulator.service.open_content(file.id).read_bytes() == CONTENT
    assert file.filename == ("requests.jsonl" if kind == "bytes" else "rows.jsonl")


def test_a_file_that_is_not_valid_is_refused_before_any_request(
    hook: SiliconFlowHook, emulator: Emulator, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(CONTENT + b"{}\n" + CONTENT + b"oops\n")
    with pytest.raises(InvalidRequestFileError) as caught:
        hook.upload_file(path)
    lines = [(problem.line, problem.custom_id) for problem in caught.value.problems]
    assert lines == [(2, None), (3, "r0"), (4, None)]
    assert str(path) in str(caught.value)
    with pytest.raises(InvalidInputError, match=r"absent\.jsonl does not exist"):
        hook.upload_file(str(tmp_path / "absent.jsonl"))
    with pytest.raises(InvalidInputError, match="folder"):
        hook.upload_file(tmp_path)
    assert emulator.request_counts == {}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"input_file_id": "None"}, "input_file_id"),
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {"k": 1}}, "metadata"),
        ({"replace": "a model"}, "replace"),
    ],
)
def test_create_batch_checks_before_it_sends(
    hook: SiliconFlowHook, emulator: Emulator, arguments: dict[str, Any], named: str
) -> None:
    with pytest.raises(InvalidInputError, match=named):
        hook.create_batch(**({"input_file_id": "file-1"} | arguments))
    assert emulator.request_counts == {}


@pytest.mark.parametrize("fault", ["status-after=502", "reset-after", "truncated-json", "html=503"])
def test_create_batch_with_an_open_outcome_says_so_and_is_not_sent_again(
    hook: SiliconFlowHook, emulator: Emulator, fault: str
) -> None:
    file = hook.upload_file(CONTENT)
    emulator.faults.add(f"POST /batches:{fault}")
    with pytest.raises(SubmissionUnknownError, match=file.id) as caught:
        hook.create_batch(file.id)
    assert "list_batches()" in str(caught.value)
    assert emulator.request_counts["POST /batches"] == 1


def test_create_batch_that_was_refused_is_no_open_outcome(hook: SiliconFlowHook, emulator: Emulator) -> None:
    file = hook.upload_file(CONTENT)
    emulator.service.configure({"balance": 0.0})
    with pytest.raises(InsufficientBalanceError):
        hook.create_batch(file.id)


def test_a_batch_from_upload_to_results(hook: SiliconFlowHook, emulator: Emulator) -> None:
    file = hook.upload_file(CONTENT)
    batch = hook.create_batch(file.id, completion_window=48, replace={"model": "Qwen/Qwen3-8B"})
    for fault in ("truncated-json", "status=404"):
        emulator.faults.add(f"GET /batches/*:{fault}")
    ended = hook.wait_for_batch(batch.id, poll_interval=0.01, timeout=60)
    assert (ended.status, ended.completion_window) == ("completed", "48h")
    (result,) = hook.iter_results(ended)
    assert (result.custom_id, result.body["model"]) == ("r0", "Qwen/Qwen3-8B")
    assert next(hook.list_batches()).id == batch.id
    # Asking to cancel what has ended is no error.
    assert hook.cancel_batch(batch.id).status == "completed"


@pytest.mark.emulator(speed=0.001)
def test_wait_for_batch_ends_in_time_and_leaves_the_batch_alone(
    hook: SiliconFlowHook, emulator: Emulator
) -> None:
    batch = hook.create_batch(hook.upload_file(CONTENT).id)
    with pytest.raises(BatchTimeoutError, match=batch.id):
        hook.wait_for_batch(batch.id, poll_interval=0.05, timeout=0.2)
    emulator.faults.add("GET /batches/*:status=401")
    with pytest.raises(BatchWaitError, match="untouched"):
        hook.wait_for_batch(batch.id, poll_interval=0.05, timeout=30)
    assert hook.get_batch(batch.id).status == "in_queue"


def test_a_wait_for_several_can_end_with_the_first(
    hook: SiliconFlowHook, emulator: Emulator, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(CONTENT)
    file_id = hook.upload_file(str(path)).id
    first = hook.create_batch(file_id).id
    emulator.service.advance(1000)
    emulator.service.configure({"speed": 0.001})
    second = hook.create_batch(file_id).id
    ended = hook.wait_for_batches([second, first], poll_interval=0.05, deadline=time.time() + 30, min_ended=1)
    assert [batch.id for batch in ended] == [first]


@pytest.mark.parametrize("call", ["get_batch", "cancel_batch", "wait_for_batch"])
def test_an_id_that_no_task_pushed_is_refused(hook: SiliconFlowHook, emulator: Emulator, call: str) -> None:
    with pytest.raises(InvalidInputError, match="upstream"):
        getattr(hook, call)("None")
    assert emulator.request_counts == {}


def test_a_result_that_is_none(hook: SiliconFlowHook, monkeypatch: pytest.MonkeyPatch) -> None:
    from airflow_provider_siliconflow.api.exceptions import IncompleteResultsError

    batch = hook.create_batch(hook.upload_file(CONTENT).id)
    hook.wait_for_batch(batch.id, poll_interval=0.01, timeout=60)
    monkeypatch.setattr(
        hook.get_conn(), "iter_file", lambda *_, **__: iter([b'{"custom_id": "r0"}\n{"custom', b'_id"\n'])
    )
    found = hook.iter_results(batch.id)
    assert next(found).custom_id == "r0"
    with pytest.raises(IncompleteResultsError, match=f"line 2 of the output file of batch {batch.id}"):
        next(found)
