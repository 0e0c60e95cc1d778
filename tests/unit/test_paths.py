"""Files and folders as people name them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from airflow_provider_siliconflow.api.exceptions import InvalidInputError
from airflow_provider_siliconflow.paths import open_folder, open_source, resolve_path


@pytest.mark.parametrize("kind", [str, Path, Path.as_uri])
def test_a_file_opens_however_it_is_named(tmp_path: Path, kind: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"content")
    with open_source(kind(path)).open("rb") as stream:
        assert stream.read() == b"content"
    assert (open_folder("output_dir", kind(tmp_path)) / "rows.jsonl").read_bytes() == b"content"


def test_a_relative_path_is_relative_to_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Airflow 2.11 takes one for a path below the root."""
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_bytes(b"content")
    assert open_source("rows.jsonl").read_bytes() == b"content"


def test_content_opens_like_a_file_as_often_as_it_is_asked() -> None:
    source = open_source(b"content")
    for _ in range(2):
        with source.open("rb") as stream:
            assert stream.read() == b"content"
    assert str(source) == "the given bytes"


@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_name_is_refused(empty: str) -> None:
    """It would be the working folder of the worker."""
    with pytest.raises(InvalidInputError, match="source is empty"):
        open_source(empty, "source")
    with pytest.raises(InvalidInputError, match="output_dir is empty"):
        open_folder("output_dir", empty)


@pytest.mark.parametrize(
    ("uri", "needed"), [("abfs://c/x", "microsoft-azure"), ("nosuch://c/x", "needs a provider")]
)
def test_a_scheme_that_nothing_registers_names_what_does(uri: str, needed: str) -> None:
    with pytest.raises(InvalidInputError, match=f"^output_dir: .*{needed}"):
        resolve_path("output_dir", uri)
