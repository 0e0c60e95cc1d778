"""Rows are cut into shards."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_provider_siliconflow.api.exceptions import InvalidInputError, InvalidRequestFileError
from airflow_provider_siliconflow.batch_files.shards import (
    Shard,
    Split,
    iter_custom_ids,
    select_rows,
    split_requests,
)
from tests.unit.batch_files.samples import prompts


@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=30),
    max_rows=st.integers(1, 8),
    max_bytes=st.integers(200, 600),
)
def test_shards_hold_every_row_in_order_within_both_limits(
    tmp_path_factory: pytest.TempPathFactory, sizes: Any, max_rows: Any, max_bytes: Any
) -> None:
    work_dir = tmp_path_factory.mktemp("shards")
    split = split_requests(
        ["x" * n for n in sizes], work_dir, name="x", max_rows=max_rows, max_bytes=max_bytes
    )
    texts = []
    row = 0
    for index, shard in enumerate(split.shards):
        data = (work_dir / shard.name).read_bytes()
        lines = data.splitlines(keepends=True)
        texts += [json.loads(each)["body"]["messages"][0]["content"] for each in lines]
        assert data.endswith(b"\n")
        assert (shard.index, shard.first_row, shard.rows, shard.bytes) == (index, row, len(lines), len(data))
        assert shard.sha256 == hashlib.sha256(data).hexdigest()
        assert shard.rows <= max_rows
        assert shard.bytes <= max_bytes
        row += shard.rows
        if index:
            previous = split.shards[index - 1]
            assert previous.rows == max_rows or previous.bytes + len(lines[0]) > max_bytes, "cut too early"
    assert [len(text) for text in texts] == sizes
    assert (split.rows, split.bytes) == (len(sizes), sum(shard.bytes for shard in split.shards))


def test_a_shard_may_be_filled_to_the_last_byte(tmp_path: Path) -> None:
    size = split_requests(["x"] * 2, tmp_path, name="x").bytes
    for rows, limit, shards in ((2, size, 1), (2, size - 1, 2), (4, size, 2)):
        assert len(split_requests(["x"] * rows, tmp_path, name="x", max_bytes=limit).shards) == shards


def test_rows_of_any_size_are_not_gathered(tmp_path: Path) -> None:
    rows = ({"messages": [{"role": "user", "content": "x" * (1 << 20)}]} for _ in range(40))
    tracemalloc.start()
    try:
        assert split_requests(rows, tmp_path, name="x").rows == 40
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_a_split_tells_models_and_survives_json(tmp_path: Path) -> None:
    rows = ["abcd" * 3, {"model": "b", "messages": [{"role": "user", "content": "中"}]}, *prompts(1)]
    split = split_requests(rows, tmp_path / "new" / "folder", name="x", max_rows=2)
    assert (split.models, split.rows_without_model, split.prompt_tokens) == (("b",), 2, 4)
    assert Split.from_dict(json.loads(json.dumps(split.to_dict()))) == split
    defaulted = split_requests(rows, tmp_path, name="x", defaults={"model": "d"})
    assert (defaulted.models, defaulted.rows_without_model) == (("b", "d"), 0)


def test_a_default_model_in_a_full_line_is_seen(tmp_path: Path) -> None:
    rows = [{"custom_id": "a", "body": {"messages": [{"role": "user", "content": ""}]}}]
    assert split_requests(rows, tmp_path, name="x", defaults={"model": "d"}).models == ("d",)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_no_rows_are_an_error(tmp_path: Path, content: Any) -> None:
    (tmp_path / "empty.jsonl").write_bytes(content)
    with pytest.raises(InvalidInputError, match=r"empty\.jsonl holds no rows"):
        split_requests(tmp_path / "empty.jsonl", tmp_path / "work", name="empty.jsonl")


def test_blank_lines_in_the_middle_are_named(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'"a"\n\n\r\n"b"\n\n')
    with pytest.raises(InvalidRequestFileError) as caught:
        split_requests(source, tmp_path / "work", name="x")
    assert [problem.line for problem in caught.value.problems] == [2, 3]


@given(st.lists(st.booleans(), min_size=10, max_size=10), st.booleans())
def test_selected_rows_keep_their_bytes_and_tell_their_shards(
    tmp_path_factory: pytest.TempPathFactory, wanted: Any, as_bitmap: Any
) -> None:
    work_dir = tmp_path_factory.mktemp("select")
    split = split_requests(prompts(10), work_dir / "all", name="x", max_rows=4)
    sources = [work_dir / "all" / shard.name for shard in split.shards]
    parts = [wanted[shard.first_row : shard.first_row + shard.rows] for shard in split.shards]
    chosen = [bytearray(part) if as_bitmap else {n for n, yes in enumerate(part) if yes} for part in parts]
    selected = select_rows(sources, chosen, work_dir / "again", max_rows=3)
    written = b"".join((work_dir / "again" / shard.name).read_bytes() for shard in selected)
    lines = b"".join(source.read_bytes() for source in sources).splitlines(keepends=True)
    assert written == b"".join(each for each, yes in zip(lines, wanted, strict=True) if yes)
    for shard in selected:
        ids = list(iter_custom_ids(work_dir / "again" / shard.name))
        assert shard.rows == len(ids) <= 3
        assert shard.sources == tuple(sorted({int(each[3:]) // 4 for each in ids}))
        assert Shard.from_dict(shard.to_dict()) == shard


@pytest.mark.parametrize("limits", [{"max_rows": 0}, {"max_bytes": 0}])
def test_limits_without_room_are_refused(tmp_path: Path, limits: Any) -> None:
    with pytest.raises(InvalidInputError, match="at least one row"):
        split_requests(["x"], tmp_path, name="x", **limits)
