"""
Opening a job: making its plan or continuing with an existing one, and checking for other jobs in its output folder.

All jobs keep their folders below ``<output_dir>/.siliconflow``, each named after its identity. Paid work decides what
happens there: a plan is used again whatever the try number is, a folder is not removed while its batches may run, and
the results of a running job are not overwritten.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from airflow_provider_siliconflow.api.client import SiliconFlowClient
from airflow_provider_siliconflow.api.exceptions import (
    InvalidInputError,
    JobTakenOverError,
    NotFoundError,
    SiliconFlowError,
)
from airflow_provider_siliconflow.batch_files.atomic_files import (
    make_private_folder,
    temporary_folder,
    write_json,
)
from airflow_provider_siliconflow.jobs.cache import find_answers
from airflow_provider_siliconflow.jobs.cancelling import cancel
from airflow_provider_siliconflow.jobs.clock import Clock, SystemClock
from airflow_provider_siliconflow.jobs.finished import Finished, take_over
from airflow_provider_siliconflow.jobs.folder import names_in, read_json, remove_tree
from airflow_provider_siliconflow.jobs.identity import Submitter
from airflow_provider_siliconflow.jobs.job import OpenJob
from airflow_provider_siliconflow.jobs.ledger import FolderLedger, Owner
from airflow_provider_siliconflow.jobs.options import RunOptions
from airflow_provider_siliconflow.jobs.plan import (
    FIRST_ROUND,
    InputMark,
    Piece,
    Plan,
    PlanFolder,
    digest_of,
    model_params_of,
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
        #: The finished job whose answers are kept, if the task was cleared since.
        self._finished: Finished | None = None

    # Manifests --------------------------------------------------------------------------------------------

    def manifest(self) -> dict[str, Any]:
        """Return the manifest in the output folder, of this or another job; empty if there is none."""
        return read_json(self._try.output_dir / "manifest.json", otherwise="it will be replaced") or {}

    def finished_manifest(self) -> dict[str, Any] | None:
        """Return the manifest if this job wrote it as its last step, and its run was not deleted since."""
        manifest = self.manifest()
        if manifest.get("run") != self.key:
            return None
        deleted = self._try.submitter.is_of_deleted_run(Finished(manifest).run_start)
        return None if deleted else manifest

    def answered(self, requests: Callable[[], Any], name: str) -> dict[str, Any] | None:
        """
        Return the manifest of the job if it has finished and nothing is left to do.

        After a manual clear, rows that are not ok are left to do, and so are rows that were changed.

        :param requests: returns the rows.
        :param name: how messages call the rows.
        """
        manifest = self.finished_manifest()
        if manifest is None:
            return None
        finished, stored, mine = Finished(manifest), self.plans.read(), self._try.submitter
        if not self._try.earlier_tries and not (finished.run_start and mine.run_start):
            # For all that is known, it belongs to a deleted run that was created again under the same id.
            return None
        if stored is not None and stored.submitter.epoch > finished.epoch:
            # An earlier try since the clear has begun to send rows.
            return None
        is_cleared = mine.epoch > finished.epoch
        if not is_cleared and self._try.owner.try_number != finished.try_number:
            log.info("An earlier try wrote all results and the manifest; nothing is left to do")
            return manifest
        # Cleared; or the same try runs again, as `airflow tasks test` makes it.
        if is_cleared and not (finished.all_ok and self._asks_for_the_same(finished)):
            self._finished = finished
            return None
        if not self._has_input_of(finished, requests, name):
            log.warning("%s was changed since the job finished; it is new work", name)
            return None
        if not finished.has_results(self._try.output_dir, self._try.options):
            return None
        log.info("The job has finished, and its rows are the same: its results are returned at no cost")
        return manifest

    def _asks_for_the_same(self, finished: Finished) -> bool:
        """Whether what the job puts into its rows is what it was; another ``output_type`` judges the answers anew."""
        mark = finished.input
        return mark is None or mark.params == digest_of(self._try.options.body_content)

    def _has_input_of(self, finished: Finished, requests: Callable[[], Any], name: str) -> bool:
        mark = finished.input
        if mark is None:
            # Nobody knows which rows these are answers to. Those of the batches are proven by their content.
            return False
        return self._is_input(mark, requests, name, otherwise="the results of the finished job are used")

    def _is_input(self, mark: InputMark, requests: Callable[[], Any], name: str, *, otherwise: str) -> bool:
        """
        Whether the job still has these rows, or its input cannot be read.

        The input may be gone, or its function fail: the task must still get the results that are paid for.

        :param otherwise: what happens in that case, for the log.
        """
        try:
            rows = requests()
            if hasattr(rows, "open"):
                with rows.open("rb"):
                    pass
        # A function of the author, and a store, may raise anything.
        except Exception as exc:  # noqa: BLE001
            log.warning("%s cannot be read again (%s); %s", name, exc, otherwise)
            return True
        return mark.is_of(rows, self._try.options, name=name)

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

    def withdraw_manifest(self, job: OpenJob) -> None:
        """
        Say that a manifest of other rows is no longer final: the results that it describes are about to be replaced.

        Otherwise the task that wrote it would take these results for its own if it is cleared now.
        """
        manifest = self.manifest()
        rows = Finished(manifest).input
        is_of_these = job.plan.kept_rounds or (rows is not None and rows.has_rows_of(job.plan.input))
        theirs = manifest.pop("run", None)
        if theirs is not None and not (theirs == self.key and is_of_these):
            job.ledger.check_owner()
            # Not removed: a store may let us write, but not delete.
            write_json(self._try.output_dir / "manifest.json", manifest)

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
        manifest = self.manifest()
        if manifest and self.key not in (manifest.get("unfinished"), manifest.get("run")):
            log.warning("%s holds the results of another job; they will be replaced", self._try.output_dir)
        stored = self._usable_plan(requests, name)
        make_private_folder(self.plans.path)
        if stored is None:
            job = self._make_plan(requests, name)
        else:
            mine, theirs = self._try.submitter, stored.submitter
            is_anew = (mine.epoch, mine.run_start) != (theirs.epoch, theirs.run_start) or not stored.began
            if is_anew:
                # From here on, this is the work of the present clear and run, whose time begins now.
                stored = replace(stored, submitter=mine, began=self._try.clock.time())
            job = self._open(stored)
            job.ledger.claim(self._try.owner)
            log.info("Continuing with the plan of an earlier try")
            if is_anew:
                self.plans.write(stored)
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
        if not stored.began:
            # A version before this one made the plan, while the task waited.
            began = self._try.clock.time() if owner is None else owner.at
            job = self._open(replace(stored, began=began or self._try.clock.time()))
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
        if stored is None or self._is_done_with(stored):
            return None
        if not self._try.earlier_tries:
            log.warning(
                "%s exists although this is the first try; the job continues with it, at no extra cost",
                self.plans,
            )
        if self._is_input(
            stored.input, requests, name, otherwise="the job continues with the rows as planned"
        ):
            return stored
        if stored.submitter.epoch < self._try.submitter.epoch:
            self._supersede(self._open(stored), requests, name)
            return None
        self._refuse_changed(self._open(stored), name)
        log.warning("%s was changed, and no batch of the earlier rows is running; a new plan is made", name)
        remove_tree(self.plans.path)
        return None

    def _is_done_with(self, stored: Plan) -> bool:
        """
        Remove a plan that is of no use: that of a deleted run, or one whose job finished.

        :returns: whether it is gone; a plan whose batches may run stays.
        """
        manifest, mine = self.manifest(), self._try.submitter
        of_deleted_run = mine.is_of_deleted_run(stored.submitter.run_start)
        finished = manifest.get("run") == self.key and stored.submitter.epoch <= Finished(manifest).epoch
        if not of_deleted_run and not finished:
            return False
        ledger = FolderLedger(self.plans.path / "ledger.json", complete=stored.complete)
        if (running := self._may_run(ledger, stored.conn_id)) is not None:
            log.warning("%s is of an earlier job, whose batch %s may be running", self.plans, running)
            return False
        remove_tree(self.plans.path)
        return True

    def _supersede(self, job: OpenJob, requests: Callable[[], Any], name: str) -> None:
        """
        Give up a plan whose rows were changed before the task was cleared.

        The ledger stays, since it names batches that may run. Those of shards that are still wanted go on.

        :raises InvalidInputError: the new rows are wrong; nothing was changed.
        """
        with temporary_folder() as folder:
            options = self._try.options
            split = plan(requests(), folder / FIRST_ROUND, name=name, options=options)
            variants, _ = PlanFolder(folder).write_variants(split, options)
        wanted = {shard.sha256 for shards in (split.shards, *variants) for shard in shards}
        log.warning("%s was changed before the task was cleared; the changed rows are new work", name)
        job.ledger.claim(self._try.owner)
        unwanted = [piece for piece in job.pieces if piece.round or piece.shard.sha256 not in wanted]
        self._end(job, unwanted, cancels=self._try.cancel_on_kill)
        job.ledger.flush()
        self.plans.forget()

    def _refuse_changed(self, job: OpenJob, name: str) -> None:
        """
        Refuse to continue if the rows were changed after batches of them were paid for.

        :raises InvalidInputError: they were. If the run was deleted and created again, only batches that have not ended
            count.
        """
        paid = [piece for piece in job.pieces if not isinstance(job.state(piece), Planned | Refused)]
        is_recorded = paid or job.ledger.damaged or job.live_rounds
        if not is_recorded or (
            not self._try.earlier_tries and self._may_run(job.ledger, self._try.conn_id) is None
        ):
            return
        ids = ", ".join(job.batch_ids[:5]) or "one whose creation was not recorded"
        more = ", ..." if len(job.batch_ids) > 5 else ""
        what = f"batches may be paid for, as the record of them is cut ({ids}{more})"
        if paid:
            what = f"{len(paid)} batches are paid for ({ids}{more})"
        elif job.live_rounds:
            what = "rows were asked live"
        raise InvalidInputError(
            f"{name} was changed since an earlier try submitted its rows: {what}. Nothing was sent. Restore the rows, "
            "their order, request_params and output_type, and let the task retry, which continues the job; or submit "
            "the new rows by a manual clear, which pays for what was changed; or give the new rows another output_dir.",
            retryable=True,
        )

    def _make_plan(self, requests: Callable[[], Any], name: str) -> OpenJob:
        options = self._try.options
        path = self.plans.path / "ledger.json"
        ledger = FolderLedger(path, complete=not self._try.earlier_tries, is_new=True)
        # Other jobs must see that a job starts here before the rows are made, which may take long.
        ledger.claim(self._try.owner)
        # A try that died while it planned may have left parts of its plan.
        self.plans.forget()
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
            digest_of(options.body_content),
            version,
            # An earlier try may have sent batches that this folder does not know.
            complete=not self._try.earlier_tries,
            model_params=model_params_of(options),
            began=self._try.clock.time(),
        )
        try:
            variants, variant_of = self.plans.write_variants(split, options)
            stored = replace(stored, variants=variants, variant_of=variant_of)
            stored = self._with_answers(stored, requests, name)
            self._check_spend(self._open(stored))
        except Exception:
            ledger.remove_folder()
            raise
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

    def _with_answers(self, planned: Plan, requests: Callable[[], Any], name: str) -> Plan:
        """
        Return the plan with the answers that exist: those of the cache, or those of the finished job.

        The latter count if the task was cleared since and the rows are the same.
        """
        finished = self._finished
        if finished is not None:
            mark, mine = finished.input, planned.input
            is_known = same = mark is not None and mark.has_rows_of(mine)
            if mark is not None and mark.shard_rows != mine.shard_rows:
                same = mark.is_of(requests(), self._try.options, name=name)
            kept = replace(planned, kept_rounds=finished.rounds)
            if same and not is_known and mark is not None and sum(mark.shard_rows) > planned.split.rows:
                raise InvalidInputError(
                    f"max_bytes_per_batch: {sum(mark.shard_rows) - planned.split.rows} rows of the finished job are "
                    "now too long to be sent, and their answers would be lost. Nothing was sent. Raise it to what it "
                    "was"
                )
            if not same:
                log.warning("The rows were changed since the job finished; they are new work")
            elif take_over(finished, self.plans, kept, self._try.output_dir, self._try.options):
                return kept
        if self._try.cache_dir is None:
            return planned
        reuse = find_answers(self._try.cache_dir, self.plans, planned, self._try.options)
        return replace(planned, reuse=reuse)

    def _check_spend(self, job: OpenJob) -> None:
        """
        Refuse a job that ``max_cost`` or the account's balance certainly cannot pay.

        :raises InvalidInputError: it is such a job.
        """
        refuse_costly(job)
        check_balance(
            job,
            lambda: self._try.client.get_account(repeat=False).charge_balance,
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
        for name in names_in(self._try.output_dir / WORK_FOLDER):
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
                if self._is_older(theirs):
                    continue
                if theirs.epoch > mine.epoch:
                    raise JobTakenOverError(
                        f"{self._try.output_dir} contains the job of a later clear of this task. This try stops and "
                        "sends nothing."
                    )
                if (running := self._may_run(ledger, stored.conn_id)) is not None:
                    raise InvalidInputError(
                        "models, conn_id, output_dir or on_clear of this task were changed since an earlier try "
                        f"submitted batches: {running} is paid for and may be running. Nothing was sent. Restore the "
                        "arguments and let the task retry, which continues with the batches; or cancel the batches "
                        "first.",
                        retryable=True,
                    )
            elif (running := self._may_run(ledger, stored.conn_id)) is not None:
                raise InvalidInputError(
                    _in_use(self._try.output_dir, theirs.label, f"is running there (batch {running})")
                )
            elif self._may_ask_live(plans, ledger):
                raise InvalidInputError(
                    _in_use(
                        self._try.output_dir, theirs.label, "was asking rows live there within the last hour"
                    ),
                    retryable=True,
                )
            elif not any(ledger.work()):
                # Its rows are planned, and perhaps being uploaded.
                self._refuse_starting(ledger)

    def _may_ask_live(self, plans: PlanFolder, ledger: FolderLedger) -> bool:
        """Whether a job that has not finished began to ask rows one by one a while ago, so that it may go on."""
        start, owner = plans.read_live(), ledger.owner()
        if start is None:
            return False
        latest = max(start.at, 0.0 if owner is None else owner.at)
        return abs(self._try.clock.time() - latest) < _OPEN_INTENT

    def _is_older(self, theirs: Submitter) -> bool:
        """Whether a job of this task is from before its last manual clear, or of a run that was deleted."""
        mine = self._try.submitter
        return theirs.epoch < mine.epoch or mine.is_of_deleted_run(theirs.run_start)

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
        Cancel open batches of older jobs of this task in the output folder, and remove jobs that have ended.

        After a manual clear that submits again, or that comes with other models, nothing else takes care of the older
        job, which may have been deferred or queued.

        :param cancels: whether to cancel; otherwise their batches continue and are billed.
        """
        for plans in self._other_folders():
            stored = plans.read()
            if stored is None or not self._is_older(stored.submitter):
                continue
            if replace(stored.submitter, generation=self._try.submitter.generation) != self._try.submitter:
                continue
            try:
                self._tidy(self._opened(plans, stored), cancels=cancels)
            except SiliconFlowError as exc:
                log.warning("%s, of an earlier job of this task, is not removed: %s", plans, exc)

    def _tidy(self, job: OpenJob, *, cancels: bool) -> None:
        # This stops a try of that job that is still alive.
        job.ledger.claim(self._try.owner)
        self._end(job, job.pieces, cancels=cancels)
        job.ledger.flush()
        job.ledger.remove_folder()

    def _end(self, job: OpenJob, pieces: Iterable[Piece], *, cancels: bool) -> None:
        """Cancel the batches of pieces that nobody waits for any more, and record those that have ended."""
        for piece in pieces:
            state = job.state(piece)
            if not isinstance(state, Sent):
                continue
            batch = self._try.client.get_batch(state.batch_id)
            if cancels and not batch.is_terminal:
                if job.submission.is_ours(job.work(piece, _never), batch):
                    log.warning("Cancelling batch %s of an earlier job of this task", batch.id)
                    batch = cancel(self._try.client, batch.id)
                else:
                    log.warning(
                        "Batch %s is not proven to belong to this task; it is not cancelled", batch.id
                    )
            elif not batch.is_terminal:
                log.warning("Batch %s of an earlier job of this task continues and is billed", batch.id)
            if batch.is_terminal:
                job.ledger.record(piece.work_key, Ended.of(batch, state.number, at=self._try.clock.time()))

    def close(self, job: OpenJob) -> None:
        """Remove the folder of a job that has finished, and older jobs of its task that have ended."""
        self.tidy_older(cancels=False)
        mine = {piece.work_key for piece in job.pieces}
        for key, state in job.ledger.work():
            # Rows that were changed before a clear.
            if key not in mine and isinstance(state, Sent):
                try:
                    batch = self._try.client.get_batch(state.batch_id)
                except SiliconFlowError as exc:
                    log.warning("Batch %s, which nobody waits for, cannot be read: %s", state.batch_id, exc)
                    continue
                if batch.is_terminal and batch.id == state.batch_id:
                    job.ledger.record(key, Ended.of(batch, state.number, at=self._try.clock.time()))
        job.ledger.remove_folder()


def _never(name: str) -> Any:
    raise AssertionError("an earlier job uploads nothing")


def _in_use(output_dir: Any, who: str, what: str) -> str:
    return (
        f"output_dir: the job of {who} {what}, and the results of both would be mixed in {output_dir}. Nothing was "
        "sent. Give each task and run a folder of its own, such as '.../{{ run_id }}/{{ task.task_id }}'"
    )
