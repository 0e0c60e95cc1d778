"""Rows that no batch answered in time are asked one by one: none twice, none lost, within the budget."""

from __future__ import annotations

import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from airflow_provider_siliconflow.api.arguments import LiveAfter
from airflow_provider_siliconflow.api.exceptions import (
    InvalidInputError,
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
    given = {
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


FAULTS = {
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
LIMITS = (4, 1, 7)

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
    options = {"live_concurrency": concurrency, "max_cost": max_cost, **(TYPED if typed else {})}
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
