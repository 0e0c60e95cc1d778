"""Files that appear under their name only when they are whole."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_siliconflow.batch_files.atomic_files import (
    load_json,
    temporary_folder,
    write_json,
    write_whole,
)


class Store:
    """A path into a store that is not local, as an ``ObjectStoragePath`` is one."""

    protocol = "s3"

    def __init__(self, path: str = "bucket/x.jsonl") -> None:
        self.path = path
        self.fs = self
        self.files: dict[str, bytes] = {}
        self.seen: list[Path] = []

    def put_file(self, local: str, path: str) -> None:
        self.files[path] = Path(local).read_bytes()
        self.seen.append(Path(local))

    @property
    def parent(self) -> Store:
        return self


def write_half(target: Any) -> None:
    with contextlib.suppress(ZeroDivisionError), write_whole(target) as stream:
        stream.write(b"half")
        raise ZeroDivisionError


def test_a_file_replaces_what_was_there_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "x.json"
    write_json(target, {"cut": "\ud83d"})
    assert load_json(target) == {"cut": "\ud83d"}
    write_half(target)
    assert load_json(target) == {"cut": "\ud83d"}
    assert os.listdir(target.parent) == ["x.json"]


def test_a_file_for_a_store_is_put_there_in_one_go() -> None:
    store = Store()
    write_half(store)
    assert store.files == {}
    with write_whole(store) as stream:
        stream.write(b"whole")
    assert store.files == {"bucket/x.jsonl": b"whole"}
    assert not store.seen[0].parent.exists()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_results_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_json(tmp_path / "x.json", {})
    finally:
        os.umask(before)
    assert (tmp_path / "x.json").stat().st_mode & 0o777 == mode


HOLD = """
import sys, time
from pathlib import Path
from airflow_provider_siliconflow.batch_files.atomic_files import temporary_folder, write_whole
with temporary_folder() as folder, write_whole(Path(sys.argv[1])) as stream:
    (folder / "some").write_text("thing")
    stream.write(b"x" * 100_000)
    print(folder, flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    target = tmp_path / "results.jsonl"
    other = tmp_path / ".other.jsonl.1.part"
    other.write_text("another file's")
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    processes = []
    for _ in range(2):
        command = [sys.executable, "-c", HOLD, str(target)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        processes.append(process)
        assert process.stdout
        assert Path(process.stdout.readline().strip()).is_dir()
    killed, living = processes
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    folders = sorted(tmp_path.glob("siliconflow-files-*"))
    parts = sorted(tmp_path.glob(".results.jsonl.*.part"))
    assert (len(folders), len(parts)) == (2, 2)
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(tempfile, "tempdir", str(tmp_path))
            with write_whole(target) as stream:
                stream.write(b"whole")
                assert len(list(tmp_path.glob(".results.jsonl.*.part"))) == 2, "the living one's, and this"
            with temporary_folder():
                assert len(list(tmp_path.glob("siliconflow-files-*"))) == 2, "the living one's, and this"
    finally:
        living.kill()
        living.wait()
    assert target.read_bytes() == b"whole"
    assert other.exists()
    write_json(target, {})
    assert list(tmp_path.glob(".results.jsonl.*.part")) == []


def test_without_locks_nothing_is_removed_and_everything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(45, "not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    left = tmp_path / ".x.json.1.part"
    left.write_text("")
    write_json(tmp_path / "x.json", 1)
    assert load_json(tmp_path / "x.json") == 1
    assert left.exists()
    with temporary_folder() as folder:
        assert folder.is_dir()
    assert not folder.exists()
