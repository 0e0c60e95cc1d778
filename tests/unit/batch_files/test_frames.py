"""Results as a data frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from airflow_provider_siliconflow.api.exceptions import InvalidInputError
from airflow_provider_siliconflow.batch_files.frames import to_frame
from tests.unit.batch_files.samples import Folder, answer, failure


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_a_frame_has_a_row_per_result(tmp_path: Path, library: Any) -> None:
    pytest.importorskip(library)
    odd = answer("c", "cut \ud83d", finish=1, usage=(10.0, 1))
    odd["response"]["body"]["choices"][0]["message"]["reasoning_content"] = ["hm"]
    odd["response"]["body"]["usage"]["completion_tokens"] = "7"
    path = Folder(tmp_path, []).file([answer("a"), failure("b", "400", "bad"), odd])
    frame = to_frame(path, library)
    assert list(frame["custom_id"]) == ["a", "b", "c"]
    assert list(frame["outcome"]) == ["ok", "error", "ok"]
    assert (frame["prompt_tokens"].sum(), frame["completion_tokens"].sum()) == (20, 9)
    assert frame["error"][1] == "bad (400)"
    assert frame["text"][2] == "cut \ufffd"
    assert len(to_frame([], library)) == 0


def test_a_frame_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "polars", None)
    with pytest.raises(ImportError, match=r"airflow-provider-siliconflow\[polars\]"):
        to_frame([], "polars")
    with pytest.raises(InvalidInputError, match="'pandas' or 'polars'"):
        to_frame([], "numpy")
