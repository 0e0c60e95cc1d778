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

from airflow_provider_siliconflow.api.client import SiliconFlowClient
from airflow_provider_siliconflow.api.exceptions import InvalidInputError, SiliconFlowError
from airflow_provider_siliconflow.api.models import Batch
from airflow_provider_siliconflow.batch_files.atomic_files import write_json
from airflow_provider_siliconflow.batch_files.manifest import render_summary
from airflow_provider_siliconflow.jobs.clock import Clock, SystemClock
from airflow_provider_siliconflow.jobs.collecting import Collected, Collector
from airflow_provider_siliconflow.jobs.folder import read_json, remove_tree
from airflow_provider_siliconflow.jobs.identity import Submitter
from airflow_provider_siliconflow.jobs.job import OpenJob
from airflow_provider_siliconflow.jobs.ledger import FolderLedger
from airflow_provider_siliconflow.jobs.options import RunOptions
from airflow_provider_siliconflow.jobs.outcome import unfinished_job
from airflow_provider_siliconflow.jobs.plan import FIRST_ROUND, Plan, PlanFolder, plan
from airflow_provider_siliconflow.jobs.sending import Sender
from airflow_provider_siliconflow.jobs.states import Sending
from airflow_provider_siliconflow.jobs.submission import Submission

log = logging.getLogger(__name__)

#: Folder below the output in which jobs keep what outlives a process.
WORK_FOLDER = ".siliconflow"

