"""Jobs that share answers: what was answered before is not sent, nothing is lost, and nobody gets a wrong answer."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from airflow_provider_siliconflow.api.exceptions import InvalidInputError, SiliconFlowError
from airflow_provider_siliconflow.batch_files import atomic_files
from airflow_provider_siliconflow.batch_files.segments import SEGMENTS_FOLDER, read_segments, segments_folder
from airflow_provider_siliconflow.emulator import Emulator
from airflow_provider_siliconflow.jobs import cache
from airflow_provider_siliconflow.jobs.cache import find_answers
from airflow_provider_siliconflow.jobs.options import RunOptions
from airflow_provider_siliconflow.jobs.plan import PlanFolder, Reuse
from airflow_provider_siliconflow.jobs.run import BatchRun
from tests.unit.batch_files.samples import answer
from tests.unit.jobs.faulty import FAULTS, Crash
from tests.unit.jobs.test_downloads import memory_folder
from tests.unit.jobs.test_plan import make
from tests.unit.jobs.test_whole_life import Life
from tests.unit.jobs.whole_job import MODELS, Job, fail_first_of, posts, results

pytestmark = pytest.mark.emulator(speed=2000.0)

quickly = settings(deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def _disk_that_keeps_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "airflow_provider_siliconflow.batch_files.atomic_files.os.fsync", lambda descriptor: None
    )


class CachingJob(Job):
    """A job with a cache, each in a folder of its own."""

    def __init__(self, emulator: Emulator, folder: Path, cache_dir: Any, rows: Any, **changes: Any) -> None:
        super().__init__(emulator, folder, rows, **changes)
        self.cache_dir = cache_dir

    def process(self, try_id: str | None = None) -> BatchRun:
        run = super().process(try_id)
        job_try = replace(run._try, cache_dir=self.cache_dir)
        return BatchRun(job_try)


def questions(
    numbers: Any, night: int = 0, mark: Callable[[int], str] = lambda _: ""
) -> list[dict[str, Any]]:
    return [
        {"custom_id": f"{night}-{n}", "messages": [{"role": "user", "content": f"Say {n} {mark(n)}"}]}
        for n in numbers
    ]


def sent(emulator: Emulator) -> int:
    """Return how many rows the service has been sent."""
    return sum(batch["request_counts"]["total"] for batch in emulator.service.state()["batches"])


def kept(cache_dir: Any) -> int:
    return sum(segment.answers for segment in read_segments(segments_folder(cache_dir))[0])


@pytest.fixture(params=["local", "store"])
def cache_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return tmp_path / "cache" if request.param == "local" else memory_folder(f"/{tmp_path.name}/cache")


# What is sent -------------------------------------------------------------------------------------------------


def test_three_nights_with_five_percent_new_questions(
    emulator: Emulator, tmp_path: Path, cache_dir: Any
) -> None:
    uploads = billed = 0
    for night in range(3):
        asked = [*range(5 * night, 100), *range(1000, 1000 + 5 * night)]
        # Another order every night.
        rows = questions(sorted(asked, key=lambda n: n * 7919 % 101), night)
        before = sent(emulator)
        job = CachingJob(emulator, tmp_path / str(night), cache_dir, rows, max_rows_per_batch=30)
        manifest = job.attempt()
        assert sent(emulator) - before == (200 if night == 0 else 10)
        assert manifest["rows"]["ok"] == 200
        assert manifest["cached"]["rows"] == (0 if night == 0 else 190)
        assert [each["cached"]["rows"] for each in manifest["models"]] == [0 if night == 0 else 95] * 2
        assert manifest["usage"]["total_tokens"] == (
            manifest["billed_usage"]["total_tokens"] + manifest["cached"]["total_tokens"]
        )
        assert sum(each["ok"] for each in manifest["rounds"]) == 200 - manifest["cached"]["rows"]
        # Both models lack the same rows, which are uploaded once.
        assert posts(emulator)[0] - uploads == (4 if night == 0 else 1)
        uploads = posts(emulator)[0]
        for model in MODELS:
            found = results(tmp_path / str(night), model)
            assert [row["custom_id"] for row in found] == [row["custom_id"] for row in rows]
            assert {row["response"]["body"]["model"] for row in found} == {model}
        billed += manifest["billed_usage"]["total_tokens"]
    assert kept(cache_dir) == 220
    assert billed == tokens_of_the_service(emulator)


def tokens_of_the_service(emulator: Emulator) -> int:
    found = 0
    for batch in emulator.service.state()["batches"]:
        for line in emulator.service.open_results(batch["id"], "output").read_bytes().splitlines():
            found += json.loads(line)["response"]["body"]["usage"]["total_tokens"]
    return found


def test_a_cached_line_is_the_services_but_for_its_custom_id(emulator: Emulator, tmp_path: Path) -> None:
    def lines(folder: Path) -> list[bytes]:
        return (folder / "results.jsonl").read_bytes().splitlines()

    for night in (0, 1):
        rows = questions(range(12), night)
        CachingJob(emulator, tmp_path / str(night), tmp_path / "cache", rows, models=MODELS[:1]).attempt()
    again = [line.replace(b'"1-', b'"0-', 1) for line in lines(tmp_path / "1")]
    assert again == lines(tmp_path / "0")


def test_a_job_that_is_answered_already_sends_nothing(emulator: Emulator, tmp_path: Path) -> None:
    CachingJob(emulator, tmp_path / "0", tmp_path / "cache", questions(range(12))).attempt()
    before = posts(emulator)
    job = CachingJob(emulator, tmp_path / "1", tmp_path / "cache", questions(range(12), 1))
    run = job.next_try()
    assert run.start(lambda: job.requests, "requests", timeout=None) is None
    manifest = run.finish()
    assert posts(emulator) == before
    assert manifest["rows"]["ok"] == manifest["cached"]["rows"] == 24
    assert manifest["billed_usage"]["total_tokens"] == 0
    assert [each["batches"] for each in manifest["models"]] == [[], []]
    assert not (tmp_path / "1" / ".siliconflow").exists()
    assert len(os.listdir(tmp_path / "cache" / SEGMENTS_FOLDER)) == 2, "no segment without an answer"


def test_models_and_parameters_have_answers_of_their_own(emulator: Emulator, tmp_path: Path) -> None:
    def rows_sent(night: int, **changes: Any) -> int:
        before = sent(emulator)
        rows = questions(range(10), night)
        CachingJob(emulator, tmp_path / str(night), tmp_path / "cache", rows, **changes).attempt()
        return sent(emulator) - before

    assert rows_sent(0, models=MODELS[:1]) == 10
    assert rows_sent(1, models=MODELS) == 10, "one of the models only"
    assert rows_sent(2, models=MODELS[::-1]) == 0
    assert rows_sent(3, models=MODELS[:1], request_params={"temperature": 0}) == 10
    assert rows_sent(4, models=MODELS[:1], request_params={"temperature": 0.0}) == 10
    assert rows_sent(5, models=MODELS[:1], request_params={"temperature": 0}) == 0


def test_rows_that_name_their_models(emulator: Emulator, tmp_path: Path) -> None:
    def rows_sent(night: int, models: list[str] | None, *named: str) -> int:
        before = sent(emulator)
        rows = [
            row | {"model": named[n % len(named)]} if named else row
            for n, row in enumerate(questions(range(10), night))
        ]
        CachingJob(emulator, tmp_path / str(night), tmp_path / "cache", rows, models=models).attempt()
        return sent(emulator) - before

    assert rows_sent(0, None, *MODELS) == 10
    assert rows_sent(1, None, *MODELS) == 0
    assert rows_sent(2, None, *MODELS[::-1]) == 10
    assert rows_sent(3, MODELS) == 0, "every row was asked of both by now"


def test_only_rows_that_are_ok_are_kept_whatever_round_answered_them(
    emulator: Emulator, tmp_path: Path
) -> None:
    marks = {3: "[[emulator:once=429]]", 7: "[[emulator:error=400]]"}
    changes: dict[str, Any] = {"models": MODELS[:1], "max_row_attempts": 2}
    rows = questions(range(12), 0, lambda n: marks.get(n, ""))
    first = CachingJob(emulator, tmp_path / "0", tmp_path / "cache", rows, **changes).attempt()
    assert (first["rows"]["ok"], kept(tmp_path / "cache")) == (11, 11)
    before = sent(emulator)
    again = CachingJob(emulator, tmp_path / "1", tmp_path / "cache", rows, **changes).attempt()
    assert sent(emulator) - before == 1
    assert (again["rows"]["error"], again["cached"]["rows"]) == (1, 11)


def test_rows_of_a_later_night_are_sent_again_if_they_are_worth_it(
    emulator: Emulator, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"models": MODELS, "max_row_attempts": 3}
    CachingJob(emulator, tmp_path / "0", tmp_path / "cache", questions(range(0, 23, 2)), **changes).attempt()
    marks = {3: "[[emulator:once=429]]", 11: "[[emulator:once=503]]", 13: "[[emulator:once=expire]]"}
    rows = questions(range(23), 1, lambda n: marks.get(n, ""))
    manifest = CachingJob(emulator, tmp_path / "1", tmp_path / "cache", rows, **changes).attempt()
    assert (manifest["rows"]["ok"], manifest["cached"]["rows"]) == (46, 24)
    assert [each["rows"] for each in manifest["rounds"]] == [22, 6]
    for model in MODELS:
        assert [row["custom_id"] for row in results(tmp_path / "1", model)] == [f"1-{n}" for n in range(23)]


def test_equal_rows_of_one_job_are_all_answered(emulator: Emulator, tmp_path: Path) -> None:
    rows = [row | {"custom_id": f"c{n}"} for n, row in enumerate(questions([1, 2, 1, 1]))]
    changes: dict[str, Any] = {"models": MODELS[:1], "max_rows_per_batch": 2}
    CachingJob(emulator, tmp_path / "0", tmp_path / "cache", questions([1]), **changes).attempt()
    manifest = CachingJob(emulator, tmp_path / "1", tmp_path / "cache", rows, **changes).attempt()
    assert manifest["cached"]["rows"] == 3
    found = [json.loads(line)["custom_id"] for line in (tmp_path / "1" / "results.jsonl").open()]
    assert found == ["c0", "c1", "c2", "c3"]


@settings(quickly, max_examples=25)
@given(
    first=st.lists(st.integers(0, 6), max_size=8, unique=True),
    second=st.lists(st.integers(0, 9), min_size=1, max_size=10, unique=True),
    models=st.tuples(
        st.sampled_from([MODELS, MODELS[:1], MODELS[1:]]), st.sampled_from([MODELS, MODELS[:1]])
    ),
    size=st.sampled_from([1, 3, 10]),
)
def test_a_row_is_sent_if_and_only_if_it_has_no_answer(
    emulator: Emulator,
    tmp_path_factory: pytest.TempPathFactory,
    first: list[int],
    second: list[int],
    models: tuple[list[str], list[str]],
    size: int,
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    if first:
        CachingJob(emulator, folder / "0", folder, questions(first), models=models[0]).attempt()
    before = sent(emulator)
    rows = questions(second, 1)
    job = CachingJob(emulator, folder / "1", folder, rows, models=models[1], max_rows_per_batch=size)
    manifest = job.attempt()
    new = sum(n not in first or model not in models[0] for n in second for model in models[1])
    assert sent(emulator) - before == new
    assert manifest["rows"]["ok"] == len(second) * len(models[1])
    for model in models[1]:
        found = results(folder / "1", model if len(models[1]) > 1 else ".")
        assert [row["custom_id"] for row in found] == [f"1-{n}" for n in second]


# Trouble ------------------------------------------------------------------------------------------------------


def segment(cache_dir: Path) -> Path:
    (found,) = (cache_dir / SEGMENTS_FOLDER).iterdir()
    return found


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def foreign(path: Path) -> None:
    path.write_text('{"custom_id": "x"}\n')


def link(path: Path) -> None:
    path.rename(path.parent / "elsewhere")
    path.symlink_to(path.parent / "elsewhere")


@pytest.mark.parametrize("spoil", [cut, foreign, link])
def test_a_segment_that_cannot_be_used_is_named_and_its_rows_are_sent(
    emulator: Emulator, tmp_path: Path, spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "cache"
    CachingJob(emulator, tmp_path / "0", folder, questions(range(6)), models=MODELS[:1]).attempt()
    spoilt = segment(folder)
    spoil(spoilt)
    with caplog.at_level(logging.WARNING):
        job = CachingJob(emulator, tmp_path / "1", folder, questions(range(6), 1), models=MODELS[:1])
        manifest = job.attempt()
    assert (manifest["rows"]["ok"], manifest["cached"]["rows"]) == (6, 0)
    assert spoilt.name in caplog.text


def test_an_answer_that_is_damaged_costs_its_own_row(emulator: Emulator, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    CachingJob(emulator, tmp_path / "0", folder, questions(range(6)), models=MODELS[:1]).attempt()
    spoilt = segment(folder)
    content = spoilt.read_bytes()
    spoilt.write_bytes(content.replace(b'"choices"', b'"chojces"', 1))
    manifest = CachingJob(
        emulator, tmp_path / "1", folder, questions(range(6), 1), models=MODELS[:1]
    ).attempt()
    assert (manifest["rows"]["ok"], manifest["cached"]["rows"]) == (6, 5)


def test_a_cached_answer_is_judged_like_one_of_the_service(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody who can write into the cache can make an answer, but none that the merge would not take."""
    failed = answer("x", error={"code": "500", "message": "no"}, response=None)
    monkeypatch.setattr(cache, "without_custom_id", lambda line: forged(failed))
    folder = tmp_path / "cache"
    CachingJob(emulator, tmp_path / "0", folder, questions(range(6)), models=MODELS[:1]).attempt()
    monkeypatch.undo()
    manifest = CachingJob(
        emulator, tmp_path / "1", folder, questions(range(6), 1), models=MODELS[:1]
    ).attempt()
    assert (manifest["rows"]["ok"], manifest["cached"]["rows"]) == (6, 0)


