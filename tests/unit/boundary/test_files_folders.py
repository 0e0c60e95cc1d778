"""Nobody who can write beside a job's files decides what is sent, paid, read or overwritten."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_siliconflow.api.exceptions import InvalidInputError
from airflow_provider_siliconflow.batch_files import atomic_files
from airflow_provider_siliconflow.batch_files.atomic_files import (
    OwnFile,
    create_file,
    load_json,
    make_private_folder,
    open_own,
    write_json,
)
from airflow_provider_siliconflow.batch_files.shards import (
    Shard,
    Split,
    iter_custom_ids,
    select_rows,
    split_requests,
)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_work_folder_is_private_whatever_the_umask_or_its_past(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        make_private_folder(tmp_path / "out" / "work")
        (tmp_path / "old").mkdir(mode=0o777)
        make_private_folder(tmp_path / "old")
    finally:
        os.umask(before)
    assert (mode(tmp_path / "out"), mode(tmp_path / "out" / "work"), mode(tmp_path / "old")) == (
        0o777,
        0o700,
        0o700,
    )


@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_is_no_folder_of_ours_is_refused(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "work"
    (tmp_path / "elsewhere").mkdir()
    if kind == "link":
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.write_text("")
    with pytest.raises(InvalidInputError, match="work is a link or not a folder; remove it"):
        make_private_folder(folder)


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    # A file system that maps all users to one gives new files to the folder's owner as well.
    make_private_folder(folder)
    monkeypatch.setattr(atomic_files, "_owner_of_new_files", lambda descriptor: 4711)
    with pytest.raises(InvalidInputError, match=r"belongs to user \d+, but this task runs as 4711"):
        make_private_folder(folder)
    assert list(folder.iterdir()) == []


def test_links_are_neither_read_nor_written_through(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("{}")
    for target in ("plan.json", "shard-00000.jsonl"):
        (tmp_path / target).symlink_to(secret)
        with pytest.raises(InvalidInputError, match="is a link, and is not followed"):
            open_own(tmp_path / target)
        with pytest.raises(InvalidInputError, match="is a link"):
            OwnFile(tmp_path / target).open("rb")
    with pytest.raises(InvalidInputError, match="is a link"):
        load_json(tmp_path / "plan.json")
    with pytest.raises(InvalidInputError, match="is a link"):
        list(iter_custom_ids(tmp_path / "shard-00000.jsonl"))
    with pytest.raises(InvalidInputError, match="is a link"):
        select_rows([tmp_path / "shard-00000.jsonl"], [{0}], tmp_path / "again")
    write_json(tmp_path / "plan.json", {"mine": 1})
    split_requests(["a row"], tmp_path, name="rows")
    with create_file(tmp_path / "shard-00000.jsonl") as stream:
        stream.write(b"x")
    assert secret.read_text() == "{}"
    assert load_json(tmp_path / "plan.json") == {"mine": 1}
    assert not (tmp_path / "shard-00000.jsonl").is_symlink()


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "plan.json")
    began = time.monotonic()
    with pytest.raises(InvalidInputError, match="is not a file"):
        load_json(tmp_path / "plan.json")
    with pytest.raises(InvalidInputError, match="is not a file"):
        load_json(tmp_path)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b" " * (33 << 20), "more than 33554432 bytes"),
        (b"[" * 10**6, "not JSON"),
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
    ],
    ids=["large", "nested", "cut", "binary"],
)
def test_a_plan_that_cannot_be_one_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(InvalidInputError, match=said):
        load_json(tmp_path / "plan.json")
    with pytest.raises(FileNotFoundError):
        load_json(tmp_path / "none.json")


def changed(data: dict[str, Any], change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    copy = {**data, "shards": [dict(shard) for shard in data["shards"]]}
    change(copy)
    return copy


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan["shards"][0].update(name="../../etc/passwd"),
        lambda plan: plan["shards"][0].update(name="shard-00001.jsonl"),
        lambda plan: plan["shards"][0].update(sha256="x" * 64),
        lambda plan: plan["shards"][0].update(sha256=None),
        lambda plan: plan["shards"][0].update(rows=0),
        lambda plan: plan["shards"][0].update(rows=10**9),
        lambda plan: plan["shards"][0].update(rows="2"),
        lambda plan: plan["shards"][0].update(bytes=-1),
        lambda plan: plan["shards"][0].update(bytes=10**30),
        lambda plan: plan["shards"][0].update(sources=[-1]),
        lambda plan: plan["shards"][0].update(sources="abc"),
        lambda plan: plan["shards"][1].update(index=10**9, name="shard-1000000000.jsonl"),
        lambda plan: plan["shards"][1].update(first_row=1),
        lambda plan: plan["shards"].reverse(),
        lambda plan: plan["shards"].pop(),
        lambda plan: plan.update(shards={}),
        lambda plan: plan.update(shards=[]),
        lambda plan: plan.update(rows=10**6),
        lambda plan: plan.update(bytes=True),
        lambda plan: plan.update(models=[5]),
        lambda plan: plan.update(rows_without_model=99),
        lambda plan: plan.update(prompt_tokens=10**30),
        lambda plan: plan.pop("rows"),
    ],
)
def test_a_plan_is_checked_before_it_is_believed(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    plan = split_requests(["a", "b", "c"], tmp_path, name="rows", max_rows=2).to_dict()
    assert Split.from_dict(changed(plan, lambda _: None)).to_dict() == plan
    with pytest.raises(InvalidInputError, match="the plan"):
        Split.from_dict(changed(plan, change))


@pytest.mark.parametrize("data", [None, [], 5, "x", {"shards": 3}, {"shards": [None]}, {"shards": [[]]}])
def test_what_is_no_plan_at_all(data: Any) -> None:
    with pytest.raises(InvalidInputError, match="the plan"):
        Split.from_dict(data)
    with pytest.raises(InvalidInputError, match="the plan"):
        Shard.from_dict(data)
