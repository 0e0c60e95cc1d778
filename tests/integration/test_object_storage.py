"""Everything on S3: the input, what a job keeps for its next try, and the results."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from s3fs import S3FileSystem  # type: ignore[import-untyped]

    from airflow_provider_siliconflow.emulator import Emulator

pytest.importorskip("s3fs", reason="needs s3fs")
moto_server = pytest.importorskip("moto.server", reason="needs moto[server]")
object_storage = pytest.importorskip("airflow.sdk.io.fs", reason="registers the file system of Airflow 3")

MODELS = ["Qwen/Qwen3-32B", "THUDM/GLM-4-9B-0414"]
ROWS = 11
INPUT = "s3://evals/questions.jsonl"
OUTPUT = "s3://evals/out"

pytestmark = [
    pytest.mark.emulator(speed=100_000.0),
    pytest.mark.usefixtures("siliconflow_connection"),
]


class Crash(BaseException):
    """The process dies here."""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """A local S3 server."""
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3FileSystem]:
    """An empty bucket, which ``ObjectStoragePath`` finds as it finds the one of Airflow's Amazon provider."""
    from s3fs import S3FileSystem

    def make(*_: Any) -> S3FileSystem:
        return S3FileSystem(key="test", secret="test", endpoint_url=endpoint)

    monkeypatch.setitem(object_storage._register_filesystems(), "s3", make)
    filesystem = make()
    filesystem.mkdir("evals")
    body = {"model": MODELS[0]}
    rows = [
        {"custom_id": f"q{n}", "body": body | {"messages": [{"role": "user", "content": mark(n)}]}}
        for n in range(ROWS)
    ]
    filesystem.pipe(INPUT, "".join(json.dumps(row) + "\n" for row in rows).encode())
    yield filesystem
    filesystem.rm("evals", recursive=True)


def mark(row: int) -> str:
    return f"Say {row} " + {2: "[[emulator:once=503]]", 7: "[[emulator:error=400]]"}.get(row, "")


def context(task: Any, try_number: int = 1) -> Any:
    now = datetime.now(UTC)
    ti = SimpleNamespace(
        dag_id="dag",
        run_id="run",
        task_id=task.task_id,
        map_index=-1,
        max_tries=3,
        try_number=try_number,
        start_date=now,
        xcom_push=lambda key, value: None,
    )
    return {
        "ti": ti,
        "task": task,
        "dag_run": SimpleNamespace(start_date=now, run_after=now, logical_date=None),
    }


def run_job(output_dir: str = OUTPUT, try_number: int = 1, **arguments: Any) -> dict[str, Any]:
    from airflow_provider_siliconflow.operators.batch import RunBatchOperator

    task = RunBatchOperator(
        task_id="run",
        requests=INPUT,
        output_dir=output_dir,
        models=MODELS,
        max_rows_per_batch=4,
        max_row_attempts=2,
        poll_interval=0.05,
        deferrable=False,
        retries=3,
        **arguments,
    )
    return task.execute(context(task, try_number))


def files(s3: S3FileSystem, folder: str = OUTPUT) -> dict[str, bytes]:
    s3.invalidate_cache()
    root = folder.removeprefix("s3://")
    return {name.removeprefix(root): s3.cat_file(name) for name in s3.find(root)}


def ids(data: bytes) -> list[str]:
    return [json.loads(line)["custom_id"] for line in data.splitlines()]


def posts(emulator: Emulator) -> tuple[int, int]:
    counts = emulator.request_counts
    return counts.get("POST /files", 0), counts.get("POST /batches", 0)


def test_a_whole_job_reads_keeps_and_writes_on_s3(s3: S3FileSystem, emulator: Emulator) -> None:
    manifest = run_job()
    found = files(s3)
    slugs = [model.replace("/", "--") for model in MODELS]
    assert sorted(found) == sorted(
        ["/manifest.json"] + [f"/{slug}/{name}.jsonl" for slug in slugs for name in ("results", "errors")]
    ), "nothing of the job's own folder is left"
    for slug in slugs:
        assert ids(found[f"/{slug}/results.jsonl"]) == [f"q{n}" for n in range(ROWS)]
        assert ids(found[f"/{slug}/errors.jsonl"]) == ["q7"]
    assert manifest == json.loads(found["/manifest.json"])
    assert manifest["rows"] == {"total": 22, "ok": 20, "error": 2, "invalid": 0, "expired": 0, "missing": 0}
    assert all(
        path.startswith("s3://evals/out/") for one in manifest["models"] for path in one["paths"].values()
    )
    # Three shards for both models; the row worth it again, which is the same row for both.
    assert posts(emulator) == (4, 8)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.4, 0.6, 0.8, 0.95])
