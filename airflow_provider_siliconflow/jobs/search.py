"""
Searching the account for the batch of a piece of work, and proving that it is the right one.

A batch with our mark may belong to others, since everybody with access to the account can copy a mark. A batch without
a mark may be ours, since the list may leave out metadata. A batch that is not listed may exist, since the list may lag
or be incomplete.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from airflow_provider_siliconflow.api.exceptions import (
    NotFoundError,
    SiliconFlowError,
    SubmissionUnknownError,
)
from airflow_provider_siliconflow.api.models import Batch, BatchStatus
from airflow_provider_siliconflow.jobs.account import AccountAPI, AccountBatches, AccountFiles, Listed
from airflow_provider_siliconflow.jobs.clock import Clock
from airflow_provider_siliconflow.jobs.identity import (
    SUBMIT_ANEW,
    WORK_KEY,
    WORK_RUN,
    WORK_SUBMITTER,
    BatchWork,
    Proof,
    Upload,
    prove,
)
from airflow_provider_siliconflow.jobs.ledger import Ledger
from airflow_provider_siliconflow.jobs.settled import SETTLE_PATIENCE, SETTLE_POLL, is_settled
from airflow_provider_siliconflow.jobs.states import Planned, Refused, files_of

log = logging.getLogger(__name__)

#: How long the account's listing may take to show a new batch, and the pauses between two searches, in seconds.
LIST_LAG = 60.0
_LIST_PAUSES = (2.0, 3.0, 5.0, 10.0, 15.0, 25.0)
#: How long to wait for the end of a cancellation, in seconds.
CANCEL_PATIENCE = 900.0
#: Batches without metadata that one search reads by their id: those over a file of ours, and the first ones in the list
#: that name no file at all.
_MAX_READS_OVER_FILE, _MAX_READS_WITHOUT_FILE = 200, 50


class SearchAPI(AccountAPI, Protocol):
    """The calls that a search needs; ``SiliconFlowClient`` has them."""

    def get_batch(self, batch_id: str) -> Batch:
        """Read a batch."""
        ...


@dataclass(frozen=True, slots=True)
class Found:
    """
    The result of one search.

    :param live: batches that certainly belong to the work and whose rows are or will be paid for; those of the latest
        run first, then the oldest first.
    :param dead: batches that certainly belong to the work, and failed or were cancelled before their rows were done.
    :param doubtful: ids of batches that may belong to the work; the service states too little about them.
    """

    live: tuple[Batch, ...]
    dead: tuple[Batch, ...]
    doubtful: tuple[str, ...]


class AccountSearch:
    """
    Searches for one try.

    :param api: the calls.
    :param ledger: the record of earlier tries.
    :param since: no try can have sent anything before this time (epoch seconds of Airflow's clock).
    :param clock: time.
    """

    def __init__(self, api: SearchAPI, ledger: Ledger, since: float, clock: Clock) -> None:
        self._api = api
        self._ledger = ledger
        self._since = since
        self._clock = clock
        self.files = AccountFiles(api, clock)
        self.batches = AccountBatches(api, self.files, clock)
        self._logged_copies: set[str] = set()

    # Reading and searching --------------------------------------------------------------------------------

    def read(self, batch_id: str, *, watch: bool = True) -> Batch | None:
        """
        Read a batch.

        :param watch: whether to wait for the end of a batch that is being cancelled.
        :returns: ``None`` if the account does not know the batch, or answers about another one.
        """
        try:
            batch = self._api.get_batch(batch_id)
            give_up_at = self._clock.monotonic() + (CANCEL_PATIENCE if watch else 0.0)
            while batch.status == BatchStatus.CANCELLING and self._clock.monotonic() < give_up_at:
                log.info("Batch %s of an earlier try is being cancelled; waiting for its end", batch_id)
                self._clock.sleep(10.0)
                batch = self._api.get_batch(batch_id)
        except NotFoundError as exc:
            log.warning("Batch %s was submitted by an earlier try but cannot be read: %s", batch_id, exc)
            return None
        if batch.id != batch_id:
            log.warning(
                "Asked for batch %s, the service answered about batch %s; that answer is ignored",
                batch_id,
                batch.id,
            )
            return None
        return batch

    def read_to_its_counts(self, batch: Batch) -> Batch:
        """Read a cancelled batch until its counts are settled, or have had the time: it may have answered every row."""
        give_up_at = self._clock.monotonic() + SETTLE_PATIENCE
        while not is_settled(batch) and self._clock.monotonic() < give_up_at:
            log.info(
                "The counts of batch %s, which was cancelled, do not add up yet; waiting for them", batch.id
            )
            self._clock.sleep(SETTLE_POLL)
            batch = self.read(batch.id) or batch
        return batch

    def searches(self, work: BatchWork, listed_by: float, *, watch: bool = True) -> Iterator[Found]:
        """
        Search the account repeatedly, with pauses, until the work must be listed if it exists.

        :param listed_by: monotonic time from which on the listing can be trusted.
        :param watch: whether to wait for the end of a batch that is being cancelled.
        """
        pauses = iter(_LIST_PAUSES)
        while True:
            self.batches.read(work, self._anchor(work), listed_by, self._ledger.recorded_batches())
            yield self._search(work, watch=watch)
            left = listed_by - self.batches.read_at
            if left <= 0:
                return
            pause = min(next(pauses, LIST_LAG), left)
            log.info(
                "No batch of an earlier try is listed; searching again in %.0f s, since the list may lag",
                pause,
            )
            self._clock.sleep(pause)

    def _anchor(self, work: BatchWork) -> float | None:
        """Return the time, by the service's clock, before which the work has no batch; ``None`` if it is unknown."""
        try:
            self.files.read()
        except SiliconFlowError as exc:
            log.info("The account's files cannot be listed, so all of its batches are searched: %s", exc)
            return None
        ours = self.our_files(work)
        if not ours:
            # No batch can be ours then, so going back further than the first try is useless.
            return self._since
        times = [file.created_at if (file := self.files.get(file_id)) else None for file_id in ours]
        known = [time for time in times if time is not None]
        return min(known) if len(known) == len(times) else None

    def _search(self, work: BatchWork, *, watch: bool) -> Found:
        doubtful = self._read_unmarked(work)
        retired = {ended.batch_id for ended in self._ledger.retired(work.key)}
        live: list[Batch] = []
        dead: list[Batch] = []
        for listed in self.batches.marked(work.key):
            if listed.id in retired:
                continue
            # The listing may be stale: only the batch itself shows whether it is still alive. A listed batch exists,
            # even if a gateway briefly answers something else for its id.
            batch = self.read(listed.id, watch=watch) or listed.batch()
            if work.is_of_deleted_run(batch):
                log.info(
                    "Batch %s was submitted by a run of the same id that was deleted; not used", batch.id
                )
                continue
            proof = self.prove(work, batch)
            if proof is Proof.UNPROVEN:
                doubtful.append(batch.id)
            elif proof is Proof.FOREIGN:
                self._log_copy(work, batch)
            else:
                (dead if is_replaceable(batch) else live).append(batch)
        # If the run was deleted and created again, those of the later one count; within a run, the oldest.
        live.sort(key=lambda batch: batch.metadata.get(WORK_RUN, ""), reverse=True)
        if len(live) > 1:
            log.warning(
                "The account has %d batches of this task (%s); continuing with the first",
                len(live),
                ", ".join(batch.id for batch in live),
            )
        return Found(tuple(live), tuple(dead), tuple(doubtful))

    def _log_copy(self, work: BatchWork, batch: Batch) -> None:
        if batch.id not in self._logged_copies:
            self._logged_copies.add(batch.id)
            log.error(
                "Batch %s carries the mark of this work (%s=%s), but its input file (%s), endpoint or completion "
                "window differs. It is not used",
                batch.id,
                WORK_KEY,
                work.key,
                batch.input_file_id,
            )

    # Batches without a mark -------------------------------------------------------------------------------

    def _read_unmarked(self, work: BatchWork) -> list[str]:
        """
        Read batches that are listed without our marks by their ids, if they may belong to the work.

        :returns: the ids of those that may belong to it, but about which nothing more can be found out.
        """
        chosen, unread = self._unmarked(work)
        for listed in chosen:
            if not self.batches.was_read(listed.id):
                batch = self.read(listed.id, watch=False)
                if batch is not None:
                    self.batches.add_read(batch)
        # If the service returns metadata, batches without any were created by somebody else.
        doubtful = [] if self.batches.shows_marks else [listed.id for listed in self._unmarked(work)[0]]
        return [*doubtful, *unread]

    def _unmarked(self, work: BatchWork) -> tuple[list[Listed], list[str]]:
        """Return the batches that may belong to the work by the list, and the ids of those beyond the limits."""
        over_file: list[Listed] = []
        without_file: list[Listed] = []
        ours, recorded = self.our_files(work), self._ledger.recorded_batches()
        for listed in self.batches.unmarked():
            if listed.file_id is not None and listed.file_id not in ours:
                continue
            if listed.id not in recorded:
                (without_file if listed.file_id is None else over_file).append(listed)
        unread = [*over_file[_MAX_READS_OVER_FILE:], *without_file[_MAX_READS_WITHOUT_FILE:]]
        chosen = [*over_file[:_MAX_READS_OVER_FILE], *without_file[:_MAX_READS_WITHOUT_FILE]]
        return chosen, [listed.id for listed in unread]

    # Proof ------------------------------------------------------------------------------------------------

    def our_files(self, work: BatchWork) -> set[str]:
        """Return the input files that a batch of the work can have, according to the ledger and the account."""
        if work.upload is None:
            return {work.input_file_id} if work.input_file_id else set()
        self.files.read()
        recorded = self.recorded_files(work.upload)
        if recorded and self._ledger.complete:
            # A file is recorded before a batch over it is asked for, so another of its name is a copy.
            return recorded
        listed = {file.id for file in self.files.named(work.upload) if work.upload.may_be(file)}
        return listed | recorded

    def recorded_files(self, upload: Upload) -> set[str]:
        """Return the files that the ledger names, without those that the account lists as something else."""
        recorded = {file_id: self.files.get(file_id) for file_id in files_of(self._ledger.upload(upload.key))}
        return {file_id for file_id, file in recorded.items() if file is None or upload.may_be(file)}

    def prove(self, work: BatchWork, batch: Batch) -> Proof:
        """Say whether a batch belongs to a piece of work."""
        ours, upload = self.our_files(work), work.upload
        file = self.files.get(batch.input_file_id or "")
        only_listed = (
            file is not None and upload is not None and file.id in ours - self.recorded_files(upload)
        )
        # Name and size can be copied, but the content can be compared if the service lets it be read.
        if only_listed and file and upload and self.files.has_content_of(file, upload) is False:
            return Proof.FOREIGN
        # A complete ledger knows every file that a batch of ours can have.
        is_anothers = self._ledger.complete if file is None else file.id not in ours
        return prove(work, batch, our_files=ours, file_is_anothers=is_anothers)

    def proves_record(self, work: BatchWork, batch: Batch) -> bool:
        """
        Whether a batch that the ledger names belongs to the work; others may have written into a shared folder.

        :raises SubmissionUnknownError: the service states too little to tell.
        """
        proof = self.prove(work, batch)
        if proof is Proof.UNPROVEN and batch.input_file_id in self.our_files(work):
            # The record and the input file agree, and the service returns no metadata.
            return True
        if proof is Proof.UNPROVEN:
            raise SubmissionUnknownError(
                f"Batch {batch.id} is recorded for {work.label}, but the service states neither its metadata nor its "
                "input file, so it may belong to others. Nothing was sent. A retry reads it again.",
                retryable=True,
            )
        if proof is Proof.FOREIGN:
            log.error(
                "The record names batch %s for %s, but it belongs to other work (mark %s, input file %s). It is not "
                "used, and the account is searched",
                batch.id,
                work.label,
                batch.metadata.get(WORK_KEY),
                batch.input_file_id,
            )
        return proof is Proof.OURS

    def check_conclusive(self, work: BatchWork, found: Found) -> None:
        """
        Check that a search that found nothing proves that there is nothing.

        :raises SubmissionUnknownError: the work may have a batch nevertheless.
        """
        manual = f"On the console, its batch has the metadata {WORK_KEY}={work.key}. If there is none, {SUBMIT_ANEW}."
        if found.doubtful:
            raise SubmissionUnknownError(
                f"An earlier try may have paid for {work.label}: {', '.join(found.doubtful[:5])} may be its batch, but "
                "the service states too little to tell (metadata, input file). Nothing was sent. A retry reads it "
                f"again. {manual}",
                retryable=True,
            )
        if self.batches.unreadable:
            raise SubmissionUnknownError(
                f"The account lists {self.batches.unreadable} batches that cannot be read, and one of them may be "
                f"{work.label}, which an earlier try may have paid for. Nothing was sent. A retry searches again. "
                f"{manual}",
                retryable=True,
            )
        if not self.batches.shows_all_of(self._anchor(work), self._older_batches(work)):
            raise SubmissionUnknownError(
                f"The account lists only its newest {len(self.batches)} batches, and none of them is {work.label}: an "
                f"earlier try may have paid for an older one. Nothing was sent. A retry searches again. {manual}",
                retryable=True,
            )

    def _older_batches(self, work: BatchWork) -> set[str]:
        """Return the recorded batches that are certainly older than any of the work's, if its intent is recorded."""
        state = self._ledger.state(work.key)
        number = 0 if isinstance(state, Planned | Refused) else state.number
        return {batch_id for batch_id, other in self._ledger.recorded_batches().items() if 0 < other < number}


def is_spent(work: BatchWork, batch: Batch) -> bool:
    """Whether a batch from before a manual clear ended without a single answer, so that it is of no use any more."""
    counts = batch.request_counts
    mark = batch.metadata.get(WORK_SUBMITTER)
    cleared_since = work.submitter is not None and mark is not None and mark != work.submitter.mark
    if not cleared_since or not batch.is_terminal or not counts.total or counts.completed:
        return False
    # The answers of a batch that expired may come late, and its file shows them first.
    return counts.failed >= counts.total or (batch.status == BatchStatus.EXPIRED and not batch.output_file_id)


def is_replaceable(batch: Batch) -> bool:
    """Whether a batch failed or was cancelled and has unanswered rows, so that its work may be submitted again."""
    counts = batch.request_counts
    all_done = batch.status == BatchStatus.CANCELLED and 0 < counts.total <= counts.completed
    return batch.is_dead and not all_done
