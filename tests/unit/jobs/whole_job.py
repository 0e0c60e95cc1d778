"""A job whose tries run against the emulator, over HTTP, with a clock whose pauses cost nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from airflow_provider_siliconflow.api.client import SiliconFlowClient
from airflow_provider_siliconflow.api.models import Batch
from airflow_provider_siliconflow.api.settings import ClientSettings
from airflow_provider_siliconflow.emulator.server import Emulator
from airflow_provider_siliconflow.jobs.identity import Submitter
from airflow_provider_siliconflow.jobs.ledger import FolderLedger, Owner
from airflow_provider_siliconflow.jobs.opening import JobTry
from airflow_provider_siliconflow.jobs.options import check_options
from airflow_provider_siliconflow.jobs.run import BatchRun, Wait
from airflow_provider_siliconflow.jobs.submission import Search, Submission
from airflow_provider_siliconflow.jobs.waiting import BatchWait

MODELS = ["Qwen/Qwen3-32B", "THUDM/GLM-4-9B-0414"]


class Clock:
    """The emulator's clock, whose pauses take no time."""

    def __init__(self, emulator: Emulator) -> None:
        self._service = emulator.service

    def time(self) -> float:
        return self._service.now()

    def monotonic(self) -> float:
        return self._service.now()

    def sleep(self, seconds: float) -> None:
        self._service.advance(seconds)


def rows(count: int, mark: Callable[[int], str] = lambda _: "") -> list[dict[str, Any]]:
    return [
        {"custom_id": f"q{i}", "messages": [{"role": "user", "content": f"Say {i} {mark(i)}"}]}
        for i in range(count)
    ]


def options(**changes: Any) -> Any:
    arguments = {
        "model": None,
        "models": MODELS,
        "completion_window": "24h",
        "metadata": None,
        "max_rows_per_batch": 5,
        "max_bytes_per_batch": 10**6,
        "max_in_flight": None,
        "max_row_attempts": 1,
        "max_error_rate": None,
        "prices": None,
        "request_params": None,
    }
    return check_options(**(arguments | changes))


class Job:
    """One task instance: its tries share a folder and nothing else."""

    def __init__(self, emulator: Emulator, folder: Path, requests: Any, **changes: Any) -> None:
        self.emulator, self.folder, self.requests = emulator, folder, requests
        self.options = options(**changes)
        self.tries = 0
        self.map_index = -1
        self.generation = 5
        #: Manual clears so far that reuse the work.
        self.clears = 0
        self.run_start = ""
        self.run_was_cleared = False
        self.cache_dir: Path | None = None
        self.run_id = "run"
        self.conn_id = "c"
        self.cancel_on_kill = True
        self.host = emulator.base_url
        self.after: Callable[[str], None] = lambda _: None
        self.clock = Clock(emulator)
        self.timeout: float | None = None
        self.waits: list[Wait] = []

    def client(self) -> SiliconFlowClient:
        job = self

        class Client(SiliconFlowClient):
            def _send(self, call: Any, *arguments: Any, **options: Any) -> Any:
                answer = super()._send(call, *arguments, **options)
                job.after(call.name)
                return answer

        return Client(ClientSettings("sk-test", self.host, backoff=0.01))

    def attempt(self) -> dict[str, Any]:
        """Make another try, from its start to its end."""
        run = self.next_try()
        return self.carry_out(run, run.start(lambda: self.requests, "requests", timeout=self.timeout))

    def clear(self) -> None:
        """Clear the task by hand."""
        self.clears += 1

    def next_try(self) -> BatchRun:
        """Return the job of another try, in a process of its own."""
        self.tries += 1
        return self.process()

    def process(self, try_id: str | None = None) -> BatchRun:
        """
        Return the job in another process of the present try.

        :param try_id: of another try with the same number, as ``airflow tasks test`` makes it.
        """
        client = self.client()

        def open_submission(ledger: FolderLedger) -> Submission:
            tries: Search = "none" if self.tries == 1 else "patiently"
            return Submission(client, ledger=ledger, earlier_tries=tries, since=0.0, clock=self.clock)

        submitter = Submitter(
            "dag",
            self.run_id,
            "task",
            self.map_index,
            self.generation,
            epoch=self.generation + self.clears,
            run_start=self.run_start,
            run_was_cleared=self.run_was_cleared,
        )
        owner = Owner.new(submitter, try_number=self.tries, try_id=try_id or str(self.tries))
        return BatchRun(
            JobTry(
                options=self.options,
                submitter=submitter,
                client=client,
                conn_id=self.conn_id,
                output_dir=self.folder,
                open_submission=open_submission,
                earlier_tries=self.tries > 1,
                owner=replace(owner, at=self.clock.time()),
                cancel_on_kill=self.cancel_on_kill,
                clock=self.clock,
                cache_dir=self.cache_dir,
            )
        )

    def carry_out(self, run: BatchRun, wait: Wait | None) -> dict[str, Any]:
        """Wait as long as the job wants it, and return its manifest."""
        while wait is not None:
            self.waits.append(wait)
            wait = run.resume(self.wait(wait))
        return run.finish()

    def wait(self, wait: Wait) -> list[Batch]:
        """Poll until as many batches have ended as a job waits for."""
        client = self.client()
        state = BatchWait(
            wait.batch_ids, self.clock.time(), 60.0, min_ended=wait.min_ended, resume_at=wait.resume_at
        )
        while not state.is_over(self.clock.time()):
            for batch_id in state.due(self.clock.time()):
                state.observe(batch_id, client.get_batch(batch_id), self.clock.time())
            state.check_deadline(self.clock.time())
            if not state.finished:
                # The service runs by its own clock, and so fast that no pause is needed.
                self.clock.sleep(state.pause(self.clock.time()) if state.settling else 0.0)
                state.make_all_due(self.clock.time())
        return state.batches


def results(folder: Path, model: str = MODELS[0]) -> list[dict[str, Any]]:
    path = folder / model.replace("/", "--") / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def posts(emulator: Emulator) -> tuple[int, int]:
    counts = emulator.request_counts
    return counts.get("POST /files", 0), counts.get("POST /batches", 0)


def fail_first_of(emulator: Emulator) -> Callable[[str], None]:
    """Let the first batch that is created fail as a whole."""
    failed: list[str] = []

    def fail(name: str) -> None:
        if name == "POST /batches" and not failed:
            failed.append(emulator.service.state()["batches"][-1]["id"])
            emulator.service.force_status(failed[0], "failed")

    return fail
