"""A job from its rows to its results, through any sequence of faults, crashes, late results, tries and retries."""

from __future__ import annotations

import contextlib
import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from airflow_provider_siliconflow.api.exceptions import (
    BatchTimeoutError,
    JobTakenOverError,
    SiliconFlowError,
)
from airflow_provider_siliconflow.api.models import TERMINAL_STATUSES, Batch
from airflow_provider_siliconflow.emulator.service import ServiceError
from airflow_provider_siliconflow.jobs.identity import WORK_KEY, Submitter
from airflow_provider_siliconflow.jobs.ledger import FolderLedger, Owner
from airflow_provider_siliconflow.jobs.opening import JobTry
from airflow_provider_siliconflow.jobs.options import check_options
from airflow_provider_siliconflow.jobs.run import BatchRun, Wait
from airflow_provider_siliconflow.jobs.submission import Submission
from airflow_provider_siliconflow.jobs.waiting import BatchWait
from tests.unit.jobs.faulty import FAULTS, Crash, FakeClock, FaultyAPI, make_service

ROWS = 7
MODELS = ["Qwen/Qwen3-32B", "THUDM/GLM-4-9B-0414"]

#: What may happen while a job waits: a person cancels a batch, the service stops or loses one, another try begins
#: beside this one, or the task is deferred and resumed elsewhere.
EVENTS = ("none", "console", "cancelled", "failed", "second try", "deferred")

#: In place of an answer that is any text: the service asks for JSON, and some rows are answered wrongly at first.
TYPED = {
    "output_type": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
    "retry_params": {"seed": 1},
    "max_row_attempts": 4,
}
WRONG = {"invalid_rate": 0.3, "truncated_rate": 0.1, "empty_rate": 0.1}


def is_point(answer: dict[str, Any]) -> bool:
    """Whether an answer is as ``TYPED`` wants it."""
    choice = answer["response"]["body"]["choices"][0]
    try:
        found = json.loads(choice["message"]["content"])
    except ValueError:
        return False
    return isinstance(found, dict) and type(found.get("x")) is int and choice["finish_reason"] == "stop"


