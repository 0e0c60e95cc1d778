"""Whatever the service answers, lists and tells of the time: one batch per work, and nothing foreign is touched."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from airflow_provider_siliconflow.api.exceptions import SiliconFlowError, SubmissionUnknownError
from airflow_provider_siliconflow.api.models import Batch
from airflow_provider_siliconflow.jobs.identity import BatchWork
from airflow_provider_siliconflow.jobs.ledger import NoLedger
from airflow_provider_siliconflow.jobs.submission import Search, Submission
from tests.unit.jobs.faulty import (
    FAULTS,
    Crash,
    FakeClock,
    FaultyAPI,
    FaultyLedger,
    Oddities,
    batches_of,
    make_service,
    make_upload_work,
    make_work,
)

ODDITIES = st.builds(
    Oddities,
    order=st.sampled_from(["newest", "oldest", "any"]),
    without=st.sets(st.sampled_from(["metadata", "input_file_id", "file_name", "created_at"])).map(frozenset),
    never_told=st.sets(st.sampled_from(["metadata", "input_file_id"]), max_size=1).map(frozenset),
    clock_off=st.sampled_from([0.0, -7200.0, 7200.0, -3 * 86400.0, 3 * 86400.0]),
    readable=st.booleans(),
)


class World:
    """An account that others use too."""

    def __init__(
        self, folder: Any, script: list[str], oddities: Oddities, jumps: list[float], lag: float
    ) -> None:
        self.clock = FakeClock(jumps)
        self.service = make_service(folder, self.clock, list_lag_seconds=lag)
        self.faults = iter(script)
        self.api = FaultyAPI(self.service, self.faults, self.clock, oddities)
        self.start = self.clock.time()

    def copy_mark(self, work: BatchWork) -> str:
        """Let a neighbour create a batch over a file of theirs that carries the mark of ours; return its id."""
        answer = self.service.add_file("theirs.jsonl", "batch", [b"{}\n"])
        request = {**replace(work, completion_window="48h").request(answer["data"]["id"])}
        return str(self.service.create_batch(request)["id"])

    def submission(self, ledger: Any, search: Search) -> Submission:
        return Submission(self.api, ledger=ledger, earlier_tries=search, since=self.start, clock=self.clock)

    def submit(
        self, work: BatchWork, ledger: Any = None, search: Search = "patiently", **options: Any
    ) -> Batch:
        return self.submission(NoLedger() if ledger is None else ledger, search).submit(work, **options)

    def ours(self, work: BatchWork, foreign: set[str]) -> list[str]:
        return [batch["id"] for batch in batches_of(self.service, work) if batch["id"] not in foreign]


@pytest.fixture
def world(tmp_path: Any) -> World:
    return World(tmp_path, [], Oddities(), [], 0.0)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    script=st.lists(st.sampled_from(FAULTS), max_size=20),
    oddities=ODDITIES,
    jumps=st.lists(st.sampled_from([0.0, -86400.0, 7200.0, 1e6]), max_size=8),
    lag=st.sampled_from([0.0, 5.0, 40.0]),
    recorded=st.booleans(),
    uploads=st.booleans(),
    copied=st.booleans(),
    retry_delay=st.sampled_from([0.0, 300.0]),
)
def test_one_batch_and_nothing_foreign(
    tmp_path_factory: pytest.TempPathFactory,
    script: list[str],
    oddities: Oddities,
    jumps: list[float],
    lag: float,
    recorded: bool,
    uploads: bool,
    copied: bool,
    retry_delay: float,
) -> None:
    world = World(tmp_path_factory.mktemp("world"), script, oddities, jumps, lag)
    work = make_upload_work(world.api) if uploads else make_work(world.service)
    foreign = {world.copy_mark(work)} if copied else set()
    ledger: Any = FaultyLedger(world.faults) if recorded else NoLedger()
    last: Any = None
    for attempt in range(1, len(script) + 4):
        try:
            batch = world.submit(work, ledger, "none" if attempt == 1 else "patiently")
            break
        except (Crash, SiliconFlowError) as exc:
            last = exc
        assert isinstance(last, Crash) or last.retryable, last
        assert len(world.ours(work, foreign)) <= 1
        world.clock.sleep(retry_delay)
    else:
        # A service that tells too little of what exists leaves a try nothing but to say so, each time.
        assert isinstance(last, SubmissionUnknownError)
        assert oddities.never_told
        return
    assert world.ours(work, foreign) == [batch.id]
    assert all(world.service.get_batch(each)["status"] != "cancelling" for each in foreign)
