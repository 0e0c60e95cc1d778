"""Submitting the batches of a job, with those of earlier tries, the limit of open batches, and refusals."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Sequence

from airflow_provider_siliconflow.api.client import SiliconFlowClient
from airflow_provider_siliconflow.api.exceptions import (
    APIError,
    InsufficientBalanceError,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitedError,
    SiliconFlowError,
    SubmissionUnknownError,
)
from airflow_provider_siliconflow.api.models import Batch
from airflow_provider_siliconflow.batch_files.shards import Shard, select_rows
from airflow_provider_siliconflow.jobs.cancelling import cancel_all
from airflow_provider_siliconflow.jobs.clock import Clock
from airflow_provider_siliconflow.jobs.collecting import Collector
from airflow_provider_siliconflow.jobs.identity import BatchWork
from airflow_provider_siliconflow.jobs.job import OpenJob
from airflow_provider_siliconflow.jobs.plan import Piece, Rest
from airflow_provider_siliconflow.jobs.posting import REFUSAL_PATIENCE
from airflow_provider_siliconflow.jobs.spend import Budget
from airflow_provider_siliconflow.jobs.states import Planned, Refused, Sending, Sent

log = logging.getLogger(__name__)

#: Refusals of a model, none of whose batches was accepted, after which its other batches are not sent either.
_REFUSALS_OF_A_MODEL = 3
#: Seconds to wait for a full account (429) while batches of the job are open.
FULL_ACCOUNT_PATIENCE = 20.0


#: Seconds that a worker waits for batches that it cancelled, and between two looks at them.
_CANCELLING_PATIENCE, _CANCELLING_POLL = 30.0, 2.0


class _AccountIsFull(Exception):  # noqa: N818
    """The service accepts no more batches until one of this job ends."""


class Sender:
    """
    Submits the batches of a job in one process.

    :param job: the job.
    :param client: the calls.
    :param collector: reads which rows a dead batch answered.
    :param clock: time.
    :param began: when this try began, in epoch seconds: it may replace batches that died before.
    :param budget: decides which batches ``max_cost`` allows; ``None`` for all.
    """

    def __init__(
        self,
        job: OpenJob,
        client: SiliconFlowClient,
        collector: Collector,
        *,
        clock: Clock,
        began: float,
        budget: Budget | None = None,
    ) -> None:
        self._job = job
        self._client = client
        self._collector = collector
        self._clock = clock
        self._began = began
        self._budget = budget
        self._looked_up: set[str] = set()
        self._left_alone: set[str] = set()
        self._read: set[str] = set()
        self._refusals_are_logged = False
        self._cancels_late = False

    def stop(self, *, cancels: bool) -> None:
        """
        Send nothing from now on.

        :param cancels: whether to cancel a batch that is being created right now, once its answer comes.
        """
        self._cancels_late = cancels
        self._job.submission.stop()

    def take_up(self) -> None:
        """Read the batches of earlier tries; batches that the service refused may be submitted again."""
        job = self._job
        found = []
        unread = []
        for piece in job.current:
            if job.refused(piece):
                job.ledger.record(piece.work_key, Planned())
            if not isinstance(job.state(piece), Sent):
                continue
            batch = job.submission.recorded(self._work(piece))
            if batch is None:
                unread.append(piece)
                continue
            log.info(
                "Continuing with batch %s (%s) of an earlier try, at no extra cost", batch.id, batch.status
            )
            found.append(batch)
            self._read.add(batch.id)
        job.record_ended(found, at=self._began)
        for piece in unread:
            self._find_unread(piece)

    def _find_unread(self, piece: Piece) -> None:
        """
        Search for a batch that was created and cannot be read; if it is not found, do without it in this try.

        :raises SubmissionUnknownError: nor can any other batch of the job be read.
        """
        job = self._job
        try:
            if self._budget is None:
                self._submit(piece)
            else:
                # If the record is wrong, whether the batch is sent is decided like that of any other.
                self._look_up(piece)
        except SubmissionUnknownError as exc:
            others = (other for other in job.pieces if other.work_key != piece.work_key)
            if not isinstance(job.state(piece), Sent) or not any(map(self._was_read, others)):
                # The connection may lead to another account.
                raise
            log.error("%s Its rows are left out, and the results of the others are written.", exc)
            job.leave_out(piece, str(exc))

    def _was_read(self, piece: Piece) -> bool:
        return self._job.batch_id(piece) in self._read or self._job.ended(piece) is not None

    def submit_due(self) -> bool:
        """
        Submit as many batches as may be open at once.

        A refused batch does not stop the others: those that were accepted are paid for, and their results are wanted.
        The job then fails at its end.

        :returns: whether the account has no room for more batches until one of this job ends.
        :raises SiliconFlowError: the service refuses, and has accepted no batch of this job.
        """
        is_full = False
        try:
            # An adopted batch may have ended already, which makes room for more.
            while self._replace_dead() or self._submit_some():
                pass
        except _AccountIsFull as exc:
            log.warning("%s The next batch is submitted once an open one has ended.", exc)
            is_full = True
        except SiliconFlowError:
            # Without the ids recorded so far, a later try would have to search for them by their intents.
            with contextlib.suppress(SiliconFlowError):
                self._job.ledger.flush()
            raise
        self._job.ledger.flush()
        return is_full

    # Asking row by row ------------------------------------------------------------------------------------

    def end_batches(self, at: float) -> list[Batch]:
        """
        Send no more batches, and cancel the open ones: what they do not answer is asked row by row.

        :param at: epoch seconds.
        :returns: the batches that have reached a terminal status, some of which may not be settled yet.
        :raises SiliconFlowError: the job belongs to another try, or the service refuses every call.
        """
        job = self._job
        # A newer try may want these batches.
        job.ledger.check_owner()
        for piece in job.current:
            state = job.state(piece)
            may_exist = isinstance(state, Sending) or (isinstance(state, Planned) and not job.ledger.complete)
            if may_exist and piece.work_key not in self._looked_up:
                self._looked_up.add(piece.work_key)
                self._look_up_or_leave_out(piece)
        # A batch that has ended is only waited for until its results are complete.
        open_ids = [
            state.batch_id
            for piece in job.current
            if isinstance(state := job.state(piece), Sent) and not state.terminal_since
        ]
        # Recorded first: a later process must know that nobody else cancelled them.
        job.start_live(at, open_ids)
        job.ledger.flush()
        if open_ids:
            log.info("Live: %d open batches are cancelled; what they answered is kept", len(open_ids))
            cancel_all(open_ids, lambda: SiliconFlowClient(self._client.settings), is_ours=self.owns)
        return self._see_ends()

    def _see_ends(self) -> list[Batch]:
        """
        Record which batches have reached a terminal status, and wait a little for those that were just cancelled.

        From that moment on counts the time in which their results may still change; nobody else would see it so soon.
        """
        job, found = self._job, dict[str, Batch]()
        until = self._clock.monotonic() + _CANCELLING_PATIENCE
        while True:
            for batch_id in job.awaited:
                if batch_id not in found:
                    try:
                        batch = self._client.get_batch(batch_id, repeat=False)
                    except SiliconFlowError as exc:
                        log.info("Batch %s cannot be read now: %s", batch_id, exc)
                        continue
                    if batch.is_terminal:
                        found[batch_id] = batch
            job.record_ended(found.values(), at=self._clock.time())
            if all(batch_id in found for batch_id in job.awaited) or self._clock.monotonic() >= until:
                return list(found.values())
            self._job.submission.check_not_stopped("A row")
            self._clock.sleep(_CANCELLING_POLL)

    def _look_up_or_leave_out(self, piece: Piece) -> None:
        try:
            self._look_up(piece)
        except SubmissionUnknownError as exc:
            # Its rows may be paid for, so they are not asked. The others are.
            log.error("%s Its rows are left out, and not asked live.", exc)
            self._job.leave_out(piece, str(exc))

    # Dead batches -----------------------------------------------------------------------------------------

    def _replace_dead(self) -> bool:
        """
        Plan batches of the rows that dead batches of earlier tries did not answer; return whether there are any.

        A batch that died in this try is not replaced in it: somebody may have cancelled it for a reason.
        """
        job = self._job
        replaced = False
        for piece in list(job.current):
            ended = job.dead(piece)
            if ended is None or ended.at > self._began or ended.batch_id in self._left_alone:
                continue
            try:
                unanswered = self._collector.unanswered(piece, ended)
            except SiliconFlowError as exc:
                log.error("Batch %s (%s) is not replaced yet: %s", ended.batch_id, ended.status, exc)
                self._left_alone.add(ended.batch_id)
                continue
            # The download took its time; a newer try may have planned the same meanwhile.
            job.ledger.check_owner()
            rows = sum(unanswered)
            log.info(
                "Batch %s of an earlier try is %s: %d of its %d rows have no answer and are submitted again",
                ended.batch_id,
                ended.status,
                rows,
                len(unanswered),
            )
            if rows == len(unanswered):
                job.ledger.retire(piece.work_key)
            else:
                job.add_rest(piece, self._rest(piece, unanswered) if rows else None)
            replaced = True
        return replaced

    def _rest(self, piece: Piece, unanswered: bytearray) -> Shard:
        folder = self._job.plans.path / Rest(piece.work_key, None).folder
        (shard,) = select_rows([self._job.source(piece)], [unanswered], folder)
        return shard

    # Submitting -------------------------------------------------------------------------------------------

    def _submit_some(self) -> bool:
        job = self._job
        current = job.current
        limit = job.options.max_in_flight or len(current)
        waiting = self._affordable([piece for piece in current if job.is_waiting(piece)])
        now = waiting[: max(limit - job.running, 0)]
        for piece in now:
            try:
                batch = self._submit(piece)
            except RateLimitedError as exc:
                if job.running:
                    raise _AccountIsFull(str(exc)) from exc
                raise
            except InsufficientBalanceError as exc:
                self._refuse([piece, *self._surely_unsent(waiting, piece)], exc)
                return True
            except NotFoundError as exc:
                if not job.batch_ids:
                    raise
                self._refuse([piece], exc)
                return True
            except (InvalidRequestError, PermissionDeniedError) as exc:
                self._refuse(self._refused_alike(piece), exc)
                return True
            if self._cancels_late:
                # The task was ended while the request was under way, when there was no batch to be found yet.
                self._client.cancel_batch(batch.id)
            log.info("Batch %s: %s", batch.id, job.name(piece))
        return bool(now)

    def _affordable(self, waiting: list[Piece]) -> list[Piece]:
        """Return those of the batches to be submitted that ``max_cost`` allows."""
        if self._budget is None:
            return waiting
        job = self._job
        for piece in waiting:
            # Whatever an earlier try left costs money, so it must be known before anything is sent beside it.
            is_open = isinstance(job.state(piece), Sending) or not job.ledger.complete
            if is_open and piece.work_key not in self._looked_up:
                self._looked_up.add(piece.work_key)
                self._look_up(piece)
        return self._budget.affordable([piece for piece in waiting if job.is_waiting(piece)])

    def _look_up(self, piece: Piece) -> None:
        """Adopt what an earlier try left of a batch, and send nothing."""
        batch = self._job.submission.find_earlier(self._work(piece))
        if batch is not None:
            self._job.record_ended([batch], at=self._clock.time())

    def _submit(self, piece: Piece) -> Batch:
        # If this job's own batches fill the account, waiting here does not make room.
        patience = FULL_ACCOUNT_PATIENCE if self._job.running else REFUSAL_PATIENCE
        batch = self._job.submission.submit(self._work(piece), rate_limit_patience=patience, adopt_dead=True)
        self._job.record_ended([batch], at=self._clock.time())
        return batch

    def _work(self, piece: Piece) -> BatchWork:
        source, size = self._job.source(piece), piece.shard.bytes
        return self._job.work(piece, lambda name: self._client.upload_file(source, size=size, filename=name))

    def owns(self, batch: Batch) -> bool:
        """Whether an open batch that the ledger names is proven to be of this job."""
        for piece in self._job.current:
            if self._job.batch_id(piece) == batch.id:
                return self._job.submission.owns(self._work(piece), batch)
        return False

    def find_unrecorded(self, patience: float) -> list[str]:
        """
        Search the account for batches that were being created.

        :param patience: for how many seconds to repeat the search if one is not listed.
        :raises SiliconFlowError: the account cannot be searched.
        """
        job = self._job
        works = [self._work(piece) for piece in job.current if isinstance(job.state(piece), Sending)]
        return [batch.id for batch in job.submission.find(works, patience)] if works else []

    def _refused_alike(self, piece: Piece) -> list[Piece]:
        """Return a refused batch, with all others of its model if enough were refused and none was accepted."""
        job = self._job
        same = [other for other in job.current if other.model == piece.model and other.round == piece.round]
        tried = sum(job.refused(other) is not None for other in same) + 1
        if tried < _REFUSALS_OF_A_MODEL or any(map(job.batch_id, same)):
            return [piece]
        return [piece, *self._surely_unsent(same, piece)]

    def _surely_unsent(self, pieces: Iterable[Piece], but: Piece) -> list[Piece]:
        """Return the pieces for which no try can have left a batch; one with an intent may be paid for."""
        return [piece for piece in pieces if piece != but and isinstance(self._job.state(piece), Planned)]

    def _refuse(self, pieces: Sequence[Piece], error: APIError) -> None:
        """
        Record batches that the service refuses, so that the others are still collected.

        :raises SiliconFlowError: there are no others, so nothing was paid and nothing can be lost.
        """
        job = self._job
        refused = Refused(error.status_code, error.message)
        job.ledger.record_all({piece.work_key: refused for piece in pieces})
        if not job.has_paid and not any(map(job.is_waiting, job.current)):
            raise error
        log.error("Refused: %s: %s", job.name(pieces[0]), error)
        if len(pieces) > 1:
            log.error("%d more batches of the same model are not sent in this try", len(pieces) - 1)
        if not self._refusals_are_logged:
            self._refusals_are_logged = True
            log.error(
                "The accepted batches continue. The task collects their results and then fails; a retry sends only "
                "what was refused."
            )