def test_a_second_try_takes_up_what_a_crash_left_on_s3(
    s3: S3FileSystem,
    emulator: Emulator,
    make_emulator: Callable[..., Emulator],
    monkeypatch: pytest.MonkeyPatch,
    share: float,
) -> None:
    from s3fs import S3FileSystem as FileSystem

    from airflow_provider_siliconflow.api.client import SiliconFlowClient
    from airflow_provider_siliconflow.jobs.clock import SystemClock

    passed, fatal = 0, -1

    def before_and_after(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            count()
            answer = original(*arguments, **named)
            count()
            return answer

        return wrapped

    def count() -> None:
        nonlocal passed
        passed += 1
        if passed == fatal:
            raise Crash

    # The search for a batch that may have been created is patient: a minute, which need not pass here.
    slept = 0.0

    def sleep(_: SystemClock, seconds: float) -> None:
        nonlocal slept
        slept += seconds

    monkeypatch.setattr(SystemClock, "sleep", sleep)
    monkeypatch.setattr(SystemClock, "time", lambda _: time.time() + slept)
    for owner, name in ((SiliconFlowClient, "_send"), (FileSystem, "put_file"), (FileSystem, "rm")):
        monkeypatch.setattr(owner, name, before_and_after(getattr(owner, name)))
    calm = make_emulator(speed=100_000.0)
    monkeypatch.setenv("AIRFLOW_CONN_SILICONFLOW_DEFAULT", calm.airflow_connection)
    run_job("s3://evals/calm")
    expected = files(s3, "s3://evals/calm")
    events, passed = passed, 0

    fatal = max(int(events * share), 1)
    monkeypatch.setenv("AIRFLOW_CONN_SILICONFLOW_DEFAULT", emulator.airflow_connection)
    with pytest.raises(Crash):
        run_job()
    run_job(try_number=2)
    assert posts(emulator) == posts(calm)
    found = files(s3)
    del found["/manifest.json"], expected["/manifest.json"]
    assert found == expected


@pytest.fixture
def ended_batch(s3: S3FileSystem, emulator: Emulator) -> str:
    from airflow_provider_siliconflow.operators.batch import CreateBatchOperator

    create = CreateBatchOperator(
        task_id="create", input_path=INPUT, wait_for_completion=True, deferrable=False, poll_interval=0.05
    )
    return create.execute(context(create))


def download(batch_id: str) -> dict[str, Any]:
    from airflow_provider_siliconflow.operators.batch import DownloadBatchResultsOperator

    task = DownloadBatchResultsOperator(task_id="download", batch_id=batch_id, output_dir=OUTPUT)
    return task.execute(context(task))


def test_results_of_one_batch_are_written_to_s3(s3: S3FileSystem, ended_batch: str) -> None:
    manifest = download(ended_batch)
    found = files(s3)
    assert set(found) == {"/results.jsonl", "/errors.jsonl", "/manifest.json"}
    assert sorted(ids(found["/results.jsonl"])) == sorted(f"q{n}" for n in range(ROWS))
    assert sorted(ids(found["/errors.jsonl"])) == ["q2", "q7"]
    assert manifest == json.loads(found["/manifest.json"])


def test_a_download_that_fails_half_way_leaves_no_file(
    s3: S3FileSystem, emulator: Emulator, ended_batch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from airflow_provider_siliconflow.api.exceptions import SiliconFlowError

    connection = json.loads(emulator.airflow_connection) | {"extra": {"max_retries": 0}}
    monkeypatch.setenv("AIRFLOW_CONN_SILICONFLOW_DEFAULT", json.dumps(connection))
    emulator.faults.add("GET storage:cut=200,times=99")
    with pytest.raises(SiliconFlowError):
        download(ended_batch)
    assert files(s3) == {}


@pytest.mark.parametrize("megabytes", [1, 120])
def test_a_file_on_s3_is_whole_or_not_there(s3: S3FileSystem, megabytes: int) -> None:
    from airflow.sdk import ObjectStoragePath

    from airflow_provider_siliconflow.batch_files.atomic_files import write_whole

    target = ObjectStoragePath(OUTPUT) / "results.jsonl"

    def write(fails: bool) -> None:
        with write_whole(target) as stream:
            for _ in range(megabytes):
                stream.write(b"x" * 1_000_000)
            if fails:
                raise Crash

    with pytest.raises(Crash):
        write(fails=True)
    assert files(s3) == {}
    write(fails=False)
    assert s3.size(f"{OUTPUT}/results.jsonl") == megabytes * 1_000_000
    with pytest.raises(Crash):
        write(fails=True)
    assert s3.size(f"{OUTPUT}/results.jsonl") == megabytes * 1_000_000, "what was there before stays"


def test_rows_are_asked_live_with_a_journal_on_s3(s3: S3FileSystem, emulator: Emulator) -> None:
    emulator.service.configure({"live_latency": 0.05})
    emulator.faults.add(match="POST /chat/completions", kind="status", status=401, skip=9, times=-1)
    with pytest.raises(Exception, match="401"):
        run_job(live_after=0, live_concurrency=2)
    kept = [name for name in files(s3) if name.endswith(".answers")]
    assert kept
    emulator.faults.clear()
    manifest = run_job(try_number=2, live_after=0, live_concurrency=2)
    assert posts(emulator) == (0, 0)
    assert manifest["rows"]["ok"] == manifest["live"]["rows"] == 20
    # What was on S3 was not asked again.
    assert emulator.live.asked_again == 0
    found = files(s3)
    assert not [name for name in found if ".siliconflow" in name]
    for model in MODELS:
        assert ids(found[f"/{model.replace('/', '--')}/results.jsonl"]) == [f"q{n}" for n in range(ROWS)]
