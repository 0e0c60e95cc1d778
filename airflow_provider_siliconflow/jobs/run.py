"""
A whole job: any number of rows over one or more models, in rounds, with results in the order of the rows.

Only :class:`BatchRun` knows the order of the steps. It never waits: :meth:`~BatchRun.start` and
:meth:`~BatchRun.resume` return a :class:`Wait` for their caller to carry out, in this process or another one, until
they return ``None`` and :meth:`~BatchRun.finish` writes the manifest::

    wait = run.start(requests, "requests", timeout=None)
    while wait is not None:
        ended = hook.wait_for_batches(
            wait.batch_ids, min_ended=wait.min_ended, deadline=wait.deadline, resume_at=wait.resume_at
        )
        wait = run.resume(ended)
    manifest = run.finish()

A process may die at any point. A folder in the output folder contains everything that a later process needs: the plan,
the shards, and a ledger of what was uploaded and created.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

from airflow_provider_siliconflow.api.exceptions import (
    InvalidInputError,
    JobTakenOverError,
    SiliconFlowError,
)
from airflow_provider_siliconflow.api.models import Batch
from airflow_provider_siliconflow.batch_files.atomic_files import write_json
from airflow_provider_siliconflow.batch_files.manifest import render_summary
from airflow_provider_siliconflow.jobs.clock import SteadyClock
from airflow_provider_siliconflow.jobs.collecting import Collected, Collector
from airflow_provider_siliconflow.jobs.finished import input_entry
from airflow_provider_siliconflow.jobs.job import OpenJob
from airflow_provider_siliconflow.jobs.live import LivePhase
from airflow_provider_siliconflow.jobs.opening import JobTry, Opening
from airflow_provider_siliconflow.jobs.outcome import unfinished_job
from airflow_provider_siliconflow.jobs.sending import Sender
from airflow_provider_siliconflow.jobs.spend import Budget

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Wait:
    """
    A wait that the job needs before its next step.

    :param batch_ids: the open batches.
    :param min_ended: how many of them must end before :meth:`BatchRun.resume`; ``None`` for all.
    :param deadline: when the wait ends, in epoch seconds; ``None`` leaves it to the batches.
    :param resume_at: when to resume whatever has ended, in epoch seconds; ``None`` for never.
    :param poll_limit: most seconds between two polls of a batch; ``None`` leaves it to the caller.
    """

    batch_ids: tuple[str, ...]
    min_ended: int | None
    deadline: float | None
    resume_at: float | None = None
    poll_limit: float | None = None

    def poll_interval(self, wanted: float) -> float:
        """
        Return the seconds between two polls of a batch.

        :param wanted: what the author asks for.
        """
        return wanted if self.poll_limit is None else min(wanted, self.poll_limit)


@dataclass(frozen=True, slots=True)
class _Opened:
    """A job opened in this process, with what works on it."""

    job: OpenJob
    sender: Sender
    collector: Collector
    live: LivePhase


#: Most seconds between two polls of a batch that was cancelled so that its rows can be asked one by one.
_LIVE_POLL = 10.0
#: Seconds after which the job looks again at batches that it cancelled and that have not ended, for ten times as long.
_LIVE_LOOK = 60.0


class BatchRun:
    """
    The driver of one job, in one process.

    :param job_try: the try that it belongs to.
    """

    def __init__(self, job_try: JobTry) -> None:
        # A clock that is set forward must not shorten the patience with a batch that is not settled.
        job_try = self._try = replace(job_try, clock=SteadyClock(job_try.clock))
        self._opening = Opening(job_try)
        self._opened: _Opened | None = None
        self._collected: Collected | None = None
        self._earlier_manifest: dict[str, Any] | None = None
        self._stopped = False
        self._cancels = False

    # The driver -------------------------------------------------------------------------------------------

    def start(self, requests: Callable[[], Any], name: str, *, timeout: float | None) -> Wait | None:
        """
        Begin a try: plan and submit, or continue what an earlier try left.

        :param requests: returns the rows, a file or Python objects. They are compared with the rows of an earlier
            try's plan.
        :param name: how messages call the rows.
        :param timeout: seconds until the try's waits end, over all of its deferrals; ``None`` leaves it to the batches.
        :returns: what to wait for; ``None`` if nothing is left but :meth:`finish`.
        :raises InvalidRequestFileError: rows are wrong; nothing was uploaded.
        :raises InvalidInputError: rows were changed since they were submitted, or another job runs in ``output_dir``.
        :raises SiliconFlowError: the service refuses, and has accepted no batch of this job.
        """
        self._earlier_manifest = self._opening.answered(requests, name)
        if self._earlier_manifest is not None:
            return None
        job = self._opening.prepare(requests, name)
        opened = self._take(job, began=self._try.owner.at)
        split = job.plan.split
        log.info(
            "%d rows in %d shards over %s: %d batches, about %d prompt tokens per model",
            split.rows,
            len(split.shards),
            ", ".join(job.options.models) or "the models that the rows name",
            sum(1 for _ in job.pieces),
            split.prompt_tokens,
        )
        if split.invalid:
            log.warning(
                "%d rows of %s are invalid: they are not sent, and count as errors", split.invalid, name
            )
        if self._is_live(job) and job.live_start is None and not job.has_paid and job.live_at:
            log.warning(
                "live_after has passed already: no batch is sent, and all rows are asked live, at the live price"
            )
        job.ledger.deadline = None if timeout is None else self._try.clock.time() + timeout
        opened.sender.take_up()
        return self._advance(opened)

    def resume(self, ended: Iterable[Batch]) -> Wait | None:
        """
        Continue after a wait, in any process.

        :param ended: the batches that ended.
        :returns: what to wait for next; ``None`` if nothing is left but :meth:`finish`.
        :raises InvalidInputError: the job's folder is gone.
        :raises JobTakenOverError: another try has taken over the job.
        """
        try:
            opened = self._open()
        except InvalidInputError:
            self._earlier_manifest = self._opening.finished_manifest()
            if self._earlier_manifest is None:
                raise
            log.info("Another try of this task has finished the job; using its manifest")
            return None
        opened.job.ledger.check_owner()
        batches = list(ended)
        opened.job.record_ended(batches, at=self._try.clock.time())
        opened.collector.settle(batches)
        return self._advance(opened)

    def finish(self) -> dict[str, Any]:
        """
        Write the manifest and return it.

        :raises SiliconFlowError: what kept rows from being asked one by one; the results of the others are written.
        :raises BatchFailedError: batches failed, were cancelled or refused; the results of the others are written.
        :raises IncompleteResultsError: batches cannot be read; the results of the others are written.
        """
        if self._earlier_manifest is not None:
            return self._earlier_manifest
        opened = self._open()
        opened.job.ledger.check_owner()
        collected = self._collected or opened.collector.collect()
        manifest = opened.collector.manifest(collected)
        manifest["task"] = asdict(self._try.submitter)
        manifest["input"] = input_entry(opened.job.plan, try_number=self._try.owner.try_number)
        log.info("Results are in %s\n%s", self._try.output_dir, render_summary(manifest))
        unfinished = unfinished_job(
            opened.job, collected, self._try.output_dir, live_problem=opened.live.problem
        )
        # This key marks the manifest as final, whether or not the job counts as a success.
        manifest["unfinished" if unfinished else "run"] = self._opening.key
        opened.job.ledger.check_owner()
        if self._try.cache_dir is not None:
            # Before the manifest: once that is final, nobody comes back for the answers.
            opened.collector.keep_answers(self._try.cache_dir, self._opening.key, collected)
            opened.job.ledger.check_owner()
        write_json(self._try.output_dir / "manifest.json", manifest)
        if unfinished:
            raise unfinished
        self._opening.close(opened.job)
        return manifest

    def _advance(self, opened: _Opened) -> Wait | None:
        """Submit what is due; once all batches have ended, collect, and plan the next round."""
        job = opened.job
        while not self._is_live(job):
            is_full = opened.sender.submit_due()
            if awaited := job.awaited:
                return Wait(
                    awaited,
                    1 if is_full else self._min_ended(job),
                    job.ledger.deadline,
                    resume_at=job.live_at,
                )
            self._opening.refuse_sibling()
            self._opening.withdraw_manifest(job)
            self._collected = opened.collector.collect()
            shards = opened.collector.next_round(self._collected)
            if shards is None:
                return None
            job.add_round(shards)
            log.info(
                "Round %d: %d rows are sent again in %d batches",
                len(job.rounds) - 1,
                sum(piece.shard.rows for piece in job.current),
                len(job.current),
            )
        return self._ask_live(opened)

    def _is_live(self, job: OpenJob) -> bool:
        """Whether the time has come from which on the job asks what is left row by row."""
        at = job.live_at
        return at is not None and self._try.clock.time() >= at

    def _ask_live(self, opened: _Opened) -> Wait | None:
        """End the batches; once all have ended, ask the rows that are left, in rounds."""
        job = opened.job
        opened.collector.settle(opened.sender.end_batches(self._try.clock.time()))
        if awaited := job.awaited:
            return Wait(
                awaited,
                None,
                job.ledger.deadline,
                resume_at=job.settles_at or self._next_look(job),
                poll_limit=_LIVE_POLL,
            )
        self._opening.refuse_sibling()
        self._opening.withdraw_manifest(job)
        while True:
            if job.live_rounds:
                budget = opened.collector.budget
                opened.live.ask(Fraction() if budget is None else budget.read_spent().total)
            self._collected = opened.collector.collect()
            if opened.live.problem is not None:
                return None
            shards = opened.collector.next_live_round(self._collected)
            if shards is None:
                return None
            pieces = job.add_round(shards, live=True)
            log.info(
                "Round %d: %d rows have no answer and are asked live",
                pieces[0].round,
                sum(piece.shard.rows for piece in pieces),
            )

    def _next_look(self, job: OpenJob) -> float | None:
        """Return when to look at batches that were cancelled and have not ended; ``None``: when they have."""
        now = self._try.clock.time()
        is_recent = job.live_start is not None and now - job.live_start.at < 10 * _LIVE_LOOK
        return now + _LIVE_LOOK if is_recent else None

    @staticmethod
    def _min_ended(job: OpenJob) -> int | None:
        waiting = any(map(job.is_waiting, job.current))
        # Otherwise a large job would wake its task 200 times, once for every batch.
        return max(len(job.awaited) // 4, 1) if waiting else None

    # Opening ----------------------------------------------------------------------------------------------

    def _open(self) -> _Opened:
        """Return the job; open it from its folder if this process has not done so yet."""
        if self._opened is None:
            job, owner = self._opening.reopen()
            return self._take(job, began=owner.at)
        return self._opened

    def _take(self, job: OpenJob, *, began: float) -> _Opened:
        collector = Collector(job, self._try.client, self._try.output_dir, clock=self._try.clock)
        tariff, clock = job.options.tariff(), self._try.clock
        live = LivePhase(job, self._try.client, clock=clock)
        collector.live, collector.began = live, began
        if tariff is not None:
            collector.budget = Budget(job, tariff, collector.read, clock=clock)
            collector.budget.live = live
        sender = Sender(job, self._try.client, collector, clock=clock, began=began, budget=collector.budget)
        self._opened = _Opened(job, sender, collector, live)
        if self._stopped:
            sender.stop(cancels=self._cancels)
            live.stop()
        return self._opened

    # For callers that end the task ------------------------------------------------------------------------

    @property
    def batch_ids(self) -> tuple[str, ...]:
        """Ids of all batches so far."""
        job = self._known_job
        return () if job is None else job.batch_ids

    @property
    def open_batches(self) -> tuple[str, ...]:
        """Ids of the batches of this try that were submitted and are not known to have ended."""
        job = self._known_job
        return () if job is None else job.open_batches

    @property
    def _known_job(self) -> OpenJob | None:
        """The job, even if this process has not opened it yet; ``None`` if there is none, or another try has it."""
        try:
            job = self._open().job
            job.ledger.check_owner()
        except (InvalidInputError, JobTakenOverError) as exc:
            log.debug("No batches of this try are known: %s", exc)
            return None
        return job

    def stop(self, *, cancels: bool) -> tuple[str, ...]:
        """
        Send nothing from now on, and return the ids of the batches that are known to be open.

        If another try has taken over the job, they belong to that try, and none is returned.

        :param cancels: whether to cancel a batch that is being created right now, once its answer comes.
        """
        self._stopped, self._cancels = True, cancels
        if self._opened is not None:
            self._opened.sender.stop(cancels=cancels)
            self._opened.live.stop()
        return self.open_batches

    def check_not_stopped(self) -> None:
        """
        Refuse to continue after :meth:`stop`.

        :raises SiliconFlowError: the task was ended.
        """
        if self._stopped:
            raise SiliconFlowError("The job does not continue: the task was ended from outside")

    def owns(self, batch: Batch) -> bool:
        """Whether an open batch is proven to be of this job: others may have written into the folder of its ledger."""
        return self._opened is not None and self._opened.sender.owns(batch)

    def find_unrecorded(self, patience: float) -> list[str]:
        """
        Search the account for batches that were being created.

        :param patience: for how many seconds to repeat the search if one is not listed.
        :raises SiliconFlowError: the account cannot be searched.
        """
        return [] if self._opened is None else self._opened.sender.find_unrecorded(patience)
