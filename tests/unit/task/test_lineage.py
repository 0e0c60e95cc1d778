"""What OpenLineage is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from airflow_provider_siliconflow.task.lineage import lineage

pytest.importorskip("airflow.providers.openlineage", reason="needs apache-airflow-providers-openlineage")


@pytest.mark.parametrize(
    ("requests", "named"),
    [
        ("s3://conn@evals/in/rows.jsonl", ("s3://evals", "in/rows.jsonl")),
        ("file:///data/rows.jsonl", ("file", "/data/rows.jsonl")),
        (Path("/data/rows.jsonl"), ("file", "/data/rows.jsonl")),
        ('["a prompt"]', None),
        ([{"custom_id": "a"}], None),
    ],
)
def test_a_file_is_named_without_its_connection_and_rows_are_none(
    requests: Any, named: tuple[str, str] | None
) -> None:
    found = [(each.namespace, each.name) for each in lineage(requests).inputs]
    assert found == ([named] if named else [])


def test_results_are_named_with_their_rows() -> None:
    rows = {"total": 10, "ok": 7}
    models = [
        {
            "rows": rows,
            "paths": {"results": f"s3://evals/{name}/r.jsonl", "errors": f"s3://evals/{name}/e.jsonl"},
        }
        for name in ("a", "b")
    ]
    found = lineage(Path("/data/rows.jsonl"), {"models": models}).outputs
    told = [(each.namespace, each.name, each.outputFacets["outputStatistics"].rowCount) for each in found]
    assert told == [
        ("s3://evals", "a/r.jsonl", 10),
        ("s3://evals", "a/e.jsonl", 3),
        ("s3://evals", "b/r.jsonl", 10),
        ("s3://evals", "b/e.jsonl", 3),
    ]
    assert lineage("/data/rows.jsonl").outputs == []
