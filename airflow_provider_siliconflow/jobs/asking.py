"""
Asking rows one by one: several at once, as fast as the service allows, each answer in the journal before it counts.

The requests run in an event loop in a thread of its own, so that a signal that Airflow sends to the task is handled at
once, whatever the loop is doing. Nothing makes ``/chat/completions`` idempotent. So a row is asked again only if it was
certainly not answered, or, a few times, if its answer was lost, which may be billed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fractions import Fraction
from typing import Any

import msgspec

from airflow_provider_siliconflow.api import protocol
from airflow_provider_siliconflow.api.async_client import AsyncSiliconFlowClient
from airflow_provider_siliconflow.api.exceptions import (
    APIError,
    AuthenticationError,
    BatchTimeoutError,
    IncompleteResultsError,
    InsufficientBalanceError,
    NotFoundError,
    PermissionDeniedError,
    SiliconFlowError,
)
from airflow_provider_siliconflow.batch_files.live_lines import answer_line, error_line
from airflow_provider_siliconflow.batch_files.verdicts import UnreadableLineError, Verdict, read_verdict
from airflow_provider_siliconflow.jobs.clock import Clock
from airflow_provider_siliconflow.jobs.live_journal import Entry, LiveJournal
from airflow_provider_siliconflow.jobs.pacing import Pacer
from airflow_provider_siliconflow.jobs.plan import Piece

log = logging.getLogger(__name__)

#: Codes of error lines of rows that may be billed: no answer arrived, or one that cannot be read.
NO_ANSWER, UNREADABLE = "no_answer", "unreadable"
#: How often a row is asked whose answers are lost: each of them may be billed.
MOST_SENDS = 3
#: First and longest pause before such a row is asked again, in seconds.
_FIRST_BACKOFF, _LONGEST_BACKOFF = 2.0, 30.0
#: Answers lost in a row, none arriving between them, from which on requests slow down.
_LOSSES = 3
#: Seconds without any answer, while requests fail, after which the phase ends; a retry of the task goes on.
OUTAGE_PATIENCE = 600.0
#: Rows in a row that a model is refused for, after which its other rows are not asked.
_REFUSALS_OF_A_MODEL = 3
#: Seconds that requests under way get after a kill, after which Airflow ends the process, and after the deadline.
_KILL_GRACE, _DEADLINE_GRACE = 3.0, 60.0
#: Seconds after which a kill is noticed meanwhile.
_GRACE_POLL = 0.2
#: Seconds for which lines that cannot be written are tried again.
_WRITE_PATIENCE = 60.0
#: Seconds in which lines are collected for one write, if the journal cannot append.
_LINGER = 1.0
#: Seconds after which a process that lost the job to another try has certainly noticed it.
FENCE_SECONDS = 4.0
#: Seconds between two checks of the owner, and between two progress lines.
_OWNER_SECONDS, _PROGRESS_SECONDS = 2.0, 30.0
#: Rows and bytes that are read ahead.
_AHEAD_ROWS, _AHEAD_BYTES = 32, 1 << 20


@dataclass(frozen=True, slots=True)
class Question:
    """
    A row to ask.

    :param piece: the shard that it belongs to.
    :param body: what is sent, as JSON.
    :param model: the model that is asked, for its price.
    :param bound: the most that asking it once can cost in CNY; ``None`` if nothing limits the cost.
    """

    piece: Piece
    custom_id: str
    body: bytes
    model: str
    bound: Fraction | None = None


@dataclass(slots=True)
class Purse:
    """
    What may be spent, in CNY.

    :param most: ``max_cost``; ``None`` for no limit.
    :param known: what is spent for certain.
    :param held: the most that requests under way, or without a known outcome, can cost.
    """

    most: Fraction | None
    known: Fraction = Fraction()
    held: Fraction = Fraction()
    under_way: int = 0

    def fits(self, bound: Fraction) -> bool:
        """Whether a request that costs at most this much may be sent."""
        return self.most is None or self.known + self.held + bound <= self.most

    def hold(self, bound: Fraction) -> None:
        """Set money aside for a request."""
        self.held += bound
        self.under_way += 1

    def settle(self, bound: Fraction, cost: Fraction | None) -> None:
        """
        Replace what was set aside by what a request did cost.

        :param cost: ``None`` if it is not known, so that the money stays aside.
        """
        self.under_way -= 1
        if cost is not None:
            self.held -= bound
            self.known += cost


@dataclass(slots=True)
class Figures:
    """What an asking did: answers, rows that cannot be paid for, lost answers."""

    answered: int = 0
    failed: int = 0
    refused: int = 0
    lost: int = 0
    unaffordable: int = 0
    unaffordable_cost: Fraction = Fraction()


@dataclass(slots=True)
class _Lane:
    """The rows of one model, with what limits their rate."""

    rows: Iterator[Question]
    pacer: Pacer
    ahead: list[Question] = field(default_factory=list)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    #: Held by the one request that waits for its turn; the others wait for it.
    gate: asyncio.Lock = field(default_factory=asyncio.Lock)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    #: Refusals in a row of each model: rows that name their models share a lane.
    refusals: Counter[str] = field(default_factory=Counter)
    ends: bool = False


class _Stopped(Exception):  # noqa: N818
    """Nothing may be sent any more."""


class Asking:
    """
    Asks rows; one use.

    :param feeds: the rows of each model.
    :param rows: how many they are.
    :param journal: gets the answers.
    :param open_client: returns a client.
    :param concurrency: most requests at once, over all models.
    :param purse: what may be spent.
    :param cost_of: returns what an answer costs in CNY; ``None`` if that is not known.
    :param deadline: epoch seconds after which nothing is asked.
    :param check_owner: raises if another try has taken over the job.
    :param clock: time.
    """

    def __init__(
        self,
        feeds: Sequence[Iterator[Question]],
        *,
        rows: int,
        journal: LiveJournal,
        open_client: Callable[[], AsyncSiliconFlowClient],
        concurrency: int,
        purse: Purse,
        cost_of: Callable[[str, Verdict], Fraction | None],
        deadline: float | None,
        check_owner: Callable[[], None],
        clock: Clock,
    ) -> None:
        self._feeds = feeds
        self._rows = rows
        self._journal = journal
        self._open_client = open_client
        self._concurrency = concurrency
        self._purse = purse
        self._cost_of = cost_of
        self._deadline = deadline
        self._check_owner = check_owner
        self._clock = clock
        self.figures = Figures()
        #: Why not every row was asked; ``None`` if every row was, or cannot be paid for.
        self.problem: SiliconFlowError | None = None
        self._killed = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lanes: list[_Lane] = []
        self._pending: list[tuple[Entry, asyncio.Future[None]]] = []
        self._losses = 0
        self._began = self._progress_at = 0.0

    # The thread -------------------------------------------------------------------------------------------

    def run(self) -> None:
        """
        Ask all rows, and return when each has a line, or :attr:`problem` says why not.

        :raises Exception: a defect, or what a signal handler of the calling thread raises.
        """
        failure: list[BaseException] = []
        # Not `Thread.join`: on Python 3.11, a signal handler that raises there makes the thread count as ended.
        ended = threading.Event()

        def work() -> None:
            try:
                asyncio.run(self._main())
            except BaseException as exc:  # noqa: BLE001
                failure.append(exc)
            finally:
                ended.set()

        threading.Thread(target=work, name="siliconflow-live", daemon=True).start()
        try:
            # With a limit, so that signals are handled.
            while not ended.wait(0.2):
                if self._killed.is_set():
                    # A store that hangs must not keep a task that is being ended.
                    ended.wait(_KILL_GRACE + 1.0)
                    break
        except BaseException:
            self.stop()
            ended.wait(_KILL_GRACE + 1.0)
            raise
        if failure:
            raise failure[0]

    def stop(self) -> None:
        """Send nothing from now on; answers that come within three seconds are still kept. Any thread may call it."""
        self._killed.set()
        if self._loop is not None:
            # It may be closed by now.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._stopping.set)

    async def _main(self) -> None:
        loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._slots = asyncio.Semaphore(self._concurrency)
        self._money = asyncio.Event()
        self._has_pending = asyncio.Event()
        self._began = self._progress_at = loop.time()
        self._loop = loop
        if self._killed.is_set():
            return
        self._lanes = [_Lane(feed, Pacer(self._concurrency)) for feed in self._feeds]
        # One writes the journal, and the other reads the next rows.
        with ThreadPoolExecutor(2, thread_name_prefix="siliconflow-files") as self._files:
            async with self._open_client() as self._client:
                helpers = [asyncio.create_task(self._commit_all()), asyncio.create_task(self._watch())]
                workers = [
                    asyncio.create_task(self._work(lane))
                    for lane in self._lanes
                    for _ in range(self._concurrency)
                ]
                try:
                    await self._until_done(workers, helpers)
                finally:
                    for task in (*workers, *helpers):
                        task.cancel()
                    await asyncio.gather(*workers, *helpers, return_exceptions=True)
        self._log_progress(last=True)

    async def _until_done(
        self, workers: Sequence[asyncio.Task[None]], helpers: Sequence[asyncio.Task[None]]
    ) -> None:
        stopped = asyncio.create_task(self._stopping.wait())
        waiting: set[asyncio.Task[Any]] = set(workers)
        beside: set[asyncio.Task[Any]] = {*helpers, stopped}
        try:
            while waiting and not self._stopping.is_set():
                done, _ = await asyncio.wait({*waiting, *beside}, return_when=asyncio.FIRST_COMPLETED)
                waiting -= done
                beside -= done
                for task in done:
                    if error := task.exception():
                        raise error
            # What is under way is paid for.
            await self._until_answered(waiting)
        finally:
            stopped.cancel()

    async def _until_answered(self, waiting: set[asyncio.Task[Any]]) -> None:
        now = asyncio.get_running_loop().time
        ends, is_killed = math.inf, False
        if self._deadline is not None:
            ends = now() + max(self._deadline - self._clock.time(), 0.0) + _DEADLINE_GRACE
        while waiting and now() < ends:
            if self._killed.is_set() and not is_killed:
                # A kill may come while answers are waited for because of something else.
                is_killed, ends = True, now() + _KILL_GRACE
            _, waiting = await asyncio.wait(waiting, timeout=min(ends - now(), _GRACE_POLL))

    def _halt(self, problem: SiliconFlowError) -> None:
        """Send nothing from now on, since something is wrong with more than one row."""
        if self.problem is None:
            self.problem = problem
            log.error("Live: no more rows are asked in this try: %s", problem)
        self._stopping.set()
        self._changed()

    def _changed(self) -> None:
        for lane in self._lanes:
            lane.changed.set()
        self._money.set()

    async def _pause(self, seconds: float) -> None:
        """
        Wait.

        :raises _Stopped: nothing may be sent any more.
        """
        try:
            await asyncio.wait_for(self._stopping.wait(), seconds)
        except TimeoutError:
            return
        raise _Stopped

    # Rows -------------------------------------------------------------------------------------------------

    async def _work(self, lane: _Lane) -> None:
        try:
            while (question := await self._next(lane)) is not None:
                await self._ask(question, lane)
        except _Stopped:
            return
        except SiliconFlowError as exc:
            # Reading the rows, or writing the answers.
            self._halt(exc)
        except OSError as exc:
            self._halt(
                IncompleteResultsError(
                    f"The job's folder cannot be read or written: {exc}. What was answered is kept as far as it was "
                    "written; a retry asks the other rows."
                )
            )

    async def _next(self, lane: _Lane) -> Question | None:
        """Return the next row of a lane; ``None`` if there is none."""
        async with lane.lock:
            while not self._stopping.is_set():
                if not lane.ahead and not lane.ends:
                    rows = await asyncio.get_running_loop().run_in_executor(
                        self._files, _read_ahead, lane.rows
                    )
                    lane.ends = not rows
                    lane.ahead = rows[::-1]
                elif not lane.ahead:
                    return None
                elif lane.refusals[(question := lane.ahead.pop()).model] < _REFUSALS_OF_A_MODEL:
                    return question
            return None

    async def _ask(self, question: Question, lane: _Lane) -> None:
        """Ask a row until it has a line."""
        lost = 0
        is_held = False
        while True:
            if not is_held:
                if not await self._hold(question):
                    return
                is_held = True
            epoch = await self._turn(lane)
            async with self._slots:
                if self._stopping.is_set():
                    lane.pacer.ended()
                    raise _Stopped
                try:
                    completion = await self._client.complete_chat(question.body)
                except SiliconFlowError as exc:
                    error = exc
                else:
                    lane.pacer.accepted(epoch)
                    lane.changed.set()
                    await self._answered(question, completion, lane)
                    return
                if protocol.had_no_effect(error):
                    self._refused(lane, epoch, error)
                    continue
                if not protocol.is_transient(error):
                    lane.pacer.accepted(epoch)
                    lane.changed.set()
                    await self._failed(question, error, lane)
                    return
                lost += 1
                is_held = False
                self._lost(question, lane, epoch, error)
                if lost == MOST_SENDS:
                    said = (
                        f"no answer, the service being unavailable: asked {lost} times; the last time {error}"
                    )
                    await self._write(question.piece, error_line(question.custom_id, NO_ANSWER, said))
                    self.figures.failed += 1
                    return
            await self._pause(min(_FIRST_BACKOFF * 2.0 ** (lost - 1), _LONGEST_BACKOFF))

    async def _turn(self, lane: _Lane) -> int:
        """Wait until a request of a lane may be sent, and count it as sent."""
        now = asyncio.get_running_loop().time
        # One at a time: otherwise all that wait would wake up for each that is sent.
        async with lane.gate:
            while True:
                if self._stopping.is_set():
                    raise _Stopped
                delay = lane.pacer.delay(now())
                if delay == 0.0:
                    return lane.pacer.sent(now())
                if delay is None:
                    lane.changed.clear()
                    await lane.changed.wait()
                else:
                    await self._pause(delay)

    async def _hold(self, question: Question) -> bool:
        """
        Set money aside for a row, and record that it is about to be asked; ``False`` if it cannot be paid for.

        Costs of requests under way become known, so a row waits for them first.
        """
        bound = question.bound
        if bound is None:
            return True
        while not self._purse.fits(bound):
            if not self._purse.under_way:
                self.figures.unaffordable += 1
                self.figures.unaffordable_cost += bound
                return False
            self._money.clear()
            await self._money.wait()
            if self._stopping.is_set():
                raise _Stopped
        self._purse.hold(bound)
        await self._commit(Entry(question.piece, "asked", msgspec.json.encode(question.custom_id)))
        return True

    def _settle(self, question: Question, cost: Fraction | None) -> None:
        if question.bound is not None:
            self._purse.settle(question.bound, cost)
            self._money.set()
        elif cost is not None:
            self._purse.known += cost

    # Outcomes ---------------------------------------------------------------------------------------------

    async def _answered(self, question: Question, completion: protocol.Completion, lane: _Lane) -> None:
        line = answer_line(question.custom_id, completion.body, completion.trace_id)
        try:
            verdict = read_verdict(line)
        except UnreadableLineError as exc:
            verdict = None
            line = error_line(question.custom_id, UNREADABLE, f"the answer cannot be read: {exc}")
        self._losses = lane.refusals[question.model] = 0
        self._progressed()
        await self._write(question.piece, line)
        self.figures.answered += 1
        self._settle(question, None if verdict is None else self._cost_of(question.model, verdict))

    async def _failed(self, question: Question, error: SiliconFlowError, lane: _Lane) -> None:
        """Record that the service refuses a row, unless it would refuse any."""
        if isinstance(error, AuthenticationError | InsufficientBalanceError) or not isinstance(
            error, APIError
        ):
            self._settle(question, Fraction())
            self._halt(error)
            return
        self._progressed()
        await self._write(
            question.piece,
            error_line(question.custom_id, str(error.code or error.status_code), error.message),
        )
        self.figures.failed += 1
        self._settle(question, Fraction())
        if isinstance(error, NotFoundError | PermissionDeniedError) or error.code in _MODEL_CODES:
            lane.refusals[question.model] += 1
            if lane.refusals[question.model] == _REFUSALS_OF_A_MODEL:
                self.problem = self.problem or error
                log.error("Live: the other rows of %s are not asked in this try: %s", question.model, error)

    def _refused(self, lane: _Lane, epoch: int, error: SiliconFlowError) -> None:
        """Take note that a request had no effect: a limit was reached, or the service cannot be reached."""
        self.figures.refused += 1
        now = asyncio.get_running_loop().time()
        lane.pacer.refused(epoch, now, getattr(error, "retry_after", None))
        lane.changed.set()
        self._check_outage(error)

    def _lost(self, question: Question, lane: _Lane, epoch: int, error: SiliconFlowError) -> None:
        """Take note that an answer was lost. What was set aside for it stays aside."""
        self.figures.lost += 1
        self._losses += 1
        if question.bound is not None:
            self._settle(question, None)
        if self._losses >= _LOSSES:
            lane.pacer.refused(epoch, asyncio.get_running_loop().time(), getattr(error, "retry_after", None))
        else:
            lane.pacer.ended()
        lane.changed.set()
        log.warning("Live: row %s has no answer, and may be billed: %s", question.custom_id[:100], error)
        if self._losses >= max(3 * self._concurrency, 8):
            self._halt(error)
        self._check_outage(error)

    def _progressed(self) -> None:
        self._progress_at = asyncio.get_running_loop().time()

    def _check_outage(self, error: SiliconFlowError) -> None:
        if asyncio.get_running_loop().time() - self._progress_at >= OUTAGE_PATIENCE:
            self._halt(error)

    # The journal ------------------------------------------------------------------------------------------

    async def _write(self, piece: Piece, line: bytes) -> None:
        await self._commit(Entry(piece, "answers", line))

    async def _commit(self, entry: Entry) -> None:
        """Write a line together with those of other rows, and return when it is on the disk."""
        written = asyncio.get_running_loop().create_future()
        self._pending.append((entry, written))
        self._has_pending.set()
        await written

    async def _commit_all(self) -> None:
        """Write the lines that come, all that have come at once."""
        loop = asyncio.get_running_loop()
        while True:
            await self._has_pending.wait()
            if not self._journal.appends and not self._killed.is_set():
                await asyncio.sleep(_LINGER)
            self._has_pending.clear()
            pending, self._pending = self._pending, []
            failure: Exception | None = None
            try:
                await loop.run_in_executor(self._files, self._append, [entry for entry, _ in pending])
                # Written first: these answers are paid for, whoever has the job now.
                await self._check_owner_now()
            # Stores raise errors of their own.
            except Exception as exc:  # noqa: BLE001
                log.error("Live: %d lines of the journal cannot be written: %s", len(pending), exc)
                failure = OSError(f"the journal cannot be written: {exc}")
            for _, written in pending:
                if written.done():
                    continue
                if failure is None:
                    written.set_result(None)
                else:
                    written.set_exception(failure)

    def _append(self, entries: list[Entry]) -> None:
        """
        Write lines, repeatedly if need be: they are paid for.

        :raises Exception: they cannot be written.
        """
        began = time.monotonic()
        while True:
            try:
                self._journal.append(entries)
                return
            except Exception as exc:
                if time.monotonic() - began >= _WRITE_PATIENCE or self._killed.is_set():
                    raise
                log.warning("Live: the journal cannot be written (%s); trying again", exc)
                self._killed.wait(1.0)

    # Watching ---------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """End the phase at its deadline or when another try takes over the job; log the progress."""
        loop = asyncio.get_running_loop()
        told = checked = loop.time()
        while True:
            if self._deadline is not None and self._clock.time() >= self._deadline:
                left = self._rows - self.figures.answered - self.figures.failed
                self._halt(
                    BatchTimeoutError(
                        f"The timeout was reached while rows were asked live: {left} of {self._rows} have no answer. "
                        "The others are kept, and a retry asks only these."
                    )
                )
                return
            if loop.time() - checked >= _OWNER_SECONDS:
                checked = loop.time()
                await self._check_owner_now()
            if loop.time() - told >= _PROGRESS_SECONDS:
                told = loop.time()
                self._log_progress()
            if self._stopping.is_set():
                # Set by a kill: the workers wait for something else.
                self._changed()
                return
            left_until = self._deadline - self._clock.time() if self._deadline is not None else 1.0
            try:
                await self._pause(max(min(1.0, left_until), 0.01))
            except _Stopped:
                self._changed()
                return

    async def _check_owner_now(self) -> None:
        """End the phase if another try has taken over the job."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._files, self._check_owner)
        except SiliconFlowError as exc:
            self._halt(exc)
        # Stores raise errors of their own.
        except Exception as exc:  # noqa: BLE001
            log.warning("Live: whose job it is cannot be read: %s", exc)

    def _log_progress(self, *, last: bool = False) -> None:
        figures = self.figures
        done = figures.answered + figures.failed
        seconds = max(asyncio.get_running_loop().time() - self._began, 1e-3)
        rate = done / seconds
        story = f"Live: {done} of {self._rows} rows done in {seconds:.0f} s, {rate:.1f} rows/s"
        if figures.refused:
            story += f", {figures.refused} requests refused by limits"
        if figures.lost:
            story += f", {figures.lost} answers lost"
        if figures.unaffordable:
            story += f", {figures.unaffordable} rows not asked since max_cost could not pay for them"
        if self._purse.known or self._purse.held:
            story += f", {float(self._purse.known):.4f} CNY in total so far"
        if rate and not last and done < self._rows:
            end = datetime.fromtimestamp(self._clock.time() + (self._rows - done) / rate, UTC)
            story += f", expected end {end:%Y-%m-%d %H:%M:%S} UTC"
        log.info("%s", story)


#: Codes of refusals that concern a model and not a row.
_MODEL_CODES = frozenset({"20012", "30003"})


def _read_ahead(rows: Iterator[Question]) -> list[Question]:
    """Return the next rows."""
    found: list[Question] = []
    size = 0
    for question in rows:
        found.append(question)
        size += len(question.body)
        if len(found) >= _AHEAD_ROWS or size >= _AHEAD_BYTES:
            break
    return found
