"""The command ``siliconflow-batches``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_siliconflow.batch_files.segments import SEGMENTS_FOLDER, segments_folder
from airflow_provider_siliconflow.cli import main
from tests.unit.batch_files.test_segments import write
from tests.unit.jobs.test_downloads import memory_folder

DAY = 86400.0


def days_ago(days: float) -> float:
    return time.time() - days * DAY


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache with answers of three ages, and with what somebody else left there."""
    for number, days in ((1, 0.0), (2, 29.9), (3, 31.0)):
        path = write(segments_folder(tmp_path), number, range(number), created=days_ago(days))
        os.utime(path, (days_ago(days),) * 2)
    folder = tmp_path / SEGMENTS_FOLDER
    (folder / "notes.txt").write_text("mine")
    (folder / f"{'f' * 32}-0.answers").write_text("no segment")
    for path in (folder / "notes.txt", folder / f"{'f' * 32}-0.answers"):
        os.utime(path, (1.0, 1.0))
    return tmp_path


def names(cache: Path) -> set[str]:
    return {path.name[31:] for path in (cache / SEGMENTS_FOLDER).iterdir()} - {""}


def test_answers_are_listed_newest_first(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "ls", str(cache), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["answers"] for each in found["segments"]] == [1, 2, 3]
    assert found["segments"][0].items() >= {"model": "m", "job": "dag/task/run"}.items()
    assert list(found["unreadable"].values()) == ["it is too short"]
    assert main(["cache", "ls", str(cache)]) == 0
    text = capsys.readouterr().out
    assert "3 segments, 6 answers" in text
    assert "not used, and left alone: fff" in text


def test_only_what_is_older_is_removed(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "prune", str(cache), "--older-than", "30d", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert ([each["answers"] for each in found["removed"]], found["kept"]) == ([3], 2)
    assert names(cache) == {"1-0.answers", "2-0.answers", "f-0.answers"}
    assert (cache / SEGMENTS_FOLDER / "notes.txt").exists()
    assert main(["cache", "prune", str(cache), "--older-than", "4w"]) == 0
    assert "1 segments removed (2 answers" in capsys.readouterr().out
    assert names(cache) == {"1-0.answers", "f-0.answers"}


def test_a_copy_is_as_old_as_the_copy(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (cache / SEGMENTS_FOLDER).iterdir():
        os.utime(path)
    assert main(["cache", "prune", str(cache), "--older-than", "30d", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["removed"] == []


def test_a_cache_in_a_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = memory_folder(f"/cli/{tmp_path.name}")
    for number in (1, 2):
        write(segments_folder(cache), number, range(number), created=days_ago(40))
    assert main(["cache", "prune", str(cache), "--older-than", "30d", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == 2, "the store says that they are new"
    assert main(["cache", "prune", str(cache), "--older-than", "0s", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["removed"]) == 2


@pytest.mark.parametrize("age", ["30", "d", "-1d", "30 days", "1.5d", ""])
def test_an_age_that_is_none_is_refused(cache: Path, age: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["cache", "prune", str(cache), f"--older-than={age}"])
    assert stopped.value.code == 2
    assert "is not an age such as 30d" in capsys.readouterr().err


def test_a_folder_without_a_cache_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "ls", str(tmp_path / "typo")]) == 1
    assert "has no cached answers" in capsys.readouterr().err


def test_the_command_loads_no_airflow(cache: Path) -> None:
    """Airflow takes seconds to import, and needs a home; a local cache needs neither."""
    code = (
        "import sys\nfrom airflow_provider_siliconflow.cli import main\n"
        f"main(['cache', 'ls', {str(cache)!r}])\nassert 'airflow' not in sys.modules"
    )
    root = Path(__file__).resolve().parents[2]
    run: Any = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
