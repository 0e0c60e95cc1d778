"""
Opening a job: making its plan or continuing with an existing one, and checking for other jobs in its output folder.

All jobs keep their folders below ``<output_dir>/.siliconflow``, each named after its identity. Paid work decides what
happens there: a plan is used again whatever the try number is, a folder is not removed while its batches may run, and
the results of a running job are not overwritten.
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
from airflow_provider_siliconflow.batch_files.shards import Split
from airflow_provider_siliconflow.jobs.cache import Reuse, find_answers
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
from airflow_provider_siliconflow.jobs.spend import check_balance, refuse_costly
from airflow_provider_siliconflow.jobs.states import Ended, Planned, Refused, Sending, Sent
from airflow_provider_siliconflow.jobs.submission import Submission

log = logging.getLogger(__name__)

#: Folder in the output folder in which jobs keep the state that outlives a process.
WORK_FOLDER = ".siliconflow"
#: Seconds for which a job that has not submitted anything counts as starting.
_STARTING = 900.0
#: Seconds for which a request of another job without a recorded outcome counts as a batch that may run.
_OPEN_INTENT = 3600.0
#: Most job folders that are read in one output folder.
_MOST_FOLDERS = 1000
_FOLDER_NAME = re.compile("[0-9a-f]{16}")

OpenSubmission = Callable[[FolderLedger], Submission]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobTry:
    """
    One try of one job.

    :param options: the job's options.
    :param submitter: the task instance.
    :param client: the calls.
    :param conn_id: the connection; part of the identity.
    :param output_dir: ``pathlib.Path`` or ``ObjectStoragePath`` of the results.
    :param open_submission: returns the submission that uses the job's ledger.
    :param earlier_tries: whether an earlier try of this generation may have left batches behind.
    :param owner: this try, with a fresh token; ``try_id`` and ``try_number`` identify a resumption.
    :param cancel_on_kill: whether to cancel what an earlier generation of this task left open in ``output_dir``.
    :param clock: time.
    :param cache_dir: ``pathlib.Path`` or ``ObjectStoragePath`` of answers that jobs share; ``None`` for no cache.
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
    cache_dir: Any = None


