"""Jobs over inputs with invalid rows: ``on_invalid_row``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_siliconflow.api.exceptions import (
    BatchPartialFailureError,
    InvalidInputError,
    InvalidRequestFileError,
)
from airflow_provider_siliconflow.emulator.server import Emulator
from airflow_provider_siliconflow.jobs.outcome import judge_run
from airflow_provider_siliconflow.jobs.plan import estimate
from tests.unit.jobs.test_cache import CachingJob
from tests.unit.jobs.whole_job import MODELS, Job, posts, results, rows

pytestmark = pytest.mark.emulator(speed=2000.0)


def with_faults(count: int) -> list[Any]:
    good: list[Any] = rows(count, lambda i: "[[emulator:once=503]]" if i == 4 else "")
    return [7, *good[:4], {"custom_id": "x"}, *good[4:], good[0]]


def test_invalid_rows_stand_in_the_results_of_every_model_and_the_others_run(
    emulator: Emulator, tmp_path: Path
) -> None:
    job = Job(emulator, tmp_path, with_faults(9), on_invalid_row="report", max_row_attempts=2)
    manifest = job.attempt()
    for model in MODELS:
        lines = results(tmp_path, model)
        ids = [
            "row-0000001",
            "q0",
            "q1",
            "q2",
            "q3",
            "x",
            "q4",
            "q5",
            "q6",
            "q7",
            "q8",
            "row-0000012-invalid",
        ]
        assert [each["custom_id"] for each in lines] == ids
        wrong = {each["custom_id"]: each["error"] for each in lines if each["error"]}
        assert set(wrong) == {"row-0000001", "x", "row-0000012-invalid"}
        assert wrong["row-0000012-invalid"]["code"] == "invalid_input"
        assert wrong["row-0000012-invalid"]["message"].startswith(
            "line 12: line 2 has the same custom_id 'q0'"
        )
        errors = (tmp_path / model.replace("/", "--") / "errors.jsonl").read_text().splitlines()
        assert [json.loads(each) for each in errors] == [each for each in lines if each["error"]]
    assert manifest["rows"] == {"total": 24, "ok": 18, "error": 6, "invalid": 0, "expired": 0, "missing": 0}
    assert manifest["invalid_input"] == 6
    assert manifest["models"][0]["invalid_input"] == 3
    assert manifest["worth_another_attempt"] == 0
    assert [each["rows"] for each in manifest["rounds"]] == [18, 2]


def test_invalid_rows_fail_a_job_only_by_its_rates(emulator: Emulator, tmp_path: Path) -> None:
    job = Job(
        emulator, tmp_path, with_faults(9), models=MODELS[:1], on_invalid_row="report", max_error_rate=0.2
    )
    manifest = job.attempt()
    with pytest.raises(BatchPartialFailureError, match="than max_error_rate allows"):
        judge_run(manifest, job.options)
    lenient = Job(emulator, tmp_path, [], models=MODELS[:1], max_error_rate=0.5)
    assert "8 of 12 rows succeeded (4 failed" in (judge_run(manifest, lenient.options) or "")


def test_a_retry_goes_on_with_the_rows_as_planned(emulator: Emulator, tmp_path: Path) -> None:
    given = [7, *rows(9), {"custom_id": "x"}]
    job = Job(emulator, tmp_path, given, models=MODELS[:1], on_invalid_row="report")
    assert job.next_try().start(lambda: given, "requests", timeout=None) is not None
    job.requests = [*given[:-1], {"custom_id": "another fault"}]
    with pytest.raises(InvalidInputError, match="was changed"):
        job.attempt()
    # That invalid rows would fail a new job does not make them other rows.
    job.requests, job.options = given, Job(emulator, tmp_path, given, models=MODELS[:1]).options
    manifest = job.attempt()
    assert (manifest["rows"]["ok"], manifest["invalid_input"]) == (9, 2)
    assert posts(emulator) == (2, 2)


def test_an_input_without_a_valid_row_sends_nothing(emulator: Emulator, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestFileError, match="2 problem"):
        Job(emulator, tmp_path, [{}, 7], on_invalid_row="report").attempt()
    assert posts(emulator) == (0, 0)
    assert not list(tmp_path.iterdir())


def test_a_row_without_a_model_is_invalid_where_rows_name_their_models(
    emulator: Emulator, tmp_path: Path
) -> None:
    given = [{"model": MODELS[0], **row} for row in rows(3)]
    del given[1]["model"]
    job = Job(emulator, tmp_path, [7, *given], models=None, on_invalid_row="report")
    manifest = job.attempt()
    assert (manifest["rows"]["ok"], manifest["invalid_input"]) == (2, 2)
    (_, error) = map(json.loads, (tmp_path / "errors.jsonl").read_text().splitlines())
    assert error["error"]["message"] == "line 3: the row names no model"
    planned = estimate([7, *given], name="requests", options=job.options)
    assert (planned["rows"], planned["invalid_input"]) == (2, 2)


def test_answers_are_kept_for_their_own_questions_whatever_stands_between_them(
    emulator: Emulator, tmp_path: Path
) -> None:
    """The cache and a clear read the results, which have lines of invalid rows among those of the others."""
    model = MODELS[:1]
    job = CachingJob(
        emulator, tmp_path / "0", tmp_path / "cache", with_faults(9), on_invalid_row="report", models=model
    )
    job.attempt()
    right = {row["custom_id"]: row["id"] for row in results(tmp_path / "0", "") if row["error"] is None}
    again = CachingJob(
        emulator,
        tmp_path / "1",
        tmp_path / "cache",
        rows(9, lambda i: "[[emulator:once=503]]" if i == 4 else ""),
        models=model,
    )
    manifest = again.attempt()
    assert manifest["cached"]["rows"] == len(right) == 8
    found = {row["custom_id"]: row["id"] for row in results(tmp_path / "1", "")}
    assert right.items() <= found.items()
    before = posts(emulator)
    job.clear()
    cleared = job.attempt()
    # Of the row that failed, and not of those that are invalid.
    assert (posts(emulator)[1], cleared["rows"]["error"], cleared["invalid_input"]) == (before[1] + 1, 3, 3)
    kept = {row["custom_id"]: row["id"] for row in results(tmp_path / "0", "") if row["error"] is None}
    assert right.items() <= kept.items()
    job.clear()
    assert job.attempt() == cleared
