"""Whole DAGs, each by ``airflow dags test`` in a process of its own."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from airflow_provider_siliconflow.emulator import Emulator

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "example_dags"
DAGS = Path(__file__).parent / "dags"
KEY = "sk-integration-0123456789"

DagTest = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def make_input(tmp_path: Path) -> Callable[..., str]:
    def make(*texts: str) -> str:
        rows = [
            {
                "custom_id": f"r{n}",
                "body": {"model": "Qwen/Qwen3-32B", "messages": [{"role": "user", "content": text}]},
            }
            for n, text in enumerate(texts)
        ]
        path = tmp_path / "requests.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return make


def xcom(home: Path, task_id: str, key: str = "return_value") -> list[Any]:
    """What the instances of a task pushed, in the order of their map index."""
    query = "select value from xcom where task_id = ? and key = ? order by map_index"
    with sqlite3.connect(home / "airflow.db") as database:
        found = [json.loads(value) for (value,) in database.execute(query, (task_id, key))]
    # Airflow 3 keeps JSON inside a JSON string.
    return [json.loads(one) if isinstance(one, str) and one[:1] in '{["' else one for one in found]


def states(home: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    with sqlite3.connect(home / "airflow.db") as database:
        for task_id, state in database.execute("select task_id, state from task_instance"):
            found.setdefault(task_id, set()).add(state)
    return found


@pytest.mark.every_airflow
@pytest.mark.emulator(speed=1000.0, keys=(KEY,))
def test_the_example_uploads_once_creates_once_and_tells_no_secret(
    dag_test: DagTest,
    airflow_home: Path,
    emulator: Emulator,
    tmp_path: Path,
    make_input: Callable[..., str],
) -> None:
    folder = tmp_path / "out"
    run = dag_test(
        EXAMPLES / "siliconflow_batch_quickstart.py",
        "siliconflow_batch_quickstart",
        {"input_path": make_input("Hi", "Ho", "[[emulator:error=400]]"), "output_dir": str(folder)},
        {"AIRFLOW__LOGGING__LOGGING_LEVEL": "DEBUG"},
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
    assert set.union(*states(airflow_home).values()) == {"success"}, run.stdout[-3000:]
    counts = emulator.request_counts
    assert (counts["POST /files"], counts["POST /batches"]) == (1, 1)
    (batch,) = emulator.service.state()["batches"]
    assert xcom(airflow_home, "create", "batch_id") == [batch["id"]]
    assert xcom(airflow_home, "create") == [batch["id"]]
    # Every row was answered by the model that the DAG's own parameter names.
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert {row["custom_id"] for row in rows} == {"r0", "r1", "r2"}
    answered = [row["response"]["body"]["model"] for row in rows if row["response"]]
    assert answered == ["deepseek-ai/DeepSeek-V3"] * 2
    (manifest,) = xcom(airflow_home, "download")
    assert manifest["rows"] == {"total": 3, "ok": 2, "error": 1, "invalid": 0, "expired": 0, "missing": 0}
    assert manifest == json.loads((folder / "manifest.json").read_text())
    # Nor do they appear anywhere, though everything was logged.
    # At this level Airflow's own test run logs what it is told to mask.
    lines = [line for line in (run.stdout + run.stderr).splitlines() if "MaskSecret(" not in line]
    told = {"output": "\n".join(lines).encode()}
    told |= {
        str(path): path.read_bytes()
        for place in (airflow_home, folder)
        for path in place.rglob("*.*")
        if path.is_file()
    }
    assert any(path.endswith("airflow.db") for path in told)
    assert b"/results/" in told["output"], "the download is logged, so that this test can see how"
    for secret in (KEY, "X-Amz-Signature"):
        places = {path: text.index(secret.encode()) for path, text in told.items() if secret.encode() in text}
        assert {path: told[path][max(at - 300, 0) : at + 60] for path, at in places.items()} == {}
    assert emulator.service.authorization_leaks == 0


@pytest.mark.every_airflow
def test_one_upload_many_models_and_every_way_of_waiting(
    dag_test: DagTest,
    airflow_home: Path,
    emulator: Emulator,
    tmp_path: Path,
    make_input: Callable[..., str],
) -> None:
    conf = {"input_path": make_input("Hi", "Ho"), "output_dir": str(tmp_path / "out")}
    run = dag_test(DAGS / "waits.py", "waits", conf)
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
    assert set.union(*states(airflow_home).values()) == {"success"}, run.stdout[-3000:]
    counts = emulator.request_counts
    assert (counts["POST /files"], counts["POST /batches"]) == (1, 3)
    ids = xcom(airflow_home, "create")
    made = {
        batch["id"]: batch["request"].get("replace", {}).get("model")
        for batch in emulator.service.state()["batches"]
    }
    assert xcom(airflow_home, "finish") == [one for one, model in made.items() if model is None]
    assert [made[one] for one in ids] == ["Qwen/Qwen3-32B", "Qwen/Qwen3-8B"]
    for sensor in ("poke", "reschedule"):
        (found,) = xcom(airflow_home, sensor)
        assert [(batch["id"], batch["status"]) for batch in found] == [(one, "completed") for one in ids]
    for index, one in enumerate(ids):
        lines = (tmp_path / "out" / str(index) / "results.jsonl").read_text().splitlines()
        assert {json.loads(line)["response"]["body"]["model"] for line in lines} == {made[one]}


def test_a_batch_of_which_nothing_succeeded_fails_and_says_why(
    dag_test: DagTest, airflow_home: Path, make_input: Callable[..., str]
) -> None:
    texts = ["[[emulator:error=429]]", "[[emulator:error=400]]", "[[emulator:error=400]]"]
    run = dag_test(DAGS / "waits.py", "waits_in_vain", {"input_path": make_input(*texts)})
    assert states(airflow_home) == {"create": {"failed"}}
    told = run.stdout + run.stderr
    assert "0 of 3 rows succeeded" in told
    assert "The request has invalid parameters. (20015) (2 rows)" in told
    # It can be looked up all the same.
    (batch_id,) = xcom(airflow_home, "create", "batch_id")
    assert batch_id.startswith("batch_")


PARSE = """
import importlib.util, sys, warnings
import airflow.providers.common.compat.sdk
warnings.resetwarnings()
warnings.simplefilter("always")
folder, *examples = sys.argv[1:]
sys.path.insert(0, folder)
for example in examples:
    with warnings.catch_warnings(record=True) as caught:
        spec = importlib.util.spec_from_file_location("example", example)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    blamed = [str(w) for w in caught if "airflow_provider_siliconflow" in w.filename or folder in w.filename]
    assert not blamed, (example, blamed)
