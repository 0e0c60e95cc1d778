"""
Submission exactly once.

Creating a batch is the call that costs money. After a crash or a lost answer nobody knows whether it was
carried out, so before it is sent (again) the account's own batches are searched for the work's identity.
Uploads go the same way: they cost no money, but a gigabyte is not sent twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, Protocol, TypeVar

from airflow_provider_siliconflow.api import protocol
from airflow_provider_siliconflow.api.arguments import WORK_KEY
from airflow_provider_siliconflow.api.exceptions import (
    NotFoundError,
    SiliconFlowError,
    SubmissionUnknownError,
)
from airflow_provider_siliconflow.api.models import Batch, BatchStatus, UploadedFile
from airflow_provider_siliconflow.jobs.clock import Clock, SystemClock
from airflow_provider_siliconflow.jobs.identity import BatchWork
from airflow_provider_siliconflow.jobs.ledger import Ledger
from airflow_provider_siliconflow.jobs.states import (
    Ended,
    Planned,
    Refused,
    Sending,
    Sent,
    State,
    Uploaded,
    Uploading,
    UploadState,
)

log = logging.getLogger(__name__)

T = TypeVar("T")
Search = Literal["none", "once", "patiently"]

#: How long the account's listing may take to show a new batch, in seconds, and the pauses between looks at it.
LIST_LAG = 60.0
_LIST_PAUSES = (2.0, 3.0, 5.0, 10.0, 15.0, 25.0)
#: How long definite refusals (429, overloaded, no connection) are sat out, in seconds.
REFUSAL_PATIENCE = 900.0
#: How often a request is sent of which each time it stayed open whether it counted.
MAX_OPEN_SENDS = 3
#: How long the end of a cancellation is waited for before its batch counts as dead, in seconds.
CANCEL_PATIENCE = 900.0
#: Clocks of the service and of the worker may differ by so much, in seconds.
CLOCK_SKEW = 3600.0
#: The service keeps files for 30 days; nothing older is worth finding.
MAX_AGE = 30 * 86400.0


class BatchAPI(Protocol):
    """The calls submission needs; ``SiliconFlowClient`` has them."""

    def create_batch(self, **request: Any) -> Batch:
        """Create a batch."""
        ...

    def get_batch(self, batch_id: str) -> Batch:
        """Read a batch."""
        ...

    def list_batches(self) -> Iterator[Batch]:
        """Yield batches, newest first."""
        ...

    def list_files(self) -> Iterable[UploadedFile]:
        """Return the account's files."""
        ...


