"""Results from a batch to a folder: late, aged, cut, short, in whichever store."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from airflow_provider_siliconflow.api.client import SiliconFlowClient
from airflow_provider_siliconflow.api.exceptions import (
    BatchError,
    IncompleteResultsError,
    NoAnswerError,
    ServiceUnavailableError,
)
from airflow_provider_siliconflow.api.models import Batch, Outcome
from airflow_provider_siliconflow.api.settings import ClientSettings
from airflow_provider_siliconflow.batch_files.merge import BatchFiles
from airflow_provider_siliconflow.jobs import downloads
from airflow_provider_siliconflow.jobs.downloads import (
    download_results,
    downloaded,
    iter_results,
    outcomes_in,
    stated_end,
)
from airflow_provider_siliconflow.jobs.outcome import most_common_error
from airflow_provider_siliconflow.jobs.settled import SETTLE_PATIENCE

if TYPE_CHECKING:
    from airflow_provider_siliconflow.emulator import Emulator

REQUEST = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
FILES = ("results.jsonl", "errors.jsonl", "manifest.json")


class EmulatorClock:
    """Lets time pass at the emulator instead of waiting."""

    def __init__(self, emulator: Emulator) -> None:
        self.emulator = emulator
        self.slept: list[float] = []

    def time(self) -> float:
        return self.emulator.service.now()

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.emulator.service.advance(seconds)

    def monotonic(self) -> float:
        return self.emulator.service.now()


@pytest.fixture
def clock(emulator: Emulator) -> EmulatorClock:
    return EmulatorClock(emulator)


@pytest.fixture
def client(emulator: Emulator) -> Iterator[SiliconFlowClient]:
    with SiliconFlowClient(ClientSettings("sk-1", emulator.base_url, backoff=0.01)) as client:
        yield client


@pytest.fixture
def make_batch(emulator: Emulator) -> Callable[..., str]:
    """Runs a batch over one row per text to its end; its id."""

    def make(*texts: str, seconds: float = 1000) -> str:
        lines = [
            {
                "custom_id": f"r{n}",
                "body": {"model": "Qwen/Qwen3-32B", "messages": [{"role": "user", "content": text}]},
            }
            for n, text in enumerate(texts)
        ]
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        file = emulator.service.add_file("rows.jsonl", "batch", [content])["data"]
        batch = emulator.service.create_batch({**REQUEST, "input_file_id": file["id"]})
        emulator.service.advance(seconds)
        return str(batch["id"])

    return make


def ids(path: Any) -> list[str]:
    return sorted(json.loads(line)["custom_id"] for line in path.read_text().splitlines())


def memory_folder(path: str) -> Any:
    """A folder in a store that is not local, as Airflow hands it to an operator."""
    from airflow.providers.common.compat.sdk import ObjectStoragePath
    from fsspec.implementations.memory import MemoryFileSystem

    try:
        from airflow.sdk.io import attach
    except ImportError:
        from airflow.io.store import attach
    attach("memory", fs=MemoryFileSystem())
    return ObjectStoragePath(f"memory://bucket{path}")


FAIL = "[[emulator:error=400]]"


def test_every_row_is_told_and_the_servers_lines_are_untouched(
    client: SiliconFlowClient,
    clock: EmulatorClock,
    emulator: Emulator,
    make_batch: Callable[..., str],
    tmp_path: Path,
) -> None:
    batch_id = make_batch("Hi", FAIL, "Hi", "[[emulator:missing]]", "[[emulator:expire]]", seconds=14400)
    manifest = download_results(client, batch_id, tmp_path, clock)
    assert manifest["rows"] == {"total": 5, "ok": 2, "error": 1, "invalid": 0, "expired": 1, "missing": 1}
    assert ids(tmp_path / "results.jsonl") == ["r0", "r1", "r2", "r4"]
    assert ids(tmp_path / "errors.jsonl") == ["r1", "r4"]
    sent = emulator.service.open_results(batch_id, "output").read_bytes().splitlines()
    assert set(sent) < set((tmp_path / "results.jsonl").read_bytes().splitlines())
    assert json.loads((tmp_path / "manifest.json").read_text()) == manifest


@pytest.mark.emulator(late_output_seconds=5.0)
def test_a_url_that_comes_later_is_waited_for(
    client: SiliconFlowClient, clock: EmulatorClock, make_batch: Callable[..., str], tmp_path: Path
) -> None:
    batch_id = make_batch("Hi", seconds=0)
    while not client.get_batch(batch_id).is_terminal:
        clock.sleep(0.01)
    assert client.get_batch(batch_id).output_file_id is None
    assert download_results(client, batch_id, tmp_path, clock)["rows"]["ok"] == 1


class Altered:
    """A client whose batches are told differently."""

    def __init__(self, client: SiliconFlowClient, *versions: dict[str, Any]) -> None:
        self._client, self._versions = client, list(versions)

    def get_batch(self, batch_id: str) -> Batch:
        fields = self._versions.pop(0) if len(self._versions) > 1 else self._versions[0]
        return Batch.model_validate(self._client.get_batch(batch_id).model_dump() | fields)

    def iter_file(self, reference: str, refresh: Any, *, limit: int | None = None) -> Iterator[bytes]:
        return self._client.iter_file(reference, refresh, limit=limit)


NO_COUNTS = [None, {}, {"total": 0, "completed": 0, "failed": 0}]
LATE_COUNTS = [*NO_COUNTS, {"total": 3, "completed": 0, "failed": 0}]


@pytest.mark.parametrize("counts", LATE_COUNTS)
@pytest.mark.parametrize("late", [{"output_file_id": None}, {"output_file_id": None, "error_file_id": None}])
def test_a_file_that_is_named_later_is_waited_for_whatever_the_counts_say(
    client: SiliconFlowClient,
    clock: EmulatorClock,
    make_batch: Callable[..., str],
    tmp_path: Path,
    counts: Any,
    late: dict[str, Any],
) -> None:
    """The rows that are ok are paid for, and a download that does without them loses them."""
    batch_id = make_batch("Hi", FAIL, "Hi")
    api = Altered(client, *[{"request_counts": counts} | late] * 3, {"request_counts": counts})
    rows = download_results(api, batch_id, tmp_path, clock)["rows"]
    assert (rows["ok"], rows["error"], rows["missing"]) == (2, 1, 0)


def test_an_error_file_that_comes_later_is_waited_for(
    client: SiliconFlowClient, clock: EmulatorClock, make_batch: Callable[..., str], tmp_path: Path
) -> None:
    batch_id = make_batch("Hi", FAIL)
    rows = download_results(Altered(client, *[{"error_file_id": None}] * 2, {}), batch_id, tmp_path, clock)[
        "rows"
    ]
    assert (rows["ok"], rows["error"], rows["missing"]) == (1, 1, 0)


@pytest.mark.emulator(speed=1000.0, partial_output_seconds=1030.0)
@pytest.mark.parametrize("counts", [{}, {"request_counts": {"total": 4}}])
def test_a_file_that_is_partial_for_a_while_is_waited_for(
    client: SiliconFlowClient,
    clock: EmulatorClock,
    make_batch: Callable[..., str],
    tmp_path: Path,
    counts: dict[str, Any],
) -> None:
    manifest = download_results(Altered(client, counts), make_batch("Hi", "Hi", "Hi", "Hi"), tmp_path, clock)
    assert manifest["rows"]["ok"] == 4
    assert clock.slept


def test_successful_rows_without_a_file_are_an_error_that_a_retry_may_fix(
    client: SiliconFlowClient, clock: EmulatorClock, make_batch: Callable[..., str], tmp_path: Path
) -> None:
    batch_id = make_batch("Hi", FAIL)
    with pytest.raises(IncompleteResultsError, match=r"1 rows of 2 as answered .* has 0 lines") as caught:
        download_results(Altered(client, {"output_file_id": None}), batch_id, tmp_path, clock)
    assert caught.value.retryable
    assert 50 <= sum(clock.slept) <= 120
    assert list(tmp_path.iterdir()) == []


def test_a_batch_without_any_success_needs_no_output_file(
    client: SiliconFlowClient, clock: EmulatorClock, make_batch: Callable[..., str], tmp_path: Path
) -> None:
    manifest = download_results(client, make_batch(FAIL, FAIL), tmp_path, clock)
    assert manifest["rows"] == {"total": 2, "ok": 0, "error": 2, "invalid": 0, "expired": 0, "missing": 0}
    assert clock.slept == []


@pytest.mark.parametrize(("age", "is_final"), [(1000, False), (7200, False), (14400, True)])
def test_fewer_lines_than_counted_are_an_error_for_an_hour_by_any_clock(
    client: SiliconFlowClient,
    clock: EmulatorClock,
    make_batch: Callable[..., str],
    tmp_path: Path,
    age: float,
    is_final: bool,
) -> None:
    batch_id = make_batch("Hi", "Hi", seconds=age)
    api = Altered(client, {"request_counts": {"total": 3, "completed": 3, "failed": 0}})
    if is_final:
        rows = download_results(api, batch_id, tmp_path, clock)["rows"]
        assert (rows["total"], rows["ok"], rows["missing"]) == (3, 2, 1)
    else:
        with pytest.raises(IncompleteResultsError, match="output file has 2 lines"):
            download_results(api, batch_id, tmp_path, clock)
        with pytest.raises(IncompleteResultsError, match="output file has 2 lines"):
            list(iter_results(api, batch_id, clock))
    assert sum(clock.slept) >= 30


def test_rows_once_downloaded_are_not_given_up_for_fewer(
    client: SiliconFlowClient, clock: EmulatorClock, make_batch: Callable[..., str], tmp_path: Path
) -> None:
    """Asked again, a replica that lags behind names no file, and the storage has an older one."""
    counts = {"request_counts": {"total": 3, "completed": 3, "failed": 0}}
    late = {"status": "finalizing", "output_file_id": None, "error_file_id": None, "request_counts": None}
    api = Altered(client, counts, counts | late)
    contents = iter([b'{"custom_id":"r0"}\n{"custom_id":"r1"}\n'])
    api.iter_file = lambda reference, refresh, *, limit=None: iter([next(contents, b'{"custom_id":"r0"}\n')])  # type: ignore[method-assign]
    manifest = download_results(api, make_batch("Hi", "Hi", "Hi", seconds=14400), tmp_path, clock)
    assert ids(tmp_path / "results.jsonl") == ["r0", "r1"]
    assert (manifest["rows"]["total"], manifest["models"][0]["batches"][0]["status"]) == (3, "completed")


@pytest.mark.parametrize(("age", "pauses"), [(0.0, True), (SETTLE_PATIENCE, False)])
def test_what_a_stopped_batch_counts_is_enough_when_it_stays_so(
    client: SiliconFlowClient, clock: EmulatorClock, make_batch: Callable[..., str], age: float, pauses: bool
) -> None:
    batch_id = make_batch("Hi", "Hi")
    api = Altered(
        client, {"status": "cancelled", "request_counts": {"total": 5, "completed": 2, "failed": 0}}
    )
    ended_at = clock.time() - age
    if pauses:
        with (
            pytest.raises(IncompleteResultsError),
            downloaded(api, batch_id, clock, rows=5, ended_at=ended_at),
        ):
            pass
    else:
        with downloaded(api, batch_id, clock, rows=5, ended_at=ended_at) as (batch, files):
            assert (batch.status, files.short) == ("cancelled", False)
    assert bool(clock.slept) == pauses


def test_a_result_file_is_larger_than_the_results_of_its_rows_can_be(
    client: SiliconFlowClient,
    clock: EmulatorClock,
    make_batch: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch_id = make_batch("Hi", "Hi")
    monkeypatch.setattr(downloads, "_ROW_BYTES", 100)
    monkeypatch.setattr(downloads, "_SPARE_BYTES", 0)
    with pytest.raises(IncompleteResultsError, match="200"):
        download_results(client, batch_id, tmp_path, clock)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_nearly_full_is_not_filled(
    client: SiliconFlowClient,
    clock: EmulatorClock,
    make_batch: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch_id = make_batch("Hi", "Hi")
    usage = SimpleNamespace(free=downloads._RESERVED_BYTES + 100)
    monkeypatch.setattr("airflow_provider_siliconflow.jobs.downloads.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(IncompleteResultsError, match="only 100 bytes may be used") as caught:
        download_results(client, batch_id, tmp_path, clock)
    assert caught.value.retryable


def test_a_batch_under_way_has_no_results(
    client: SiliconFlowClient, make_batch: Callable[..., str], tmp_path: Path, emulator: Emulator
) -> None:
    batch_id = make_batch("Hi")
    emulator.service.force_status(batch_id, "finalising_soon")
    with pytest.raises(BatchError, match="is finalising_soon"):
        download_results(client, batch_id, tmp_path)


@pytest.mark.parametrize("store", ["local", "memory"])
@pytest.mark.parametrize("fault", ["cut=100", "status=503"])
def test_files_appear_only_when_they_are_whole(
    emulator: Emulator, make_batch: Callable[..., str], tmp_path: Path, store: str, fault: str
) -> None:
    folder: Any = tmp_path / "out" if store == "local" else memory_folder(str(tmp_path))
    batch_id = make_batch("Hi", "Hi", FAIL)
    # The first file arrives, the second one does not.
    emulator.faults.add(f"GET storage:{fault},skip=1,times=-1")
    hasty = ClientSettings("sk-1", emulator.base_url, backoff=0.01, max_retries=0)
    with SiliconFlowClient(hasty) as client, pytest.raises((NoAnswerError, ServiceUnavailableError)):
        download_results(client, batch_id, folder)
    assert not folder.exists() or list(folder.iterdir()) == []
    emulator.faults.clear()
    with SiliconFlowClient(hasty) as client:
        manifest = download_results(client, batch_id, folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert ids(folder / "results.jsonl") == ["r0", "r1", "r2"]
    assert (folder / "errors.jsonl").read_bytes() == emulator.service.open_results(
        batch_id, "error"
    ).read_bytes()
    assert manifest["paths"]["output_dir"] == str(folder)


def test_a_file_that_cannot_be_read_leaves_nothing_behind(
    client: SiliconFlowClient, make_batch: Callable[..., str], tmp_path: Path
) -> None:
    api = Altered(client, {})
    api.iter_file = lambda reference, refresh, *, limit=None: iter([b'{"custom_id": "r0", "resp'])  # type: ignore[method-assign]
    with pytest.raises(IncompleteResultsError, match="line 1"):
        download_results(api, make_batch("Hi"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_second_download_replaces_the_first(
    client: SiliconFlowClient, make_batch: Callable[..., str], tmp_path: Path
) -> None:
    download_results(client, make_batch("Hi", FAIL, "Hi"), tmp_path)
    download_results(client, make_batch("Hi"), tmp_path)
    assert ids(tmp_path / "results.jsonl") == ["r0"]
    assert ids(tmp_path / "errors.jsonl") == []


def test_the_most_common_error(
    client: SiliconFlowClient, make_batch: Callable[..., str], emulator: Emulator
) -> None:
    batch = client.get_batch(make_batch("Hi", FAIL, "[[emulator:error=503]]", FAIL))
    assert most_common_error(client, batch) == "The request has invalid parameters. (20015) (2 rows)"
    odd = b'{"id":5,"custom_id":"a","error":{"code":"1","message":"no \\ud83d"}}\n<html>\n{"odd":1}\n'
    api = Altered(client, {})
    api.iter_file = lambda reference, refresh, *, limit=None: iter([odd])  # type: ignore[method-assign]
    assert most_common_error(api, batch) == "no \ufffd (1) (1 rows)"
    # It only makes a message better, so it never makes a judgement fail.
    emulator.faults.add("GET storage:status=403,times=-1")
    assert most_common_error(client, batch) is None


def test_a_row_that_never_ran_counts_as_expired_and_an_answer_is_not_given_up(tmp_path: Path) -> None:
    def line(custom_id: str, code: str | None) -> str:
        error = {"message": "no", "code": code}
        return json.dumps({"id": "1", "custom_id": custom_id, "response": None, "error": error}) + "\n"

    errors = tmp_path / "error.jsonl"
    errors.write_text(
        line("never", "batch_cancelled") + line("refused", "20015") + line("plain", None) + line("twice", "1")
    )
    output = tmp_path / "output.jsonl"
    body = {"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}]}
    response = {"status_code": 200, "request_id": "r", "body": body}
    output.write_text(
        json.dumps({"id": "1", "custom_id": "twice", "response": response, "error": None}) + "\n"
    )
    found = outcomes_in(BatchFiles(output, errors))
    assert found == {
        "twice": Outcome.OK,
        "never": Outcome.EXPIRED,
        "refused": Outcome.ERROR,
        "plain": Outcome.ERROR,
    }


@pytest.mark.parametrize(
    ("status", "field"),
    [
        ("completed", "completed_at"),
        ("failed", "failed_at"),
        ("expired", "expired_at"),
        ("cancelled", "cancelled_at"),
    ],
)
def test_when_a_batch_ended_is_what_the_service_says_if_that_can_be(status: str, field: str) -> None:
    now = 1_800_000_000.0
    times = dict.fromkeys(("completed_at", "failed_at", "expired_at", "cancelled_at"), now - 99)
    times[field] = now - 10
    assert stated_end(Batch(id="b", status=status, **times), now) == now - 10
    for odd in (None, 0, now + 86_400, now * 1000):
        assert stated_end(Batch(id="b", status=status, **times | {field: odd}), now) == -math.inf
    assert stated_end(Batch(id="b", status=status, **{field: now + 86_399}), now) == now + 86_399
    assert stated_end(Batch(id="b", status="in_progress", **times), now) == -math.inf
