"""Exactly once: submission driven through faults, crashes and retries against the emulator's own rules."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from airflow_provider_siliconflow.api.exceptions import (
    NoAnswerError,
    NotFoundError,
    RateLimitedError,
    SiliconFlowError,
    SubmissionUnknownError,
)
from airflow_provider_siliconflow.api.models import Batch, UploadedFile
from airflow_provider_siliconflow.emulator.service import EmulatedService
from airflow_provider_siliconflow.jobs.identity import BatchWork, Submitter, Upload
from airflow_provider_siliconflow.jobs.ledger import NoLedger
from airflow_provider_siliconflow.jobs.submission import Search, Submission
from tests.unit.jobs.faulty import (
    CONTENT,
    FAULTS,
    Crash,
    FakeClock,
    FakeListing,
    FaultyAPI,
    FaultyLedger,
    batches_of,
    make_service,
    make_work,
)


def created(service: EmulatedService) -> int:
    return int(service.state(batches=False)["batch_count"])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    script=st.lists(st.sampled_from(FAULTS), max_size=25),
    recorded=st.booleans(),
    lag=st.sampled_from([0.0, 5.0, 40.0]),
    retry_delay=st.sampled_from([0.0, 300.0]),
)
def test_whatever_happens_there_is_one_batch(
    tmp_path_factory: pytest.TempPathFactory,
    script: list[str],
    recorded: bool,
    lag: float,
    retry_delay: float,
) -> None:
    clock = FakeClock()
    service = make_service(tmp_path_factory.mktemp("service"), clock, list_lag_seconds=lag)
    work = make_work(service)
    faults = iter(script)
    api, ledger = FaultyAPI(service, faults, clock), FaultyLedger(faults)
    start = clock.time()
    for attempt in range(1, len(script) + 3):
        submission = Submission(
            api,
            ledger=ledger if recorded else NoLedger(),
            earlier_tries="none" if attempt == 1 else "patiently",
            since=start,
            clock=clock,
        )
        try:
            batch = submission.submit(work)
            break
        except (Crash, SiliconFlowError) as exc:
            if isinstance(exc, SiliconFlowError) and not exc.retryable:
                raise
            assert len(batches_of(service, work)) <= 1
            clock.sleep(retry_delay)
    else:
        pytest.fail("it never came to an end")
    assert [found["id"] for found in batches_of(service, work)] == [batch.id]
    assert created(service) == 1


def test_first_try_is_one_post_and_no_search(tmp_path: Any) -> None:
    clock = FakeClock()
    service = make_service(tmp_path, clock)
    api = FaultyAPI(service, iter(()), clock)
    Submission(api, ledger=NoLedger(), earlier_tries="none", since=0.0, clock=clock).submit(
        make_work(service)
    )
    assert api.calls == ["create"]


def test_dead_batches_are_not_adopted_but_paid_ones_are(tmp_path: Any) -> None:
    clock = FakeClock()
    service = make_service(tmp_path, clock)
    work = make_work(service)
    api = FaultyAPI(service, iter(()), clock)

    def submit() -> Batch:
        return Submission(
            api, ledger=NoLedger(), earlier_tries="patiently", since=clock.time(), clock=clock
        ).submit(work)

    first = submit()
    service.force_status(first.id, "expired")
    assert submit().id == first.id
    service.force_status(first.id, "failed")
    second = submit()
    assert second.id != first.id
    service.force_status(second.id, "cancelled")
    third = submit()
    assert third.id not in (first.id, second.id)


def test_a_batch_being_cancelled_is_watched_to_its_end(tmp_path: Any) -> None:
    clock = FakeClock()
    service = make_service(
        tmp_path, clock, cancelling_seconds=120.0, queue_seconds=0.0, rows_per_second=0.001
    )
    work = make_work(service)
    api = FaultyAPI(service, iter(()), clock)

    def submit() -> Batch:
        return Submission(
            api, ledger=NoLedger(), earlier_tries="patiently", since=clock.time(), clock=clock
        ).submit(work)

    first = submit()
    clock.sleep(1.0)
    service.cancel_batch(first.id)
    assert submit().id != first.id
    assert service.get_batch(first.id)["status"] == "cancelled"


def test_other_work_over_the_same_file_is_not_adopted(tmp_path: Any) -> None:
    clock = FakeClock()
    service = make_service(tmp_path, clock)
    api = FaultyAPI(service, iter(()), clock)
    work = make_work(service)
    keys = {
        Submitter("dag", "run", "create", -1, 3).key(input="f"),
        Submitter("dag", "run", "create", -1, 4).key(input="f"),
        Submitter("dag", "run", "create", 0, 3).key(input="f"),
        Submitter("dag", "run", "other", -1, 3).key(input="f"),
        Submitter("dag", "run2", "create", -1, 3).key(input="f"),
        Submitter("dag2", "run", "create", -1, 3).key(input="f"),
        Submitter("dag", "run", "create", -1, 3).key(input="g"),
    }
    assert len(keys) == 7
    ids = set()
    for key in keys:
        other = BatchWork(key, work.label, work.input_file_id, work.endpoint, "24h", {}, None)
        submission = Submission(api, ledger=NoLedger(), earlier_tries="patiently", since=0.0, clock=clock)
        ids.add(submission.submit(other).id)
    assert len(ids) == 7


def test_a_search_among_ten_thousand_foreign_batches_is_bounded(tmp_path: Any) -> None:
    clock = FakeClock()
    service = make_service(tmp_path, clock)
    for day in range(100):
        service.seed_foreign_batches(100, age_seconds=(1.5 + day) * 86400.0)
    work = make_work(service)

    class Paged(FaultyAPI):
        def list_batches(self) -> FakeListing:
            return FakeListing(self._pages())

        def _pages(self) -> Iterator[Batch]:
            after = None
            while True:
                page = self._run(
                    "list", lambda after=after: self.service.list_batches(limit=100, after=after)
                )
                yield from (Batch.model_validate(item) for item in page["data"])
                if not page["has_more"]:
                    return
                after = page["last_id"]

    api = Paged(service, iter(()), clock)
    submission = Submission(
        api, ledger=NoLedger(), earlier_tries="patiently", since=clock.time(), clock=clock
    )
    submission.submit(work)
    # One page, perhaps two, for each of the searches, though there are a hundred.
    assert api.calls.count("list") <= 14


def test_an_outage_without_end_gives_up_with_what_to_do(tmp_path: Any) -> None:
    clock = FakeClock()
    service = make_service(tmp_path, clock)
    work = make_work(service)

    class Lost(FaultyAPI):
        def create_batch(self, *, repeat: bool = True, **request: Any) -> Batch:
            self.calls.append("create")
            raise NoAnswerError("reset")

    api = Lost(service, iter(()), clock)
    with pytest.raises(SubmissionUnknownError, match="searches the account") as caught:
        Submission(api, ledger=NoLedger(), earlier_tries="none", since=0.0, clock=clock).submit(work)
    assert caught.value.retryable
    assert api.calls.count("create") == 3


def test_refusals_are_sat_out_as_long_as_they_ask(tmp_path: Any) -> None:
    clock = FakeClock()
    service = make_service(tmp_path, clock)
    work = make_work(service)
    start = clock.time()

    class Refusing(FaultyAPI):
        def create_batch(self, *, repeat: bool = True, **request: Any) -> Batch:
            if self.clock.time() < start + 200:
                raise RateLimitedError("rate limit", status_code=429, retry_after=190.0)
            return super().create_batch(repeat=repeat, **request)

    api = Refusing(service, iter(()), clock)
    Submission(api, ledger=NoLedger(), earlier_tries="none", since=0.0, clock=clock).submit(work)
    assert created(service) == 1
    assert clock.time() >= start + 190


def test_an_upload_is_found_again_by_name_and_size(tmp_path: Any) -> None:
    clock = FakeClock()
    service = make_service(tmp_path, clock)
    api = FaultyAPI(service, iter(["lost-after"]), clock)
    content = CONTENT

    def send() -> UploadedFile:
        answer = api._run("upload", lambda: service.add_file("rows-key.jsonl", "batch", [content]))
        return UploadedFile.model_validate(answer["data"])

    submission = Submission(api, ledger=NoLedger(), earlier_tries="none", since=0.0, clock=clock)
    upload = Upload("key", "rows-key.jsonl", len(content), sha256(content).hexdigest(), send)
    file = submission.upload(upload)
    again = Submission(api, ledger=NoLedger(), earlier_tries="patiently", since=0.0, clock=clock)
    assert again.upload(upload).id == file.id
    assert len(api.list_files()) == 1


class Cut(FaultyAPI):
    """Lists the newest batches only, as a service does whose listing has no pages."""

    newest = 3

    def list_batches(self) -> FakeListing:
        page = self._run("list", lambda: self.service.list_batches(limit=self.newest))
        return FakeListing((Batch.model_validate(item) for item in page["data"]), cut=True)


def test_a_listing_without_pages_stops_no_first_try_of_a_generation(tmp_path: Any) -> None:
    clock = FakeClock()
    service = make_service(tmp_path, clock)
    service.seed_foreign_batches(10, age_seconds=1.0)
    work, api = make_work(service), Cut(service, iter(()), clock)

    def submit(search: Search) -> Batch:
        since = clock.time() - 7200.0
        return Submission(api, ledger=NoLedger(), earlier_tries=search, since=since, clock=clock).submit(work)

    with pytest.raises(SubmissionUnknownError, match="only its newest 3 batches"):
        submit("patiently")
    assert not batches_of(service, work)
    assert submit("once").id == batches_of(service, work)[0]["id"]


def test_a_batch_that_is_listed_is_adopted_whatever_its_id_answers(tmp_path: Any) -> None:
    clock = FakeClock()
    service = make_service(tmp_path, clock)
    work, ledger = make_work(service), FaultyLedger(iter(()))

    class Lost(FaultyAPI):
        def get_batch(self, batch_id: str) -> Batch:
            raise NotFoundError("404 page not found", status_code=404)

    def submit(api: FaultyAPI) -> Batch:
        return Submission(
            api, ledger=ledger, earlier_tries="patiently", since=clock.time(), clock=clock
        ).submit(work)

    first = submit(FaultyAPI(service, iter(()), clock))
    assert submit(Lost(service, iter(()), clock)).id == first.id

    class Other(Lost):
        def list_batches(self) -> FakeListing:
            return FakeListing(())

    with pytest.raises(SubmissionUnknownError, match=f"submitted batch {first.id}") as caught:
        submit(Other(service, iter(()), clock))
    assert caught.value.retryable
    assert created(service) == 1
