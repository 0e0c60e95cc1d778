"""
Submission exactly once.

Creating a batch is the call that costs money. After a crash or a lost answer it is unknown whether it was carried out.
So the intent is recorded before a request leaves. A later try reads the recorded batch or, without a record, searches
the account, and adopts a batch that is proven to be ours. It sends a request only if there is none.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal, Protocol

from airflow_provider_siliconflow.api.exceptions import (
    APIError,
    InvalidInputError,
    SiliconFlowError,
    SubmissionUnknownError,
    UnexpectedAnswerError,
)
from airflow_provider_siliconflow.api.models import Batch, BatchStatus, UploadedFile
from airflow_provider_siliconflow.jobs.clock import Clock, SystemClock
from airflow_provider_siliconflow.jobs.identity import (
    SUBMIT_ANEW,
    WORK_KEY,
    BatchWork,
    Proof,
    Upload,
)
from airflow_provider_siliconflow.jobs.ledger import Ledger
from airflow_provider_siliconflow.jobs.posting import REFUSAL_PATIENCE, Request, send_once
from airflow_provider_siliconflow.jobs.search import (
    CANCEL_PATIENCE,
    LIST_LAG,
    AccountSearch,
    SearchAPI,
    is_replaceable,
    is_spent,
)
from airflow_provider_siliconflow.jobs.states import Ended, Planned, Refused, Sending, Sent, State
from airflow_provider_siliconflow.jobs.uploads import Uploads

log = logging.getLogger(__name__)

Search = Literal["none", "once", "patiently"]

#: Words by which a refusal says that the input file is gone.
_GONE = re.compile(
    r"not (be )?(exist|found)|no such|n't exist|unknown|invalid|expired|deleted|missing", re.IGNORECASE
)


class BatchAPI(SearchAPI, Protocol):
    """The calls submission needs; ``SiliconFlowClient`` has them."""

    def create_batch(self, *, repeat: bool = True, **request: Any) -> Batch:
        """Create a batch; with ``repeat=False`` send exactly one request."""
        ...


class Submission:
    """
    Creates batches and uploads files exactly once.

    :param api: the calls.
    :param ledger: the record that outlives a try.
    :param earlier_tries: how to search for batches of earlier tries if the ledger is not complete: ``"none"`` if there
        was no earlier try, ``"once"``, or ``"patiently"`` since the account may list a batch late.
    :param since: no earlier try can have sent anything before this time (epoch seconds of Airflow's clock).
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
        self._started = self._clock.monotonic()
        self._account = AccountSearch(api, ledger, since, self._clock)
        self._uploads = Uploads(
            self._account.files,
            ledger,
            earlier_tries=earlier_tries != "none" or ledger.damaged,
            clock=self._clock,
            check_not_stopped=self.check_not_stopped,
        )
        self._sent: set[str] = set()
        self._stopped = False

    def stop(self) -> None:
        """
        Send nothing from now on: the task was ended from outside.

        Airflow 3 lets the process run for five seconds after ``on_kill``, long enough to pay for a batch that nothing
        waits for.
        """
        self._stopped = True

    def check_not_stopped(self, what: str) -> None:
        """
        Refuse to send after :meth:`stop`.

        :param what: what would have been sent.
        :raises SiliconFlowError: the task was ended.
        """
        if self._stopped:
            raise SiliconFlowError(f"{what} is not sent: the task was ended from outside")

    def submit(
        self, work: BatchWork, *, rate_limit_patience: float = REFUSAL_PATIENCE, adopt_dead: bool = False
    ) -> Batch:
        """
        Return the batch of a piece of work: the one an earlier try left, or a new one.

        :param rate_limit_patience: for how many seconds to wait out a 429. A caller with open batches of its own waits
            for one of them to end instead.
        :param adopt_dead: whether to return a batch that failed or was cancelled too, recorded as ended. By default it
            is kept among the ledger's retired batches and replaced.
        :raises SubmissionUnknownError: it is unknown whether a batch exists; a retry searches again.
        :raises RateLimitedError: the account accepts no more for now; nothing was created, and no intent is left.
        :raises InvalidInputError: the input was changed, and the batch over the old input is paid for.
        :raises SiliconFlowError: the service refused; no batch was created.
        """
        batch = self._take_up(work, adopt_dead)
        if batch is not None:
            return batch
        self._refuse_changed_input(work)
        return self._create(work, rate_limit_patience, adopt_dead)

    def find_earlier(self, work: BatchWork) -> Batch | None:
        """
        Return the batch that an earlier try left, dead or alive, recorded; ``None`` if there certainly is none.

        :raises SubmissionUnknownError: it is unknown whether a batch exists; a retry searches again.
        """
        batch = self._take_up(work, adopt_dead=True)
        if batch is None and isinstance(self._ledger.state(work.key), Sending):
            self._ledger.record(work.key, Planned())
        return batch

    def upload(self, upload: Upload) -> UploadedFile:
        """
        Return the uploaded file: the one an earlier try left, or a new one.

        :raises SiliconFlowError: the service refused it, or its files cannot be listed.
        """
        return self._uploads.upload(upload)

    def recorded(self, work: BatchWork) -> Batch | None:
        """
        Read the batch that the ledger names for a piece of work. If it is being cancelled, wait for its end.

        :returns: the batch, dead or alive; ``None`` if none is recorded, it cannot be read, or it is not ours.
        :raises SubmissionUnknownError: the service states too little to tell whether it is ours.
        """
        state = self._ledger.state(work.key)
        if not isinstance(state, Sent | Ended):
            return None
        batch = self._account.read(state.batch_id)
        return batch if batch is not None and self._account.proves_record(work, batch) else None

    def find(self, works: Iterable[BatchWork], patience: float = 0.0) -> list[Batch]:
        """
        Search the account for live batches of these works, repeatedly while one is not listed.

        :param patience: for how many seconds to repeat the search.
        :returns: batches that are certainly ours.
        """
        listed_by = self._clock.monotonic() + patience
        return [batch for work in works if (batch := self._find_live(work, listed_by)) is not None]

    def _find_live(self, work: BatchWork, listed_by: float) -> Batch | None:
        for found in self._account.searches(work, listed_by, watch=False):
            for batch in found.live:
                if batch.status != BatchStatus.CANCELLING:
                    return batch
        return None

    def is_ours(self, work: BatchWork, batch: Batch) -> bool:
        """Whether a batch is proven to belong to a piece of work; not if the service states too little to tell."""
        return self._account.prove(work, batch) is Proof.OURS

    def owns(self, work: BatchWork, batch: Batch) -> bool:
        """Whether a batch that the ledger names belongs to a piece of work. What this process sent certainly does."""
        if work.key in self._sent:
            return True
        try:
            return self._account.proves_record(work, batch)
        except SubmissionUnknownError as exc:
            log.warning("%s", exc)
            return False

    # Batches of earlier tries -----------------------------------------------------------------------------

    def _take_up(self, work: BatchWork, adopt_dead: bool) -> Batch | None:
        """Return the batch that an earlier try left; ``None`` if a new one must certainly be created."""
        state = self._ledger.state(work.key)
        unreadable = None
        if isinstance(state, Sent | Ended):
            batch = self._account.read(state.batch_id)
            if batch is None:
                unreadable = state.batch_id
            elif self._account.proves_record(work, batch):
                # If it is dead, a search is not needed: a try that replaced it would have left an intent.
                return self._adopt(work, batch, adopt_dead)
            else:
                self._ledger.record(work.key, Sending(self._ledger.next_number(), self._clock.time()))
        listed_by = self._must_be_listed_by(work, state)
        if listed_by is None:
            return None
        batch = self._search_earlier(work, listed_by, adopt_dead)
        if batch is None and unreadable is not None:
            raise _unreadable(work, unreadable)
        if batch is None and self._is_accepted(work):
            raise _lost(work, "an earlier try", None)
        return batch

    def _is_accepted(self, work: BatchWork) -> bool:
        state = self._ledger.state(work.key)
        return isinstance(state, Sending) and state.accepted

    def _must_be_listed_by(self, work: BatchWork, state: State) -> float | None:
        """Return when the account must list what an earlier try left; ``None`` if there is nothing to be found."""
        if self._ledger.damaged or not isinstance(state, Planned | Refused):
            return self._started + LIST_LAG
        if self._ledger.complete or self._earlier_tries == "none":
            return None
        if self._earlier_tries == "patiently":
            return self._started + LIST_LAG
        # Little can be found, and nothing at all without an input file of ours.
        return self._started if work.upload is None or self._account.our_files(work) else None

    def _search_earlier(self, work: BatchWork, listed_by: float, adopt_dead: bool) -> Batch | None:
        # With "once" a batch is unlikely, and a first try must not fail because the search is inconclusive.
        has_record = not isinstance(self._ledger.state(work.key), Planned | Refused)
        is_final = has_record or self._ledger.damaged or self._earlier_tries == "patiently"
        try:
            return self._search(work, listed_by, adopt_dead, is_final=is_final)
        except SubmissionUnknownError:
            raise
        except SiliconFlowError as exc:
            raise SubmissionUnknownError(
                f"The account cannot be searched for {work.label}, which an earlier try may have paid for: {exc} "
                "Nothing was sent. A retry searches again.",
                retryable=True,
            ) from exc

    def _search(self, work: BatchWork, listed_by: float, adopt_dead: bool, *, is_final: bool) -> Batch | None:
        """
        Search until the listing must show the batch if it exists, and adopt the batch that is found.

        :param listed_by: monotonic time from which on the listing can be trusted.
        :param is_final: whether finding nothing must prove that there is nothing.
        :raises SubmissionUnknownError: the account does not show enough to be sure.
        """
        for found in self._account.searches(work, listed_by):
            for batch in (*found.live, *found.dead):
                adopted = self._adopt(work, batch, adopt_dead)
                if adopted is not None:
                    return adopted
        if is_final:
            self._account.check_conclusive(work, found)
        return None

    def _adopt(self, work: BatchWork, batch: Batch, adopt_dead: bool) -> Batch | None:
        """Record a batch that is ours and return it; return ``None`` if it is dead and must be replaced."""
        if batch.status == BatchStatus.CANCELLING:
            raise SubmissionUnknownError(
                f"Batch {batch.id} of {work.label} is being cancelled and has not ended within {CANCEL_PATIENCE:.0f} "
                "s; its rows may still be answered and billed. Nothing was sent. A retry continues once it has ended.",
                retryable=True,
            )
        # What this try sent and somebody cancelled is not replaced within it.
        adopt_dead = adopt_dead or work.key in self._sent
        if batch.status == BatchStatus.CANCELLED and not adopt_dead:
            batch = self._account.read_to_its_counts(batch)
        self._record_sent(work, batch)
        is_of_no_use = not adopt_dead and is_spent(work, batch)
        if not is_replaceable(batch) and not is_of_no_use:
            log.info(
                "Adopting batch %s (%s), which an earlier try submitted, at no extra cost",
                batch.id,
                batch.status,
            )
            return batch
        self._record_ended(work, batch)
        if adopt_dead:
            return batch
        why = ", and not one of its rows was answered before the task was cleared" if is_of_no_use else ""
        log.info("Batch %s of an earlier try is %s%s; it is not adopted", batch.id, batch.status, why)
        self._ledger.retire(work.key)
        return None

    def _record_sent(self, work: BatchWork, batch: Batch) -> None:
        state = self._ledger.state(work.key)
        if isinstance(state, Sent | Ended) and state.batch_id == batch.id:
            return
        if isinstance(state, Refused):
            self._ledger.record(work.key, Planned())
        self._ledger.record(work.key, Sent(batch.id))

    def _record_ended(self, work: BatchWork, batch: Batch) -> None:
        state = self._ledger.state(work.key)
        if isinstance(state, Sent):
            # It is unknown when a batch of an earlier try ended; one that this try sent ended during this try.
            at = self._clock.time() if work.key in self._sent else 0.0
            self._ledger.record(work.key, Ended.of(batch, state.number, at=at))

    # Changed input ----------------------------------------------------------------------------------------

    def _refuse_changed_input(self, work: BatchWork) -> None:
        """
        Refuse to submit a second batch for the same task, unless the first one is dead.

        :raises InvalidInputError: the task has another batch, which is paid for.
        """
        for batch_id, key in self._others(work).items():
            batch = self._account.read(batch_id)
            if batch is not None and batch.metadata.get(WORK_KEY, key) != key:
                # The record or the list was wrong about this batch.
                continue
            if batch is not None and work.is_of_deleted_run(batch):
                continue
            if batch is None or not is_replaceable(batch):
                raise _changed_input(work, batch_id, batch)

    def _others(self, work: BatchWork) -> dict[str, str]:
        """Return the known batches that the same task made from another input: id to key."""
        if not work.only_one:
            return {}
        listed = self._account.batches.of_submitter(work.submitter.mark) if work.submitter is not None else {}
        others = {batch_id: key for batch_id, key in listed.items() if key != work.key}
        key, state = self._ledger.earlier_work(work.key) or ("", Planned())
        if isinstance(state, Sent | Ended):
            others[state.batch_id] = key
        if isinstance(state, Sending):
            for _ in self._account.searches(work, self._started + LIST_LAG):
                others |= {listed.id: key for listed in self._account.batches.marked(key)}
                if others:
                    break
        return others

    # Creating ---------------------------------------------------------------------------------------------

    def _create(self, work: BatchWork, rate_limit_patience: float, adopt_dead: bool) -> Batch:
        """Create the batch. If the service no longer has the input file, upload it again, once."""
        file_id = self._input_file(work)
        try:
            return self._post(work, file_id, rate_limit_patience, adopt_dead)
        except APIError as exc:
            if work.upload is None or not _says_file_is_gone(exc, file_id):
                raise
            log.warning("The service does not have file %s any more (%s); it is uploaded again", file_id, exc)
            self._uploads.forget(work.upload, file_id)
            return self._post(work, self._input_file(work), rate_limit_patience, adopt_dead)

    def _input_file(self, work: BatchWork) -> str:
        if work.upload is not None:
            return self.upload(work.upload).id
        assert work.input_file_id is not None
        return work.input_file_id

    def _post(self, work: BatchWork, file_id: str, rate_limit_patience: float, adopt_dead: bool) -> Batch:
        def send() -> Batch:
            self._record_intent(work)
            self._sent.add(work.key)
            # send_once alone decides about refusals: the client would block a worker while the account is full.
            answer = self._api.create_batch(repeat=False, **work.request(file_id))
            batch = self._confirmed(work, file_id, answer)
            # Taken anew: the intent may be that of a try which died long ago, and others were sent since.
            self._ledger.record(work.key, Sent(batch.id, self._ledger.next_number()))
            return batch

        request = Request(
            f"POST /batches for {work.label}",
            send,
            find=lambda: self._search(work, self._clock.monotonic() + LIST_LAG, adopt_dead, is_final=True),
            forget=lambda: self._ledger.record(work.key, Planned()),
            accept=lambda: self._record_accepted(work),
            lost=lambda answer: _lost(work, "this try", answer),
            rate_limit_patience=rate_limit_patience,
        )
        return send_once(request, self._clock, self.check_not_stopped)

    def _record_intent(self, work: BatchWork) -> None:
        state = self._ledger.state(work.key)
        if isinstance(state, Refused):
            self._ledger.record(work.key, Planned())
        # One that is recorded already is recorded again, since that asks whose job this is.
        is_known = isinstance(state, Sending) and state.number > 0
        intent = state if is_known else Sending(self._ledger.next_number(), self._clock.time())
        self._ledger.record(work.key, intent)

    def _record_accepted(self, work: BatchWork) -> None:
        state = self._ledger.state(work.key)
        if isinstance(state, Sending):
            self._ledger.record(work.key, replace(state, accepted=True))

    def _confirmed(self, work: BatchWork, file_id: str, answer: Batch) -> Batch:
        """
        Return the batch that an answer to ``POST /batches`` names, read by its id if the answer contains little else.

        :raises UnexpectedAnswerError: the id is not one of our batches, although one may have been created.
        """
        may_be_ours = not self._is_of_other_work(work, answer)
        if may_be_ours and answer.is_known_status and answer.input_file_id == file_id:
            return answer
        log.warning(
            "The answer to POST /batches for %s names batch %s and does not prove that it is the new one; reading it",
            work.label,
            answer.id,
        )
        self._record_accepted(work)
        try:
            batch = self._account.read(answer.id, watch=False)
        except SiliconFlowError as exc:
            if may_be_ours:
                log.warning("%s; using the id of the answer", exc)
                return answer
            batch = None
        if batch is None or batch.input_file_id not in (file_id, None) or self._is_of_other_work(work, batch):
            raise UnexpectedAnswerError(
                f"POST /batches for {work.label} answered with the id {answer.id}, which is not that of a new batch "
                f"over {file_id}",
                accepted=True,
            )
        return batch

    def _is_of_other_work(self, work: BatchWork, batch: Batch) -> bool:
        """Whether a batch is certainly not the one that was just asked for: several may be over the same file."""
        mark = batch.metadata.get(WORK_KEY)
        return batch.id in self._ledger.recorded_batches() if mark is None else mark != work.key


def _says_file_is_gone(error: APIError, file_id: str) -> bool:
    """Whether a refusal of ``POST /batches`` says that the service no longer has the input file."""
    if error.status_code not in (400, 404):
        return False
    names_file = re.search(r"\bfile\b", error.message, re.IGNORECASE) is not None
    return file_id in error.message or (names_file and _GONE.search(error.message) is not None)


def _unreadable(work: BatchWork, batch_id: str) -> SubmissionUnknownError:
    """Return the error for a batch that an earlier try recorded but the account does not know."""
    return SubmissionUnknownError(
        f"An earlier try submitted batch {batch_id} for {work.label}, but the account neither answers to its id nor "
        "lists it. Nothing was sent, since that would pay twice. Check that the connection leads to the account with "
        f"which the batch was submitted. A retry reads it again; {SUBMIT_ANEW}.",
        retryable=True,
    )


def _lost(work: BatchWork, who: str, answer: SiliconFlowError | None) -> SubmissionUnknownError:
    """Return the error for a batch that the service may have created but the account does not list."""
    return SubmissionUnknownError(
        f"{who.capitalize()} asked for the batch of {work.label}. The service answered with a success status but "
        "without a usable id, and the account lists no such batch. It may exist and be paid for, so it is not created "
        "again: a retry only searches. Look on the console for a batch with the metadata "
        f"{WORK_KEY}={work.key}; if there is none, {SUBMIT_ANEW}."
        f"{f' The answer: {answer}' if answer is not None else ''}",
        retryable=True,
    )


def _changed_input(work: BatchWork, batch_id: str, batch: Batch | None) -> InvalidInputError:
    """Return the error for a batch of the same task that was made from another input."""
    status = f" ({batch.status})" if batch is not None else ""
    return InvalidInputError(
        f"The input of {work.label} was changed between two tries: batch {batch_id}{status} was made from the earlier "
        "input and is paid for. Nothing was sent. Either restore the input (rows and their order, completion_window, "
        "endpoint, replace, conn_id) and let the task retry, which continues with that batch; or cancel that batch and "
        "let the task retry. To pay for both, clear the task: the new input is then new work. durable=False submits on "
        "every try.",
        retryable=True,
    )
