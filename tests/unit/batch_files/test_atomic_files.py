"""Files that appear when they are whole."""

from __future__ import annotations

import json
from pathlib import Path

from airflow_provider_siliconflow.batch_files.atomic_files import write_json


def test_half_of_a_surrogate_pair_can_be_written(tmp_path: Path) -> None:
    write_json(tmp_path / "any.json", {"cut": "\ud83d"})
    assert json.loads((tmp_path / "any.json").read_bytes()) == {"cut": "\ud83d"}