class Opening:
    """
    Opens the job of a try, in one process.

    :param job_try: the try.
    """

    def __init__(self, job_try: JobTry) -> None:
        self._try = job_try
        # Without the host: the same service under another name is the same job.
        self.key = job_try.submitter.key(
            run=str(job_try.output_dir), models=list(job_try.options.models), conn_id=job_try.conn_id
        )
        self.plans = PlanFolder(job_try.output_dir / WORK_FOLDER / self.key[:16])

    # Manifests --------------------------------------------------------------------------------------------

    def manifest(self) -> dict[str, Any]:
        """Return the manifest in the output folder, of this or another job; empty if there is none."""
        return read_json(self._try.output_dir / "manifest.json", otherwise="it will be replaced") or {}

    def finished_manifest(self) -> dict[str, Any] | None:
        """Return the manifest if this job wrote it as its last step."""
        manifest = self.manifest()
        return manifest if manifest.get("run") == self.key else None

    def refuse_sibling(self) -> None:
        """
        Refuse to overwrite the results of another map index of the same task and run.

        :raises InvalidInputError: the output folder has such results.
        """
        theirs, mine = self.manifest().get("task"), asdict(self._try.submitter)
        if not isinstance(theirs, dict):
            return
        same = ("dag_id", "run_id", "task_id", "generation")
        if theirs.get("map_index") != mine["map_index"] and all(theirs.get(n) == mine[n] for n in same):
            raise InvalidInputError(
                f"output_dir: {self._try.output_dir} contains the results of map index {theirs.get('map_index')} of "
                "this task. A mapped task needs a folder per map index, such as '.../{{ ti.map_index }}'"
            )

    # Opening ----------------------------------------------------------------------------------------------

    def prepare(self, requests: Callable[[], Any], name: str) -> OpenJob:
        """
        Claim the job for this try, and make a plan or continue with the existing one.

        :param requests: returns the rows.
        :param name: how messages call the rows.
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
        :raises JobTakenOverError: another try has taken over the job.
        :raises InvalidInputError: the job's folder is gone.
        """
        stored = self.plans.read()
        if stored is None:
            raise InvalidInputError(
                f"{self.plans} no longer contains a plan: output_dir must be accessible to every worker, and must "
                "render to the same value, while the task waits. The batches are untouched. A retry makes a new plan, "
                "searches the account and adopts them; a manual clear that submits again would pay for all of them.",
                retryable=True,
            )
        job = self._open(stored)
        owner = job.ledger.owner()
        if owner is None:
            log.warning("%s does not name an owner; this try claims it", self.plans)
            job.ledger.claim(self._try.owner)
            return job, self._try.owner
        if owner.try_number < self._try.owner.try_number:
            # This try was ended before it claimed the job, but the open batches belong to its task.
            return job, owner
        if (owner.try_id, owner.try_number) != (self._try.owner.try_id, self._try.owner.try_number):
            raise JobTakenOverError(
                f"Another try of this task has taken over the job: {owner}. This try stops and sends nothing more. "
                "Its batches are not lost: the other try continues with them."
            )
        job.ledger.continue_as(owner.token)
        return job, owner

    def _open(self, stored: Plan) -> OpenJob:
        return self._opened(self.plans, stored)

    def _opened(self, plans: PlanFolder, stored: Plan) -> OpenJob:
        ledger = FolderLedger(plans.path / "ledger.json", complete=stored.complete)
        return OpenJob(
            self._try.options,
            # The folder's name contains the identity, so a plan with another submitter is not ours.
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
        """Return the plan that an earlier try made from the same rows; ``None`` if a new one is needed."""
        stored = self.plans.read()
        if stored is None:
            return None
        if not self._try.earlier_tries:
            log.warning(
                "%s exists although this is the first try; the job continues with it, at no extra cost",
                self.plans,
            )
        try:
            rows = requests()
            if hasattr(rows, "open"):
                with rows.open("rb"):
                    pass
        # If the input is gone, or its function fails, a retry must still get the results that are paid for.
        except Exception as exc:  # noqa: BLE001
            log.warning("%s cannot be read again (%s); the job continues with the rows as planned", name, exc)
            return stored
        if stored.is_of(rows, self._try.options, name=name):
            return stored
        self._refuse_changed(self._open(stored), name)
        log.warning("%s was changed, and no batch of the earlier rows is running; a new plan is made", name)
        remove_tree(self.plans.path)
        return None

    def _refuse_changed(self, job: OpenJob, name: str) -> None:
        """
        Refuse to continue if the rows were changed after batches of them were paid for.

        :raises InvalidInputError: they were. If the run was deleted and created again, only batches that have not ended
            count.
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
            f"{', ...' if len(job.batch_ids) > 5 else ''}). Nothing was sent. Restore the rows, their order, "
            "request_params and output_type, and let the task retry, which continues with these batches; or submit the "
            "new rows by a manual clear, which pays for all of them; or give the new rows another output_dir.",
            retryable=True,
        )

    def _make_plan(self, requests: Callable[[], Any], name: str) -> OpenJob:
        options = self._try.options
        path = self.plans.path / "ledger.json"
        ledger = FolderLedger(path, complete=not self._try.earlier_tries, is_new=True)
        # Other jobs must see that a job starts here before the rows are made, which may take long.
        ledger.claim(self._try.owner)
        try:
            rows = requests()
            version = source_version(rows)
            split = plan(rows, self.plans.path / FIRST_ROUND, name=name, options=options)
            reuse = self._reuse(split)
            self._check_spend(split, reuse)
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
            digest_of(options.body_content),
            version,
            # An earlier try may have sent batches that this folder does not know.
            complete=not self._try.earlier_tries,
            reuse=reuse,
        )
        self.plans.write(stored)
        # Two jobs that start at the same time see each other here, before anything is sent.
        try:
            self._refuse_others()
        except InvalidInputError:
            ledger.remove_folder()
            raise
        job = self._open(stored)
        job.ledger.continue_as(self._try.owner.token)
        return job

    def _reuse(self, split: Split) -> Reuse | None:
        if self._try.cache_dir is None:
            return None
        options = self._try.options
        sources = [self.plans.path / FIRST_ROUND / shard.name for shard in split.shards]
        return find_answers(
            self._try.cache_dir,
            self.plans.path,
            split,
            sources,
            models=options.replacements,
            max_rows=options.max_rows,
            max_bytes=options.max_bytes,
            judge=options.acceptance.judge,
            tariff=options.tariff(),
        )

    def _check_spend(self, split: Split, reuse: Reuse | None) -> None:
        """
        Refuse a job that ``max_cost`` or the account's balance certainly cannot pay.

        :raises InvalidInputError: it is such a job.
        """
        options, folder = self._try.options, self.plans.path / FIRST_ROUND
        refuse_costly(split, options, folder, reuse)
        check_balance(
            split,
            options,
            lambda: self._try.client.get_account(repeat=False).charge_balance,
            reuse=reuse,
            # What earlier tries submitted may be what used the balance up, and must still be collected.
            may_refuse=not self._try.earlier_tries,
        )

    def _warn_of_unknown_models(self) -> None:
        """Warn of models that the account does not list. The list does not say which of them the batch API takes."""
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
        Refuse to start in the output folder of another running job, whose results would be mixed with ours.

        :raises InvalidInputError: another job runs there.
        :raises JobTakenOverError: it is a newer generation of this task.
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
                        f"{self._try.output_dir} contains the job of a later clear of this task. This try stops and "
                        "sends nothing."
                    )
                if (running := self._may_run(ledger, stored.conn_id)) is not None:
                    raise InvalidInputError(
                        "models, conn_id or output_dir of this task were changed since an earlier try submitted "
                        f"batches: {running} is paid for and may be running. Nothing was sent. Restore the arguments "
                        "and let the task retry, which continues with the batches; or cancel the batches first.",
                        retryable=True,
                    )
            elif (running := self._may_run(ledger, stored.conn_id)) is not None:
                raise InvalidInputError(
                    _in_use(self._try.output_dir, theirs.label, f"is running there (batch {running})")
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
            raise InvalidInputError(
                _in_use(self._try.output_dir, str(owner), "is starting there"), retryable=True
            )

    def _may_run(self, ledger: FolderLedger, conn_id: str) -> str | None:
        """
        Return a batch of a job that may run: its id, or its key if its creation was not recorded.

        :param conn_id: the job's connection. If it is another one, its batches may be invisible and count as running.
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
        Cancel open batches of older generations of this task in the output folder, and remove jobs that have ended.

        After a manual clear that submits again nothing else takes care of the older job, which may have been deferred
        or queued.

        :param cancels: whether to cancel; otherwise their batches continue and are billed.
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
                log.warning("%s, of an earlier generation of this task, is not removed: %s", plans, exc)

    def _tidy(self, job: OpenJob, *, cancels: bool) -> None:
        # This stops a try of that generation that is still alive.
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
                    log.warning(
                        "Batch %s is not proven to belong to this task; it is not cancelled", batch.id
                    )
            elif not batch.is_terminal:
                log.warning(
                    "Batch %s of an earlier generation of this task continues and is billed", batch.id
                )
            if batch.is_terminal:
                job.ledger.record(piece.work_key, Ended.of(batch, state.number, at=self._try.clock.time()))
        job.ledger.flush()
        job.ledger.remove_folder()


def _never(name: str) -> Any:
    raise AssertionError("an earlier generation uploads nothing")


def _in_use(output_dir: Any, who: str, what: str) -> str:
    return (
        f"output_dir: the job of {who} {what}, and the results of both would be mixed in {output_dir}. Nothing was "
        "sent. Give each task and run a folder of its own, such as '.../{{ run_id }}/{{ task.task_id }}'"
    )


def _names(folder: Any) -> list[str]:
    """Return the names in a folder; none if it does not exist."""
    local = local_path(folder)
    try:
        if local is not None:
            return sorted(os.listdir(local))[:_MOST_FOLDERS]
        return sorted(
            str(path).rstrip("/").rpartition("/")[2] for path in folder.fs.ls(folder.path, detail=False)
        )[:_MOST_FOLDERS]
    except (FileNotFoundError, NotADirectoryError):
        return []
