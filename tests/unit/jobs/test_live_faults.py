"""Rows asked one by one, under odd answers, damaged journals, changed rows, two tries at once and kills."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_siliconflow.api.exceptions import SiliconFlowError
from airflow_provider_siliconflow.emulator.faults import Fault
from airflow_provider_siliconflow.emulator.server import Emulator
from airflow_provider_siliconflow.jobs.live_journal import LiveJournal
from tests.unit.jobs.test_live import PRICES, QWEN, V3, Killed, live_job
from tests.unit.jobs.test_live import hasty as hasty
from tests.unit.jobs.test_whole_life import TYPED
from tests.unit.jobs.whole_job import Job, rows

pytestmark = [
    pytest.mark.emulator(speed=1.0, live_latency=0.0, prices=PRICES),
    pytest.mark.usefixtures("hasty"),
]

CHAT = "POST /chat/completions"
WITH_THINKING = {model: {**price, "thinking": 0} for model, price in PRICES.items()}


def bounded(count: int) -> list[dict[str, Any]]:
    """Rows whose cost has a bound."""
    return [{**row, "max_tokens": 100, "enable_thinking": False} for row in rows(count)]


def die_at(patched: pytest.MonkeyPatch, write: int) -> None:
    """Let the process end right after one of its writes to the journal."""
    append = LiveJournal.append
    left = [write]

    def die(journal: LiveJournal, entries: Any) -> None:
        append(journal, entries)
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    patched.setattr(LiveJournal, "append", die)


def die(job: Job, write: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        die_at(patched, write)
        with pytest.raises(Killed):
            job.attempt()


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


# The journal ----------------------------------------------------------------------------------------------------


def test_rows_that_were_changed_do_not_get_the_answers_of_the_earlier_ones(
    emulator: Emulator, tmp_path: Path
) -> None:
    job = live_job(emulator, tmp_path, rows(6), live_concurrency=1)
    die(job, 4)
    job.clear()
    job.requests = rows(6, lambda _: "changed")
    assert job.attempt()["rows"]["ok"] == 12
    assert emulator.live.asked == 4 + 12


def test_lines_of_other_rows_in_a_journal_count_for_nothing(emulator: Emulator, tmp_path: Path) -> None:
    job = live_job(emulator, tmp_path, rows(6), models=[V3], live_concurrency=1)
    die(job, 2)
    (path,) = tmp_path.glob(".siliconflow/*/live-1/*/*.answers")
    line = path.read_bytes().splitlines()[0]
    with path.open("ab") as stream:
        stream.writelines(line.replace(b'"q0"', b'"x%d"' % number) + b"\n" for number in range(4))
    assert job.attempt()["rows"]["ok"] == 6


def test_lines_that_are_written_again_are_not_billed_twice(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, count = os.write, [0]

    def fill(descriptor: int, data: memoryview) -> int:
        count[0] += 1
        if count[0] in (3, 4):
            write(descriptor, bytes(data)[: len(data) - 10])
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr("airflow_provider_siliconflow.jobs.live_journal.os.write", fill)
    manifest = live_job(emulator, tmp_path, rows(13)).attempt()
    assert manifest["rows"]["ok"] == 26
    assert manifest["cost"]["total"] == pytest.approx(float(emulator.bill.total), abs=1e-6)


_ANSWER = (
    '{"id":"a","choices":[{"index":0,"message":{"role":"assistant","content":"%s"},"finish_reason":"stop"%s}],'
    '"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}}'
)


@pytest.mark.parametrize(
    "answer",
    [
        _ANSWER % ("a\x01b", ""),
        _ANSWER % ("a\tb\n", ""),
        _ANSWER % ("\x00", ""),
        _ANSWER % ("\\ud800", ""),
        _ANSWER % ("a", ',"logprobs":NaN'),
        "\ufeff" + _ANSWER % ("a", ""),
        (_ANSWER % ("\u2028", "")).replace(",", ",\r\n"),
    ],
)
def test_an_answer_with_a_damaged_text_is_kept(emulator: Emulator, tmp_path: Path, answer: str) -> None:
    emulator.faults.add(Fault(CHAT, "rewrite", times=-1, status=200, raw=answer))
    job = live_job(emulator, tmp_path, rows(3), models=[V3], live_concurrency=1)
    die(job, 2)
    assert job.attempt()["rows"]["ok"] == 3
    assert emulator.live.answered == 3


# Money ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("removed", [[], ["usage"]])
def test_an_answer_without_a_choice_is_billed_in_a_later_process_too(
    emulator: Emulator, tmp_path: Path, removed: list[str]
) -> None:
    emulator.faults.add(Fault(CHAT, "rewrite", times=-1, merge={"choices": []}, remove=removed))
    job = live_job(
        emulator,
        tmp_path,
        bounded(6),
        models=[V3],
        live_concurrency=1,
        max_cost=0.05,
        prices=WITH_THINKING,
    )
    die(job, 6)
    budget = job.attempt()["budget"]
    assert float(emulator.bill.total) <= budget["spent"] + budget["held"] + 1e-6


def test_a_retry_knows_what_the_batches_cost(emulator: Emulator, tmp_path: Path) -> None:
    emulator.service.config = emulator.service.config.changed(
        {"queue_seconds": 10, "rows_per_second": 0.2, "cancelling_seconds": 1}
    )
    job = live_job(
        emulator,
        tmp_path,
        bounded(20),
        after=17.0,
        max_cost=0.009,
        models=[V3],
        prices=WITH_THINKING,
        live_concurrency=1,
    )
    run = job.next_try()
    wait = run.start(lambda: job.requests, "requests", timeout=None)
    assert wait is not None
    assert wait.resume_at is not None
    emulator.service.advance(wait.resume_at - job.clock.time() + 0.1)
    with pytest.MonkeyPatch.context() as patched:
        die_at(patched, 4)
        with pytest.raises(Killed):
            job.carry_out(run, run.resume([]))
    assert job.attempt()["rows"]["ok"] == 20


def test_a_process_that_lost_the_job_asks_no_rows_beside_the_new_one(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulator.service.config = emulator.service.config.changed({"live_latency": 0.05})
    job = live_job(emulator, tmp_path, rows(800), models=[V3], live_concurrency=8)
    monkeypatch.setattr(job.clock, "sleep", time.sleep)
    _, thread, raised = begun(job)
    time.sleep(1.5)
    assert job.attempt()["rows"]["ok"] == 800
    thread.join(30)
    assert type(raised[0]).__name__ == "JobTakenOverError"
    assert emulator.live.asked_again <= 8


def test_a_plan_without_a_time_begins_with_its_try(emulator: Emulator, tmp_path: Path) -> None:
    job = live_job(emulator, tmp_path, rows(5), after=5000.0)
    job.next_try().start(lambda: job.requests, "requests", timeout=None)
    (path,) = tmp_path.glob(".siliconflow/*/plan.json")
    plan = json.loads(path.read_text())
    del plan["began"]
    path.write_text(json.dumps(plan))
    wait = job.process().resume([])
    assert wait is not None
    assert wait.resume_at == pytest.approx(job.clock.time() + 5000, abs=30)


# Rows -----------------------------------------------------------------------------------------------------------


def test_a_model_that_is_refused_does_not_hold_up_rows_of_another(emulator: Emulator, tmp_path: Path) -> None:
    asked = [{**row, "model": "no/such"} for row in rows(10)]
    asked += [{**row, "custom_id": f"other {row['custom_id']}", "model": QWEN} for row in rows(10)]
    job = live_job(emulator, tmp_path, asked, models=None, live_concurrency=2)
    with pytest.raises(SiliconFlowError, match="Model does not exist"):
        job.attempt()
    assert emulator.live.answered == 10
    assert [line["error"] is None for line in lines_of(tmp_path)] == 10 * [False] + 10 * [True]


def test_a_clear_asks_rows_again_that_were_refused_for_good(emulator: Emulator, tmp_path: Path) -> None:
    def refuse(times: int) -> None:
        body = {"code": 20015, "message": "bad parameter"}
        emulator.faults.add(Fault(CHAT, "status", times=times, status=400, body=body))

    job = live_job(emulator, tmp_path, rows(6), models=[V3])
    refuse(3)
    assert job.attempt()["rows"]["ok"] == 3
    for left in (1, 0):
        refuse(left)
        job.clear()
        manifest = job.attempt()
        assert manifest["rows"]["ok"] == 6 - left
    assert manifest["live"]["rows"] == 6 == emulator.live.answered
    assert manifest["cost"]["total"] == pytest.approx(float(emulator.bill.total), abs=1e-6)


@pytest.mark.parametrize("attempts", [2, 3])
def test_a_row_that_is_too_dear_stays_named_in_later_rounds(
    make_emulator: Any, tmp_path: Path, attempts: int
) -> None:
    emulator = make_emulator(speed=1.0, live_latency=0.0, prices=PRICES, invalid_rate=0.9)
    asked = bounded(9)
    asked[8]["max_tokens"] = 100_000
    options: dict[str, Any] = {**TYPED, "max_row_attempts": attempts}
    job = live_job(emulator, tmp_path, asked, models=[V3], prices=WITH_THINKING, max_cost=0.5, **options)
    manifest = job.attempt()
    assert [each["rows"] for each in manifest["rounds"]] == [9, 8]
    assert manifest["budget"]["rows_not_sent"] == 1
    assert "max_cost" in lines_of(tmp_path)[8]["error"]["message"]


# The end --------------------------------------------------------------------------------------------------------


def begun(job: Job) -> tuple[Any, threading.Thread, list[BaseException]]:
    """Let a try run in a thread."""
    run, raised = job.next_try(), []

    def work() -> None:
        try:
            job.carry_out(run, run.start(lambda: job.requests, "requests", timeout=None))
        except BaseException as exc:  # noqa: BLE001
            raised.append(exc)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return run, thread, raised


@pytest.mark.parametrize("fault", [None, {"kind": "status", "status": 401}])
def test_a_kill_ends_the_phase_even_while_answers_are_awaited(
    emulator: Emulator, tmp_path: Path, fault: dict[str, Any] | None
) -> None:
    emulator.service.config = emulator.service.config.changed({"live_latency": 20.0})
    if fault is not None:
        emulator.faults.add(Fault(CHAT, skip=3, **fault))
    run, thread, _ = begun(live_job(emulator, tmp_path, rows(30), models=[V3]))
    time.sleep(1.5)
    began = time.monotonic()
    run.stop(cancels=False)
    thread.join(15)
    assert time.monotonic() - began < 5


class Ended(Exception):  # noqa: N818
    """What a signal handler of Airflow raises."""


def test_answers_that_come_within_three_seconds_of_a_signal_are_kept(
    emulator: Emulator, tmp_path: Path
) -> None:
    def end(*_: Any) -> None:
        raise Ended

    emulator.service.config = emulator.service.config.changed({"live_latency": 2.5})
    job = live_job(emulator, tmp_path, rows(30), models=[V3], live_concurrency=4)
    before = signal.signal(signal.SIGTERM, end)
    timer = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    try:
        with pytest.raises(Ended):
            job.attempt()
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)
    assert emulator.live.answered == 4
    emulator.service.config = emulator.service.config.changed({"live_latency": 0.0})
    assert job.attempt()["rows"]["ok"] == 30
    assert emulator.live.asked_again == 0


def test_a_store_that_hangs_does_not_keep_a_task_that_is_ended(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    monkeypatch.setattr(LiveJournal, "_write", lambda *_: released.wait(30))
    run, thread, _ = begun(live_job(emulator, tmp_path, rows(30), models=[V3]))
    time.sleep(1.5)
    began = time.monotonic()
    run.stop(cancels=False)
    thread.join(15)
    released.set()
    assert time.monotonic() - began < 6