"""


@pytest.mark.every_airflow
def test_the_examples_are_parsed_without_a_warning(tmp_path: Path) -> None:
    """Of those that are blamed on the file itself, or on this package: Airflow deprecates with each version."""
    examples = sorted(map(str, EXAMPLES.glob("*.py")))
    assert examples
    run = subprocess.run(
        [sys.executable, "-c", PARSE, str(EXAMPLES), *examples],
        env=os.environ | {"PYTHONPATH": str(ROOT), "AIRFLOW_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.skipif(
    find_spec("airflow.providers.openlineage") is None, reason="needs apache-airflow-providers-openlineage"
)
def test_openlineage_is_told_which_files_were_read_and_written(
    dag_test: DagTest, tmp_path: Path, make_input: Callable[..., str]
) -> None:
    folder, events = tmp_path / "out", tmp_path / "events"
    requests = make_input("Hi", "Ho", "[[emulator:error=400]]")
    transport = {"type": "file", "log_file_path": str(events), "append": True}
    run = dag_test(
        EXAMPLES / "siliconflow_batch_quickstart.py",
        "siliconflow_batch_quickstart",
        {"input_path": requests, "output_dir": str(folder)},
        {"AIRFLOW__OPENLINEAGE__TRANSPORT": json.dumps(transport)},
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
    read: set[tuple[str, str]] = set()
    written: dict[str, int] = {}
    for event in map(json.loads, events.read_text().splitlines()):
        read |= {(each["namespace"], each["name"]) for each in event["inputs"]}
        for each in event["outputs"]:
            written[each["name"]] = each["outputFacets"]["outputStatistics"]["rowCount"]
    assert read == {("file", requests)}
    assert written == {str(folder / "results.jsonl"): 3, str(folder / "errors.jsonl"): 1}