def forged(result: dict[str, Any]) -> tuple[bytes, int]:
    line = json.dumps(result | {"custom_id": ""}).encode()
    return line, line.index(b'"custom_id": ') + len('"custom_id": ')


def test_a_cached_answer_that_is_not_accepted_is_asked_for_again(emulator: Emulator, tmp_path: Path) -> None:
    """Only accepted answers are kept, and an answer of an earlier job is judged by the rules of this one."""
    rows = questions(range(6))

    def picky(row: Any) -> bool:
        return row.custom_id not in ("0-1", "0-4")

    CachingJob(emulator, tmp_path / "picky", tmp_path / "cache", rows, accept=picky).attempt()
    assert kept(tmp_path / "cache") == 4 * len(MODELS)
    CachingJob(emulator, tmp_path / "second", tmp_path / "cache", rows).attempt()
    assert kept(tmp_path / "cache") == 6 * len(MODELS)
    before = sent(emulator)
    manifest = CachingJob(emulator, tmp_path / "third", tmp_path / "cache", rows, accept=picky).attempt()
    assert sent(emulator) - before == manifest["rows"]["invalid"] == 2 * len(MODELS)
    assert manifest["cached"]["rows"] == 4 * len(MODELS)


def test_an_answer_that_cannot_be_judged_is_not_paid_for_again(emulator: Emulator, tmp_path: Path) -> None:
    rows = questions(range(3))
    CachingJob(emulator, tmp_path / "first", tmp_path / "cache", rows).attempt()
    before = sent(emulator)
    with pytest.raises(SiliconFlowError, match="could not be judged"):
        CachingJob(emulator, tmp_path / "second", tmp_path / "cache", rows, accept=lambda row: None).attempt()
    assert sent(emulator) == before


