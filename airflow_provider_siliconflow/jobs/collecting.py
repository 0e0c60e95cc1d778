"""
The results of a job: downloads, the merge in the order of the rows, and the manifest.

A batch that cannot be read costs only its own rows: those of the others are written, and the job then fails and names
the batch.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from airflow_provider_siliconflow.api.exceptions import (
    AuthenticationError,
    IncompleteResultsError,
    InvalidInputError,
    JobTakenOverError,
    PermissionDeniedError,
    SiliconFlowError,
)
from airflow_provider_siliconflow.api.models import Batch, BatchStatus, Outcome
from airflow_provider_siliconflow.api.protocol import is_transient
from airflow_provider_siliconflow.batch_files.atomic_files import OwnFile, temporary_folder, write_whole
from airflow_provider_siliconflow.batch_files.cost_bounds import Tariff, UnboundedRowError
from airflow_provider_siliconflow.batch_files.invalid_rows import InvalidLines
from airflow_provider_siliconflow.batch_files.manifest import (
    BatchSummary,
    ModelRun,
    build_manifest,
    results_folder,
)
from airflow_provider_siliconflow.batch_files.merge import (
    BatchFiles,
    MergedShard,
    Unjudged,
    merge_shard,
    refused_lines,
)
from airflow_provider_siliconflow.batch_files.result_lines import OnUnreadable
from airflow_provider_siliconflow.batch_files.shards import Shard, iter_custom_ids, select_rows
from airflow_provider_siliconflow.batch_files.tally import ModelTally
from airflow_provider_siliconflow.jobs.cache import cached_files, keep_answers
from airflow_provider_siliconflow.jobs.clock import Clock
from airflow_provider_siliconflow.jobs.downloads import (
    LATE_FILE_PATIENCE,
    ResultAPI,
    downloaded,
    outcomes_in,
)
from airflow_provider_siliconflow.jobs.finished import KeptAnswers
from airflow_provider_siliconflow.jobs.identity import WORK_KEY
from airflow_provider_siliconflow.jobs.job import OpenJob
from airflow_provider_siliconflow.jobs.live import LivePhase
from airflow_provider_siliconflow.jobs.plan import Piece
from airflow_provider_siliconflow.jobs.settled import SETTLE_LIMIT, SETTLE_PATIENCE
from airflow_provider_siliconflow.jobs.spend import Budget
from airflow_provider_siliconflow.jobs.states import Ended, Sent
from airflow_provider_siliconflow.jobs.storable import storable, storable_text

log = logging.getLogger(__name__)

#: Why a row of a batch is not asked that somebody cancelled.
_CANCELLED_BY_HAND = "not asked in this try, since its batch was cancelled by hand"

#: Batches that may be unreadable for a transient reason before the storage is considered down for all of them.
_TRANSIENT_FAILURES = 3


@dataclass(slots=True)
class Collected:
    """
    The results of the batches of all rounds so far.

    :param tallies: the figures, by model.
    :param retries: by model, for each shard of the first round a byte per row: 1 if the row is worth another attempt.
    :param fresh: likewise, 1 if the row is ok by an answer of this job's own.
    :param asked_live: likewise, in how many rounds the row was asked by itself.
    :param spoilt: batches that could not be read, and why.
    :param unanswered: dead batches of this try, and how many of their rows they did not answer.
    :param unjudged: rows whose answers could not be judged; ``None`` if there are none.
    """

    tallies: dict[int, ModelTally] = field(default_factory=dict)
    retries: dict[int, list[bytearray]] = field(default_factory=dict)
    fresh: dict[int, list[bytearray]] = field(default_factory=dict)
    asked_live: dict[int, list[bytearray]] = field(default_factory=dict)
    spoilt: dict[str, str] = field(default_factory=dict)
    unanswered: dict[str, int] = field(default_factory=dict)
    unjudged: Unjudged | None = None

    @property
    def worth_another_attempt(self) -> int:
        """Rows that another attempt may answer."""
        return sum(sum(chosen) for model in self.retries.values() for chosen in model)

    @property
    def out_of_balance(self) -> bool:
        """Whether rows failed because the account cannot pay."""
        return any(tally.balance_errors for tally in self.tallies.values())


class Collector:
    """
    Reads and writes the results of a job.

    :param job: the job.
    :param client: the calls.
    :param output_dir: folder of the results.
    :param clock: time.
    """

    def __init__(self, job: OpenJob, client: ResultAPI, output_dir: Any, *, clock: Clock) -> None:
        self._job = job
        self._client = client
        self._output_dir = output_dir
        self._clock = clock
        self._kept = KeptAnswers(job.plans) if job.plan.kept_rounds else None
        self._short: set[str] = set()
        self._replacing_since = 0.0
        #: Learns what batches cost, and says why some were not sent.
        self.budget: Budget | None = None
        #: Has the answers of rows that were asked one by one.
        self.live: LivePhase | None = None
        #: When this try began, in epoch seconds.
        self.began = 0.0

    # Before the merge -------------------------------------------------------------------------------------

    def settle(self, batches: Iterable[Batch]) -> None:
        """
        Record the end of batches whose counts do not add up but whose files show that they are settled.

        :param batches: the batches that a wait returned; other batches of the job do not change.
        """
        by_id = {batch.id: batch for batch in batches}
        for piece in self._job.current:
            state = self._job.state(piece)
            if not isinstance(state, Sent) or not state.terminal_since or state.batch_id not in by_id:
                continue
            try:
                with self._downloaded(
                    piece, state.batch_id, ended_at=state.terminal_since, patience=()
                ) as found:
                    batch = found[0]
            except SiliconFlowError as exc:
                if self._is_not_about_one(exc):
                    raise
                if self._clock.time() - state.terminal_since < SETTLE_LIMIT:
                    log.info("Batch %s is not settled yet: %s", state.batch_id, exc)
                    continue
                # A batch that is still unreadable after that time is named when the results are written.
                batch = by_id[state.batch_id]
            self._job.record_settled(piece, batch)

    def unanswered(self, piece: Piece, ended: Ended) -> bytearray:
        """
        Return a byte per row of a dead batch: 1 if it did not answer the row.

        A batch that was cancelled and shows nothing may have been stopped before any row ran, or show it late.

        :raises SiliconFlowError: the batch cannot be read, or is not settled.
        """
        self._replacing_since = self._replacing_since or self._clock.time()
        unanswered = self._unanswered_so_far(piece, ended)
        settled_at = (ended.at or self._replacing_since) + SETTLE_PATIENCE
        left = settled_at - self._clock.time()
        if ended.status == BatchStatus.CANCELLED and all(unanswered) and left > 0:
            log.info(
                "Batch %s was cancelled and shows no answer; reading it again in %.0f s", ended.batch_id, left
            )
            self._clock.sleep(min(left, SETTLE_PATIENCE))
            unanswered = self._unanswered_so_far(piece, ended)
        return unanswered

    def _unanswered_so_far(self, piece: Piece, ended: Ended) -> bytearray:
        problems: list[str] = []
        with self._downloaded(piece, ended.batch_id, ended_at=ended.at or None) as (_, files):
            unanswered = self._unanswered(piece, ended, files, problems.append)
        if problems and any(unanswered):
            raise IncompleteResultsError(
                f"{problems[0]}, and it may be the answer to a row that seems to have none.",
                batch_id=ended.batch_id,
            )
        return unanswered

    def _unanswered(
        self, piece: Piece, ended: Ended, files: BatchFiles, on_unreadable: OnUnreadable
    ) -> bytearray:
        outcomes = outcomes_in(files, on_unreadable)
        answered = {Outcome.OK, Outcome.INVALID, Outcome.ERROR}
        if ended.status == BatchStatus.FAILED and Outcome.OK not in outcomes.values():
            # Rejected as a whole: what it reports about single rows does not answer them.
            answered = set()
        return bytearray(
            outcomes.get(custom_id) not in answered for custom_id in iter_custom_ids(self._job.source(piece))
        )

    def read(self, piece: Piece, ended: Ended) -> None:
        """
        Read what an ended batch cost, for the budget.

        :raises SiliconFlowError: the batch cannot be read, or is not settled.
        """
        with self._downloaded(piece, ended.batch_id, ended_at=ended.at or None, patience=()):
            pass

    # Collecting -------------------------------------------------------------------------------------------

    def collect(self) -> Collected:
        """
        Download the results of all batches, and write those of each model in the order of the rows.

        Call this once every batch of the job has ended or was refused.

        :raises JobTakenOverError: another try has taken over the job; its results are not overwritten.
        :raises SiliconFlowError: nothing can be read; a retry reads it again.
        """
        collected = Collected()
        try:
            for model in self._job.models:
                self._merge_model(model, collected)
        except FileNotFoundError:
            # A newer try that finished the job has removed its folder.
            self._job.ledger.check_owner()
            raise
        return collected

    def next_round(self, collected: Collected) -> dict[int, tuple[Shard, ...]] | None:
        """
        Write the shards of the rows that are worth another attempt.

        :returns: the shards by model; ``None`` if no row is worth it, no attempt is left, the account has no balance,
            or a retry of the task has to get the rows of a batch first.
        """
        job = self._job
        number = len(job.rounds)
        if job.attempts >= job.options.max_row_attempts or not collected.worth_another_attempt:
            return None
        if collected.out_of_balance:
            log.error("Rows failed because the account has no balance: no row is sent again")
            return None
        if collected.unjudged:
            log.error("No row is sent again in this try, since answers cannot be judged")
            return None
        cancelled = [
            ended.batch_id
            for piece in job.current
            if (ended := job.dead(piece)) and ended.status == BatchStatus.CANCELLED
            # Somebody who cancels a batch does not want its rows to be sent again at once.
            if collected.unanswered.get(ended.batch_id)
        ]
        if waits_for := [*collected.spoilt, *cancelled]:
            log.warning(
                "No row is sent again in this try, because of batches %s", ", ".join(map(str, waits_for[:5]))
            )
            return None
        # The next try sends the rows of a later round that was refused as a part of that one.
        refused = {piece.model for piece in job.current if piece.round and job.refused(piece)}
        if not any(any(chosen) for model, chosen in collected.retries.items() if model not in refused):
            return None
        chosen = {model: rows for model, rows in collected.retries.items() if model not in refused}
        return self._select(chosen, number, tariff=job.options.tariff())

    def next_live_round(self, collected: Collected) -> dict[int, tuple[Shard, ...]] | None:
        """
        Write the shards of the rows that are to be asked one by one.

        A row is asked so at least once, and together with its attempts in batches at most ``max_row_attempts`` times.

        :returns: the shards by model; ``None`` if there is no such row, no attempt is left, or the account has no
            balance.
        """
        job = self._job
        sent_in_batches = sum(any(map(job.batch_id, pieces)) for pieces in job.rounds)
        most = max(job.options.max_row_attempts - sent_in_batches, 1)
        chosen = {
            model: [
                bytearray(wanted and asked < most for wanted, asked in zip(*of_shard, strict=True))
                for of_shard in zip(shards, collected.asked_live[model], strict=True)
            ]
            for model, shards in collected.retries.items()
        }
        if not any(any(wanted) for shards in chosen.values() for wanted in shards):
            return None
        if collected.out_of_balance:
            log.error("Rows failed because the account has no balance: no row is asked live")
            return None
        if collected.unjudged:
            log.error("No row is asked live in this try, since answers cannot be judged")
            return None
        number = len(job.rounds) + len(job.live_rounds)
        return self._select(chosen, number, keeps_unanswered=True)

    def _select(
        self,
        chosen: Mapping[int, list[bytearray]],
        number: int,
        *,
        tariff: Tariff | None = None,
        keeps_unanswered: bool = False,
    ) -> dict[int, tuple[Shard, ...]]:
        """
        Write the shards of a round.

        :param chosen: by model, for each shard of the plan a byte per row: 1 if it is selected.
        :param number: the round.
        :param tariff: limits what the rows of a shard can cost.
        :param keeps_unanswered: whether rows that were not answered stay as they are.
        """
        job = self._job
        try:
            return {
                model: select_rows(
                    job.plans.sources(job.plan, model),
                    rows,
                    job.plans.path / f"round-{number}" / str(model),
                    max_rows=job.options.max_rows,
                    max_bytes=job.options.max_bytes,
                    transform=job.options.acceptance.next_attempt(
                        OwnFile(self._model_folder(model) / "errors.jsonl"),
                        job.options.max_bytes,
                        keeps_unanswered=keeps_unanswered,
                    ),
                    tariff=tariff,
                )
                for model, rows in chosen.items()
            }
        except UnboundedRowError as exc:
            # They were checked when the job started, so they are others now.
            raise InvalidInputError(
                f"retry_params: {exc}. max_cost needs it. No row was sent again; correct retry_params and let the "
                "task retry, which continues the job",
                retryable=True,
            ) from None

    def _model_folder(self, model: int) -> Any:
        names = self._job.options.replacements
        return results_folder(self._output_dir, names[model], several=len(names) > 1)

    def _merge_model(self, model: int, collected: Collected) -> None:
        job = self._job
        folder = self._model_folder(model)
        name = job.options.replacements[model]
        tally = collected.tallies[model] = ModelTally()
        retries: list[bytearray] = collected.retries.setdefault(model, [])
        fresh: list[bytearray] = collected.fresh.setdefault(model, [])
        pieces = [piece for piece in (*job.pieces, *job.live_pieces) if piece.model == model]
        # The other batches hold rows of several shards of the plan, or some rows of one.
        whole = {piece.shard.index: piece for piece in pieces if self._is_whole(piece)}
        others = [piece for piece in pieces if not self._is_whole(piece)]
        with contextlib.ExitStack() as stack:
            shared = stack.enter_context(self._shared_files(others, collected))
            results = stack.enter_context(write_whole(folder / "results.jsonl"))
            errors = stack.enter_context(write_whole(folder / "errors.jsonl"))
            invalid_rows = job.plans.invalid_lines(job.plan.split, tally)
            for shard in job.plan.split.shards:
                with contextlib.ExitStack() as of_shard:
                    cached = cached_files(job.plan.reuse, job.plans.path, model, shard)
                    files = list(of_shard.enter_context(cached))
                    if self._kept is not None:
                        files.append(of_shard.enter_context(self._kept.files(model, shard)))
                    if (piece := whole.get(shard.index)) is not None:
                        files += of_shard.enter_context(self._files(piece, collected))
                    files += shared(shard)
                    merged = self._merge_shard(model, shard, files, results, errors, collected, invalid_rows)
                if merged.tally.rows != shard.rows:
                    raise IncompleteResultsError(
                        f"{job.planned(shard)} has {merged.tally.rows} rows, but {shard.rows} were planned: the file "
                        "is damaged. The batches and their results at the service are untouched.",
                        batch_id=None if piece is None else job.batch_id(piece),
                    )
                tally.add(merged.tally)
                retries.append(merged.retry)
                fresh.append(merged.fresh)
                collected.asked_live.setdefault(model, []).append(merged.asked_live)
            for line in invalid_rows.rest():
                results.write(line + b"\n")
                errors.write(line + b"\n")
            if self._kept is not None:
                self._kept.add_figures(model, tally)
            # The files get their names at the end of this block.
            job.ledger.check_owner()
        log.info("%s: %d of %d rows are ok", name or "Results", tally.ok, tally.rows)

    @staticmethod
    def _is_whole(piece: Piece) -> bool:
        """Whether a batch holds a shard of the plan."""
        return piece.round == 0 and piece.rest_of is None and not piece.shard.sources

    @contextlib.contextmanager
    def _shared_files(
        self, pieces: Sequence[Piece], collected: Collected
    ) -> Iterator[Callable[[Shard], list[BatchFiles]]]:
        """
        Download the batches of selected rows when the first shard of the plan that they have rows of is merged.

        They are removed after the last one, since together they may be as large as all results.

        :returns: a function that returns the files for a shard; to be called for each, in their order.
        """
        sources = [frozenset(piece.shard.sources) for piece in pieces]
        firsts = [min(each, default=-1) for each in sources]
        with contextlib.ExitStack() as stack:
            opened: dict[int, tuple[contextlib.ExitStack, list[BatchFiles]]] = {}

            def files_for(shard: Shard) -> list[BatchFiles]:
                for number in [number for number in opened if max(sources[number]) < shard.index]:
                    opened.pop(number)[0].close()
                for number in (number for number, first in enumerate(firsts) if first == shard.index):
                    own = stack.enter_context(contextlib.ExitStack())
                    files = own.enter_context(self._files(pieces[number], collected, shared=True))
                    opened[number] = own, files
                # In the order of their rounds, as the merge needs them.
                needed = (number for number in sorted(opened) if shard.index in sources[number])
                return [each for number in needed for each in opened[number][1]]

            yield files_for

    def _merge_shard(
        self,
        model: int,
        shard: Shard,
        files: Sequence[BatchFiles],
        results: Any,
        errors: Any,
        collected: Collected,
        invalid_rows: InvalidLines,
    ) -> MergedShard:
        """Merge a shard. A line that cannot be read costs its own row, and its batch counts as spoilt."""
        name = self._job.options.replacements[model]
        merged = merge_shard(
            self._job.planned(shard),
            files,
            results,
            errors,
            model=name,
            strict=False,
            judge=self._job.options.acceptance.judge,
            invalid_rows=invalid_rows if self._job.plan.split.invalid else None,
        )
        if merged.unjudged is not None:
            if collected.unjudged is None:
                log.error("Row %s cannot be judged: %s", merged.unjudged.custom_id, merged.unjudged.reason)
            collected.unjudged = merged.unjudged.after(collected.unjudged)
        for spoilt in merged.spoilt:
            # An unreadable line loses nothing if every row has a result from elsewhere.
            if spoilt.rows and spoilt.batch_id is not None and spoilt.batch_id not in collected.spoilt:
                log.error("Batch %s cannot be read completely: %s", spoilt.batch_id, spoilt.reason)
                collected.spoilt[spoilt.batch_id] = spoilt.reason
        return merged

    @contextlib.contextmanager
    def _files(
        self, piece: Piece, collected: Collected, *, shared: bool = False
    ) -> Iterator[list[BatchFiles]]:
        """Download the results of a piece: its batch, those that died before it, or why it was refused."""
        if piece.live and self.live is not None:
            with self.live.answers(piece) as path:
                yield [
                    BatchFiles(
                        path,
                        None,
                        round=piece.round,
                        shared=shared,
                        unsent=self.live.unasked(piece),
                        requests=self._job.source(piece),
                        live=True,
                    )
                ]
            return
        job = self._job
        ended, refused = job.ended(piece), job.refused(piece)
        found: list[BatchFiles] = []
        with contextlib.ExitStack() as stack:
            for retired in job.retired(piece):
                with contextlib.suppress(_LeftOut):
                    found.append(self._opened(stack, piece, retired, shared=shared))
            if ended is not None:
                found.append(self._collected_files(stack, piece, ended, collected, shared=shared))
            elif (reason := job.left_out(piece)) is not None:
                batch_id = job.batch_id(piece) or ""
                collected.spoilt[batch_id] = storable_text(reason, 1000)
                found.append(self._spoilt_files(piece, batch_id, collected, shared=shared))
            elif refused is not None and piece.round == 0:
                # In a later round the rows already have a result, which says more.
                folder = stack.enter_context(temporary_folder())
                path = folder / "error.jsonl"
                lines = refused_lines(job.source(piece), status=refused.status, message=refused.message)
                _write_lines(path, lines)
                found.append(BatchFiles(None, path, shared=shared))
            elif job.live_start is not None and job.is_waiting(piece):
                # Its rows are asked one by one.
                requests = job.source(piece) if shared else None
                found.append(
                    BatchFiles(None, None, round=piece.round, shared=shared, requests=requests, wanted=shared)
                )
            elif self.budget is not None and job.is_waiting(piece):
                requests = job.source(piece) if shared else None
                unsent = self.budget.reason
                found.append(
                    BatchFiles(None, None, round=piece.round, shared=shared, unsent=unsent, requests=requests)
                )
            elif refused is None:
                raise AssertionError(f"no batch for {piece}")
            yield found

    def _collected_files(
        self, stack: contextlib.ExitStack, piece: Piece, ended: Ended, collected: Collected, *, shared: bool
    ) -> BatchFiles:
        if ended.batch_id not in collected.spoilt:
            try:
                downloading = self._downloaded(
                    piece, ended.batch_id, ended_at=ended.at or None, shared=shared
                )
                files = stack.enter_context(downloading)[1]
                if self._job.dead(piece):
                    # The merge says which lines cannot be read, and they cost their own rows alone.
                    unanswered = self._unanswered(piece, ended, files, lambda _: None)
                    collected.unanswered[ended.batch_id] = sum(unanswered)
                    if self._is_not_to_be_asked(ended):
                        requests = self._job.source(piece)
                        return replace(files, unsent=_CANCELLED_BY_HAND, requests=requests)
                    return replace(files, wanted=shared and self._job.live_start is not None)
                return files
            except SiliconFlowError as exc:
                self._spoil(ended.batch_id, exc, collected)
        return self._spoilt_files(piece, ended.batch_id, collected, shared=shared)

    def _is_not_to_be_asked(self, ended: Ended) -> bool:
        """
        Whether somebody cancelled a batch in this try, and so does not want its rows to be asked at once.

        The job itself cancels batches whose rows are asked one by one.
        """
        start = self._job.live_start
        return (
            start is not None
            and ended.status == BatchStatus.CANCELLED
            and ended.at > self.began
            and ended.batch_id not in start.cancelled
        )

    def _spoilt_files(self, piece: Piece, batch_id: str, collected: Collected, *, shared: bool) -> BatchFiles:
        return BatchFiles(
            None,
            None,
            round=piece.round,
            shared=shared,
            batch_id=batch_id,
            spoilt=collected.spoilt[batch_id],
            requests=self._job.source(piece) if shared else None,
        )

    def _opened(
        self, stack: contextlib.ExitStack, piece: Piece, retired: Ended, *, shared: bool
    ) -> BatchFiles:
        """Download a batch that was replaced since it had answered no row; answers that came later are paid for too."""
        try:
            downloading = self._downloaded(
                piece, retired.batch_id, ended_at=retired.at, shared=shared, patience=()
            )
            return stack.enter_context(downloading)[1]
        except SiliconFlowError as exc:
            if self._is_not_about_one(exc):
                raise
            log.warning("%s Batch %s was replaced, so the job continues without it.", exc, retired.batch_id)
            raise _LeftOut from exc

    def _spoil(self, batch_id: str, error: SiliconFlowError, collected: Collected) -> None:
        """
        Remember a batch that cannot be read.

        :raises SiliconFlowError: the error does not concern this batch alone.
        """
        if self._is_not_about_one(error):
            raise error
        collected.spoilt[batch_id] = storable_text(str(error), 1000)
        log.error("Batch %s cannot be read, and its rows are left out: %s", batch_id, error)
        if is_transient(error) and len(collected.spoilt) >= _TRANSIENT_FAILURES:
            log.error("%d batches cannot be read; the others are not tried", len(collected.spoilt))
            raise error

    @staticmethod
    def _is_not_about_one(error: SiliconFlowError) -> bool:
        return isinstance(error, AuthenticationError | PermissionDeniedError | JobTakenOverError)

    @contextlib.contextmanager
    def _downloaded(
        self,
        piece: Piece,
        batch_id: str,
        *,
        ended_at: float | None,
        shared: bool = False,
        patience: Sequence[float] = LATE_FILE_PATIENCE,
    ) -> Iterator[tuple[Batch, BatchFiles]]:
        # A file that did not arrive in an earlier round is not waited for again.
        if batch_id in self._short:
            patience = ()
        with downloaded(
            self._client,
            batch_id,
            self._clock,
            number=piece.round,
            shared=shared,
            rows=piece.shard.rows,
            ended_at=ended_at,
            patience=patience,
            requests=self._job.source(piece) if shared else None,
        ) as found:
            if found[0].metadata.get(WORK_KEY, piece.work_key) != piece.work_key:
                raise IncompleteResultsError(
                    f"Batch {batch_id} belongs to other work, and our record is wrong to name it. Our own is on the "
                    f"console with the metadata {WORK_KEY}={piece.work_key}.",
                    batch_id=batch_id,
                )
            if found[1].short:
                self._short.add(batch_id)
            if self.budget is not None:
                self.budget.learn(piece, batch_id, found[1])
            yield found

    # Cache ------------------------------------------------------------------------------------------------

    def keep_answers(self, cache_dir: Any, key: str, collected: Collected) -> None:
        """
        Add the job's own answers to a cache.

        The job's results are written by now, so whatever goes wrong here does not fail it.

        :param cache_dir: the cache.
        :param key: identity of the job.
        :param collected: the results, as they were written.
        """
        job = self._job
        for model in job.models:
            try:
                kept = keep_answers(
                    cache_dir,
                    key,
                    model,
                    job.plans,
                    job.plan,
                    self._model_folder(model) / "results.jsonl",
                    collected.fresh[model],
                    now=self._clock.time(),
                )
            # Stores raise errors of their own.
            except Exception as exc:  # noqa: BLE001
                log.error(
                    "Answers are not added to the cache in %s, and are paid for again: %s", cache_dir, exc
                )
                return
            if kept:
                log.info("%d answers are added to the cache in %s", kept, cache_dir)

    # Manifest ---------------------------------------------------------------------------------------------

    def manifest(self, collected: Collected) -> dict[str, Any]:
        """Return the manifest of the collected results, as XCom takes it."""
        options = self._job.options
        runs = [
            ModelRun(
                options.replacements[model],
                collected.tallies[model],
                [
                    *(self._kept.batches(model) if self._kept is not None else ()),
                    *(
                        summary
                        for piece in self._job.pieces
                        if piece.model == model
                        for summary in self._summaries(piece, collected)
                    ),
                ],
                {name: str(self._model_folder(model) / f"{name}.jsonl") for name in ("results", "errors")},
                self._live_rounds(model),
            )
            for model in self._job.models
        ]
        paths = {"output_dir": str(self._output_dir), "manifest": str(self._output_dir / "manifest.json")}
        manifest = build_manifest(runs, prices=options.prices, paths=paths)
        manifest["worth_another_attempt"] = collected.worth_another_attempt
        manifest["budget"] = None if self.budget is None else self.budget.to_dict()
        found: dict[str, Any] = storable(manifest)
        return found

    def _live_rounds(self, model: int) -> dict[int, int]:
        """Return the rows of each live round of a model."""
        found = {} if self._kept is None else self._kept.live_rounds(model)
        for piece in self._job.live_pieces:
            if piece.model == model:
                found[piece.round] = found.get(piece.round, 0) + piece.shard.rows
        return found

    def _summaries(self, piece: Piece, collected: Collected) -> Iterator[BatchSummary]:
        ended = self._job.ended(piece)
        batches: list[Ended] = [*self._job.retired(piece), *([ended] if ended else [])]
        for batch in batches:
            yield BatchSummary(
                id=batch.batch_id,
                status=batch.status,
                rows=piece.shard.rows,
                shard=piece.shard.index,
                round=piece.round,
                counts=batch.counts,
                spoilt=collected.spoilt.get(batch.batch_id),
            )


class _LeftOut(Exception):  # noqa: N818
    """A batch that is left out of the results."""


def _write_lines(path: Path, lines: Iterable[bytes]) -> None:
    with path.open("wb") as stream:
        stream.writelines(lines)
