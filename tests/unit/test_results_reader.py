"""`airflow_provider_siliconflow.results`: what a task after a batch reads with."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel

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


def manifest(folder: Path, *models: str | None, **more: Any) -> dict[str, Any]:
    """A manifest whose inner paths lead nowhere: they are not to be followed."""
    entries: list[dict[str, Any]] = [
        {"model": model, "batches": [], "paths": {"results": "/etc/passwd"}} for model in models
    ]
    return {"version": 1, "models": entries, "paths": {"output_dir": str(folder)}, **more}


@pytest.fixture
def two_models(tmp_path: Path) -> dict[str, Any]:
    write(tmp_path / "Qwen--Qwen3-32B" / "results.jsonl", "A0", "A1")
    write(tmp_path / "b" / "results.jsonl", "B0")
    return manifest(tmp_path, "Qwen/Qwen3-32B", "b")


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
    write(tmp_path / "results.jsonl", "A")
    one = manifest(tmp_path, "a")
    assert [row.text for row in read_results(one)] == ["A"]
    assert [row.text for row in read_results(one, model="a")] == ["A"]


def test_manifest_of_rows_that_name_their_models(tmp_path: Path) -> None:
    write(tmp_path / "results.jsonl", "A")
    unnamed = manifest(tmp_path, None)
    assert [row.text for row in read_results(unnamed)] == ["A"]
    with pytest.raises(InvalidInputError, match="leave model out"):
        read_results(unnamed, model="a")


def test_manifest_picks_a_model(two_models: dict[str, Any], tmp_path: Path) -> None:
    assert [row.text for row in read_results(two_models, model="Qwen/Qwen3-32B")] == ["A0", "A1"]
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(two_models))
    assert [row.text for row in read_results(path, model="b")] == ["B0"]
    assert [row.text for row in read_results(path.as_uri(), model="b")] == ["B0"]


def test_a_folder_that_was_moved_is_read_where_it_is(two_models: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(two_models))
    moved = tmp_path.with_name(f"{tmp_path.name}-moved")
    tmp_path.rename(moved)
    assert [row.text for row in read_results(moved / "manifest.json", model="b")] == ["B0"]
    with pytest.raises(FileNotFoundError):
        read_results(two_models, model="b")


@pytest.mark.parametrize("model", ["../b", "/etc", "..", "b/../../x", "\ud800", "a\0b"])
def test_a_manifest_leads_nowhere_but_below_its_folder(
    two_models: dict[str, Any], tmp_path: Path, model: str
) -> None:
    """Its models name folders; whatever they are, their slugs are names of one level."""
    write(tmp_path.parent / "x" / "results.jsonl", "not yours")
    two_models["models"][0]["model"] = model
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        read_results(two_models, model=model)


@pytest.mark.parametrize("own", [{"run": "1"}, {"unfinished": "1"}, {}])
def test_results_of_another_run_are_refused(tmp_path: Path, own: dict[str, Any]) -> None:
    task = {"dag_id": "d", "run_id": "first", "task_id": "t"}
    write(tmp_path / "results.jsonl", "A")
    returned = manifest(tmp_path, "a", **own, **({"task": task} if own else {}))
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(returned))
    assert [row.text for row in read_results(returned)] == ["A"]
    path.write_text(json.dumps({**returned, "run": "2", "task": {**task, "run_id": "second"}}))
    with pytest.raises(
        InvalidInputError, match="the results of another run, task 't' of DAG 'd', run 'second'"
    ):
        read_results(returned)
    with pytest.raises(InvalidInputError, match="another run"):
        to_frame(returned)


def test_a_job_that_was_finished_later_is_the_same_job(tmp_path: Path) -> None:
    write(tmp_path / "results.jsonl", "A")
    (tmp_path / "manifest.json").write_text(json.dumps(manifest(tmp_path, "a", run="1")))
    assert [row.text for row in read_results(manifest(tmp_path, "a", unfinished="1"))] == ["A"]


def test_downloads_differ_by_their_batches(tmp_path: Path) -> None:
    write(tmp_path / "results.jsonl", "A")
    first, second = manifest(tmp_path, None), manifest(tmp_path, None)
    first["models"][0]["batches"] = [{"id": "batch_1"}]
    second["models"][0]["batches"] = [{"id": "batch_2"}]
    (tmp_path / "manifest.json").write_text(json.dumps(second))
    assert [row.text for row in read_results(second)] == ["A"]
    with pytest.raises(InvalidInputError, match="the results of another run, a download"):
        read_results(first)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (None, "several models; model must be one of 'Qwen/Qwen3-32B', 'b'"),
        ("c", "no results of model 'c'.*'Qwen/Qwen3-32B', 'b'"),
    ],
)
def test_unclear_model_fails_before_reading(
    two_models: dict[str, Any], model: str | None, message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        read_results(two_models, model=model)
    if model is not None:
        with pytest.raises(InvalidInputError, match=message):
            to_frame(two_models, model=model)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"did you mean .*manifest\.json"):
        read_results(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no\.jsonl"):
        read_results(tmp_path / "no.jsonl")
    with pytest.raises(FileNotFoundError, match=r"results\.jsonl, which belongs to the manifest"):
        read_results(manifest(tmp_path, "a"))


@pytest.mark.parametrize(
    "content",
    ["{", "[" * 100_000, "[]", '{"models": 3}', '{"models": [{"model": 5}]}', " " * (33 << 20)],
    ids=["cut", "nested", "list", "number", "model", "large"],
)
def test_what_is_no_manifest(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(InvalidInputError, match=r"manifest\.json is not a manifest"):
        read_results(tmp_path / "manifest.json")


def test_what_no_task_returned(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="not a manifest"):
        read_results({"rows": 3})
    with pytest.raises(InvalidInputError, match="of a single model"):
        read_results(write(tmp_path / "results.jsonl", "A"), model="a")
    with pytest.raises(InvalidInputError, match="source must be a path, a URI or a path object; got int"):
        read_results(5)
    with pytest.raises(InvalidInputError, match="source must not contain NUL"):
        read_results("a\0b.jsonl")


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
    frame = to_frame(two_models, library, model="Qwen/Qwen3-32B")
    assert list(frame["text"]) == ["A0", "A1"]
    assert list(frame["prompt_tokens"]) == [3, 3]


class Part(BaseModel):
    text: str


class Label(BaseModel):
    label: Literal["spam", "ham"]
    score: int | None = None
    seen: date | None = None
    parts: list[Part] = []


SCHEMA = {
    "type": "object",
    "properties": {"label": {"enum": ["spam", "ham"]}, "score": {}},
    "required": ["label"],
}
ANSWERS = [
    '{"label": "spam", "score": 7, "seen": "2026-01-02", "parts": [{"text": "a"}]}',
    '```json\n{"label": "ham"}\n```',
    "I cannot say.",
]


@pytest.mark.parametrize("output_type", [Label, SCHEMA], ids=["pydantic", "schema"])
def test_rows_are_read_as_a_type(tmp_path: Path, output_type: Any) -> None:
    path = write(tmp_path / "results.jsonl", *ANSWERS)
    with open(path, "a") as file:
        file.write(line("row-3", ANSWERS[0])[:-1] + ',"invalid":"not accepted"}\n')
    rows = list(read_results(path, output_type=output_type))
    assert [row.outcome for row in rows] == ["ok", "ok", "ok", "invalid"]
    found = [row.parsed if output_type is SCHEMA else row.parsed and row.parsed.model_dump() for row in rows]
    assert [each and each["label"] for each in found] == ["spam", "ham", None, None]
    assert [row.parsed for row in read_results(path)] == [None] * 4
    with pytest.raises(InvalidInputError, match="output_type must be"):
        read_results(path, output_type=Label(label="spam"))  # type: ignore[arg-type]


@pytest.mark.parametrize("library", ["pandas", "polars"])
@pytest.mark.parametrize("output_type", [Label, SCHEMA], ids=["pydantic", "schema"])
def test_a_frame_has_the_fields_of_the_type(tmp_path: Path, library: str, output_type: Any) -> None:
    pytest.importorskip(library)
    frame = to_frame(write(tmp_path / "r.jsonl", *ANSWERS), library, output_type=output_type)
    assert list(frame["label"])[:2] == ["spam", "ham"]
    assert frame["score"][0] == 7
    assert "Int64" in str(frame["score"].dtype)
    assert list(frame.columns)[-len(frame.columns) + 8 :] == (
        ["label", "score", "seen", "parts"] if output_type is Label else ["label", "score"]
    )
    if output_type is Label:
        assert frame["seen"][0] == date(2026, 1, 2)
        assert list(frame["parts"][0]) == [{"text": "a"}]


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_a_frame_over_several_models_names_them(two_models: dict[str, Any], library: str) -> None:
    pytest.importorskip(library)
    frame = to_frame(two_models, library)
    assert list(zip(frame["model"], frame["text"], strict=True)) == [
        ("Qwen/Qwen3-32B", "A0"),
        ("Qwen/Qwen3-32B", "A1"),
        ("b", "B0"),
    ]
    assert "model" not in to_frame(two_models, library, model="b").columns


def test_columns_of_the_same_name_are_told_apart_by_a_prefix(two_models: dict[str, Any]) -> None:
    pytest.importorskip("pandas")
    schema = {"type": "object", "properties": {"text": {}, "model": {}, "a": {}}}
    with pytest.raises(InvalidInputError, match=r"other columns \(model, text\); give prefix"):
        to_frame(two_models, "pandas", output_type=schema)
    assert list(to_frame(two_models, "pandas", output_type=schema, prefix="x_").columns)[-3:] == [
        "x_text",
        "x_model",
        "x_a",
    ]


def test_a_field_of_several_types_is_kept_as_it_is(tmp_path: Path) -> None:
    pytest.importorskip("polars")
    path = write(tmp_path / "r.jsonl", '{"a": 1}', '{"a": "x"}', '{"a": {"b": 2}}')
    frame = to_frame(path, "polars", output_type={"type": "object", "properties": {"a": {}}})
    assert list(frame["a"]) == [1, "x", {"b": 2}]