quickly = settings(deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def _disk_that_keeps_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """These processes die, the machine does not."""
    monkeypatch.setattr(
        "airflow_provider_siliconflow.batch_files.atomic_files.os.fsync", lambda descriptor: None
    )


class Life:
    """
    The tries of one task instance; each knows nothing but the folder and the service.

    :param script: what happens at each boundary of a process, see ``FAULTS``.
    :param events: what happens at each poll, see ``EVENTS``.
    :param config: of the service.
    """

    #: The rows of the job, if they are not numbers; and which these are.
    requests: Sequence[Any] = ()
    rows: Sequence[int] = range(ROWS)

    def __init__(
        self,
        folder: Any,
        script: list[str],
        events: list[str] = [],  # noqa: B006
        arguments: Mapping[str, Any] = MappingProxyType({}),
        **config: Any,
    ) -> None:
        self.arguments = dict(arguments)
        self.clock = FakeClock()
        self.service = make_service(folder / "service", self.clock, **config)
        self.api = FaultyAPI(self.service, iter(script), self.clock)
        self.events = iter(events)
        self.output = folder / "output"
        self.cache_dir: Any = None
        self.begun = self.clock.time()
        self.tries = 0
        #: Manual clears so far.
        self.clears = 0
        #: Whether rows fail once, for a reason that the job itself makes no further attempt for.
        self.some_fail = False

    # The job ----------------------------------------------------------------------------------------------

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
            since=self.begun,
            clock=self.clock,
        )

    def process(self, number: int) -> BatchRun:
        """Return the job in a process of its own."""
        submitter = Submitter("dag", "run", "task", -1, 0, epoch=3 + self.clears)
        owner = Owner.new(submitter, try_number=number, try_id=str(number))
        return BatchRun(
            JobTry(
                options=check_options(
                    **{
                        "model": None,
                        "models": MODELS,
                        "completion_window": "24h",
                        "metadata": None,
                        "max_rows_per_batch": 4,
                        "max_bytes_per_batch": 10**6,
                        "max_in_flight": 3,
                        "max_row_attempts": 2,
                        "max_error_rate": None,
                        "prices": None,
                        "request_params": None,
                        **self.arguments,
                    }
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
                cache_dir=self.cache_dir,
            )
        )

    def attempt(self) -> dict[str, Any]:
        """Make one try, from its start to its end."""
        self.tries += 1
        number = self.tries
        run = self.process(number)
        marks = {5: " [[emulator:once=503]]"} | ({1: " [[emulator:once=400]]"} if self.some_fail else {})
        requests = self.requests or [f"Say {i}{marks.get(i, '')}" for i in self.rows]
        wait = run.start(lambda: requests, "requests", timeout=None)
        while wait is not None:
            event = next(self.events, "none")
            if event in ("second try", "cleared"):
                # A clear ends the try in which the task waits, wherever that try is; the next one begins beside it.
                self.clears += event == "cleared"
                with contextlib.suppress(SiliconFlowError):
                    self.attempt()
                with pytest.raises(JobTakenOverError):
                    self._go_on(run, wait)
                raise JobTakenOverError("and this one fails")
            self._happen(event)
            if event == "deferred":
                run = self.process(number)
            wait = self._go_on(run, wait)
        return run.finish()

    def _go_on(self, run: BatchRun, wait: Wait) -> Wait | None:
        ended = self._wait(wait)
        resumed = run.resume(ended)
        if resumed is None and run._earlier_manifest is not None:
            raise JobTakenOverError("the other try has finished")
        return resumed

    def _happen(self, event: str) -> None:
        open_ones = [b["id"] for b in self.service.state()["batches"] if b["status"] not in TERMINAL_STATUSES]
        if not open_ones:
            return
        if event == "console":
            self.service.cancel_batch(open_ones[0])
        elif event in ("cancelled", "failed"):
            self.clock.sleep(25.0)
            self.service.force_status(open_ones[-1], event)

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

    def live(self, most: int, retry_delay: float) -> dict[str, Any]:
        """Retry until a try succeeds, and return its manifest."""
        for _ in range(most):
            try:
                return self.attempt()
            except BatchTimeoutError:
                raise
            except (Crash, SiliconFlowError) as exc:
                if isinstance(exc, SiliconFlowError) and not exc.retryable:
                    raise
                self.clock.sleep(retry_delay)
        pytest.fail("it never came to an end")

    # What came of it --------------------------------------------------------------------------------------

    def results(self) -> dict[str, bytes]:
        return {
            f"{model}/{name}": (self.output / model.replace("/", "--") / f"{name}.jsonl").read_bytes()
            for model in MODELS
            for name in ("results", "errors")
        }

    def sent(self) -> tuple[int, int]:
        """Return how many batches and files the service was sent."""
        files = self.service.list_files(purpose="batch")["data"]["data"]
        return len(self.service.state()["batches"]), len(files)

    def answers(self) -> Iterator[dict[str, Any]]:
        """Yield every answer that the service gave, of dead batches as well: that is what it bills."""
        for batch in self.service.state()["batches"]:
            with contextlib.suppress(ServiceError):
                for line in self.service.open_results(batch["id"], "output").read_bytes().splitlines():
                    yield json.loads(line)

    def check(self, manifest: dict[str, Any]) -> None:
        """Every row once and in order, none paid for twice, and the manifest's bill is the service's."""
        for model in MODELS:
            text = (self.output / model.replace("/", "--") / "results.jsonl").read_text()
            found = [json.loads(line)["custom_id"] for line in text.splitlines()]
            assert found == [f"row-{i:07d}" for i in range(1, ROWS + 1)]
        assert manifest["rows"] == {
            "total": 2 * ROWS,
            "ok": 2 * ROWS,
            "error": 0,
            "invalid": 0,
            "expired": 0,
            "missing": 0,
        }
        answers = list(self.answers())
        rows = Counter((answer["custom_id"], answer["response"]["body"]["model"]) for answer in answers)
        wrong = Counter(
            (answer["custom_id"], answer["response"]["body"]["model"])
            for answer in answers
            if "output_type" in self.arguments and not is_point(answer)
        )
        assert all(count == 1 + wrong[row] for row, count in rows.items())
        tokens = sum(answer["response"]["body"]["usage"]["total_tokens"] for answer in answers)
        assert manifest["billed_usage"]["total_tokens"] == tokens
        batches = self.service.state()["batches"]
        assert all(batch["status"] in TERMINAL_STATUSES for batch in batches)
        named = {batch["id"] for each in manifest["models"] for batch in each["batches"]}
        assert named == {batch["id"] for batch in batches}
        assert not list(self.output.glob(".siliconflow"))


@settings(quickly, max_examples=120)
@given(
    script=st.lists(st.sampled_from(FAULTS), max_size=60),
    lag=st.sampled_from([0.0, 40.0]),
    retry_delay=st.sampled_from([0.0, 300.0]),
)
def test_every_row_once_whatever_happens(
    tmp_path_factory: pytest.TempPathFactory, script: list[str], lag: float, retry_delay: float
) -> None:
    life = Life(tmp_path_factory.mktemp("life"), script, list_lag_seconds=lag)
    life.check(life.live(len(script) + 2, retry_delay))
    # Two shards over two models, and one batch with the one row worth another attempt for each.
    keys = [batch["metadata"][WORK_KEY] for batch in life.service.state()["batches"]]
    assert len(keys) == len(set(keys)) == 6


SECONDS = st.sampled_from([0.0, 30.0, 100.0, 400.0])


@settings(quickly, max_examples=150)
@given(
    script=st.lists(st.sampled_from(("none", *FAULTS)), max_size=30),
    events=st.lists(st.sampled_from(EVENTS), max_size=8),
    service=st.fixed_dictionaries(
        {
            "list_lag_seconds": st.sampled_from([0.0, 40.0]),
            "settle_seconds": SECONDS | st.just(1e9),
            "settle_as": st.sampled_from(["zeros", "null", "empty"]),
            "late_output_seconds": SECONDS,
            "late_error_seconds": SECONDS,
            "partial_output_seconds": SECONDS,
            "max_open_batches": st.sampled_from([0, 2]),
        }
    ),
    retry_delay=st.sampled_from([0.0, 300.0]),
    typed=st.booleans(),
)
def test_no_row_is_paid_twice_or_lost_whatever_comes_late_or_dies(
    tmp_path_factory: pytest.TempPathFactory,
    script: list[str],
    events: list[str],
    service: dict[str, Any],
    retry_delay: float,
    typed: bool,
) -> None:
    """With a type, a row is paid as often as it was answered wrongly, and once more."""
    if typed:
        service = {**service, **WRONG}
    arguments = TYPED if typed else {}
    life = Life(tmp_path_factory.mktemp("life"), script, events, arguments, rows_per_second=0.1, **service)
    # An hour after the end of a batch nothing is waited for any more: twelve tries for each that died.
    life.check(life.live(len(script) + 14 * (len(events) + 2), retry_delay))


@settings(quickly, max_examples=100)
@given(
    script=st.lists(st.sampled_from(("none", *FAULTS)), max_size=30),
    events=st.lists(st.sampled_from((*EVENTS, "cleared")), max_size=6),
    again=st.lists(st.lists(st.sampled_from(("none", *FAULTS)), max_size=20), min_size=1, max_size=3),
    settle=SECONDS,
    retry_delay=st.sampled_from([0.0, 300.0]),
)
def test_a_row_that_was_answered_is_never_paid_again_by_a_clear(
    tmp_path_factory: pytest.TempPathFactory,
    script: list[str],
    events: list[str],
    again: list[list[str]],
    settle: float,
    retry_delay: float,
) -> None:
    """The task is cleared while it waits and after it has ended, and each of its lives has faults of its own."""
    life = Life(tmp_path_factory.mktemp("life"), script, events, settle_seconds=settle)
    life.some_fail = True
    manifest = life.live(len(script) + 14 * (len(events) + 2), retry_delay)
    assert manifest["rows"]["ok"] >= 2 * (ROWS - 1)
    for faults in again:
        life.clears += 1
        life.api.script = iter(faults)
        manifest = life.live(len(faults) + 14, retry_delay)
    life.check(manifest)


# In parts, which run side by side.
@pytest.mark.parametrize(
    ("typed", "part"), [(False, slice(None)), *((True, slice(n, None, 4)) for n in range(4))]
)
def test_a_crash_at_any_boundary_changes_no_byte(tmp_path: Path, typed: bool, part: slice) -> None:
    def live(folder: Path, script: list[str]) -> Life:
        # Polls are jittered, and a boundary is where it was in the calm life only if they come in the same order.
        random.seed(0)
        wrong = WRONG if typed else {}
        life = Life(folder, script, [], TYPED if typed else {}, list_lag_seconds=30.0, **wrong)
        if script:
            with pytest.raises(Crash):
                life.attempt()
        life.attempt()
        return life

    calm = live(tmp_path / "calm", [])
    batches, files = calm.sent()
    assert (batches, files) == (6, 3) or (typed and batches > 6)
    assert calm.api.met > 50
    for point, crash in calm.api.crashes()[part]:
        hurt = live(tmp_path / f"{point}-{crash}", ["none"] * point + [crash])
        assert hurt.sent() == calm.sent(), f"{crash} at {point}"
        assert hurt.results() == calm.results(), f"{crash} at {point}"
        assert not list(hurt.output.glob(".siliconflow")), f"{crash} at {point}"
