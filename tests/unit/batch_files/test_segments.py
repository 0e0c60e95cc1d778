"""Segments of an answer cache: what was put in is found, and what is damaged is not used."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from airflow_provider_siliconflow.api.exceptions import InvalidInputError
from airflow_provider_siliconflow.batch_files import segments as module
from airflow_provider_siliconflow.batch_files.segments import (
    Segment,
    Segments,
    SegmentWriter,
    age,
    read_segments,
    segment_name,
    segment_paths,
    with_custom_id,
    without_custom_id,
)
from tests.unit.batch_files.samples import answer
from tests.unit.jobs.test_downloads import memory_folder


@pytest.fixture(autouse=True)
def _disk_that_keeps_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "airflow_provider_siliconflow.batch_files.atomic_files.os.fsync", lambda descriptor: None
    )


def key(row: int) -> bytes:
    return sha256(str(row).encode()).digest()


def line(row: int) -> bytes:
    return json.dumps(answer(f"id-{row}", f"answer {row}")).encode()


def write(folder: Any, number: int, rows: Any, created: float = 100.0) -> Any:
    path = folder / segment_name(f"{number:032x}", 0)
    with SegmentWriter(path, created=created, model="m", label="dag/task/run") as writer:
        for row in rows:
            cut = without_custom_id(line(row))
            assert cut is not None
            writer.add(key(row), *cut)
    return path


def look_up(folder: Any, rows: Any) -> dict[int, bytes | None]:
    """Return the stored line of each row that is found, with the row's custom_id; ``None`` if it is damaged."""
    names = {key(row): row for row in rows}
    found: dict[int, bytes | None] = {}
    with Segments(read_segments(folder)[0]) as segments:
        for first in range(256):
            wanted: dict[int, list[bytes]] = {}
            for each in names:
                if each[0] == first:
                    wanted.setdefault(int.from_bytes(each[:8], "big"), []).append(each)
            for each, hit in list(segments.find(first, wanted)):
                (stored,) = segments.lines([hit])
                row = names[each]
                found[row] = None if stored is None else with_custom_id(stored, hit.place, f"id-{row}")
    return found


