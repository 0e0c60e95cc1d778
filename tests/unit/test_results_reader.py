"""`airflow_provider_siliconflow.results`: what a task after a batch reads with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_siliconflow.api.exceptions import IncompleteResultsError, InvalidInputError
from airflow_provider_siliconflow.results import read_results, to_frame

pytestmark = pytest.mark.every_airflow


def line(custom_id: str, text: str) -> str:
    body = {
        "choices": [
            {"message": {"content": text, "reasoning_content": "hm"}, "finish_reason": "stop", "index": 0}
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }
    return json.dumps({"custom_id": custom_id, "response": {"body": body}, "error": None})


def write(path: Path, *texts: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line(f"row-{number}", text) + "\n" for number, text in enumerate(texts)))
    return str(path)


def manifest(**files: str) -> dict[str, Any]:
    return {"version": 1, "models": [{"model": name, "paths": {"results": p}} for name, p in files.items()]}


@pytest.fixture
def two_models(tmp_path: Path) -> dict[str, Any]:
    return manifest(
        a=write(tmp_path / "a" / "results.jsonl", "A0", "A1"), b=write(tmp_path / "b.jsonl", "B0")
    )


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_results_file(tmp_path: Path, scheme: str) -> None:
    path = write(tmp_path / "results.jsonl", "one", "two")
    rows = list(read_results(scheme + path))
    assert [(row.custom_id, row.text, row.reasoning) for row in rows] == [
        ("row-0", "one", "hm"),
        ("row-1", "two", "hm"),
    ]
    assert rows[0].usage["total_tokens"] == 5


def test_object_storage_path(tmp_path: Path) -> None:
    from airflow.providers.common.compat.sdk import ObjectStoragePath

    write(tmp_path / "results.jsonl", "one")
    folder = ObjectStoragePath(tmp_path.as_uri())
    assert [row.text for row in read_results(folder / "results.jsonl")] == ["one"]


def test_manifest_of_one_model_needs_no_name(tmp_path: Path) -> None:
    one = manifest(a=write(tmp_path / "r.jsonl", "A"))
    assert [row.text for row in read_results(one)] == ["A"]
    assert [row.text for row in read_results(one, model="a")] == ["A"]


def test_manifest_of_rows_that_name_their_models(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", "A")
    unnamed = {"models": [{"model": None, "paths": {"results": path}}]}
    assert [row.text for row in read_results(unnamed)] == ["A"]
    with pytest.raises(InvalidInputError, match="leave model= out"):
        read_results(unnamed, model="a")


def test_manifest_picks_a_model(two_models: dict[str, Any], tmp_path: Path) -> None:
    assert [row.text for row in read_results(two_models, model="a")] == ["A0", "A1"]
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(two_models))
    assert [row.text for row in read_results(path, model="b")] == ["B0"]
    assert [row.text for row in read_results(path.as_uri(), model="b")] == ["B0"]


@pytest.mark.parametrize(
    ("model", "message"),
    [(None, "several models; say which: model= one of 'a', 'b'"), ("c", "no results of model 'c'.*'a', 'b'")],
)
def test_unclear_model_fails_before_reading(
    two_models: dict[str, Any], model: str | None, message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        read_results(two_models, model=model)
    with pytest.raises(InvalidInputError, match=message):
        to_frame(two_models, model=model)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"did you mean .*manifest\.json"):
        read_results(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no\.jsonl"):
        read_results(tmp_path / "no.jsonl")
    with pytest.raises(FileNotFoundError, match="which the manifest points to"):
        read_results(manifest(a=str(tmp_path / "gone.jsonl")))


def test_what_is_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="not a manifest"):
        read_results({"rows": 3})
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InvalidInputError, match=r"manifest\.json is not a manifest"):
        read_results(tmp_path / "manifest.json")
    with pytest.raises(InvalidInputError, match="one model already"):
        read_results(write(tmp_path / "results.jsonl", "A"), model="a")


def test_rows_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(line("row-0", "fine") + "\ncut")
    rows = read_results(path)
    assert next(rows).text == "fine"
    with pytest.raises(IncompleteResultsError):
        next(rows)


def test_local_files_need_no_airflow(tmp_path: Path) -> None:
    code = (
        "import sys; from airflow_provider_siliconflow.results import read_results;"
        f"print(len(list(read_results({write(tmp_path / 'r.jsonl', 'A')!r}))), 'airflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "False"]


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_frame(two_models: dict[str, Any], library: str) -> None:
    pytest.importorskip(library)
    frame = to_frame(two_models, library, model="a")
    assert list(frame["text"]) == ["A0", "A1"]
    assert list(frame["prompt_tokens"]) == [3, 3]
