"""A job from its rows to its results, through any sequence of faults, crashes and retries."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from airflow_provider_siliconflow.api.exceptions import BatchTimeoutError, SiliconFlowError
from airflow_provider_siliconflow.api.models import TERMINAL_STATUSES, Batch
from airflow_provider_siliconflow.jobs import downloads
from airflow_provider_siliconflow.jobs.identity import WORK_KEY, Submitter
from airflow_provider_siliconflow.jobs.ledger import FolderLedger, Owner
from airflow_provider_siliconflow.jobs.options import check_options
from airflow_provider_siliconflow.jobs.run import BatchRun, Wait
from airflow_provider_siliconflow.jobs.submission import Submission
from airflow_provider_siliconflow.jobs.waiting import BatchWait
from tests.unit.jobs.faulty import FAULTS, Crash, FakeClock, FaultyAPI, make_service

ROWS = 7
MODELS = ["Qwen/Qwen3-32B", "THUDM/GLM-4-9B-0414"]


class Life:
    """The tries of one task instance; each knows nothing but the folder and the service."""

    def __init__(self, folder: Any, script: list[str], lag: float) -> None:
        self.clock = FakeClock()
        self.service = make_service(folder / "service", self.clock, list_lag_seconds=lag)
        self.api = FaultyAPI(self.service, iter(script), self.clock)
        self.output = folder / "output"
        self.start = self.clock.time()

    def _open_submission(self, ledger: FolderLedger, number: int) -> Submission:
        write = ledger._write

        def die_around() -> None:
            self.api.meet(("crash-before",))
            write()
            self.api.meet(("crash-after",))

        ledger._write = die_around  # type: ignore[method-assign]
        return Submission(
            self.api,
            ledger=ledger,
            earlier_tries="none" if number == 1 else "patiently",
            since=self.start,
            clock=self.clock,
        )

    def results(self) -> dict[str, bytes]:
        return {
            f"{model}/{name}": (self.output / model.replace("/", "--") / f"{name}.jsonl").read_bytes()
            for model in MODELS
            for name in ("results", "errors")
        }

    def attempt(self, number: int) -> dict[str, Any]:
        submitter = Submitter("dag", "run", "task", -1, 3)
        owner = Owner.new(submitter, try_number=number, try_id=str(number))
        run = BatchRun(
            check_options(
                model=None,
                models=MODELS,
                completion_window="24h",
                metadata=None,
                max_rows_per_batch=4,
                max_bytes_per_batch=10**6,
                max_in_flight=3,
                max_row_attempts=2,
                max_error_rate=None,
                prices=None,
                request_params=None,
            ),
            submitter=submitter,
            client=self.api,  # type: ignore[arg-type]
            conn_id="c",
            output_dir=self.output,
            open_submission=lambda ledger: self._open_submission(ledger, number),
            earlier_tries=number > 1,
            owner=replace(owner, at=self.clock.time()),
            cancel_on_kill=True,
            clock=self.clock,
        )
        prompts = [f"Say {i}" + (" [[emulator:once=503]]" if i == 5 else "") for i in range(ROWS)]
        wait = run.start(lambda: prompts, "requests", timeout=None)
        while wait is not None:
            wait = run.resume(self._wait(wait))
        return run.finish()

    def _wait(self, wait: Wait) -> list[Batch]:
        state = BatchWait(
            wait.batch_ids, self.clock.time(), 60.0, deadline=wait.deadline, min_ended=wait.min_ended
        )
        while True:
            for batch_id in state.due(self.clock.time()):
                try:
                    batch = self.api.get_batch(batch_id)
                except SiliconFlowError as exc:
                    state.fault(batch_id, exc, self.clock.time())
                else:
                    state.observe(batch_id, batch, self.clock.time())
            if state.finished:
                return state.batches
            state.check_deadline(self.clock.time())
            self.clock.sleep(state.pause(self.clock.time()))


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    script=st.lists(st.sampled_from(FAULTS), max_size=60),
    lag=st.sampled_from([0.0, 40.0]),
    retry_delay=st.sampled_from([0.0, 300.0]),
)
def test_every_row_once_whatever_happens(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    script: list[str],
    lag: float,
    retry_delay: float,
) -> None:
    life = Life(tmp_path_factory.mktemp("life"), script, lag)
    monkeypatch.setattr(downloads, "SystemClock", lambda: life.clock)
    for number in range(1, len(script) + 3):
        try:
            manifest = life.attempt(number)
            break
        except BatchTimeoutError:
            raise
        except (Crash, SiliconFlowError) as exc:
            if isinstance(exc, SiliconFlowError) and not exc.retryable:
                raise
            life.clock.sleep(retry_delay)
    else:
        pytest.fail("it never came to an end")
    # Two shards over two models, and one batch with the one row worth another attempt for each.
    batches = life.service.state()["batches"]
    keys = [batch["metadata"][WORK_KEY] for batch in batches]
    assert len(keys) == len(set(keys)) == 6
    assert all(batch["status"] in TERMINAL_STATUSES for batch in batches)
    # A file whose answer was lost is uploaded again if its content cannot be compared just then.
    files = life.service.list_files(purpose="batch")["data"]["data"]
    assert len({file["filename"] for file in files}) == 3
    assert manifest["rows"] == {"total": 2 * ROWS, "ok": 2 * ROWS, "error": 0, "expired": 0, "missing": 0}
    for model in MODELS:
        text = (life.output / model.replace("/", "--") / "results.jsonl").read_text()
        found = [json.loads(line)["custom_id"] for line in text.splitlines()]
        assert found == [f"row-{i:07d}" for i in range(1, ROWS + 1)]


def test_a_crash_at_any_boundary_changes_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def live(folder: Path, script: list[str]) -> Life:
        life = Life(folder, script, lag=30.0)
        monkeypatch.setattr(downloads, "SystemClock", lambda: life.clock)
        if script:
            with pytest.raises(Crash):
                life.attempt(1)
        life.attempt(2 if script else 1)
        return life

    calm = live(tmp_path / "calm", [])
    assert calm.api.met > 50
    for point in range(calm.api.met):
        for crash in ("crash-before", "crash-after"):
            if crash not in calm.api.possible[point]:
                continue
            hurt = live(tmp_path / f"{point}-{crash}", ["none"] * point + [crash])
            assert len(hurt.service.state()["batches"]) == 6, f"{crash} at {point}"
            assert len(hurt.service.list_files(purpose="batch")["data"]["data"]) == 3, f"{crash} at {point}"
            assert hurt.results() == calm.results(), f"{crash} at {point}"
            assert not list(hurt.output.glob(".siliconflow")), f"{crash} at {point}"
