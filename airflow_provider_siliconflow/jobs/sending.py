"""Submitting the batches of a job: what an earlier try left, what may be open at once, what the service refuses."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from airflow_provider_siliconflow.api.client import SiliconFlowClient
from airflow_provider_siliconflow.api.exceptions import (
    APIError,
    InsufficientBalanceError,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
)
from airflow_provider_siliconflow.api.models import Batch, BatchStatus, UploadedFile
from airflow_provider_siliconflow.jobs.identity import upload_name
from airflow_provider_siliconflow.jobs.job import OpenJob
from airflow_provider_siliconflow.jobs.plan import Piece
from airflow_provider_siliconflow.jobs.states import Planned, Refused

log = logging.getLogger(__name__)

#: Refused batches of a model, none being taken, before the others of the model are not sent either.
_REFUSALS_OF_A_MODEL = 3


class Sender:
    """
    Submits the batches of a job in one process.

    :param job: the job.
    :param client: the calls.
    """

    def __init__(self, job: OpenJob, client: SiliconFlowClient) -> None:
        self._job = job
        self._client = client
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
        """
        Take up the batches of an earlier try: one that failed or was cancelled is submitted anew.

        Called once per try, since within a try a batch that failed stays failed.
        """
        job = self._job
        alive: set[str] = set()
        found = []
        for piece in job.current:
            batch_id = job.batch_id(piece)
            if batch_id is None or job.ended(piece):
                continue
            # Read first, so that one that died is known to have, with its rows.
            batch = job.submission.look(batch_id)
            if batch is None:
                continue
            if not batch.is_dead and batch.status != BatchStatus.CANCELLING:
                log.info(
                    "Adopting batch %s (%s) of an earlier try: nothing is paid again", batch_id, batch.status
                )
                alive.add(piece.work_key)
            found.append(batch)
        job.record_ended(found)
        adopted = []
        for piece in job.current:
            if job.dead(piece):
                job.ledger.retire(piece.work_key)
            elif job.refused(piece):
                job.ledger.record(piece.work_key, Planned())
            elif job.batch_id(piece) and not job.ended(piece) and piece.work_key not in alive:
                adopted.append(self._submit(piece))
        job.record_ended(adopted)

    def submit_due(self) -> None:
        """
        Submit as many batches as may be open at once.

        A batch that the service refuses stops no other: those that were taken are paid, and their results wanted. The
        job fails at its end then.

        :raises SiliconFlowError: the service refuses, and has taken no batch of this job.
        """
        # What is adopted may have ended already, and makes room for more.
        while self._submit_some():
            pass
        self._job.ledger.flush()

    def _submit_some(self) -> bool:
        job = self._job
        current = job.current
        limit = job.options.max_in_flight or len(current)
        waiting = [piece for piece in current if job.is_waiting(piece)]
        now = waiting[: max(limit - len(job.open_batches), 0)]
        for piece in now:
            try:
                batch = self._submit(piece)
            except InsufficientBalanceError as exc:
                self._refuse([piece, *self._surely_unsent(waiting, piece)], exc)
                return True
            except NotFoundError as exc:
                if not job.batch_ids:
                    raise
                # Perhaps the file is gone: the retry uploads it again.
                job.ledger.record_upload(piece.upload_key, Planned())
                self._refuse([piece], exc)
                return True
            except (InvalidRequestError, PermissionDeniedError) as exc:
                self._refuse(self._refused_alike(piece), exc)
                return True
            job.record_ended([batch])
            if self._cancels_late:
                # Ended while the request was on its way, when there was no batch to be found yet.
                self._client.cancel_batch(batch.id)
            log.info("Batch %s: %s", batch.id, job.name(piece))
        return bool(now)

    def _submit(self, piece: Piece) -> Batch:
        job = self._job
        source = job.source(piece)
        name = upload_name(f"r{piece.round}-{piece.shard.name}", piece.upload_key)

        def send() -> UploadedFile:
            return self._client.upload_file(source, size=piece.shard.bytes, filename=name)

        file = job.submission.upload(piece.upload_key, name, piece.shard.bytes, send)
        return job.submission.submit(job.work(piece, file.id))

    def _refused_alike(self, piece: Piece) -> list[Piece]:
        """Return a refused batch, and all others of its model once enough of them were refused and none was taken."""
        job = self._job
        same = [other for other in job.current if other.model == piece.model and other.round == piece.round]
        tried = sum(job.refused(other) is not None for other in same) + 1
        if tried < _REFUSALS_OF_A_MODEL or any(map(job.batch_id, same)):
            return [piece]
        return [piece, *self._surely_unsent(same, piece)]

    def _surely_unsent(self, pieces: Iterable[Piece], but: Piece) -> list[Piece]:
        """Return those of which no try can have left a batch: one with an intent is looked for, and may be paid."""
        return [piece for piece in pieces if piece != but and isinstance(self._job.state(piece), Planned)]

    def _refuse(self, pieces: Sequence[Piece], error: APIError) -> None:
        """
        Record batches that the service does not take, and go on to collect the others.

        :raises SiliconFlowError: there are no others; nothing was paid, so there is nothing to lose.
        """
        job = self._job
        refused = Refused(error.status_code, error.message)
        job.ledger.record_all({piece.work_key: refused for piece in pieces})
        if not job.has_paid and not any(map(job.is_waiting, job.current)):
            raise error
        log.error("Refused: %s: %s", job.name(pieces[0]), error)
        if len(pieces) > 1:
            log.error("%d more like it are not sent in this try", len(pieces) - 1)
        if not self._refusals_are_logged:
            self._refusals_are_logged = True
            log.error(
                "The batches that were taken go on. Their results are collected, and the task fails then; a retry "
                "sends what was refused, and nothing else."
            )
