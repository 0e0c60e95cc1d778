"""Two tries of one job alive at once: one batch for each piece of work, and the older try stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from airflow_provider_siliconflow.api.exceptions import JobTakenOverError, SiliconFlowError
from airflow_provider_siliconflow.jobs.identity import BatchWork, Submitter
from airflow_provider_siliconflow.jobs.ledger import FolderLedger, Owner
from airflow_provider_siliconflow.jobs.submission import Submission
from tests.unit.jobs.faulty import Crash, FakeClock, FaultyAPI, make_service, make_work

SUBMITTER = Submitter("dag", "run", "task", -1, 3)
WORKS = 4


class Job:
    """A job's folder and its account; :attr:`interrupt` runs once, at a boundary of the try that is under way."""

    def __init__(self, folder: Path) -> None:
        self.clock = FakeClock()
        self.service = make_service(folder / "service", self.clock)
        self.folder = folder / "job"
        self.works = [make_work(self.service, f"piece-{number}") for number in range(WORKS)]
        self.boundaries: list[str] = []
        self.pause_at: int | None = None
        self.interrupt: Any = None

    def pass_boundary(self, name: str) -> None:
        if self.interrupt is None:
            return
        self.boundaries.append(name)
        if len(self.boundaries) - 1 == self.pause_at:
            interrupt, self.interrupt = self.interrupt, None
            interrupt()

    def open(self, number: int) -> tuple[FolderLedger, Submission]:
        job = self

        class Ledger(FolderLedger):
            def check_owner(self) -> None:
                super().check_owner()
                job.pass_boundary("owner checked")

            def _write(self) -> None:
                super()._write()
                job.pass_boundary("written")

        class API(FaultyAPI):
            def _run(self, name: str, work: Any) -> Any:
                job.pass_boundary(f"before {name}")
                answer = super()._run(name, work)
                job.pass_boundary(f"after {name}")
                return answer

        ledger = Ledger(self.folder / "ledger.json", complete=True, is_new=number == 1)
        ledger.claim(Owner.new(SUBMITTER, try_number=number))
        api = API(self.service, iter(()), self.clock)
        return ledger, Submission(api, ledger=ledger, earlier_tries="none", since=0.0, clock=self.clock)

    def attempt(self, number: int) -> list[str]:
        ledger, submission = self.open(number)
        ids = [submission.submit(work).id for work in self.works]
        ledger.flush()
        return ids

    def batches(self, work: BatchWork) -> int:
        found = self.service.state()["batches"]
        return sum(batch["metadata"]["airflow_work"] == work.key for batch in found)


def is_window(job: Job) -> bool:
    """Whether the try was paused between its last check and its request, where nothing can stop it."""
    assert job.pause_at is not None
    last = job.boundaries[max(job.pause_at - 1, 0) : job.pause_at + 1]
    # A request that is sent again, since the account lists nothing of the first, has its intent recorded already.
    return last[-1] == "before create" or last in (
        ["written", "owner checked"],
        ["after list", "owner checked"],
    )


def test_a_try_that_is_paused_anywhere_pays_for_nothing_twice(tmp_path: Path) -> None:
    places = set()
    for number in range(1000):
        job = Job(tmp_path / str(number))
        newer: list[str] = []
        job.pause_at = number
        job.interrupt = lambda job=job, newer=newer: newer.extend(job.attempt(2))
        try:
            job.attempt(1)
        except JobTakenOverError as exc:
            error = exc
        if not newer:
            break
        assert error.retryable
        assert "try 2 of task" in str(error)
        place = job.boundaries[number]
        places.add(place)
        surplus = sum(job.batches(work) - 1 for work in job.works)
        assert surplus <= is_window(job), f"{place} at {number}"
        assert job.attempt(3) == newer, "whoever comes next takes up what the newer try paid for"
    else:
        pytest.fail("the older try never comes to its end")
    assert number == 6 * WORKS
    assert places == {"written", "owner checked", "before create", "after create"}


def test_an_older_try_writes_nothing_over_the_record_of_the_newer(tmp_path: Path) -> None:
    job = Job(tmp_path)
    older, _ = job.open(1)
    newer, submission = job.open(2)
    batch = submission.submit(job.works[0])
    newer.flush()
    with pytest.raises(JobTakenOverError):
        older.deadline = 5.0
    with pytest.raises(JobTakenOverError):
        older.remove_folder()
    found = FolderLedger(job.folder / "ledger.json", complete=True)
    assert found.recorded_batches() == {batch.id: 2}
    assert found.deadline is None


def test_a_record_that_an_older_try_wrote_over_is_not_complete(tmp_path: Path) -> None:
    """The older one was between its check and its write; the newer one died before it wrote again."""
    job = Job(tmp_path)
    job.attempt(1)
    written = (job.folder / "ledger.json").read_bytes()
    second, _ = job.open(2)
    assert second.complete
    (job.folder / "ledger.json").write_bytes(written)
    third, _ = job.open(3)
    assert not third.complete, "the account is searched"
    fourth, _ = job.open(4)
    assert not fourth.complete, "for as long as the job lives"


@example(script=["none", "lost-before"], pause_at=25)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    script=st.lists(
        st.sampled_from(["none", "none", "crash-after", "lost-after", "odd-after", "lost-before"]),
        max_size=12,
    ),
    pause_at=st.integers(0, 40),
)
def test_faults_in_the_older_try_and_a_newer_one(
    tmp_path_factory: pytest.TempPathFactory, script: list[str], pause_at: int
) -> None:
    job = Job(tmp_path_factory.mktemp("job"))
    _, older = job.open(1)
    older._api.script = iter(script)  # type: ignore[attr-defined]
    newer: list[str] = []
    job.pause_at = pause_at
    job.interrupt = lambda: newer.extend(job.attempt(2))
    for work in job.works:
        try:
            older.submit(work)
        except SiliconFlowError:
            continue
        except Crash:
            break
    job.interrupt = None
    again = job.attempt(3)
    assert not newer or again == newer
    assert sum(job.batches(work) - 1 for work in job.works) <= (bool(newer) and is_window(job))
