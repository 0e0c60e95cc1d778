"""The account of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_provider_siliconflow.batch_files.manifest import (
    BatchSummary,
    ModelRun,
    build_manifest,
    model_slug,
    render_summary,
    results_folder,
)
from airflow_provider_siliconflow.batch_files.tally import ModelTally, Usage


def run(model: str | None, *, ok: int = 8, error: int = 1, missing: int = 1) -> ModelRun:
    tally = ModelTally(
        rows=ok + error + missing,
        ok=ok,
        error=error,
        missing=missing,
        truncated=2,
        usage=Usage(1_000_000, 500_000, 100_000, 1_500_000),
        billed=Usage(2_000_000, 1_000_000, 100_000, 3_000_000),
        finish_reasons={"stop": ok - 2, "length": 2},
        messages={"Internal error (500)": 1},
        ok_in_round={0: ok - 1, 1: 1},
    )
    batches = [
        BatchSummary("batch_1", "completed", 10, counts={"total": 10, "completed": 7, "failed": 3}),
        BatchSummary("batch_2", "expired", 3, round=1),
    ]
    return ModelRun(model, tally, batches, {"results": "s3://b/results.jsonl"})


def test_a_manifest_adds_models_up_and_tells_rounds_apart() -> None:
    prices = {"a": {"prompt": 1.5, "completion": 2}, "b": {"prompt": 0, "completion": 0.1}}
    manifest = build_manifest([run("a"), run("b", ok=5)], prices=prices, paths={"output_dir": "s3://b"})
    assert json.loads(json.dumps(manifest)) == manifest
    assert manifest["rows"] == {"total": 17, "ok": 13, "error": 2, "invalid": 0, "expired": 0, "missing": 2}
    first, second = manifest["models"]
    assert first["cost"] == {"currency": "CNY", "prompt": 3.0, "completion": 2.0, "total": 5.0}
    assert second["cost"]["total"] == 0.1
    assert manifest["cost"]["total"] == 5.1
    assert first["rounds"] == [
        {"round": 0, "route": "batch", "batches": 1, "rows": 10, "ok": 7},
        {"round": 1, "route": "batch", "batches": 1, "rows": 3, "ok": 1},
    ]
    assert manifest["rounds"][0] == {"round": 0, "route": "batch", "batches": 2, "rows": 20, "ok": 11}
    assert manifest["usage"]["completion_tokens"] == 1_000_000
    assert manifest["billed_usage"]["total_tokens"] == 6_000_000
    assert manifest["errors"] == {"Internal error (500)": 2}
    assert first["batches"][0]["counts"] == {"total": 10, "completed": 7, "failed": 3}


def test_rows_asked_live_cost_their_own_price() -> None:
    price = {"prompt": 1, "completion": 4, "live": {"prompt": 2, "completion": 8}}
    tally = ModelTally(
        rows=10,
        ok=10,
        live=4,
        billed=Usage(10_000_000, 1_000_000),
        billed_live=Usage(4_000_000, 500_000),
        ok_in_round={0: 6, 1: 4},
    )
    batches = [BatchSummary("batch_1", "cancelled", 10)]
    manifest = build_manifest([ModelRun("a", tally, batches, live_rounds={1: 4})], prices={"a": price})
    assert manifest["live"]["rows"] == 4
    assert manifest["live"]["cost"]["total"] == 12.0
    assert manifest["cost"]["total"] == 6.0 + 2.0 + 12.0
    assert manifest["rounds"][1] == {"round": 1, "route": "live", "batches": 0, "rows": 4, "ok": 4}
    del price["live"]
    without = build_manifest([ModelRun("a", tally, batches, live_rounds={1: 4})], prices={"a": price})
    # A sum without the rows that were asked live would look like the bill.
    assert without["cost"] is None


def test_money_is_summed_unrounded_and_rounded_once() -> None:
    """Each of these models costs less than half of the last digit; together they do not."""
    tallies = [ModelTally(billed=Usage(4, 4)) for _ in range(3)]
    prices = {name: {"prompt": 0.1, "completion": 0.1} for name in "abc"}
    runs = [ModelRun(name, tally, []) for name, tally in zip("abc", tallies, strict=True)]
    manifest = build_manifest(runs, prices=prices)
    assert [each["cost"]["prompt"] for each in manifest["models"]] == [0.0, 0.0, 0.0]
    assert manifest["models"][0]["cost"]["total"] == 0.000001
    assert (manifest["cost"]["prompt"], manifest["cost"]["total"]) == (0.000001, 0.000002)


def test_a_total_cost_is_not_given_when_a_model_has_no_price(caplog: pytest.LogCaptureFixture) -> None:
    prices = {"A": {"prompt": 1, "completion": 1}}
    build_manifest([run("a")], prices=prices)
    assert not caplog.records
    manifest = build_manifest([run("a"), run("b"), run(None)], prices=prices)
    assert "The manifest has no cost for b, rows that name their models" in caplog.text
    assert manifest["models"][0]["cost"]["total"] == 3.0
    assert manifest["models"][1]["cost"] is None
    assert manifest["cost"] is None


def test_the_summary_is_a_table_without_empty_columns() -> None:
    assert render_summary(build_manifest([run("Qwen/Qwen3-8B")])) == (
        "model          rows  ok  error  missing  truncated     prompt  completion\n"
        "Qwen/Qwen3-8B    10   8      1        1          2  2,000,000   1,000,000\n"
        "round 0: 10 rows in 1 batches, 7 ok\n"
        "round 1: 3 rows in 1 batches, 1 ok\n"
        "1 x Internal error (500)"
    )
    prices = {name: {"prompt": 1, "completion": 1} for name in "ab"}
    text = render_summary(build_manifest([run("a"), run("b")], prices=prices))
    assert text.splitlines()[3].split() == [
        "total",
        "20",
        "16",
        "2",
        "2",
        "4",
        "4,000,000",
        "2,000,000",
        "6.00",
    ]


def test_a_model_has_a_folder_of_its_own_only_beside_others() -> None:
    assert results_folder(Path("/out"), "a/b", several=False) == Path("/out")
    assert results_folder(Path("/out"), "a/b", several=True) == Path("/out/a--b")
    assert results_folder(Path("/out"), None, several=True) == Path("/out")


@given(st.text(alphabet="aA/-. 中", max_size=8), st.text(alphabet="aA/-. 中", max_size=8))
def test_slugs_are_safe_and_differ(one: Any, other: Any) -> None:
    slug = model_slug(one)
    assert slug
    assert slug[0] not in ".-"
    assert set(slug) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
    assert (slug == model_slug(other)) == (one == other)


def test_a_usual_model_keeps_a_readable_slug() -> None:
    assert model_slug("Qwen/Qwen3-8B") == "Qwen--Qwen3-8B"
    assert model_slug("deepseek-ai/DeepSeek-V3.1") == "deepseek-ai--DeepSeek-V3.1"
    assert len(model_slug("x" * 500)) <= 100
