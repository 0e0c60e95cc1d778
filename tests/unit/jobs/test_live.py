"""Rows that no batch answered in time are asked one by one: none twice, none lost, within the budget."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
import time
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from airflow_provider_siliconflow.api.arguments import LiveAfter, check_live_after
from airflow_provider_siliconflow.api.exceptions import (
    AuthenticationError,
    BatchFailedError,
    BatchTimeoutError,
    InsufficientBalanceError,
    InvalidInputError,
    JobTakenOverError,
    NoAnswerError,
    SiliconFlowError,
)
from airflow_provider_siliconflow.emulator.faults import Fault
from airflow_provider_siliconflow.emulator.server import Emulator
from airflow_provider_siliconflow.jobs.live_journal import LiveJournal
from tests.unit.jobs.test_spend import least
from tests.unit.jobs.test_whole_life import TYPED, WRONG, quickly
from tests.unit.jobs.whole_job import Job, posts, results, rows

V3, QWEN = "deepseek-ai/DeepSeek-V3", "Qwen/Qwen3-8B"
PRICES: dict[str, Any] = {
    V3: {"prompt": 1, "completion": 4, "live": {"prompt": 2, "completion": 8}},
    QWEN: {"prompt": 0.7, "completion": 2.9, "live": {"prompt": 1.4, "completion": 5.8}},
}

pytestmark = pytest.mark.emulator(speed=1.0, live_latency=0.0, prices=PRICES)


def live_job(emulator: Emulator, folder: Path, requests: Any, after: float = 0.0, **changes: Any) -> Job:
    given: dict[str, Any] = {
        "models": [V3, QWEN],
        "prices": PRICES,
        "live_after": LiveAfter(seconds=after),
        "request_params": {"max_tokens": 100, "enable_thinking": False},
    }
    return Job(emulator, folder, requests, **(given | changes))


def test_a_whole_job_can_be_asked_live(emulator: Emulator, tmp_path: Path) -> None:
    manifest = live_job(emulator, tmp_path, rows(13)).attempt()
    assert posts(emulator) == (0, 0)
    assert manifest["rows"]["ok"] == manifest["live"]["rows"] == 26
    assert [row["custom_id"] for row in results(tmp_path, QWEN)] == [f"q{n}" for n in range(13)]
    assert {row["route"] for row in results(tmp_path, QWEN)} == {"live"}
    assert manifest["cost"]["total"] == pytest.approx(float(emulator.bill.total), abs=1e-6)
    assert emulator.live.asked_again == 0


def test_what_batches_answered_in_time_is_kept(emulator: Emulator, tmp_path: Path) -> None:
    emulator.service.config = emulator.service.config.changed(
        {"queue_seconds": 10, "rows_per_second": 1.0, "cancelling_seconds": 1}
    )
    job = live_job(emulator, tmp_path, rows(20), after=17.0, max_rows_per_batch=10, max_in_flight=3)
    run = job.next_try()
    wait = run.start(lambda: job.requests, "requests", timeout=None)
    assert wait is not None
    assert wait.resume_at == pytest.approx(job.clock.time() + 17, abs=5)
    assert wait.resume_at is not None
    emulator.service.advance(wait.resume_at - job.clock.time() + 0.1)
    manifest = job.carry_out(run, run.resume([]))
    assert manifest["rows"]["ok"] == 40
    assert 0 < manifest["live"]["rows"] < 40
    assert [each["route"] for each in manifest["rounds"]] == ["batch", "live"]
    assert manifest["cost"]["total"] == pytest.approx(float(emulator.bill.total), abs=1e-6)
    assert manifest["cost"]["total"] > manifest["live"]["cost"]["total"]
    assert posts(emulator)[1] == 3
    for model in (V3, QWEN):
        assert [row["custom_id"] for row in results(tmp_path, model)] == [f"q{n}" for n in range(20)]
    assert emulator.live.answered == manifest["live"]["rows"]
    assert not list(tmp_path.glob(".siliconflow/*"))


# The property ---------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process ends here."""


