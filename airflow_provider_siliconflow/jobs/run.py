"""
A whole job: rows of any number over one model or several, in rounds, back into files in the order of the rows.

:class:`BatchRun` is the only one that knows the order of the steps. It never waits: :meth:`~BatchRun.start` and
:meth:`~BatchRun.resume` return a :class:`Wait` for their caller to carry out, in this process or another one, until
they return ``None`` and :meth:`~BatchRun.finish` writes the manifest::

    wait = run.start(requests, "requests", timeout=None)
    while wait is not None:
        wait = run.resume(hook.wait_for_batches(wait.batch_ids, min_ended=wait.min_ended, deadline=wait.deadline))
    manifest = run.finish()

A process may die anywhere. Everything that a later one needs is in a folder below the output: the plan, the shards
and a ledger of what was uploaded and created.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from airflow_provider_siliconflow.api.exceptions import (
    InvalidInputError,
    JobTakenOverError,
    SiliconFlowError,
)
from airflow_provider_siliconflow.api.models import Batch
from airflow_provider_siliconflow.batch_files.atomic_files import write_json
from airflow_provider_siliconflow.batch_files.manifest import render_summary
from airflow_provider_siliconflow.jobs.collecting import Collected, Collector
from airflow_provider_siliconflow.jobs.job import OpenJob
from airflow_provider_siliconflow.jobs.opening import JobTry, Opening
from airflow_provider_siliconflow.jobs.outcome import unfinished_job
from airflow_provider_siliconflow.jobs.sending import Sender

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Wait:
    """
    What a job waits for.

    :param batch_ids: the open batches.
    :param min_ended: how many of them must end before :meth:`BatchRun.resume`; ``None`` for all.
    :param deadline: when the wait ends, in epoch seconds; ``None`` leaves it to the batches.
    """

    batch_ids: tuple[str, ...]
    min_ended: int | None
    deadline: float | None


@dataclass(frozen=True, slots=True)
class _Opened:
    """A job in this process, and who works on it."""

    job: OpenJob
    sender: Sender
    collector: Collector


class BatchRun:
    """
    The driver of one job, in one process.

    :param job_try: the try that does it.
    """

    def __init__(self, job_try: JobTry) -> None:
        self._try = job_try
        self._opening = Opening(job_try)
        self._opened: _Opened | None = None
        self._collected: Collected | None = None
        self._earlier_manifest: dict[str, Any] | None = None
        self._stopped = False
        self._cancels = False

    # The driver -------------------------------------------------------------------------------------------

    def start(self, requests: Callable[[], Any], name: str, *, timeout: float | None) -> Wait | None:
        """
        Begin a try: plan and submit, or take up what an earlier try left.

        :param requests: returns the rows, a file or Python objects. Rows that an earlier try planned are compared with
            them.
        :param name: what messages call them.
        :param timeout: seconds until the try's waits end, over all of its deferrals; ``None`` leaves it to the batches.
        :returns: what to wait for; ``None`` if nothing is left but :meth:`finish`.
        :raises InvalidRequestFileError: rows are wrong; nothing was uploaded.
        :raises InvalidInputError: rows were changed since they were submitted, or another job runs in ``output_dir``.
        :raises SiliconFlowError: the service refuses, and has taken no batch of this job.
        """
        # On a first try a manifest is of a run that was deleted and made again under the same id.
        self._earlier_manifest = self._opening.finished_manifest() if self._try.earlier_tries else None
        if self._earlier_manifest is not None:
            log.info("An earlier try wrote all results and the manifest; nothing is left to do")
            return None
        job = self._opening.prepare(requests, name)
        opened = self._take(job, began=self._try.owner.at)
        split = job.plan.split
        log.info(
            "%d rows in %d shards over %s: %d batches, about %d prompt tokens each time",
            split.rows,
            len(split.shards),
            ", ".join(job.options.models) or "the models that the rows name",
            len(split.shards) * len(job.models),
            split.prompt_tokens,
        )
        job.ledger.deadline = None if timeout is None else self._try.clock.time() + timeout
        opened.sender.take_up()
        return self._advance(opened)

    def resume(self, ended: Iterable[Batch]) -> Wait | None:
        """
        Go on after a wait, also in another process than the one that started.

        :param ended: the batches that ended.
        :returns: what to wait for next; ``None`` if nothing is left but :meth:`finish`.
        :raises InvalidInputError: the job's folder is gone.
        :raises JobTakenOverError: another try does the job now.
        """
        try:
            opened = self._open()
        except InvalidInputError:
            self._earlier_manifest = self._opening.finished_manifest()
            if self._earlier_manifest is None:
                raise
            log.info("Another try of this task has finished the job; its manifest is taken")
            return None
        opened.job.ledger.check_owner()
        batches = list(ended)
        opened.job.record_ended(batches, at=self._try.clock.time())
        opened.collector.settle(batches)
        return self._advance(opened)

    def finish(self) -> dict[str, Any]:
        """
        Write the manifest and return it.

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
        log.info("Results are in %s\n%s", self._try.output_dir, render_summary(manifest))
        unfinished = unfinished_job(opened.job, collected, self._try.output_dir)
        # With this key the manifest says that nothing is left to do, whatever the verdict on it.
        manifest["unfinished" if unfinished else "run"] = self._opening.key
        opened.job.ledger.check_owner()
        write_json(self._try.output_dir / "manifest.json", manifest)
        if unfinished:
            raise unfinished
        self._opening.tidy_older(cancels=False)
        opened.job.ledger.remove_folder()
        return manifest

    def _advance(self, opened: _Opened) -> Wait | None:
        """Submit what is due; once all batches have ended, collect, and plan the next round."""
        job = opened.job
        while True:
            is_full = opened.sender.submit_due()
            if awaited := job.awaited:
                return Wait(awaited, 1 if is_full else self._min_ended(job), job.ledger.deadline)
            self._opening.refuse_sibling()
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

    @staticmethod
    def _min_ended(job: OpenJob) -> int | None:
        waiting = any(map(job.is_waiting, job.current))
        # A task that is woken for every single batch would be woken 200 times by a large job.
        return max(len(job.awaited) // 4, 1) if waiting else None

    # Opening ----------------------------------------------------------------------------------------------

    def _open(self) -> _Opened:
        """Return the job, opened from its folder if this process did not do so yet."""
        if self._opened is None:
            job, owner = self._opening.reopen()
            return self._take(job, began=owner.at)
        return self._opened

    def _take(self, job: OpenJob, *, began: float) -> _Opened:
        collector = Collector(job, self._try.client, self._try.output_dir, clock=self._try.clock)
        sender = Sender(job, self._try.client, collector, clock=self._try.clock, began=began)
        self._opened = _Opened(job, sender, collector)
        if self._stopped:
            sender.stop(cancels=self._cancels)
        return self._opened

    # From outside -----------------------------------------------------------------------------------------

    @property
    def batch_ids(self) -> tuple[str, ...]:
        """Ids of all batches so far."""
        job = self._known_job
        return () if job is None else job.batch_ids

    @property
    def open_batches(self) -> tuple[str, ...]:
        """Ids of the batches of this try that were submitted and have not ended as far as the job knows."""
        job = self._known_job
        return () if job is None else job.open_batches

    @property
    def _known_job(self) -> OpenJob | None:
        """The job, also before this process opened it; ``None`` if there is none, or another try does it now."""
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

        If another try does the job now, they are that one's, and none is returned.

        :param cancels: whether to cancel a batch that is being created right now, once its answer comes.
        """
        self._stopped, self._cancels = True, cancels
        if self._opened is not None:
            self._opened.sender.stop(cancels=cancels)
        return self.open_batches

    def check_not_stopped(self) -> None:
        """
        Refuse to go on after :meth:`stop`.

        :raises SiliconFlowError: the task was ended.
        """
        if self._stopped:
            raise SiliconFlowError("The job does not go on: the task was ended from outside")

    def find_unrecorded(self, patience: float) -> list[str]:
        """
        Search the account for batches that were being created.

        :param patience: how long to search again for one that is not listed, in seconds.
        :raises SiliconFlowError: the account cannot be searched.
        """
        return [] if self._opened is None else self._opened.sender.find_unrecorded(patience)