def test_a_cache_of_somebody_else_is_refused_before_anything_is_sent(
    emulator: Emulator, tmp_path: Path
) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / SEGMENTS_FOLDER).symlink_to(tmp_path / "theirs")
    with pytest.raises(InvalidInputError, match=r"^cache_dir: .* is a link"):
        CachingJob(emulator, tmp_path / "0", tmp_path / "cache", questions(range(6))).attempt()
    assert posts(emulator) == (0, 0)


def test_a_cache_that_cannot_be_written_does_not_fail_a_job(
    emulator: Emulator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(cache, "SegmentWriter", full)
    manifest = CachingJob(emulator, tmp_path / "0", tmp_path / "cache", questions(range(6))).attempt()
    assert manifest["rows"]["ok"] == 12
    assert "no space left" in caplog.text


def test_answers_of_a_job_that_fails_are_kept(emulator: Emulator, tmp_path: Path) -> None:
    """A batch was rejected, and the job waits for its retry."""
    job = CachingJob(emulator, tmp_path / "0", tmp_path / "cache", questions(range(10)), models=MODELS[:1])
    job.after = fail_first_of(emulator)
    with pytest.raises(SiliconFlowError):
        job.attempt()
    assert kept(tmp_path / "cache") == 5
    assert job.attempt()["rows"]["ok"] == 10
    assert (kept(tmp_path / "cache"), len(list((tmp_path / "cache" / SEGMENTS_FOLDER).iterdir()))) == (10, 1)


def test_a_retry_keeps_to_the_decision_although_the_cache_is_gone(emulator: Emulator, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    CachingJob(emulator, tmp_path / "0", folder, questions(range(8))).attempt()
    before = sent(emulator)
    job = CachingJob(emulator, tmp_path / "1", folder, questions(range(12), 1))
    run = job.next_try()
    assert run.start(lambda: job.requests, "requests", timeout=None) is not None
    for each in (folder / SEGMENTS_FOLDER).iterdir():
        each.unlink()
    manifest = job.attempt()
    assert sent(emulator) - before == 8
    assert (manifest["rows"]["ok"], manifest["cached"]["rows"]) == (24, 16)


def test_two_jobs_at_once_share_a_cache(emulator: Emulator, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    jobs = [
        CachingJob(emulator, tmp_path / str(n), folder, questions(range(n, n + 10), n), models=MODELS[:1])
        for n in (0, 5)
    ]
    runs = []
    for job in jobs:
        run = job.next_try()
        runs.append((run, run.start(lambda job=job: job.requests, "requests", timeout=None)))  # type: ignore[misc]
    for job, (run, wait) in zip(jobs, runs, strict=True):
        assert job.carry_out(run, wait)["rows"]["ok"] == 10
    before = sent(emulator)
    last = CachingJob(
        emulator, tmp_path / "last", folder, questions(range(15), 9), models=MODELS[:1]
    ).attempt()
    assert (sent(emulator) - before, last["cached"]["rows"]) == (0, 15)


# The plan -----------------------------------------------------------------------------------------------------


def test_a_decision_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = make(tmp_path)
    first, *others = made.split.shards
    partly = (replace(first, sources=(0,)),)
    rows = first.rows
    reuse = Reuse({0: made.split.shards, 1: partly}, {0: (0, 0, 0), 1: (0, *(each.rows for each in others))})
    folder = PlanFolder(tmp_path)
    folder.write(replace(made, reuse=reuse))
    assert folder.read() == replace(made, reuse=reuse)
    assert (reuse.folder(0), reuse.folder(1)) == (None, "unanswered-1")
    assert rows + sum(reuse.cached[1]) == made.split.rows


@pytest.mark.parametrize(
    "change",
    [
        {"to_send": {}},
        {"cached": {"0": [1, 2, 1], "1": [2, 2]}},
        {"cached": {"0": [2, 2, 1], "1": [2, 2, 0]}},
        {"cached": {"0": [2, 2, 1], "1": [-1, 2, 4]}},
        {"cached": 7},
    ],
)
def test_a_damaged_decision_spoils_its_plan(tmp_path: Path, change: dict[str, Any]) -> None:
    """Else rows would be sent that are answered, or not sent that are not."""
    made = make(tmp_path)
    data = made.to_dict()
    data["reuse"] = {"to_send": {"0": [], "1": []}, "cached": {"0": [2, 2, 1], "1": [2, 2, 1]}}
    folder = PlanFolder(tmp_path)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    assert folder.read() is not None
    data["reuse"] |= change
    (tmp_path / "plan.json").write_text(json.dumps(data))
    assert folder.read() is None


def test_a_cache_without_answers_changes_nothing(tmp_path: Path) -> None:
    made = make(tmp_path / "job")
    options = RunOptions(models=("a",), max_rows=2)
    assert find_answers(tmp_path / "cache", PlanFolder(tmp_path / "job"), made, options) is None


# Crashes ------------------------------------------------------------------------------------------------------


class CachingLife(Life):
    """A life whose job finds the answers to some of its rows in a cache; it dies around every durable write, too."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **config: Any) -> None:
        super().__init__(folder, [], **config)
        self.cache_dir = folder / "cache"
        self.job("earlier", range(2, 5))
        self.live(1, 0.0)
        self.job("output", range(7))

        def die(*_: Any) -> None:
            self.api.meet(("crash-before",))

        monkeypatch.setattr(atomic_files, "sync", die)
        monkeypatch.setattr(atomic_files, "_sync_folder", die)

    def job(self, name: str, rows: range) -> None:
        """Go on with another job."""
        self.output = self.output.parent / name
        self.rows = rows
        self.tries = 0

    def check_all(self, manifest: dict[str, Any]) -> None:
        """Every row has an answer, each was paid for once over both jobs, and the cache has them all."""
        assert manifest["rows"]["ok"] == 14
        assert manifest["cached"]["rows"] == 6
        for model in MODELS:
            found = results(self.output, model)
            assert [row["custom_id"] for row in found] == [f"row-{n:07d}" for n in range(1, 8)]
        paid = Counter(json.dumps(each["response"]["body"]["choices"]) for each in self.answers())
        assert sum(paid.values()) == 14
        segments, unreadable = read_segments(segments_folder(self.cache_dir))
        assert (sum(segment.answers for segment in segments), unreadable) == (14, {})

    def check_later_job(self) -> None:
        """A later job of the same rows sends nothing."""
        self.job("later", range(7))
        self.api.script = iter([])
        before = len(self.service.state()["batches"])
        assert self.live(1, 0.0)["cached"]["rows"] == 14
        assert len(self.service.state()["batches"]) == before


# In parts, which run side by side.
@pytest.mark.parametrize("part", [slice(n, None, 2) for n in range(2)])
def test_a_crash_at_any_boundary_loses_no_answer(tmp_path: Path, part: slice) -> None:
    with pytest.MonkeyPatch.context() as patch:
        calm = CachingLife(tmp_path / "calm", patch)
        begun = calm.api.met
        calm.check_all(calm.live(1, 0.0))
        possible = calm.api.crashes(begun)
        assert calm.api.met - begun > 60
        calm.check_later_job()
    for point, crash in possible[part]:
        with pytest.MonkeyPatch.context() as patch:
            hurt = CachingLife(tmp_path / f"{point}-{crash}", patch)
            hurt.api.script = iter(["none"] * point + [crash])
            with pytest.raises(Crash):
                hurt.attempt()
            hurt.check_all(hurt.live(1, 0.0))


@settings(quickly, max_examples=40)
@given(
    script=st.lists(st.sampled_from(("none", *FAULTS)), max_size=60),
    retry_delay=st.sampled_from([0.0, 300.0]),
)
def test_no_answer_is_lost_or_paid_twice_whatever_happens(
    tmp_path_factory: pytest.TempPathFactory, script: list[str], retry_delay: float
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        life = CachingLife(tmp_path_factory.mktemp("life"), patch)
        life.api.script = iter(script)
        life.check_all(life.live(len(script) + 2, retry_delay))
        life.check_later_job()