OpenSubmission = Callable[[FolderLedger], Submission]


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

    :param options: what is asked.
    :param submitter: who asks.
    :param client: the calls.
    :param conn_id: the connection, a part of the identity.
    :param output_dir: ``pathlib.Path`` or ``ObjectStoragePath`` of the results.
    :param open_submission: makes the submission over the job's ledger.
    :param earlier_tries: whether an earlier try of this generation may have left batches behind.
    :param clock: time.
    """

    def __init__(
        self,
        options: RunOptions,
        *,
        submitter: Submitter,
        client: SiliconFlowClient,
        conn_id: str,
        output_dir: Any,
        open_submission: OpenSubmission,
        earlier_tries: bool,
        clock: Clock | None = None,
    ) -> None:
        self._options = options
        self._submitter = submitter
        self._client = client
        self._conn_id = conn_id
        self._output_dir = output_dir
        self._open_submission = open_submission
        self._earlier_tries = earlier_tries
        self._clock: Clock = clock or SystemClock()
        self._key = submitter.key(run=str(output_dir), models=list(options.models), conn_id=conn_id)
        self._plans = PlanFolder(output_dir / WORK_FOLDER / self._key[:16])
        self._opened: _Opened | None = None
        self._collected: Collected | None = None
        self._earlier_manifest: dict[str, Any] | None = None
        self._stopped = False
        self._cancels = False

    # The driver -------------------------------------------------------------------------------------------

    def start(self, requests: Callable[[], Any], name: str, *, timeout: float | None) -> Wait | None:
        """
        Begin a try: plan and submit, or take up what an earlier try left.

        :param requests: returns the rows, a file or Python objects; only called if no earlier try made a plan.
        :param name: what messages call them.
        :param timeout: seconds until the try's waits end, over all of its deferrals; ``None`` leaves it to the batches.
        :returns: what to wait for; ``None`` if nothing is left but :meth:`finish`.
        :raises InvalidRequestFileError: rows are wrong; nothing was uploaded.
        :raises SiliconFlowError: the service refuses, and has taken no batch of this job.
        """
        self._earlier_manifest = self._finished_before()
        if self._earlier_manifest is not None:
            log.info("An earlier try wrote all results and the manifest; nothing is left to do")
            return None
        opened = self._prepare(requests, name)
        opened.job.ledger.deadline = None if timeout is None else self._clock.time() + timeout
        opened.sender.take_up()
        return self._advance(opened)

    def resume(self, ended: Iterable[Batch]) -> Wait | None:
        """
        Go on after a wait, also in another process than the one that started.

        :param ended: the batches that ended.
        :returns: what to wait for next; ``None`` if nothing is left but :meth:`finish`.
        :raises InvalidInputError: the job's folder is gone.
        """
        opened = self._open()
        opened.job.record_ended(ended)
        return self._advance(opened)

    def finish(self) -> dict[str, Any]:
        """
        Write the manifest and return it.

        :raises BatchFailedError: batches failed, were cancelled or refused; the results of the others are written.
        """
        if self._earlier_manifest is not None:
            return self._earlier_manifest
        opened = self._open()
        collected = self._collected or opened.collector.collect()
        manifest = opened.collector.manifest(collected)
        manifest["task"] = asdict(self._submitter)
        log.info("Results are in %s\n%s", self._output_dir, render_summary(manifest))
        if unfinished := unfinished_job(opened.job, self._output_dir):
            manifest["unfinished"] = self._key
            write_json(self._output_dir / "manifest.json", manifest)
            raise unfinished
        # With this key the manifest says that nothing is left to do, whatever the verdict on it.
        manifest["run"] = self._key
        write_json(self._output_dir / "manifest.json", manifest)
        remove_tree(self._plans.path)
        return manifest

    def _advance(self, opened: _Opened) -> Wait | None:
        """Submit what is due; once all batches have ended, collect, and plan the next round."""
        job = opened.job
        while True:
            opened.sender.submit_due()
            if open_batches := job.open_batches:
                return Wait(open_batches, self._min_ended(job), job.ledger.deadline)
            self._refuse_sibling()
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
        return max(len(job.open_batches) // 4, 1) if waiting else None

    # Opening ----------------------------------------------------------------------------------------------

    def _finished_before(self) -> dict[str, Any] | None:
        """Return the manifest if an earlier try of this job wrote it, having done everything else."""
        manifest = self._manifest()
        # On a first try it is of a run that was deleted and made again under the same id.
        return manifest if self._earlier_tries and manifest.get("run") == self._key else None

    def _manifest(self) -> dict[str, Any]:
        return read_json(self._output_dir / "manifest.json", or_cut="it will be replaced") or {}

    def _refuse_sibling(self) -> None:
        """
        Refuse to write over the results of another map index of the same task and run.

        :raises InvalidInputError: they are there.
        """
        theirs, mine = self._manifest().get("task") or {}, asdict(self._submitter)
        same = {"dag_id", "run_id", "task_id", "generation"}
        if theirs.get("map_index") != mine["map_index"] and {n: theirs.get(n) for n in same} == {
            n: mine[n] for n in same
        }:
            raise InvalidInputError(
                f"output_dir: {self._output_dir} holds the results of map index {theirs['map_index']} of this task. "
                "A mapped task needs a folder per map index, such as '.../{{ ti.map_index }}'"
            )

    def _prepare(self, requests: Callable[[], Any], name: str) -> _Opened:
        """Make the plan, or take up the one that an earlier try made."""
        self._refuse_sibling()
        if (manifest := self._manifest()) and manifest.get("unfinished") != self._key:
            log.warning("%s holds the results of another job; they will be replaced", self._output_dir)
        stored = self._plans.read()
        if stored is not None and not self._earlier_tries:
            log.warning("%s is left of a run that was deleted; it is not used", self._plans)
            remove_tree(self._plans.path)
            stored = None
        if stored is None:
            self._make_plan(requests(), name)
        else:
            log.info("Going on with the rows as an earlier try planned them")
        opened = self._open()
        split = opened.job.plan.split
        log.info(
            "%d rows in %d shards over %s: %d batches, about %d prompt tokens each time",
            split.rows,
            len(split.shards),
            ", ".join(self._options.models) or "the models that the rows name",
            len(split.shards) * len(self._options.replacements),
            split.prompt_tokens,
        )
        return opened

    def _make_plan(self, requests: Any, name: str) -> None:
        try:
            split = plan(requests, self._plans.path / FIRST_ROUND, name=name, options=self._options)
        except InvalidInputError:
            remove_tree(self._plans.path)
            raise
        self._warn_of_unknown_models()
        # Before the plan: a plan without a ledger tells that the ledger was lost.
        write_json(self._plans.path / "ledger.json", {})
        self._plans.write(
            Plan(
                split,
                self._options.completion_window,
                self._options.metadata,
                # An earlier try may have sent batches that this folder knows nothing of.
                complete=not self._earlier_tries,
            )
        )

    def _warn_of_unknown_models(self) -> None:
        """Look the models up in the account's list, which costs nothing; the list does not say which batches take."""
        if not self._options.models:
            return
        try:
            known = set(self._client.list_models(repeat=False))
        except SiliconFlowError as exc:
            log.info("The account's models cannot be listed, so none is looked up: %s", exc)
            return
        unknown = [model for model in self._options.models if model not in known]
        if known and unknown:
            log.warning(
                "The account does not list %s among its chat models; the service may refuse it",
                ", ".join(unknown),
            )

    def _open(self) -> _Opened:
        """
        Return the job, opened from its folder if this process did not do so yet.

        :raises InvalidInputError: the folder is gone.
        """
        if self._opened is None:
            stored = self._plans.read()
            if stored is None:
                raise InvalidInputError(
                    f"{self._plans} holds no plan any more: output_dir must be seen by every worker, and render the "
                    "same, while the task waits. The batches are untouched. A retry makes the plan anew, searches the "
                    "account and adopts them; a clear would pay for all again.",
                    retryable=True,
                )
            ledger = FolderLedger(self._plans.path / "ledger.json", complete=stored.complete)
            job = OpenJob(
                self._options,
                stored,
                submitter=self._submitter,
                conn_id=self._conn_id,
                plans=self._plans,
                ledger=ledger,
                submission=self._open_submission(ledger),
            )
            sender, collector = Sender(job, self._client), Collector(job, self._client, self._output_dir)
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
        """Ids of the batches that were submitted and have not ended as far as the job knows."""
        job = self._known_job
        return () if job is None else job.open_batches

    @property
    def _known_job(self) -> OpenJob | None:
        """The job, also before this process opened it: an earlier try, or deferral, may have batches open."""
        try:
            return self._open().job
        except InvalidInputError:
            return None

    def stop(self, *, cancels: bool) -> tuple[str, ...]:
        """
        Send nothing from now on, and return the ids of the batches that are known to be open.

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

        :param patience: how long to look again for one that is not listed, in seconds.
        :raises SiliconFlowError: the account cannot be searched.
        """
        if self._opened is None:
            return []
        job = self._opened.job
        unrecorded = [piece for piece in job.current if isinstance(job.state(piece), Sending)]
        works = (job.work(piece, "") for piece in unrecorded)
        return [batch.id for batch in job.submission.find(works, patience)] if unrecorded else []
