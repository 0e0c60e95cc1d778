"""One rule for every wait, driven with a clock that is told what time it is."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airflow_provider_siliconflow.api.exceptions import (
    AuthenticationError,
    BatchTimeoutError,
    BatchWaitError,
    InsufficientBalanceError,
    InvalidInputError,
    InvalidRequestError,
    NoAnswerError,
    NotFoundError,
    NotSentError,
    PermissionDeniedError,
    RateLimitedError,
    ServiceUnavailableError,
    SiliconFlowError,
    UnexpectedAnswerError,
)
from airflow_provider_siliconflow.api.models import TERMINAL_STATUSES, Batch
from airflow_provider_siliconflow.jobs import waiting
from airflow_provider_siliconflow.jobs.settled import SETTLE_PATIENCE
from airflow_provider_siliconflow.jobs.waiting import BatchWait, default_deadline

START = 1_800_000_000.0
PENDING = (
    "validating",
    "in_queue",
    "in_progress",
    "finalizing",
    "cancelling",
    "never seen before",
    "COMPLETED",
)
TRANSIENT: list[Callable[[], SiliconFlowError]] = [
    lambda: NotSentError("no connection"),
    lambda: NoAnswerError("reset"),
    lambda: UnexpectedAnswerError("HTML, or cut JSON"),
    lambda: RateLimitedError("slow down", status_code=429),
    lambda: RateLimitedError("slow down", status_code=429, retry_after=900.0),
    *(lambda s=s: ServiceUnavailableError("busy", status_code=s) for s in (408, 425, 500, 502, 503, 504)),
    lambda: InvalidRequestError("odd", status_code=400),
    lambda: InsufficientBalanceError("no money", status_code=402),
]


def batch(status: str = "in_progress", batch_id: str = "batch_1", **fields: Any) -> Batch:
    return Batch(id=batch_id, status=status, **fields)


def settled(status: str = "completed", batch_id: str = "batch_1") -> Batch:
    return batch(status, batch_id, request_counts={"total": 2, "completed": 1, "failed": 1})


class Driver:
    """Polls as the hook and the trigger do; ``answer`` says what each poll finds."""

    def __init__(self, wait: BatchWait, answer: Callable[[str, float], Batch | SiliconFlowError]) -> None:
        self.wait, self.answer, self.now = wait, answer, START
        self.polls: list[tuple[float, str]] = []

    def run(self, until: float = math.inf) -> float:
        """Return when the wait ended, or ``until``."""
        while self.now < until:
            for batch_id in self.wait.due(self.now):
                self.polls.append((self.now, batch_id))
                found = self.answer(batch_id, self.now)
                if isinstance(found, Batch):
                    self.wait.observe(batch_id, found, self.now)
                else:
                    self.wait.fault(batch_id, found, self.now)
            if self.wait.finished:
                return self.now
            self.wait.check_deadline(self.now)
            self.now += self.wait.pause(self.now)
            assert len(self.polls) < 20_000, "the wait spins"
        return until


def script(*answers: Batch | SiliconFlowError) -> Callable[[str, float], Batch | SiliconFlowError]:
    """Answer in order; the last one for ever."""
    left = list(answers)
    return lambda batch_id, now: left.pop(0) if len(left) > 1 else left[0]


counts = st.fixed_dictionaries(
    {}, optional={n: st.integers(0, 10**9) for n in ("total", "completed", "failed")}
)
times = st.none() | st.integers(-(2**40), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
pending = st.builds(
    batch, st.sampled_from(PENDING), request_counts=counts, in_progress_at=times, created_at=times
)
faults = st.sampled_from(TRANSIENT).map(lambda make: make())


@settings(max_examples=300, deadline=None)
@given(
    answers=st.lists(pending | faults, max_size=40),
    final=st.sampled_from(sorted(TERMINAL_STATUSES)),
    interval=st.sampled_from([0.5, 60.0, 3600.0]),
    ids=st.integers(1, 12),
)
def test_a_wait_ends_when_every_batch_has_ended_and_not_before(
    answers: list[Batch | SiliconFlowError], final: str, interval: float, ids: int
) -> None:
    names = [f"batch_{n}" for n in range(ids)]
    left = {name: list(answers) for name in names}
    ended: set[str] = set()

    def answer(name: str, now: float) -> Batch | SiliconFlowError:
        assert name not in ended, "a batch that has ended is not read again"
        if left[name]:
            return left[name].pop(0)
        ended.add(name)
        return settled(final, name)

    driver = Driver(BatchWait(names, START, interval, deadline=START + 10**9), answer)
    driver.run()
    assert [found.id for found in driver.wait.batches] == names
    assert all(found.status == final for found in driver.wait.batches)
    for name in names:
        mine = [at for at, polled in driver.polls if polled == name]
        assert all(later - at >= min(0.8 * interval, 1.0) for at, later in pairwise(mine))


@pytest.mark.parametrize("error", [make() for make in TRANSIENT], ids=str)
def test_half_an_hour_of_faults_ends_no_wait(error: SiliconFlowError) -> None:
    driver = Driver(BatchWait(["batch_1"], START, 60.0), script(batch(), error))
    assert driver.run(until=START + 1800) == START + 1800
    assert 2 <= len(driver.polls) <= 30
    driver.answer = script(settled())
    assert driver.run() <= START + 1800 + waiting.FAULT_PAUSE_LIMIT * 1.2 + 900


def test_after_a_fault_the_service_gets_the_time_it_asks_for() -> None:
    error = RateLimitedError("slow down", status_code=429, retry_after=700.0)
    driver = Driver(BatchWait(["batch_1"], START, 10.0), script(error, settled()))
    assert driver.run() >= START + 700


def test_once_the_service_is_back_polls_are_regular_again() -> None:
    fault = ServiceUnavailableError("busy", status_code=502)
    driver = Driver(BatchWait(["batch_1"], START, 10.0), script(*[fault] * 8, batch(), fault, batch()))
    driver.run(until=START + 4 * 3600)
    gaps = [later - at for (at, _), (later, _) in pairwise(driver.polls)]
    assert max(gaps[:8]) > 300
    assert all(7.9 < gap < 12.1 for gap in gaps[8:])
    assert max(gaps[9:]) - min(gaps[9:]) > 1, "polls are jittered, so that many waits do not beat in time"


@pytest.mark.parametrize(
    "error", [AuthenticationError("bad key", status_code=401), PermissionDeniedError("no", status_code=403)]
)
def test_a_key_that_is_refused_ends_the_wait_and_says_that_the_batch_goes_on(error: SiliconFlowError) -> None:
    driver = Driver(BatchWait(["batch_1"], START, 60.0), script(batch(), error))
    with pytest.raises(BatchWaitError, match=r"batch_1.*untouched") as caught:
        driver.run()
    assert (caught.value.batch_id, caught.value.retryable) == ("batch_1", False)


def test_an_unknown_batch_ends_the_wait_only_after_a_grace() -> None:
    driver = Driver(BatchWait(["batch_1"], START, 5.0), script(NotFoundError("no", status_code=404)))
    with pytest.raises(BatchWaitError, match="batch_1"):
        driver.run()
    assert waiting.NOT_FOUND_GRACE <= driver.now - START <= 2.5 * waiting.NOT_FOUND_GRACE


def test_the_grace_begins_anew_when_the_batch_was_seen() -> None:
    missing = NotFoundError("no", status_code=404)

    def answer(batch_id: str, now: float) -> Batch | SiliconFlowError:
        return batch() if int(now - START) // 400 % 2 else missing

    driver = Driver(BatchWait(["batch_1"], START, 5.0), answer)
    assert driver.run(until=START + 4000) == START + 4000


def test_an_error_of_our_own_is_not_waited_out() -> None:
    driver = Driver(BatchWait(["batch_1"], START, 5.0), script(InvalidInputError("a bad CA bundle")))
    with pytest.raises(InvalidInputError):
        driver.run()


@settings(deadline=None)
@given(answers=st.lists(pending | faults, min_size=1, max_size=10), seconds=st.floats(0, 10**6))
def test_a_deadline_is_a_point_in_time_that_nothing_moves(
    answers: list[Batch | SiliconFlowError], seconds: float
) -> None:
    deadline = START + seconds
    driver = Driver(BatchWait(["batch_1"], START, 600.0, deadline), script(*answers))
    with pytest.raises(BatchTimeoutError, match="batch_1"):
        driver.run()
    assert deadline <= driver.now <= deadline + 1e-3


def test_a_wait_that_begins_anew_keeps_its_deadline() -> None:
    again = Driver(BatchWait(["batch_1"], START + 5000, 60.0, START + 6000), script(batch()))
    again.now = START + 5000
    with pytest.raises(BatchTimeoutError):
        again.run()
    assert again.now == START + 6000


def test_a_batch_that_ends_at_the_deadline_has_ended() -> None:
    driver = Driver(BatchWait(["batch_1"], START, 60.0, START), script(settled()))
    assert driver.run() == START


def test_without_a_deadline_the_wait_ends_an_hour_after_the_batches_expire() -> None:
    def answer(batch_id: str, now: float) -> Batch:
        return batch(batch_id=batch_id, expires_at=START + (7200 if batch_id == "batch_1" else 0))

    driver = Driver(BatchWait(["batch_1", "batch_2"], START, 60.0), answer)
    with pytest.raises(BatchTimeoutError, match=r"2 of 2 .*batch_1 \(in_progress\)"):
        driver.run()
    assert START + 7200 + 3600 <= driver.now <= START + 7200 + 3600 + 80


def test_a_batch_that_was_never_read_is_not_given_up() -> None:
    fault = ServiceUnavailableError("busy", status_code=502)
    driver = Driver(BatchWait(["batch_1"], START, 3600.0), script(fault))
    assert driver.run(until=START + 20 * 86400) == START + 20 * 86400


def test_as_many_ended_batches_as_asked_for_end_the_wait() -> None:
    def answer(batch_id: str, now: float) -> Batch:
        return settled(batch_id=batch_id) if batch_id in ("batch_2", "batch_4") else batch(batch_id=batch_id)

    wait = BatchWait([f"batch_{n}" for n in range(6)], START, 60.0, START + 600, min_ended=2)
    Driver(wait, answer).run()
    assert [found.id for found in wait.batches] == ["batch_2", "batch_4"]


def test_many_batches_are_read_a_few_at_a_time_and_none_starves() -> None:
    names = [f"batch_{n}" for n in range(400)]
    driver = Driver(BatchWait(names, START, 60.0), lambda name, now: batch(batch_id=name))
    assert len(driver.wait.due(START + 60)) == waiting.MAX_CONCURRENT_POLLS
    driver.run(until=START + 180)
    polled = [name for _, name in driver.polls]
    assert all(2 <= polled.count(name) <= 5 for name in names)


def test_the_longest_overdue_goes_first() -> None:
    names = [f"batch_{n}" for n in range(20)]
    wait = BatchWait(names, START, 1.0)
    polled = wait.due(START)
    for name in polled:
        wait.observe(name, batch(batch_id=name), START)
    assert not {*polled} & {*wait.due(START + 100)}


def test_an_unknown_status_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    driver = Driver(BatchWait(["batch_1"], START, 60.0), script(batch("paused")))
    driver.run(until=START + 3600)
    assert sum("paused" in r.message and r.levelno == logging.WARNING for r in caplog.records) == 1


def test_progress_is_told_when_it_changes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    def answer(batch_id: str, now: float) -> Batch:
        done = min(int(now - START) // 600 * 100, 1000)
        return batch(request_counts={"total": 1000, "completed": done}, in_progress_at=START)

    Driver(BatchWait(["batch_1"], START, 60.0), answer).run(until=START + 7200)
    lines = [r.message for r in caplog.records]
    assert 11 <= len(lines) <= 12
    assert "300/1000 rows done, 0 failed" in lines[3]
    assert "expected end 2027-01-15" in lines[3]


def test_a_wait_that_begins_late_has_an_hour_of_its_own() -> None:
    """A batch may end later than it expires; a retry that gave it up at once would burn all the others."""
    expired = batch("finalizing", expires_at=START - 5 * 3600)
    wait = BatchWait(["batch_1"], START + 50.0, 60.0, began=START)
    wait.observe("batch_1", expired, START + 50.0)
    wait.check_deadline(START + 3599)
    with pytest.raises(BatchTimeoutError, match="finalizing"):
        # Counted from where the wait began, not from where a triggerer started again.
        wait.check_deadline(START + 3601)
    assert default_deadline(expired, START) == START + 3600


@pytest.mark.parametrize(
    "times", [{"expires_at": 2**40}, {"created_at": 2**39}, {"expires_at": START * 1000}]
)
def test_no_time_of_the_service_makes_a_wait_endless(times: dict[str, Any]) -> None:
    assert default_deadline(batch(**times), START) == START + (336 + 1) * 3600


LATE = [{"total": 12}, {"total": 12, "completed": 6}, {}, None]


@pytest.mark.parametrize("counts", LATE)
@pytest.mark.parametrize("status", ["completed", "expired", "cancelled"])
def test_a_batch_whose_counts_come_late_has_not_ended_yet(status: str, counts: Any) -> None:
    late = batch(status, request_counts=counts, in_progress_at=START)
    driver = Driver(BatchWait(["batch_1"], START, 60.0), script(*[late] * 3, settled(status)))
    assert START + 3 <= driver.run() <= START + 60
    assert driver.wait.batches == [settled(status)]


@pytest.mark.parametrize("counts", LATE)
def test_a_batch_whose_counts_never_come_ends_as_it_is(counts: Any) -> None:
    late = batch("completed", request_counts=counts)
    driver = Driver(BatchWait(["batch_1"], START, 3600.0), script(late))
    assert START + SETTLE_PATIENCE <= driver.run() <= START + 1.2 * SETTLE_PATIENCE
    assert driver.wait.batches == [late]


def test_a_replica_that_lags_behind_does_not_begin_the_patience_anew() -> None:
    late, lagging = batch("completed"), batch("in_progress")
    driver = Driver(BatchWait(["batch_1"], START, 10.0), script(*[late, lagging] * 40, late))
    assert driver.run() <= START + 1.2 * SETTLE_PATIENCE


@pytest.mark.parametrize("status", ["cancelled", "failed"])
def test_a_batch_that_was_stopped_before_any_row_ran_needs_no_counts(status: str) -> None:
    driver = Driver(BatchWait(["batch_1"], START, 60.0), script(batch(status)))
    assert driver.run() == START


def test_an_answer_about_another_batch_ends_no_wait_and_is_not_asked_for_without_a_pause() -> None:
    driver = Driver(BatchWait(["batch_1"], START, 10.0), script(settled(batch_id="batch_2")))
    assert driver.run(until=START + 3600) == START + 3600
    assert len(driver.polls) < 100
    driver.answer = script(settled())
    driver.run()
    assert driver.wait.batches == [settled()]


def test_a_poll_may_go_on_until_the_deadline() -> None:
    assert BatchWait(["batch_1"], START, 10.0, START + 90).time_left(START + 30) == 60
    assert BatchWait(["batch_1"], START, 10.0, START + 90).time_left(START + 95) == 0
    wait = BatchWait(["batch_1"], START, 10.0)
    assert wait.time_left(START) is None, "a batch that was never read may expire at any time"
    wait.observe("batch_1", batch(expires_at=START + 100), START)
    assert wait.time_left(START) == 100 + waiting.EXPIRY_MARGIN


def test_a_clock_that_is_set_back_does_not_stop_the_polls() -> None:
    wait = BatchWait(["batch_1"], START, 60.0)
    wait.observe("batch_1", batch(), START)
    assert wait.due(START) == []
    back = START - 7200
    assert wait.pause(back) == 0.0
    assert wait.due(back) == ["batch_1"]
    wait.observe("batch_1", batch(), back)
    assert wait.due(back) == []
    assert 40 < wait.pause(back) < 80


def test_a_wait_that_is_taken_up_after_its_deadline_polls_once() -> None:
    wait = BatchWait(["batch_1"], START, 10.0, START + 90)
    assert wait.poll_limit(START + 30) == 60
    assert wait.poll_limit(START + 90) == wait.poll_limit(START + 95) == waiting.LAST_POLL_SECONDS
    assert BatchWait(["batch_1"], START, 10.0).poll_limit(START) is None


def test_the_pause_lasts_until_the_next_poll_or_the_deadline() -> None:
    wait = BatchWait(["batch_1", "batch_2"], START, 100.0, START + 200)
    assert wait.pause(START) == 0
    for name in ("batch_1", "batch_2"):
        wait.observe(name, batch(batch_id=name), START)
    assert 80 <= wait.pause(START) <= 120.1
    assert wait.pause(START + 70) <= 50.1
    assert wait.pause(START + 300) == 0
    soon = BatchWait(["batch_1"], START, 100.0, START + 5)
    soon.observe("batch_1", batch(), START)
    assert soon.pause(START) == 5
    soon.make_all_due(START + 1)
    assert soon.due(START + 1) == ["batch_1"]


def test_many_batches_do_not_fall_due_together_and_few_do() -> None:
    names = [f"batch_{n}" for n in range(400)]
    assert len(BatchWait(names[:50], START, 60.0).due(START)) == waiting.MAX_CONCURRENT_POLLS
    many = BatchWait(names, START, 60.0)
    assert many.due(START) == []
    assert len(many.due(START + 4)) == waiting.MAX_CONCURRENT_POLLS
    assert 0 < many.pause(START) <= 8, "all of them within a fiftieth of a second each"


@pytest.mark.parametrize(
    ("counts", "fields", "line"),
    [
        (None, {}, "Batch batch_1: in_progress"),
        ((10, 4, 1), {}, "Batch batch_1: in_progress, 5/10 rows done, 1 failed"),
        (
            (10, 0, 0),
            {"in_progress_at": START - 10},
            "Batch batch_1: in_progress, 0/10 rows done, 0 failed",
        ),
        (
            (10, 4, 1),
            {"in_progress_at": START - 10},
            "Batch batch_1: in_progress, 5/10 rows done, 1 failed, 0.5 rows/s, "
            "expected end 2027-01-15 08:00:10 UTC",
        ),
        (
            (10, 9, 1),
            {"in_progress_at": START - 10, "status": "completed"},
            "Batch batch_1: completed, 10/10 rows done, 1 failed",
        ),
    ],
)
def test_a_line_says_how_far_a_batch_is(
    counts: tuple[int, int, int] | None, fields: dict[str, Any], line: str
) -> None:
    if counts:
        fields["request_counts"] = dict(zip(("total", "completed", "failed"), counts, strict=True))
    assert waiting.progress_line(batch(**fields), START) == line


def test_many_batches_are_told_together_and_only_if_something_changed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    names = [f"batch_{n}" for n in range(10)]
    wait = BatchWait(names, START, 60.0)

    def see(done: int, now: float, *, but: int = 0) -> None:
        for name in names[: 10 - but]:
            counts = {"total": 100, "completed": done // 10, "failed": 0}
            wait.observe(name, batch(batch_id=name, request_counts=counts), now)
        wait.log_summary(now)

    see(0, START, but=1)
    assert caplog.messages == [], "one was not read yet"
    see(0, START)
    see(40, START + 60)
    assert caplog.messages == ["0/10 batches ended, 0/1000 rows done, 0 failed"], "less than a twentieth"
    see(50, START + 100)
    assert caplog.messages[1:] == [
        "0/10 batches ended, 50/1000 rows done, 0 failed, 0.5 rows/s, expected end 2027-01-15 08:33:20 UTC"
    ]
    see(60, START + 699)
    assert len(caplog.messages) == 2
    see(60, START + 700)
    assert len(caplog.messages) == 3, "ten minutes are enough for any change"
    see(60, START + 7000)
    assert len(caplog.messages) == 3, "but for none"


def test_a_refusal_of_a_batch_that_was_never_read_ends_the_wait_after_an_hour_without_a_deadline() -> None:
    refused = InvalidRequestError("odd", status_code=400)
    driver = Driver(BatchWait(["batch_1"], START, 60.0), script(refused))
    with pytest.raises(BatchWaitError, match=r"Check the id\. ") as caught:
        driver.run()
    assert waiting.REFUSED_GRACE <= driver.now - START <= waiting.REFUSED_GRACE + 900
    assert not caught.value.retryable
    with_deadline = BatchWait(["batch_1"], START, 60.0, START + 10 * 3600)
    with pytest.raises(BatchTimeoutError, match="never read"):
        Driver(with_deadline, script(refused)).run()


def test_an_unknown_batch_leaves_a_retry_where_the_wait_began_in_another_process() -> None:
    missing = NotFoundError("no", status_code=404)
    wait = BatchWait(["batch_1"], START, 60.0, began=START - 10_000)
    for _ in range(2):
        wait.fault("batch_1", missing, START)
        assert wait.has_missing
    with pytest.raises(BatchWaitError, match="not known to this account") as caught:
        wait.fault("batch_1", missing, START)
    assert caught.value.retryable
    wait.observe("batch_1", batch(), START)
    assert not wait.has_missing
