"""A plan: what is kept of it, when it is the same rows still, and what is made of a damaged one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_siliconflow.api.exceptions import InvalidInputError
from airflow_provider_siliconflow.jobs import plan as plans
from airflow_provider_siliconflow.jobs.identity import Submitter
from airflow_provider_siliconflow.jobs.options import RunOptions
from airflow_provider_siliconflow.jobs.plan import Plan, PlanFolder, Rest, Round, digest_of, source_version

SUBMITTER = Submitter("dag", "run", "task", -1, 3)
OPTIONS = RunOptions(models=("a", "b"), max_rows=2, max_bytes=10_000)


def rows(count: int, word: str = "hi") -> list[dict[str, Any]]:
    return [
        {"custom_id": f"q{n}", "messages": [{"role": "user", "content": f"{word} {n}"}]} for n in range(count)
    ]


def make(folder: Path, requests: Any = None, options: RunOptions = OPTIONS) -> Plan:
    requests = rows(5) if requests is None else requests
    return Plan(
        plans.plan(requests, folder / "round-0", name="requests", options=options),
        "24h",
        {"team": "evals"},
        SUBMITTER,
        "conn",
        options.models,
        options.max_rows,
        options.max_bytes,
        digest_of(options.request_params),
        source_version(requests),
        complete=True,
    )


# Kept ---------------------------------------------------------------------------------------------------------


def test_a_plan_and_what_came_to_it_are_read_as_they_were_written(tmp_path: Path) -> None:
    folder = PlanFolder(tmp_path)
    made = make(tmp_path)
    assert folder.read() is None
    assert folder.read_round(1, range(2)) is None
    assert folder.read_rests() == []
    folder.write(made)
    assert folder.read() == made
    first, *more = made.split.shards
    folder.write_round(1, {0: [first], 1: []})
    assert folder.read_round(1, range(2)) == Round({0: (first,), 1: ()})
    assert folder.read_round(2, range(2)) is None
    rests = [Rest("f" * 32, more[0]), Rest("e" * 32, None)]
    folder.write_rests(rests)
    assert folder.read_rests() == rests
    assert {rest.folder for rest in rests} == {"rest-" + "f" * 16, "rest-" + "e" * 16}
    assert str(folder) == str(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.pop("conn_id"),
        lambda data: data.update(split={}),
        lambda data: data.update(completion_window="soon"),
        lambda data: data.update(metadata=7),
        lambda data: data.update(task=[]),
        lambda data: data["task"].update(dag_id=7),
        lambda data: data["task"].update(generation="3"),
        lambda data: data["task"].update(other=1),
        lambda data: data.update(models=7),
        lambda data: data.update(max_rows="many"),
    ],
)
def test_a_plan_that_is_damaged_is_none(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = make(tmp_path).to_dict()
    change(data)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    assert PlanFolder(tmp_path).read() is None


@pytest.mark.parametrize("complete", [True, False, "yes", 1, None])
def test_only_a_plan_that_says_so_itself_misses_nothing(tmp_path: Path, complete: Any) -> None:
    data = make(tmp_path).to_dict() | {"complete": complete, "source": None}
    found = Plan.from_dict(data)
    assert (found.complete, found.source) == (complete is True, None)


@pytest.mark.parametrize("stored", [{}, {"shards": 7}, {"shards": {"x": []}}, {"shards": {"0": [7]}}])
def test_a_round_or_rest_that_is_damaged_is_planned_anew(tmp_path: Path, stored: Any) -> None:
    (tmp_path / "round-1.json").write_text(json.dumps(stored))
    (tmp_path / "rests.json").write_text(json.dumps(stored))
    assert PlanFolder(tmp_path).read_round(1, range(2)) is None
    assert PlanFolder(tmp_path).read_rests() == []


# The same rows still ------------------------------------------------------------------------------------------


def test_a_plan_is_of_the_rows_it_was_made_of_and_of_no_others(tmp_path: Path) -> None:
    made = make(tmp_path)
    assert made.input.is_of(rows(5), OPTIONS, name="requests")
    assert made.input.is_of(rows(5), replace(OPTIONS, max_rows=5), name="requests"), "cut as the plan was"
    assert not made.input.is_of(rows(6), OPTIONS, name="requests")
    assert not made.input.is_of(rows(4), OPTIONS, name="requests")
    assert not made.input.is_of(rows(5, "ho"), OPTIONS, name="requests")
    assert not made.input.is_of(rows(5), replace(OPTIONS, request_params={"temperature": 0}), name="requests")
    assert not made.input.is_of([], OPTIONS, name="requests"), "rows that are wrong now"


def test_a_file_that_was_not_touched_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(5)))
    made = make(tmp_path / "job", path)
    read: list[Any] = []

    def counted(requests: Any, *rest: Any, **options: Any) -> Any:
        read.append(requests)
        return split(requests, *rest, **options)

    split = plans.plan
    monkeypatch.setattr(plans, "plan", counted)
    assert made.input.is_of(path, OPTIONS, name="requests")
    assert not read
    assert not made.input.is_of(path, replace(OPTIONS, request_params={"top_p": 1}), name="requests")
    copy = tmp_path / "copy.jsonl"
    shutil.copy2(path, copy)
    assert made.input.is_of(copy, OPTIONS, name="requests"), "a copy of the same content"
    assert read == [path, copy]


@pytest.mark.parametrize("in_place", [True, False])
def test_another_content_is_seen_whatever_the_time_of_the_file(tmp_path: Path, in_place: bool) -> None:
    """An archive that is unpacked sets times, often of whole seconds, and so do copies."""
    path, other = tmp_path / "rows.jsonl", tmp_path / ("rows.jsonl" if in_place else "other.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(5)))
    made = make(tmp_path / "job", path)
    time = path.stat().st_mtime_ns
    changed = path.stat().st_ctime_ns
    other.write_text(path.read_text().replace("hi", "ho"))
    # The clock of a file system ticks a few hundred times a second.
    while other.stat().st_mtime_ns != time or other.stat().st_ctime_ns == changed:
        os.utime(other, ns=(time, time))
    assert not made.input.is_of(other, OPTIONS, name="requests")


class Stored:
    """A file in a store that says this of it."""

    path = "bucket/rows.jsonl"

    def __init__(self, info: Any) -> None:
        self._info = info

    @property
    def fs(self) -> Any:
        return self

    def info(self, path: str) -> Any:
        assert path == self.path
        if isinstance(self._info, Exception):
            raise self._info
        return self._info


@pytest.mark.parametrize(
    ("info", "version"),
    [
        ({"size": 7, "ETag": "x", "name": "n"}, {"size": 7, "ETag": "x"}),
        ({"size": 7, "mtime": 1.5, "updated": ""}, {"size": 7, "mtime": "1.5"}),
        ({"size": 7, "etag": "x" * 300}, {"size": 7, "etag": "x" * 200}),
        ({"size": 7}, None),
        ({}, None),
        (RuntimeError("away"), None),
    ],
)
def test_a_store_tells_the_version_of_a_file_or_not(info: Any, version: dict[str, Any] | None) -> None:
    found = source_version(Stored(info))
    assert (None if found is None else json.loads(found)) == (version and {**version, "path": Stored.path})


def test_rows_have_no_version(tmp_path: Path) -> None:
    assert source_version(rows(1)) is None
    assert source_version(tmp_path / "gone.jsonl") is None


def test_parameters_have_the_same_digest_in_any_order() -> None:
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1}) != digest_of({"a": 1})
    assert digest_of(None) == digest_of({})


# What it takes ------------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_a_job_would_take(tmp_path: Path) -> None:
    shards = make(tmp_path).split.shards
    options = replace(OPTIONS, prices={"a": {"prompt": 1000.0, "completion": 1.0}})
    found = plans.estimate(rows(5), name="requests", options=options)
    tokens = found["models"][0]["prompt_tokens"]
    assert found == {
        "dry_run": True,
        "rows": 5,
        "invalid_input": 0,
        "bytes": sum((tmp_path / "round-0" / shard.name).stat().st_size for shard in shards),
        "shards": 3,
        "batches": 6,
        "models": [
            {
                "model": "a",
                "batches": 3,
                "prompt_tokens": tokens,
                "prompt_cost": pytest.approx(tokens * 1000 / 1e6),
            },
            {"model": "b", "batches": 3, "prompt_tokens": tokens, "prompt_cost": None},
        ],
        "models_named_by_rows": [],
    }
    assert tokens > 0


def test_rows_that_name_no_model_need_one(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="2 of 3 rows name no model"):
        plans.plan(
            [*rows(2), rows(1)[0] | {"custom_id": "x", "model": "m"}],
            tmp_path,
            name="requests",
            options=RunOptions(),
        )