FAULTS: dict[str, Any] = {
    "overloaded": {"kind": "status", "status": 503, "body": {"code": 50505, "message": "overloaded"}},
    "limited": {"kind": "status", "status": 429},
    "limited for a moment": {"kind": "status", "status": 429, "headers": {"Retry-After": "0.01"}},
    "gateway": {"kind": "status-after", "status": 504},
    "error page": {"kind": "html"},
    "lost": {"kind": "reset-after"},
    "cut": {"kind": "cut", "bytes": 200},
    "not sent": {"kind": "reset"},
    "refused": {"kind": "status", "status": 400, "body": {"code": 20015, "message": "bad parameter"}},
    "empty": {"kind": "empty"},
}
faults = st.lists(
    st.tuples(st.sampled_from(sorted(FAULTS)), st.integers(0, 12), st.integers(1, 3)), max_size=4
)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses that take no time."""
    for name in (
        "asking._FIRST_BACKOFF",
        "asking._LONGEST_BACKOFF",
        "pacing._FIRST_PAUSE",
        "pacing._LONGEST_PAUSE",
    ):
        monkeypatch.setattr(f"airflow_provider_siliconflow.jobs.{name}", 0.001)
    monkeypatch.setattr("airflow_provider_siliconflow.jobs.pacing._LOWEST", 500.0)


@pytest.mark.usefixtures("hasty")
@quickly
@given(
    hits=faults,
    deaths=st.lists(st.integers(1, 15), max_size=3),
    before=st.booleans(),
    number=st.integers(1, 9),
    share=st.one_of(st.none(), st.floats(0.3, 3.0)),
    concurrency=st.integers(1, 4),
    typed=st.booleans(),
    clears=st.booleans(),
)
def test_no_row_is_lost_and_the_bill_is_known_whatever_happens(
    make_emulator: Any,
    tmp_path_factory: pytest.TempPathFactory,
    hits: list[tuple[str, int, int]],
    deaths: list[int],
    before: bool,
    number: int,
    share: float | None,
    concurrency: int,
    typed: bool,
    clears: bool,
) -> None:
    emulator = make_emulator(speed=1.0, live_latency=0.0, prices=PRICES, **(WRONG if typed else {}))
    for name, skip, times in hits:
        emulator.faults.add(Fault("POST /chat/completions", skip=skip, times=times, **FAULTS[name]))
    folder = tmp_path_factory.mktemp("live")
    asked = [{**row, "max_tokens": 100, "enable_thinking": False} for row in rows(number)]
    live_prices = {model: price["live"] | {"thinking": 0} for model, price in PRICES.items()}
    max_cost = None if share is None else math.ceil(least(asked, (V3, QWEN), live_prices) * share * 1e6) / 1e6
    options: dict[str, Any] = {
        "live_concurrency": concurrency,
        "max_cost": max_cost,
        **(TYPED if typed else {}),
    }
    with_thinking = {model: {**price, "thinking": 0} for model, price in PRICES.items()}
    job = live_job(emulator, folder, asked, prices=with_thinking, **options)
    try:
        manifest, killed = lived(job, deaths, before=before)
    except InvalidInputError:
        # The prompts alone cost more.
        assert emulator.bill.total == 0
        return
    if clears:
        job.clear()
        # What is left of the budget may be too little for another row.
        with contextlib.suppress(InvalidInputError):
            manifest, more = lived(job, [], before=before)
            killed += more
    bill, live = emulator.bill.total, emulator.live
    for model in (V3, QWEN):
        assert [row["custom_id"] for row in results(folder, model)] == [f"q{n}" for n in range(number)]
    if max_cost is not None:
        assert bill <= Decimal(str(max_cost))
        budget = manifest["budget"]
        assert float(bill) <= budget["spent"] + budget["held"] + 1e-6
        assert budget["spent"] + budget["held"] <= max_cost + 1e-6
        event(f"rows not sent: {budget['rows_not_sent'] > 0}")
    if not typed:
        assert live.asked_again <= live.lost + killed * concurrency
    if not (hits or deaths or typed or share):
        assert manifest["live"]["rows"] == 2 * number
        assert manifest["cost"]["total"] == pytest.approx(float(bill), abs=1e-6)


def lived(job: Job, deaths: list[int], *, before: bool) -> tuple[dict[str, Any], int]:
    """
    Let a job try until it ends.

    :param deaths: at which of its writes each of the first processes dies.
    :returns: its manifest, and how many processes died.
    """
    append = LiveJournal.append
    killed = 0
    ends = iter(deaths)

    for _ in range(40):
        left = next(ends, None)

        def die(journal: LiveJournal, entries: Any, left: list[int | None] = [left]) -> None:  # noqa: B006
            if left[0] is not None:
                left[0] -= 1
                if left[0] == 0:
                    if not before:
                        append(journal, entries)
                    raise Killed
            append(journal, entries)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(LiveJournal, "append", die)
            try:
                return job.attempt(), killed
            except Killed:
                killed += 1
            except SiliconFlowError as exc:
                if not exc.retryable:
                    raise
    raise AssertionError("the job does not end")


# Ends ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ({"kind": "status", "status": 401}, AuthenticationError),
        (
            {"kind": "status", "status": 402, "body": {"code": 30001, "message": "balance"}},
            InsufficientBalanceError,
        ),
        ({"kind": "reset-after"}, NoAnswerError),
    ],
)
def test_what_is_wrong_with_more_than_one_row_ends_the_phase_and_a_retry_asks_the_rest(
    emulator: Emulator, tmp_path: Path, fault: dict[str, Any], error: type[SiliconFlowError]
) -> None:
    emulator.faults.add(Fault("POST /chat/completions", skip=5, times=-1, **fault))
    job = live_job(emulator, tmp_path, rows(30), live_concurrency=2, max_row_attempts=2)
    with pytest.raises(error) as raised:
        job.attempt()
    assert "A retry asks only those without an answer" in "".join(raised.value.__notes__)
    # What was answered is written.
    assert sum(row["response"] is not None for row in (*results(tmp_path, V3), *results(tmp_path, QWEN))) == 5
    emulator.faults.clear()
    manifest = job.attempt()
    assert manifest["rows"]["ok"] == 60
    assert emulator.live.asked_again <= emulator.live.lost


def test_the_timeout_ends_the_phase_and_keeps_the_answers(emulator: Emulator, tmp_path: Path) -> None:
    emulator.service.configure({"live_latency": 0.05})
    job = live_job(emulator, tmp_path, rows(40), models=[V3], live_concurrency=1)
    job.timeout = 0.5
    with pytest.raises(BatchTimeoutError, match="of 40 have no answer"):
        job.attempt()
    answered = emulator.live.answered
    assert 0 < answered < 40
    job.timeout = None
    assert job.attempt()["live"]["rows"] == 40
    assert emulator.live.asked_again == 0


def test_a_stopped_job_asks_nothing_more(emulator: Emulator, tmp_path: Path) -> None:
    emulator.service.configure({"live_latency": 0.05})
    job = live_job(emulator, tmp_path, rows(200), live_concurrency=4)
    run = job.next_try()
    stopper = threading.Timer(0.6, run.stop, kwargs={"cancels": True})
    stopper.start()
    run.start(lambda: job.requests, "requests", timeout=None)
    with pytest.raises(SiliconFlowError, match="ended from outside"):
        run.finish()
    assert 0 < emulator.live.answered < 400
    assert emulator.live.open == 0
    assert job.attempt()["rows"]["ok"] == 400
    # Answers that came in time were kept.
    assert emulator.live.asked_again == 0


def test_the_older_of_two_tries_stops_asking(emulator: Emulator, tmp_path: Path, mocker: Any) -> None:
    mocker.patch("airflow_provider_siliconflow.jobs.asking._OWNER_SECONDS", 0.05)
    emulator.service.configure({"live_latency": 0.1})
    job = live_job(emulator, tmp_path, rows(60), live_concurrency=3)
    older = job.next_try()
    failure: list[BaseException] = []

    def carry_out() -> None:
        try:
            job.carry_out(older, older.start(lambda: job.requests, "requests", timeout=None))
        except BaseException as exc:  # noqa: BLE001
            failure.append(exc)

    thread = threading.Thread(target=carry_out)
    thread.start()
    while emulator.live.answered < 10:
        time.sleep(0.01)
    manifest = job.attempt()
    thread.join()
    assert isinstance(failure[0], JobTakenOverError)
    assert manifest["rows"]["ok"] == 120
    # What the older try had under way, and what it sent until it looked again.
    assert emulator.live.asked_again <= 2 * 3


def test_rows_of_a_batch_that_somebody_cancelled_are_not_asked_in_the_same_try(
    emulator: Emulator, tmp_path: Path
) -> None:
    emulator.service.configure({"queue_seconds": 1000.0, "cancelling_seconds": 0.0})
    job = live_job(emulator, tmp_path, rows(20), after=100.0, models=[V3], max_rows_per_batch=10)
    run = job.next_try()
    wait = run.start(lambda: job.requests, "requests", timeout=None)
    assert wait is not None
    emulator.service.cancel_on_console(wait.batch_ids[0], at_once=True)
    emulator.service.advance(10)
    wait = run.resume([job.client().get_batch(wait.batch_ids[0])])
    assert wait is not None
    emulator.service.advance(100)
    with pytest.raises(BatchFailedError, match="cancelled"):
        job.carry_out(run, run.resume([]))
    assert emulator.live.answered == 10
    # Whoever lets the task retry wants them.
    assert job.attempt()["rows"]["ok"] == 20
    assert emulator.live.answered == 20
    assert posts(emulator)[1] == 2


def test_once_live_always_live_until_the_job_is_finished(emulator: Emulator, tmp_path: Path) -> None:
    job = live_job(emulator, tmp_path, rows(8), models=[V3], live_concurrency=1)
    emulator.faults.add(Fault("POST /chat/completions", kind="status", skip=3, times=-1, status=401))
    with pytest.raises(AuthenticationError):
        job.attempt()
    emulator.faults.clear()
    job.options = dataclasses.replace(job.options, live_after=LiveAfter(seconds=10_000))
    job.clear()
    assert job.attempt()["live"]["rows"] == 8
    assert posts(emulator) == (0, 0)
    assert emulator.live.answered == 8


def test_a_finished_job_that_is_cleared_keeps_its_live_answers_and_their_cost(
    emulator: Emulator, tmp_path: Path
) -> None:
    emulator.faults.add(
        Fault(
            "POST /chat/completions",
            kind="status",
            times=1,
            status=400,
            body={"code": 20015, "message": "bad"},
        )
    )
    job = live_job(emulator, tmp_path, rows(8), models=[V3])
    first = job.attempt()
    assert (first["rows"]["ok"], first["live"]["rows"]) == (7, 7)
    for _ in range(2):
        job.clear()
        manifest = job.attempt()
        assert (manifest["rows"]["ok"], manifest["live"]["rows"]) == (8, 8)
        assert [each["rows"] for each in manifest["rounds"] if each["route"] == "live"] == [8, 1]
        assert manifest["cost"]["total"] == pytest.approx(float(emulator.bill.total), abs=1e-6)
    assert emulator.live.answered == 8


@pytest.mark.parametrize(
    ("value", "time"),
    [
        (0, 100.0),
        (90, 190.0),
        (timedelta(hours=1), 3700.0),
        ("2026-01-31T08:00:00+08:00", 1769817600.0),
        ("2026-01-31 00:00:00+00:00", 1769817600.0),
        (datetime(2026, 1, 31, tzinfo=UTC), 1769817600.0),
    ],
)
def test_live_after_is_a_time(value: Any, time: float) -> None:
    assert check_live_after("live_after", value).time(100.0) == time


@pytest.mark.parametrize(
    "value", [-1, True, "08:00", "2026-01-31T08:00:00", datetime(2026, 1, 31), 10**9, [], "nan"]
)
def test_what_is_no_time_is_refused_by_name(value: Any) -> None:
    with pytest.raises(InvalidInputError, match="live_after must"):
        check_live_after("live_after", value)


def test_rows_that_change_between_two_tries_are_refused_and_after_a_clear_new_work(
    emulator: Emulator, tmp_path: Path
) -> None:
    emulator.faults.add(Fault("POST /chat/completions", kind="status", skip=4, times=-1, status=401))
    job = live_job(emulator, tmp_path, rows(8), models=[V3], live_concurrency=1)
    with pytest.raises(AuthenticationError) as raised:
        job.attempt()
    # Four answers are paid for.
    assert raised.value.retryable
    emulator.faults.clear()
    job.requests = [{**row, "temperature": 1} for row in rows(8)]
    with pytest.raises(
        InvalidInputError,
        match=r"was changed since an earlier try submitted its rows: rows were asked live\.",
    ):
        job.attempt()
    job.clear()
    manifest = job.attempt()
    assert (manifest["rows"]["ok"], emulator.live.asked, emulator.live.asked_again) == (8, 12, 0)


def test_an_answer_of_the_cache_was_not_asked_live_by_this_job(emulator: Emulator, tmp_path: Path) -> None:
    for night, new in ((1, 8), (2, 2)):
        job = live_job(emulator, tmp_path / str(night), rows(6 + 2 * night), models=[V3])
        job.cache_dir = tmp_path / "cache"
        job.run_id = str(night)
        manifest = job.attempt()
        assert manifest["live"]["rows"] == new
        lines = (tmp_path / str(night) / "results.jsonl").read_text().splitlines()
        assert sum('"route":"live"' in line for line in lines) == new
    assert emulator.live.answered == 10


def test_another_job_does_not_start_where_rows_are_asked(emulator: Emulator, tmp_path: Path) -> None:
    emulator.faults.add(Fault("POST /chat/completions", kind="status", skip=4, times=-1, status=401))
    job = live_job(emulator, tmp_path, rows(8), models=[V3], live_concurrency=1)
    with pytest.raises(AuthenticationError):
        job.attempt()
    emulator.faults.clear()
    emulator.service.advance(1200)
    other = live_job(emulator, tmp_path, rows(8), models=[V3])
    other.run_id = "another"
    with pytest.raises(InvalidInputError, match="was asking rows live there within the last hour"):
        other.attempt()
    assert job.attempt()["rows"]["ok"] == 8


def test_a_batch_that_was_stopped_in_its_middle_settles_once(emulator: Emulator, tmp_path: Path) -> None:
    emulator.service.configure({"queue_seconds": 0.0, "rows_per_second": 1.0, "cancelling_seconds": 3.0})
    job = live_job(emulator, tmp_path, rows(40), after=20.0, models=[V3], max_rows_per_batch=40)
    run = job.next_try()
    wait = run.start(lambda: job.requests, "requests", timeout=None)
    assert wait is not None
    assert wait.resume_at is not None
    cut = wait.resume_at
    emulator.service.advance(cut - job.clock.time() + 0.1)
    wait = run.resume([])
    assert wait is not None
    # Two minutes after it was cancelled, which took three seconds.
    assert wait.resume_at == pytest.approx(cut + 124, abs=6)
    assert wait.resume_at is not None
    emulator.service.advance(wait.resume_at - job.clock.time())
    assert run.resume([]) is None
    manifest = run.finish()
    assert manifest["rows"]["ok"] == 40
    assert 0 < manifest["live"]["rows"] < 40
    assert manifest["cost"]["total"] == pytest.approx(float(emulator.bill.total), abs=1e-6)
