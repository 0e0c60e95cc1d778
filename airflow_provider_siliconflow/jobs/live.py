"""
The live phase of a job: rows that no batch answered in time are asked one by one.

A live round is a round like any other, but for how its rows are asked: its shards are planned, and what is answered
lies in the journal of the job's folder. So a later process asks only what has no line there.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path

import msgspec

from airflow_provider_siliconflow.api.async_client import AsyncSiliconFlowClient
from airflow_provider_siliconflow.api.client import SiliconFlowClient
from airflow_provider_siliconflow.api.exceptions import IncompleteResultsError, SiliconFlowError
from airflow_provider_siliconflow.api.models import Outcome
from airflow_provider_siliconflow.batch_files.atomic_files import open_own, temporary_folder
from airflow_provider_siliconflow.batch_files.cost_bounds import UnboundedRowError, bound_row
from airflow_provider_siliconflow.batch_files.custom_ids import custom_id_of
from airflow_provider_siliconflow.batch_files.lines import LineReader
from airflow_provider_siliconflow.batch_files.live_lines import chat_body, is_answer
from airflow_provider_siliconflow.batch_files.prices import cost, live_prices, price_of, prompt_cost
from airflow_provider_siliconflow.batch_files.shards import NamedRow, iter_custom_ids, iter_rows
from airflow_provider_siliconflow.batch_files.verdicts import UnreadableLineError, Verdict, read_verdict
from airflow_provider_siliconflow.jobs.asking import (
    FENCE_SECONDS,
    NO_ANSWER,
    UNREADABLE,
    Asking,
    Purse,
    Question,
)
from airflow_provider_siliconflow.jobs.clock import Clock
from airflow_provider_siliconflow.jobs.job import OpenJob
from airflow_provider_siliconflow.jobs.live_journal import LiveJournal
from airflow_provider_siliconflow.jobs.plan import Piece

log = logging.getLogger(__name__)


class LivePhase:
    """
    The live rounds of a job, in one process.

    :param job: the job.
    :param client: has the settings of the connection.
    :param clock: time.
    """

    def __init__(self, job: OpenJob, client: SiliconFlowClient, *, clock: Clock) -> None:
        self._job = job
        self._client = client
        self._clock = clock
        self._journal = LiveJournal(job.plans.path)
        self._tariff = job.options.live_tariff() if job.options.live_after or job.live_start else None
        self._prices = live_prices(job.options.prices)
        self._purse = Purse(None if self._tariff is None else self._tariff.max_cost)
        self._others = Fraction()
        self._unaffordable, self._unaffordable_cost = 0, Fraction()
        self._asking: Asking | None = None
        self._stopped = False
        #: Whether another process has begun to ask rows. It may be alive, as far as anybody knows.
        self._was_begun = bool(job.live_rounds)
        #: Why rows of the last round were not asked, although a retry may ask them.
        self.problem: SiliconFlowError | None = None

    # Asking -----------------------------------------------------------------------------------------------

    def ask(self, spent: Fraction) -> None:
        """
        Ask the rows of the last live round that have no line yet; :attr:`problem` says why some were not asked.

        :param spent: what the job's batches cost at most, in CNY.
        """
        job = self._job
        pieces = job.live_rounds[-1]
        if self._was_begun:
            # What it asks until it notices that the job is not its own any more would be asked twice.
            job.ledger.check_owner()
            self._clock.sleep(FENCE_SECONDS)
            self._was_begun = False
        self._purse = self._spent_so_far(spent)
        left = sum(map(self._left, pieces))
        if not left:
            return
        log.info("Live: %d rows are asked one by one, up to %d at once", left, job.options.live_concurrency)
        job.ledger.check_owner()
        self._asking = Asking(
            [self._questions([each for each in pieces if each.model == model]) for model in job.models],
            rows=left,
            journal=self._journal,
            open_client=lambda: AsyncSiliconFlowClient(
                self._client.settings, max_calls=job.options.live_concurrency
            ),
            concurrency=job.options.live_concurrency,
            purse=self._purse,
            cost_of=self._cost_of,
            deadline=job.ledger.deadline,
            check_owner=job.ledger.check_owner,
            clock=self._clock,
        )
        if self._stopped:
            self._asking.stop()
        self._asking.run()
        self.problem = self._asking.problem
        self._unaffordable += self._asking.figures.unaffordable
        self._unaffordable_cost += self._asking.figures.unaffordable_cost
        if self._stopped and self.problem is None:
            self.problem = SiliconFlowError("No more rows are asked: the task was ended from outside")

    def stop(self) -> None:
        """Send nothing from now on."""
        self._stopped = True
        if self._asking is not None:
            self._asking.stop()

    def _questions(self, pieces: list[Piece]) -> Iterator[Question]:
        """Yield the rows of some pieces that have no line."""
        for piece in pieces:
            answered = self._answered(piece)
            model = self._job.options.replacements[piece.model]
            with open_own(self._job.source(piece)) as stream:
                for line in LineReader(stream):
                    if line is None:
                        raise IncompleteResultsError(f"{self._job.source(piece)} is damaged")
                    custom_id = custom_id_of(line)
                    if custom_id not in answered:
                        bound, named = self._bound(line, model)
                        yield Question(piece, custom_id, chat_body(line, model), named, bound)

    def _left(self, piece: Piece) -> int:
        """Return how many rows of a piece have no line; lines of other rows do not count."""
        answered = self._answered(piece)
        if not answered:
            return piece.shard.rows
        return sum(custom_id not in answered for custom_id in iter_custom_ids(self._job.source(piece)))

    def _answered(self, piece: Piece) -> set[str]:
        return {custom_id for custom_id, _ in self._journal.answers(piece)}

    # Money ------------------------------------------------------------------------------------------------

    def _bound(self, line: bytes, model: str | None) -> tuple[Fraction | None, str]:
        """
        Return the most that a row can cost, ``None`` without ``max_cost``; and its model.

        :raises SiliconFlowError: there is no bound.
        """
        if self._tariff is None:
            return None, model or _named_model(line)
        try:
            own, bound = bound_row(line)
            return self._tariff.cost({own: bound}, model), model or own
        except UnboundedRowError as exc:
            raise IncompleteResultsError(
                f"max_cost: row {custom_id_of(line)!r}: {exc}. It was not asked; correct retry_params and let the task "
                "retry"
            ) from None

    def _cost_of(self, model: str, verdict: Verdict) -> Fraction | None:
        """Return what an answer costs in CNY; ``None`` if that is not known."""
        price = price_of(model, self._prices)
        if price is None or not verdict.metered:
            return None
        return prompt_cost(verdict.prompt, verdict.cached, price) + cost(
            verdict.completion, price["completion"]
        )

    def _spent_so_far(self, spent: Fraction) -> Purse:
        """Return what is left by the batches and by what was asked so far, also by processes that died."""
        self._others = spent
        purse = Purse(None if self._tariff is None else self._tariff.max_cost, known=spent)
        if self._tariff is None:
            return purse
        for piece in self._job.live_pieces:
            # A row that was asked has a line, or the most that it can cost is held. One that was asked more often than
            # it has lines may have been billed for the others.
            unknown = dict(self._journal.asked(piece))
            named = self._named_models(piece)
            for custom_id, line in self._journal.answers(piece):
                found = self._cost_of_line(piece, line, named)
                if found is not None:
                    purse.known += found
                    unknown[custom_id] = unknown.get(custom_id, 0) - 1
            purse.held += self._bounds(piece, {each: n for each, n in unknown.items() if n > 0})
        return purse

    def _cost_of_line(self, piece: Piece, line: bytes, named: Mapping[str, str]) -> Fraction | None:
        """
        Return what a line of the journal cost in CNY; ``None`` if that is not known.

        :param named: the models that the rows name, by custom id.
        """
        try:
            verdict = read_verdict(line)
        except UnreadableLineError:
            return None
        if verdict is None or verdict.code in (NO_ANSWER, UNREADABLE):
            return None
        if verdict.outcome is Outcome.ERROR and not is_answer(line):
            # The service refused the row. An answer may be an error, too, such as one without a choice; it is billed.
            return Fraction()
        model = self._job.options.replacements[piece.model]
        return self._cost_of(model or named.get(verdict.custom_id, ""), verdict)

    def _named_models(self, piece: Piece) -> dict[str, str]:
        """Return the models that the rows of a piece name, by custom id; none if the job has a model for all."""
        if self._job.options.models:
            return {}
        rows = iter_rows(self._job.source(piece), NamedRow)
        return {row.custom_id: row.body.model or "" for row in rows}

    def _bounds(self, piece: Piece, times: dict[str, int]) -> Fraction:
        """
        Return the most that rows can have cost.

        :param times: how often each of them may have been billed, by custom id.
        """
        total = Fraction()
        if not times:
            return total
        model = self._job.options.replacements[piece.model]
        with open_own(self._job.source(piece)) as stream:
            for line in filter(None, LineReader(stream)):
                if number := times.get(custom_id_of(line)):
                    total += number * (self._bound(line, model)[0] or Fraction())
        return total

    def spent(self) -> tuple[Fraction, Fraction]:
        """Return what was asked so far cost, and the most that it may have cost in addition, in CNY."""
        return self._purse.known - self._others, self._purse.held

    # Results ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def answers(self, piece: Piece) -> Iterator[Path]:
        """Return a file of the result lines of a piece."""
        with temporary_folder() as folder:
            path = folder / "output.jsonl"
            with path.open("wb") as target:
                self._journal.copy_answers(piece, target)
            yield path

    def unasked(self, piece: Piece) -> str | None:
        """Return why rows of a piece were not asked; ``None`` if all were."""
        is_last = piece in self._job.live_rounds[-1]
        if self.problem is not None and is_last:
            return f"not asked: {self.problem}"
        # An earlier round ended with rows that were not asked for no other reason.
        if (self._unaffordable or not is_last) and self._tariff is not None:
            most = float(self._tariff.max_cost)
            return f"not asked, since it could cost more than is left of max_cost ({most:g} CNY)"
        return None

    @property
    def unaffordable(self) -> tuple[int, Fraction]:
        """Rows that were not asked because of ``max_cost``, and the most that they could cost."""
        return self._unaffordable, self._unaffordable_cost


def _named_model(line: bytes) -> str:
    return msgspec.json.decode(line, type=NamedRow).body.model or ""