@pytest.fixture(params=["local", "store"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "local":
        return tmp_path / "cache"
    return memory_folder(f"/{tmp_path.name}/cache")


def test_what_was_put_in_is_found_in_any_segment(folder: Any) -> None:
    write(folder, 1, range(1000))
    write(folder, 2, range(500, 700), created=200.0)
    write(folder, 3, [2000])
    rows = [*range(0, 1200, 7), 2000]
    expected = {row: line(row) for row in rows if row < 1000 or row == 2000}
    assert look_up(folder, rows) == expected


@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sets(st.integers(0, 60), max_size=40), max_size=4), st.sets(st.integers(0, 80)))
def test_a_row_is_found_if_any_segment_has_it(
    tmp_path_factory: pytest.TempPathFactory, stored: list[set[int]], asked: set[int]
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    for number, rows in enumerate(stored):
        write(folder, number, sorted(rows))
    assert set(look_up(folder, asked)) == asked.intersection(set().union(*stored))


def test_keys_with_the_same_beginning_are_told_apart(tmp_path: Path) -> None:
    """They may be of different requests, so the whole key counts."""
    path = tmp_path / segment_name("a" * 32, 0)
    beginning = bytes(8)
    with SegmentWriter(path, created=1.0, model=None, label="") as writer:
        for rest in (b"x", b"y"):
            writer.add(beginning + rest * 24, b'{"custom_id":"","text":"' + rest + b'"}', 13)
    with Segments(read_segments(tmp_path)[0]) as segments:
        wanted = [beginning + rest * 24 for rest in (b"z", b"y")]
        ((found, hit),) = segments.find(0, {0: wanted})
        assert found == wanted[1]
        assert list(segments.lines([hit])) == [b'{"custom_id":"","text":"y"}']


def test_the_newest_answer_is_used(tmp_path: Path) -> None:
    for number, text in ((1, "old"), (2, "new")):
        path = tmp_path / segment_name(f"{number:032x}", 0)
        with SegmentWriter(path, created=float(number), model=None, label="") as writer:
            writer.add(key(1), b'{"custom_id":"","text":"' + text.encode() + b'"}', 13)
    found = look_up(tmp_path, [1])[1]
    assert found is not None
    assert b"new" in found


# The custom id ------------------------------------------------------------------------------------------------


@given(st.text(min_size=1), st.text(min_size=1), st.text(), st.booleans())
def test_a_line_changes_in_its_custom_id_only(old: str, new: str, text: str, is_ascii: bool) -> None:
    fields: dict[str, Any] = {"id": "x", "custom_id": old, "response": {"custom_id": text, "text": text}}
    try:
        stored = json.dumps(fields, ensure_ascii=is_ascii).encode()
        new.encode()
        cut = without_custom_id(stored)
    except UnicodeEncodeError:
        return
    if cut is None:
        # The service writes no surrogates of which the other half is missing.
        assert "\\ud" in json.dumps(old)
        return
    assert json.loads(cut[0]) == fields | {"custom_id": ""}
    changed = with_custom_id(*cut, new)
    assert json.loads(changed) == fields | {"custom_id": new}
    assert list(json.loads(changed)) == list(fields)


@pytest.mark.parametrize(
    "odd",
    [
        b'{"custom\\u005fid": "a"}',
        b'{"id": {"custom_id": "a"}}',
        b'{"custom_id": 7}',
        b'{"custom_id": "a"',
        b'{"custom_id":\n"a"}',
        b"",
    ],
)
def test_a_line_whose_custom_id_cannot_be_found_is_not_kept(odd: bytes) -> None:
    assert without_custom_id(odd) is None


def test_the_custom_id_of_the_line_is_found_behind_others() -> None:
    nested = b'{"response": {"custom_id": "x"}, "custom_id" : "a\\"b", "text": "\\"custom_id\\": \\"c\\""}'
    cut = without_custom_id(nested)
    assert cut is not None
    assert with_custom_id(*cut, "new") == nested.replace(b'"a\\"b"', b'"new"')


# Damage -------------------------------------------------------------------------------------------------------


def test_a_segment_that_is_cut_anywhere_is_not_used(folder: Any) -> None:
    path = write(folder, 1, range(3))
    content = path.read_bytes()
    for size in [*range(0, len(content), 97), len(content) - 1]:
        path.write_bytes(content[:size])
        segments, unreadable = read_segments(folder)
        assert not segments, size
        assert list(unreadable) == [path.name]


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_damaged_segment_gives_right_answers_or_none(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    path = write(folder, 1, range(4))
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    if read_segments(folder)[0]:
        assert all(stored in (None, line(row)) for row, stored in look_up(folder, range(6)).items())


def test_what_is_no_segment_is_left_out(tmp_path: Path) -> None:
    good = write(tmp_path, 1, range(3))
    (tmp_path / segment_name("2" * 32, 0)).symlink_to(good)
    (tmp_path / segment_name("3" * 32, 0)).mkdir()
    (tmp_path / segment_name("4" * 32, 0)).write_bytes(b"")
    os.mkfifo(tmp_path / segment_name("5" * 32, 0))
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / f".{good.name}.x.part").write_text("half")
    segments, unreadable = read_segments(tmp_path)
    assert [segment.path for segment in segments] == [good]
    assert [name[0] for name in unreadable] == list("2345")


def test_a_folder_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    write(tmp_path / "theirs", 1, range(3))
    (tmp_path / "ours").symlink_to(tmp_path / "theirs")
    with pytest.raises(InvalidInputError, match="is a link"):
        segment_paths(tmp_path / "ours")


def remove(path: Path) -> None:
    path.unlink()


def replace(path: Path) -> None:
    write(path.parent, 9, range(700, 800)).replace(path)


def cut(path: Path) -> None:
    os.truncate(path, 10)


@pytest.mark.parametrize("happens", [remove, replace, cut])
def test_a_segment_that_changes_while_it_is_used_is_used_no_more(
    tmp_path: Path, happens: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_OPEN", 1)
    path = write(tmp_path, 1, range(3))
    write(tmp_path, 2, range(10, 13))
    with Segments(read_segments(tmp_path)[0]) as segments:
        happens(path)
        found = []
        for row in (0, 10, 1, 11):
            number = int.from_bytes(key(row)[:8], "big")
            found += [each for each, _ in segments.find(key(row)[0], {number: [key(row)]})]
        assert found == [key(10), key(11)]


def test_a_segment_of_a_store_that_is_gone_is_used_no_more() -> None:
    folder = memory_folder("/gone/cache")
    path = write(folder, 1, range(3))
    with Segments(read_segments(folder)[0]) as segments:
        number = int.from_bytes(key(0)[:8], "big")
        ((_, hit),) = segments.find(key(0)[0], {number: [key(0)]})
        path.fs.rm_file(path.path)
        assert list(segments.lines([hit])) == [None]
        assert list(segments.find(key(1)[0], {int.from_bytes(key(1)[:8], "big"): [key(1)]})) == []


def test_a_segment_appears_as_a_whole_or_not_at_all(folder: Any) -> None:
    def die() -> None:
        with SegmentWriter(folder / segment_name("a" * 32, 0), created=1.0, model=None, label="") as writer:
            writer.add(key(1), b'{"custom_id":""}', 13)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        die()
    write(folder, 1, range(3))
    assert [segment.answers for segment in read_segments(folder)[0]] == [3]


def test_the_folder_is_private(tmp_path: Path) -> None:
    write(tmp_path / "cache", 1, range(3))
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def test_a_segment_is_as_old_as_the_younger_of_its_two_times(tmp_path: Path) -> None:
    path = write(tmp_path, 1, range(3), created=1000.0)
    segment = Segment.read(path)
    os.utime(path, (5000.0, 5000.0))
    assert age(segment, 6000.0) == 1000.0
    os.utime(path, (10.0, 10.0))
    assert age(segment, 6000.0) == 5000.0


def test_what_a_segment_says_does_not_reach_the_terminal_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / segment_name("0" * 32, 0)
    with SegmentWriter(path, created=1.0, model="\x1b[2Ja\nb\x9b", label="\u202edag"):
        pass
    segment = Segment.read(path)
    assert f"{segment.model} {segment.job}".isprintable()