class Submission:
    """
    Creates batches and uploads files exactly once.

    :param api: the calls.
    :param ledger: what outlives a try.
    :param earlier_tries: how hard they are to be looked for where the ledger is not complete: ``"none"`` when
        there was no earlier try, ``"once"``, or ``"patiently"`` since the account may list a batch late.
    :param since: no earlier try can have sent anything before this time (epoch seconds).
    :param clock: time.
    """

    def __init__(
        self,
        api: BatchAPI,
        *,
        ledger: Ledger,
        earlier_tries: Search,
        since: float,
        clock: Clock | None = None,
    ) -> None:
        self._api = api
        self._ledger = ledger
        self._earlier_tries = earlier_tries
        self._clock: Clock = clock or SystemClock()
        self._since = max(since - CLOCK_SKEW, self._clock.time() - MAX_AGE)
        self._started = self._clock.time()
        self._stopped = False
        self._listing_read_at = float("-inf")
        self._found: dict[str, list[Batch]] = {}
        self._seen: set[str] = set()
        self._listing_cut = False

    def stop(self) -> None:
        """
        Send nothing from now on: the task was ended from outside.

        Airflow 3 lets the process go on for five seconds after ``on_kill``, time enough to pay for a batch that
        nobody waits for.
        """
        self._stopped = True

    def check_not_stopped(self, what: str) -> None:
        """
        Refuse to send after :meth:`stop`.

        :param what: what would have been sent.
        :raises SiliconFlowError: the task was ended.
        """
        if self._stopped:
            raise SiliconFlowError(f"{what} is not sent any more: the task was ended from outside")

    # Batches ----------------------------------------------------------------------------------------------

    def submit(self, work: BatchWork) -> Batch:
        """
        Return the batch of a piece of work: the one an earlier try left, or a new one.

        :raises SubmissionUnknownError: it stayed open whether a batch exists; a retry searches again.
        :raises SiliconFlowError: the service refused; no batch was created.
        """
        state = self._ledger.state(work.key)
        listed_at = self._listed_at(state)
        if isinstance(state, Sent | Ended):
            batch = self._read(state.batch_id)
            if batch is not None and self._may_adopt(batch):
                return batch
            if batch is None:
                listed_at = self._started + LIST_LAG
            else:
                # A try that submitted after this batch had died would have left an intent instead of its id.
                listed_at = None
                self._bury(work, state, batch)
        if listed_at is not None:
            batch = self._search(work, listed_at, after_intent=not isinstance(state, Planned))
            if batch is None and isinstance(state, Sent | Ended):
                raise _unreadable(work, state.batch_id)
            if batch is not None:
                self._record_sent(work, batch)
                return batch
        if isinstance(self._ledger.state(work.key), Refused):
            self._ledger.record(work.key, Planned())
        if not isinstance(self._ledger.state(work.key), Sending):
            self._ledger.record(work.key, Sending(self._ledger.next_number(), self._clock.time()))
        batch = self._send_once(
            f"POST /batches for {work.label}",
            lambda: self._api.create_batch(**work.request()),
            lambda: self._search(work, self._clock.time() + LIST_LAG, after_intent=True),
            lambda: self._ledger.record(work.key, Planned()),
        )
        self._record_sent(work, batch)
        return batch

    def _record_sent(self, work: BatchWork, batch: Batch) -> None:
        state = self._ledger.state(work.key)
        number = state.number if isinstance(state, Sending | Sent | Ended) else 0
        self._ledger.record(work.key, Sent(batch.id, number))

    def _bury(self, work: BatchWork, state: Sent | Ended, batch: Batch) -> None:
        """Record that a batch died, so that its work is planned anew."""
        if isinstance(state, Sent):
            counts = batch.request_counts.model_dump(mode="json", include={"total", "completed", "failed"})
            errors = tuple(batch.error_messages)
            self._ledger.record(work.key, Ended(batch.id, state.number, batch.status, counts, errors))
        self._ledger.retire(work.key)

    def _listed_at(self, state: State | UploadState) -> float | None:
        """Return when the account surely lists what an earlier try left; ``None`` when it left nothing."""
        if not isinstance(state, Planned | Refused):
            return self._started + LIST_LAG
        if self._ledger.complete or self._earlier_tries == "none":
            return None
        return self._started + (LIST_LAG if self._earlier_tries == "patiently" else 0.0)

    def look(self, batch_id: str) -> Batch | None:
        """Read a batch of an earlier try, to the end of its cancellation; ``None`` where it cannot be read."""
        return self._read(batch_id)

    def find(self, works: Iterable[BatchWork], patience: float = 0.0) -> list[Batch]:
        """
        Search the account for live batches of these works: once, and while none is listed, again.

        :param patience: how long, in seconds.
        """
        listed_at = self._clock.time() + patience
        found = (self._search(work, listed_at, watch=False, after_intent=True) for work in works)
        return [batch for batch in found if batch is not None]

    def _read(self, batch_id: str, *, watch: bool = True) -> Batch | None:
        """Read a batch; one that is being cancelled is watched until it is clear how that ended."""
        try:
            batch = self._api.get_batch(batch_id)
            give_up_at = self._clock.time() + (CANCEL_PATIENCE if watch else 0.0)
            while batch.status == BatchStatus.CANCELLING and self._clock.time() < give_up_at:
                log.info("Batch %s of an earlier try is being cancelled; waiting for the end of it", batch_id)
                self._clock.sleep(10.0)
                batch = self._api.get_batch(batch_id)
        except NotFoundError as exc:
            log.warning("Batch %s was submitted by an earlier try but cannot be read: %s", batch_id, exc)
            return None
        return batch

    @staticmethod
    def _may_adopt(batch: Batch) -> bool:
        if batch.is_dead or batch.status == BatchStatus.CANCELLING:
            log.info("Batch %s of an earlier try is %s; it is not adopted", batch.id, batch.status)
            return False
        log.info(
            "Adopting batch %s (%s), submitted by an earlier try: nothing is paid again",
            batch.id,
            batch.status,
        )
        return True

    def _search(
        self, work: BatchWork, listed_at: float, *, after_intent: bool, watch: bool = True
    ) -> Batch | None:
        """
        Search the account for the work, again and again until it must be listed if it exists.

        :param listed_at: epoch seconds from which on the listing can be trusted.
        :param after_intent: whether an intent is recorded.
        :param watch: wait for the end of a batch that is being cancelled.
        :raises SubmissionUnknownError: the account does not list batches that are old enough to be sure.
        """
        pauses = iter(_LIST_PAUSES)
        while True:
            if self._listing_read_at < listed_at:
                self._read_listing()
            live = [batch for batch in self._found.get(work.key, ()) if not batch.is_dead]
            # The listing may be behind: only the batch itself says whether it is still alive.
            for listed in sorted(live, key=lambda batch: batch.created_at or 0):
                # Listed, it exists, whatever a gateway answers to its id for a moment.
                batch = self._read(listed.id, watch=watch) or listed
                if self._may_adopt(batch):
                    if len(live) > 1:
                        log.warning(
                            "The account has %d batches of this task (%s); going on with the oldest",
                            len(live),
                            ", ".join(other.id for other in live),
                        )
                    return batch
            left = listed_at - self._listing_read_at
            if left <= 0:
                if self._listing_cut and not self._listed_far_enough(work, after_intent):
                    raise SubmissionUnknownError(
                        f"The account lists its newest {len(self._seen)} batches only, and none is {work.label}: it "
                        "may be an older one, paid for by an earlier try. Nothing was sent. Look on the console for "
                        f"the metadata {WORK_KEY}={work.key}; clear the task where there is none.",
                        retryable=True,
                    )
                return None
            pause = min(next(pauses, LIST_LAG), left)
            log.info("No batch of an earlier try is listed; looking again in %.0f s, the list may lag", pause)
            self._clock.sleep(pause)

    def _listed_far_enough(self, work: BatchWork, after_intent: bool) -> bool:
        """Whether a listing that lacks the account's older batches would show the work all the same."""
        if after_intent:
            return bool(self._ledger.older_batches(work.key) & self._seen)
        # Looked for once, there is hardly anything to be found: a person's clear has begun a new generation.
        return self._earlier_tries != "patiently"

    def _read_listing(self) -> None:
        """
        Read the account's batches, newest first, as far back as an earlier try can have been.

        Stops after a page's worth of batches that are too old or were read before, and never reads one
        twice, so that a search costs as few calls as there are new pages.
        """
        nothing_new, began = 0, self._clock.time()
        reached_old = False
        for batch in self._api.list_batches():
            old = batch.created_at is not None and batch.created_at < self._since
            reached_old |= old
            if old or batch.id in self._seen:
                nothing_new += 1
                if nothing_new >= protocol.PAGE_SIZE:
                    break
                continue
            nothing_new = 0
            self._seen.add(batch.id)
            if key := batch.metadata.get(WORK_KEY):
                self._found.setdefault(key, []).append(batch)
        else:
            self._listing_cut = getattr(self._api, "listing_cut", False) and not reached_old
        self._listing_read_at = began

    # Files ------------------------------------------------------------------------------------------------

    def upload(self, key: str, filename: str, size: int, send: Callable[[], UploadedFile]) -> UploadedFile:
        """
        Return the uploaded file of a piece of work: the one an earlier try left, or a new one.

        :param key: identity of the upload.
        :param filename: name at the service, which holds the identity.
        :param size: size in bytes; a file of another size is not adopted.
        :param send: uploads.
        """
        state = self._ledger.upload(key)
        if isinstance(state, Uploaded):
            return UploadedFile(id=state.file_id, filename=filename, bytes=size)
        if self._listed_at(state) is not None:
            file = self._search_file(filename, size)
            if file is not None:
                self._ledger.record_upload(key, Uploaded(file.id))
                return file
        self._ledger.record_upload(key, Uploading(self._clock.time()))
        file = self._send_once(
            f"POST /files of {filename}",
            send,
            lambda: self._search_file(filename, size),
            lambda: self._ledger.record_upload(key, Planned()),
        )
        self._ledger.record_upload(key, Uploaded(file.id))
        return file

    def _search_file(self, filename: str, size: int) -> UploadedFile | None:
        for file in self._api.list_files():
            if file.filename == filename and file.bytes in (None, size):
                log.info("Using file %s, which was uploaded before", file.id)
                return file
        return None

    # Sending ----------------------------------------------------------------------------------------------

    def _send_once(
        self,
        what: str,
        send: Callable[[], T],
        find: Callable[[], T | None],
        forget: Callable[[], None],
    ) -> T:
        """Send until it counted once: sit out definite refusals, search after an open outcome."""
        give_up_at = self._clock.time() + REFUSAL_PATIENCE
        refusals = open_sends = 0
        while True:
            if self._stopped and not open_sends:
                forget()
            self.check_not_stopped(what)
            try:
                return send()
            except SiliconFlowError as exc:
                if protocol.had_no_effect(exc):
                    refusals += 1
                    delay = protocol.backoff_delay(refusals, exc, 15.0, 60.0)
                    if self._clock.time() + delay > give_up_at:
                        if open_sends:
                            raise _unknown(what, open_sends, exc) from exc
                        forget()
                        raise
                    log.warning("%s; nothing was created; sending it again in %.0f s", exc, delay)
                    self._clock.sleep(delay)
                    continue
                if not protocol.leaves_effect_open(exc):
                    if open_sends:
                        # This send was refused, an earlier one may have counted and be listed late.
                        raise _unknown(what, open_sends, exc) from exc
                    forget()
                    raise
                open_sends += 1
                log.warning("%s; it is open whether it counted, so the account is searched", exc)
                try:
                    found = find()
                except SiliconFlowError as unread:
                    raise _unknown(what, open_sends, unread) from exc
                if found is not None:
                    return found
                if open_sends >= MAX_OPEN_SENDS:
                    raise _unknown(what, open_sends, exc) from exc
                log.warning("%s left nothing in the account; sending it again", what)


def _unreadable(work: BatchWork, batch_id: str) -> SubmissionUnknownError:
    """Return the error for a batch that an earlier try recorded and the account does not know."""
    return SubmissionUnknownError(
        f"Batch {batch_id} was submitted for {work.label} by an earlier try, and the account neither answers to its id "
        "nor lists it. Nothing was sent, since that would pay twice. Check that the connection leads to the account "
        "that it was submitted with. A retry looks again; a clear submits anew.",
        retryable=True,
    )


def _unknown(what: str, sends: int, last: SiliconFlowError) -> SubmissionUnknownError:
    """Return the error for an outcome that stays open."""
    # Unlike a bare call of the hook, a retry of this one knows how to look.
    return SubmissionUnknownError(
        f"{what} was sent {sends} time(s) without a usable answer, and it may have counted: the account lists "
        "nothing of it so far, or cannot be read. A retry of this task searches the account before it sends "
        f"again; a clear would not, and might pay twice. Last answer: {last}",
        retryable=True,
    )
