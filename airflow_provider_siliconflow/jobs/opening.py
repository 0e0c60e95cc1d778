"""
Opening a job: its plan, made or taken up, and what else is in its output folder.

All jobs keep their folders below ``<output_dir>/.siliconflow``, each under a name made of its identity. What is found
there decides by money: a plan is taken up whatever the try number says, nothing that may run is removed, and nobody
writes over the results of a job that runs.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from airflow_provider_siliconflow.api.client import SiliconFlowClient
from airflow_provider_siliconflow.api.exceptions import (
    InvalidInputError,
    JobTakenOverError,
    NotFoundError,
    SiliconFlowError,
)
from airflow_provider_siliconflow.batch_files.atomic_files import local_path, make_private_folder
from airflow_provider_siliconflow.jobs.cancelling import cancel
from airflow_provider_siliconflow.jobs.clock import Clock, SystemClock
from airflow_provider_siliconflow.jobs.folder import read_json, remove_tree
from airflow_provider_siliconflow.jobs.identity import Submitter
from airflow_provider_siliconflow.jobs.job import OpenJob
from airflow_provider_siliconflow.jobs.ledger import FolderLedger, Owner
from airflow_provider_siliconflow.jobs.options import RunOptions
from airflow_provider_siliconflow.jobs.plan import (
    FIRST_ROUND,
    Plan,
    PlanFolder,
    digest_of,
    plan,
    source_version,
)
from airflow_provider_siliconflow.jobs.states import Ended, Planned, Refused, Sending, Sent
from airflow_provider_siliconflow.jobs.submission import Submission

log = logging.getLogger(__name__)

#: Folder below the output in which jobs keep what outlives a process.
WORK_FOLDER = ".siliconflow"
#: Seconds for which a job that has submitted nothing yet counts as one that is starting.
_STARTING = 900.0
#: Seconds for which a request whose outcome another job did not record counts as one that may run.
_OPEN_INTENT = 3600.0
#: Folders of jobs that are looked at, in one output folder.
_MOST_FOLDERS = 1000
_FOLDER_NAME = re.compile("[0-9a-f]{16}")

OpenSubmission = Callable[[FolderLedger], Submission]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobTry:
    """
    One try of one job: what is asked, by whom, where and over which connection.

    :param options: what is asked.
    :param submitter: who asks.
    :param client: the calls.
    :param conn_id: the connection, a part of the identity.
    :param output_dir: ``pathlib.Path`` or ``ObjectStoragePath`` of the results.
    :param open_submission: makes the submission over the job's ledger.
    :param earlier_tries: whether an earlier try of this generation may have left batches behind.
    :param owner: this try, with a fresh token; a resumption is told by ``try_id`` and ``try_number``.
    :param cancel_on_kill: whether to cancel what an earlier generation of this task left open in ``output_dir``.
    :param clock: time.
    """

    options: RunOptions
    submitter: Submitter
    client: SiliconFlowClient
    conn_id: str
    output_dir: Any
    open_submission: OpenSubmission
    earlier_tries: bool
    owner: Owner
    cancel_on_kill: bool
    clock: Clock = field(default_factory=SystemClock)


class Opening:
    """
    Opens the job of a try, in one process.

    :param job_try: the try.
    """

    def __init__(self, job_try: JobTry) -> None:
        self._try = job_try
        # Not the host: under another name of the same service the job is the same.
        self.key = job_try.submitter.key(
            run=str(job_try.output_dir), models=list(job_try.options.models), conn_id=job_try.conn_id
        )
        self.plans = PlanFolder(job_try.output_dir / WORK_FOLDER / self.key[:16])

    # Manifests --------------------------------------------------------------------------------------------

    def manifest(self) -> dict[str, Any]:
        """Return the manifest in the output folder, whosever it is; empty if there is none."""
        return read_json(self._try.output_dir / "manifest.json", or_cut="it will be replaced") or {}

    def finished_manifest(self) -> dict[str, Any] | None:
        """Return the manifest if this job wrote it, having done everything else."""
        manifest = self.manifest()
        return manifest if manifest.get("run") == self.key else None

    def refuse_sibling(self) -> None:
        """
        Refuse to write over the results of another map index of the same task and run.

        :raises InvalidInputError: they are there.
        """
        theirs, mine = self.manifest().get("task"), asdict(self._try.submitter)
        if not isinstance(theirs, dict):
            return
        same = ("dag_id", "run_id", "task_id", "generation")
        if theirs.get("map_index") != mine["map_index"] and all(theirs.get(n) == mine[n] for n in same):
            raise InvalidInputError(
                f"output_dir: {self._try.output_dir} holds the results of map index {theirs.get('map_index')} of this "
                "task. A mapped task needs a folder per map index, such as '.../{{ ti.map_index }}'"
            )

    # Opening ----------------------------------------------------------------------------------------------

    def prepare(self, requests: Callable[[], Any], name: str) -> OpenJob:
        """
        Claim the job for this try, and make its plan or take up the one that is there.

        :param requests: returns the rows.
        :param name: what messages call them.
        :raises InvalidInputError: rows are wrong, or were changed since they were submitted; or another job runs here.
        """
        self.refuse_sibling()
        self._refuse_others()
        if (manifest := self.manifest()) and manifest.get("unfinished") != self.key:
            log.warning("%s holds the results of another job; they will be replaced", self._try.output_dir)
        stored = self._usable_plan(requests, name)
        make_private_folder(self.plans.path)
        if stored is None:
            job = self._make_plan(requests, name)
        else:
            job = self._open(stored)
            job.ledger.claim(self._try.owner)
            log.info("Continuing with the plan of an earlier try")
        self.tidy_older(cancels=self._try.cancel_on_kill)
        return job

    def reopen(self) -> tuple[OpenJob, Owner]:
        """
        Open a job that another process of this try prepared.

        :returns: the job, and this try as that process recorded it.
        :raises JobTakenOverError: another try does the job now.
        :raises InvalidInputError: the job's folder is gone.
        """
        stored = self.plans.read()
        if stored is None:
            raise InvalidInputError(
                f"{self.plans} holds no plan any more: output_dir must be seen by every worker, and render the "
                "same, while the task waits. The batches are untouched. A retry makes the plan anew, searches the "
                "account and adopts them; a clear that submits anew would pay for all again.",
                retryable=True,
            )
        job = self._open(stored)
        owner = job.ledger.owner()
        if owner is None:
            log.warning("%s does not name an owner; this try claims it", self.plans)
            job.ledger.claim(self._try.owner)
            return job, self._try.owner
        if owner.try_number < self._try.owner.try_number:
            # Ended before it began in earnest, this try has claimed nothing; what is open is its task's all the same.
            return job, owner
        if (owner.try_id, owner.try_number) != (self._try.owner.try_id, self._try.owner.try_number):
            raise JobTakenOverError(
                f"Another try of this task has taken over the job: {owner}. This try stops and sends nothing more. "
                "What it submitted is not lost: the other try takes it up."
            )
        job.ledger.continue_as(owner.token)
        return job, owner

    def _open(self, stored: Plan) -> OpenJob:
        return self._opened(self.plans, stored)

    def _opened(self, plans: PlanFolder, stored: Plan) -> OpenJob:
        ledger = FolderLedger(plans.path / "ledger.json", complete=stored.complete)
        return OpenJob(
            self._try.options,
            # Whose it is is a part of where it is: the plan of another is not believed to be ours.
            replace(
                stored,
                submitter=self._try.submitter,
                models=self._try.options.models,
                conn_id=self._try.conn_id,
            )
            if plans is self.plans
            else stored,
            plans=plans,
            ledger=ledger,
            submission=self._try.open_submission(ledger),
        )

    # Planning ---------------------------------------------------------------------------------------------

    def _usable_plan(self, requests: Callable[[], Any], name: str) -> Plan | None:
        """Return the plan that an earlier try made of the same rows; ``None`` if a new one is to be made."""
        stored = self.plans.read()
        if stored is None:
            return None
        if not self._try.earlier_tries:
            log.warning(
                "%s exists although this is the first try; it is taken up, so nothing is paid again",
                self.plans,
            )
        try:
            rows = requests()
            if hasattr(rows, "open"):
                with rows.open("rb"):
                    pass
        # An input that is gone, or a function that fails, must not keep a retry from what is paid for.
        except Exception as exc:  # noqa: BLE001
            log.warning("%s cannot be read again (%s); the job goes on with the rows as planned", name, exc)
            return stored
        if stored.is_of(rows, self._try.options, name=name):
            return stored
        self._refuse_changed(self._open(stored), name)
        log.warning(
            "%s was changed, and no batch of the earlier rows is running: they are planned anew", name
        )
        remove_tree(self.plans.path)
        return None

    def _refuse_changed(self, job: OpenJob, name: str) -> None:
        """
        Refuse to go on if rows were changed of which batches are paid for.

        :raises InvalidInputError: they are. A run that was deleted and made again is no reason, if all have ended.
        """
        paid = [piece for piece in job.pieces if not isinstance(job.state(piece), Planned | Refused)]
        is_recorded = paid or job.ledger.damaged
        if not is_recorded or (
            not self._try.earlier_tries and self._may_run(job.ledger, self._try.conn_id) is None
        ):
            return
        ids = ", ".join(job.batch_ids[:5]) or "one whose creation was not recorded"
        what = (
            f"{len(paid)} batches are paid for"
            if paid
            else "batches may be paid for, as the record of them is cut"
        )
        raise InvalidInputError(
            f"{name} was changed since an earlier try submitted its rows: {what} ({ids}"
            f"{', ...' if len(job.batch_ids) > 5 else ''}). Nothing was sent. Restore the rows, their order and "
            "request_params and let the task retry, which takes the batches up; or submit the new rows by a manual "
            "clear, which pays for all of them; or give the new rows another output_dir.",
            retryable=True,
        )

    def _make_plan(self, requests: Callable[[], Any], name: str) -> OpenJob:
        options = self._try.options
        path = self.plans.path / "ledger.json"
        ledger = FolderLedger(path, complete=not self._try.earlier_tries, is_new=True)
        # Before the rows are made, which may take long: from now on others see that a job starts here.
        ledger.claim(self._try.owner)
        try:
            rows = requests()
            version = source_version(rows)
            split = plan(rows, self.plans.path / FIRST_ROUND, name=name, options=options)
        except Exception:
            ledger.remove_folder()
            raise
        self._warn_of_unknown_models()
        ledger.check_owner()
        stored = Plan(
            split,
            options.completion_window,
            options.metadata,
            self._try.submitter,
            self._try.conn_id,
            options.models,
            options.max_rows,
            options.max_bytes,
            digest_of(options.request_params),
            version,
            # An earlier try may have sent batches that this folder knows nothing of.
            complete=not self._try.earlier_tries,
        )
        self.plans.write(stored)
        # Two jobs that start at once each see the other here, before anything is sent.
        try:
            self._refuse_others()
        except InvalidInputError:
            ledger.remove_folder()
            raise
        job = self._open(stored)
        job.ledger.continue_as(self._try.owner.token)
        return job

    def _warn_of_unknown_models(self) -> None:
        """Look the models up in the account's list, which costs nothing; the list does not say which batches take."""
        if not self._try.options.models:
            return
        try:
            known = set(self._try.client.list_models(repeat=False))
        except SiliconFlowError as exc:
            log.info("The account's models cannot be listed, so their names are not checked: %s", exc)
            return
        unknown = [model for model in self._try.options.models if model not in known]
        if known and unknown:
            log.warning(
                "The account does not list %s among its chat models; the service may refuse it",
                ", ".join(unknown),
            )

    # Other jobs in the output folder ----------------------------------------------------------------------

    def _other_folders(self) -> Iterator[PlanFolder]:
        for name in _names(self._try.output_dir / WORK_FOLDER):
            if _FOLDER_NAME.fullmatch(name) and name != self.key[:16]:
                yield PlanFolder(self._try.output_dir / WORK_FOLDER / name)

    def _refuse_others(self) -> None:
        """
        Refuse to start where another job runs: their results would be mixed.

        :raises InvalidInputError: one does.
        :raises JobTakenOverError: it is a newer generation of this very task.
        """
        for plans in self._other_folders():
            stored = plans.read()
            ledger = FolderLedger(plans.path / "ledger.json", complete=False)
            if stored is None:
                self._refuse_starting(ledger)
                continue
            theirs, mine = stored.submitter, self._try.submitter
            if replace(theirs, generation=mine.generation) == mine:
                if theirs.generation < mine.generation:
                    continue
                if theirs.generation > mine.generation:
                    raise JobTakenOverError(
                        f"{self._try.output_dir} holds the job of a later clear of this task. This try stops and sends "
                        "nothing."
                    )
                if (running := self._may_run(ledger, stored.conn_id)) is not None:
                    raise InvalidInputError(
                        "models, conn_id or output_dir of this task were changed since an earlier try submitted "
                        f"batches: {running} is paid for and may run. Nothing was sent. Restore them and let the task "
                        "retry, which takes the batches up; or cancel them first.",
                        retryable=True,
                    )
            elif (running := self._may_run(ledger, stored.conn_id)) is not None:
                raise InvalidInputError(
                    _in_use(self._try.output_dir, theirs.label, f"runs there (batch {running})")
                )
            elif not any(ledger.work()):
                # Its rows are planned, and perhaps being uploaded.
                self._refuse_starting(ledger)

    def _refuse_starting(self, ledger: FolderLedger) -> None:
        """
        Refuse to start where another job was claimed a short while ago and has sent nothing yet.

        :raises InvalidInputError: one was.
        """
        owner = ledger.owner()
        # Either way: the clocks of two workers differ.
        if owner is not None and abs(self._try.clock.time() - owner.at) < _STARTING:
            raise InvalidInputError(_in_use(self._try.output_dir, str(owner), "starts there"), retryable=True)

    def _may_run(self, ledger: FolderLedger, conn_id: str) -> str | None:
        """
        Return what of a job may run: the id of a batch, or the key of one whose creation was not recorded.

        :param conn_id: its connection. Through another one its batches may not be seen, and count as running.
        """
        for key, state in ledger.work():
            if isinstance(state, Sending) and self._try.clock.time() - state.at < _OPEN_INTENT:
                return key
            if not isinstance(state, Sent):
                continue
            if conn_id != self._try.conn_id:
                return state.batch_id
            try:
                if not self._try.client.get_batch(state.batch_id).is_terminal:
                    return state.batch_id
            except NotFoundError:
                continue
        return None

    def tidy_older(self, *, cancels: bool) -> None:
        """
        Cancel what older generations of this task have open in the output folder, and remove what has ended.

        A manual clear that submits anew leaves the older job to nobody: it may have been waiting in the triggerer, or
        in the queue.

        :param cancels: whether to cancel; otherwise their batches go on and are billed.
        """
        for plans in self._other_folders():
            stored = plans.read()
            if stored is None or stored.submitter.generation >= self._try.submitter.generation:
                continue
            if replace(stored.submitter, generation=self._try.submitter.generation) != self._try.submitter:
                continue
            try:
                self._tidy(self._opened(plans, stored), cancels=cancels)
            except SiliconFlowError as exc:
                log.warning("%s, of an earlier generation of this task, is left as it is: %s", plans, exc)

    def _tidy(self, job: OpenJob, *, cancels: bool) -> None:
        # A try of that generation that is still alive stops by this.
        job.ledger.claim(self._try.owner)
        for piece in job.pieces:
            state = job.state(piece)
            if not isinstance(state, Sent):
                continue
            batch = self._try.client.get_batch(state.batch_id)
            if cancels and not batch.is_terminal:
                if job.submission.is_ours(job.work(piece, _never), batch):
                    log.warning("Cancelling batch %s of an earlier generation of this task", batch.id)
                    batch = cancel(self._try.client, batch.id)
                else:
                    log.warning("Batch %s is not proven to be of this task; it is left alone", batch.id)
            elif not batch.is_terminal:
                log.warning("Batch %s of an earlier generation of this task goes on and is billed", batch.id)
            if batch.is_terminal:
                job.ledger.record(piece.work_key, Ended.of(batch, state.number, at=self._try.clock.time()))
        job.ledger.flush()
        job.ledger.remove_folder()


def _never(name: str) -> Any:
    raise AssertionError("nothing of an earlier generation is uploaded")


def _in_use(output_dir: Any, who: str, what: str) -> str:
    return (
        f"output_dir: the job of {who} {what}, and its results would be mixed with these in {output_dir}. Nothing was "
        "sent. Give each task and run a folder of its own, such as '.../{{ run_id }}/{{ task.task_id }}'"
    )


def _names(folder: Any) -> list[str]:
    """Return the names in a folder; none if there is no such folder."""
    local = local_path(folder)
    try:
        if local is not None:
            return sorted(os.listdir(local))[:_MOST_FOLDERS]
        return sorted(
            str(path).rstrip("/").rpartition("/")[2] for path in folder.fs.ls(folder.path, detail=False)
        )[:_MOST_FOLDERS]
    except (FileNotFoundError, NotADirectoryError):
        return []
