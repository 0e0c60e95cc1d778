"""Answers, types and caches of an odd kind: nothing is paid twice, no row gets another's answer, and nothing hangs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, field_validator

from airflow_provider_siliconflow.api.exceptions import BatchFailedError, IncompleteResultsError
from airflow_provider_siliconflow.batch_files.segments import without_custom_id
from airflow_provider_siliconflow.emulator.server import Emulator
from airflow_provider_siliconflow.jobs.run import BatchRun
from tests.unit.boundary.test_adversary_money import OddJob
from tests.unit.jobs.test_cache import CachingJob, kept, questions, sent
from tests.unit.jobs.whole_job import MODELS

pytestmark = pytest.mark.emulator(speed=2000.0)


class CachingOddJob(OddJob):
    """A job with a cache, whose service answers as a test wants it."""

    def __init__(self, emulator: Emulator, folder: Path, cache_dir: Path, rows: Any, **changes: Any) -> None:
        super().__init__(emulator, folder, rows, **changes)
        self.cache_dir = cache_dir

    def process(self, try_id: str | None = None) -> BatchRun:
        run = super().process(try_id)
        return BatchRun(replace(run._try, cache_dir=self.cache_dir))


# The cache --------------------------------------------------------------------------------------------------


def test_a_run_made_again_under_the_same_id_keeps_the_answers_of_the_first(
    emulator: Emulator, tmp_path: Path
) -> None:
    """It is the same job, but what it sends are other rows."""
    cache_dir, folder = tmp_path / "cache", tmp_path / "out"
    CachingJob(emulator, folder, cache_dir, questions(range(20)), models=MODELS[:1]).attempt()
    again = CachingJob(emulator, folder, cache_dir, questions(range(1, 21)), models=MODELS[:1]).attempt()
    assert again["cached"]["rows"] == 19
    assert kept(cache_dir) == 21
    before = sent(emulator)
    CachingJob(emulator, tmp_path / "next", cache_dir, questions(range(20)), models=MODELS[:1]).attempt()
    assert sent(emulator) == before, "all of these were paid for"


def test_results_that_are_replaced_meanwhile_do_not_become_the_answers_of_other_rows(
    emulator: Emulator, tmp_path: Path
) -> None:
    """Somebody, or a try that Airflow took for dead, writes results between the merge and the end of the job."""
    job = CachingJob(emulator, tmp_path / "0", tmp_path / "cache", questions(range(4)), models=MODELS[:1])
    run = job.next_try()
    wait = run.start(lambda: job.requests, "requests", timeout=None)
    while wait is not None:
        wait = run.resume(job.wait(wait))
    path = tmp_path / "0" / "results.jsonl"
    first, second, *others = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([second, first, *others]))
    run.finish()
    assert kept(tmp_path / "cache") == 2


def test_a_line_with_many_custom_ids_costs_little_time_when_it_is_cached() -> None:
    line = b'{"x":[' + b",".join([b'{"custom_id":"a"}'] * 50_000) + b'],"custom_id":"q1"}'
    began = time.process_time()
    without_custom_id(line)
    assert time.process_time() - began < 2


# Judging ----------------------------------------------------------------------------------------------------


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Strict(BaseModel):
    answer: str

    @field_validator("answer")
    @classmethod
    def check(cls, value: str) -> str:
        return cls.check(value)  # Without end.


def unspeakable(result: Any) -> bool:
    raise UnspeakableError


@pytest.mark.parametrize(
    "check",
    [
        {"accept": unspeakable},
        {
            "output_type": Strict,
            "request_params": {"response_format": {"type": "text"}},
        },
    ],
    ids=["an error without a text", "endless recursion"],
)
def test_an_error_of_the_authors_code_never_pays_for_another_attempt(
    emulator: Emulator, tmp_path: Path, check: dict[str, Any]
) -> None:
    job = OddJob(emulator, tmp_path, questions(range(3)), max_row_attempts=3, **check)
    job.downloaded = with_texts(lambda _: '{"answer": "x"}')
    with pytest.raises(IncompleteResultsError, match="raised"):
        job.attempt()
    assert sent(emulator) == 3
    assert len((tmp_path / "results.jsonl").read_bytes().splitlines()) == 3


def with_texts(text: Callable[[int], str]) -> Callable[[str, bytes], bytes]:
    """Let the service answer with these texts."""

    def downloaded(reference: str, content: bytes) -> bytes:
        lines = [json.loads(line) for line in content.splitlines()]
        for number, line in enumerate(lines):
            if line["response"]:
                line["response"]["body"]["choices"][0]["message"]["content"] = text(number)
        return b"".join(json.dumps(line).encode() + b"\n" for line in lines)

    return downloaded


def test_a_retry_that_can_read_fewer_answers_does_not_replace_those_of_the_first_try(
    emulator: Emulator, tmp_path: Path
) -> None:
    rows, cache_dir = questions(range(4)), tmp_path / "cache"
    job = CachingOddJob(emulator, tmp_path / "out", cache_dir, rows, models=MODELS)
    emulator.faults.add("POST /batches:status=400")
    with pytest.raises(BatchFailedError, match="refused"):
        job.attempt()
    assert kept(cache_dir) == 4
    job.downloaded = lambda _, content: content[:10] + b"\n" + content.partition(b"\n")[2]
    with pytest.raises(IncompleteResultsError):
        job.attempt()
    assert kept(cache_dir) == 4 + 3, "of one model all, of the refused one what can be read"
