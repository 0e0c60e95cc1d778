"""
What a job may still spend of ``max_cost``.

Every batch that may exist holds the most that its rows can cost, until its results say what they did cost. Another
batch is sent only if it fits beside that. All of this follows from the ledger, the request files and the results, so a
later process or try comes to the same decision; what is written down here only saves reading them again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from airflow_provider_siliconflow.api.exceptions import InvalidInputError, SiliconFlowError
from airflow_provider_siliconflow.api.models import BatchStatus, Outcome
from airflow_provider_siliconflow.batch_files.atomic_files import write_json
from airflow_provider_siliconflow.batch_files.cost_bounds import Tariff, TokenBound, bound_file
from airflow_provider_siliconflow.batch_files.merge import BatchFiles
from airflow_provider_siliconflow.batch_files.prices import cost, price_of, prompt_cost, rounded
from airflow_provider_siliconflow.batch_files.shards import NamedRow, iter_rows
from airflow_provider_siliconflow.batch_files.tally import Usage
from airflow_provider_siliconflow.batch_files.verdicts import Verdict
from airflow_provider_siliconflow.jobs.clock import Clock
from airflow_provider_siliconflow.jobs.downloads import verdicts_in
from airflow_provider_siliconflow.jobs.finished import KeptAnswers
from airflow_provider_siliconflow.jobs.folder import read_json
from airflow_provider_siliconflow.jobs.job import OpenJob
from airflow_provider_siliconflow.jobs.plan import Piece
from airflow_provider_siliconflow.jobs.settled import SETTLE_PATIENCE
from airflow_provider_siliconflow.jobs.states import Ended, Sending, Sent

if TYPE_CHECKING:
    from airflow_provider_siliconflow.jobs.live import LivePhase

log = logging.getLogger(__name__)

#: The file in the job's folder in which bounds and usage are written down.
_FILE = "spend.json"


#: Tokens of prompts, of these from the cache, and of answers, by model; ``""`` if the model is that of the job.
_Used: TypeAlias = dict[str, tuple[int, int, int]]


class _Record(msgspec.Struct):
    """
    What is known of request files and batches.

    :param bounds: by digest of a request file, by model.
    :param used: by batch; ``None`` if not all of its tokens are known.
    """

    bounds: dict[str, dict[str, TokenBound]] = {}
    used: dict[str, _Used | None] = {}


@dataclass(frozen=True, slots=True)
class _Spent:
    """
    What batches cost, in CNY.

    :param known: by their results.
    :param held: at most, where that is not known.
    """

    known: Fraction = Fraction()
    held: Fraction = Fraction()

    def __add__(self, other: _Spent) -> _Spent:
        return _Spent(self.known + other.known, self.held + other.held)

    @property
    def total(self) -> Fraction:
        return self.known + self.held


class Budget:
    """
    Decides which batches of a job may be sent.

    :param job: the job.
    :param tariff: what its tokens cost at most.
    :param read: downloads the results of an ended batch and passes them to :meth:`learn`.
    :param clock: time.
    """

    def __init__(
        self, job: OpenJob, tariff: Tariff, read: Callable[[Piece, Ended], None], *, clock: Clock
    ) -> None:
        self._job = job
        self._tariff = tariff
        self._read = read
        self._clock = clock
        self._path = job.plans.path / _FILE
        self._tried: set[str] = set()
        self._told: tuple[int, int] = (0, 0)
        self._changed = False
        self._before = _spent_before(job)
        #: What asks rows one by one, and so spends too.
        self.live: LivePhase | None = None
        try:
            stored = read_json(self._path, otherwise="bounds and usage are read again")
            self._record = msgspec.convert(stored or {}, _Record)
        except (msgspec.ValidationError, RecursionError) as exc:
            log.warning("%s was not written by this provider (%s); it is made anew", self._path, exc)
            self._record = _Record()

    # Decisions --------------------------------------------------------------------------------------------

    def affordable(self, pieces: Sequence[Piece]) -> list[Piece]:
        """
        Return those of some batches that may be sent, one after the other.

        :param pieces: batches that certainly do not exist yet.
        """
        chosen = self._fitting(pieces)
        if len(chosen) < len(pieces) and self._read_ended():
            chosen = self._fitting(pieces)
        self._write()
        left = len(pieces) - len(chosen)
        if left and self._told != (left, len(chosen)):
            self._told = (left, len(chosen))
            spent = self.spent()
            log.info(
                "max_cost is %s CNY, %s are spent and up to %s held: %d of the %d batches that are due do not fit now",
                *map(_shown, (self._tariff.max_cost, spent.known, spent.held)),
                left,
                len(pieces),
            )
        return chosen

    def _fitting(self, pieces: Sequence[Piece]) -> list[Piece]:
        room = self._tariff.max_cost - self.spent().total
        chosen = []
        for piece in pieces:
            bound = self.bound(piece)
            if bound <= room:
                room -= bound
                chosen.append(piece)
        return chosen

    def bound(self, piece: Piece) -> Fraction:
        """
        Return the most that a batch can cost, in CNY.

        :raises InvalidInputError: one of its rows can cost any sum, or its model has no price.
        """
        job, key = self._job, piece.shard.sha256
        bounds = self._record.bounds.get(key)
        if bounds is None:
            bounds = bound_file(job.source(piece), own_models=not job.options.models)
            self._record.bounds[key] = bounds
            self._changed = True
        try:
            return self._tariff.cost(bounds, job.options.replacements[piece.model])
        except ValueError as exc:
            raise InvalidInputError(f"max_cost: {exc}") from None

    # What is spent ----------------------------------------------------------------------------------------

    def spent(self) -> _Spent:
        """Return what the batches that exist, or may exist, cost, with those of a job that was cleared."""
        return sum((self._spent_on(piece) for piece in self._job.pieces), self._before)

    def read_spent(self) -> _Spent:
        """Return the same, after reading what is not known of ended batches: what a killed process knew is gone."""
        self._read_ended()
        self._write()
        return self.spent()

    def _spent_on(self, piece: Piece) -> _Spent:
        job = self._job
        spent = sum((self._cost(piece, retired) for retired in job.retired(piece)), _Spent())
        state = job.state(piece)
        if isinstance(state, Ended):
            return spent + self._cost(piece, state)
        return spent + _Spent(held=self.bound(piece)) if isinstance(state, Sending | Sent) else spent

    def _cost(self, piece: Piece, ended: Ended) -> _Spent:
        used = self._record.used.get(ended.batch_id)
        if used is None or (not used and self._may_come_late(ended)):
            return _Spent(held=self.bound(piece))
        known = self._cost_of(piece, used)
        return _Spent(held=self.bound(piece)) if known is None else _Spent(known)

    def _cost_of(self, piece: Piece, used: _Used) -> Fraction | None:
        model = self._job.options.replacements[piece.model]
        known = Fraction()
        for own, (prompt, cached, completion) in used.items():
            price = price_of(model or own, self._job.options.prices)
            if price is None:
                return None
            known += prompt_cost(prompt, cached, price) + cost(completion, price["completion"])
        return known

    def _may_come_late(self, ended: Ended) -> bool:
        """Whether a batch that shows no answer may show some later: one that was just cancelled."""
        return ended.status == BatchStatus.CANCELLED and self._clock.time() - ended.at < SETTLE_PATIENCE

    def _read_ended(self) -> bool:
        """Read what ended batches cost of which it is not known; return whether any was read."""
        job = self._job
        before = self._known
        for piece in job.pieces:
            for ended in (*job.retired(piece), *filter(None, (job.ended(piece),))):
                if self._record.used.get(ended.batch_id) is not None or ended.batch_id in self._tried:
                    continue
                self._tried.add(ended.batch_id)
                try:
                    self._read(piece, ended)
                except SiliconFlowError as exc:
                    log.warning(
                        "What batch %s cost cannot be read, so the most that it can cost is held: %s",
                        ended.batch_id,
                        exc,
                    )
        return self._known > before

    @property
    def _known(self) -> int:
        return sum(used is not None for used in self._record.used.values())

    def learn(self, piece: Piece, batch_id: str, files: BatchFiles) -> None:
        """
        Note what a settled batch cost.

        :param files: its results.
        """
        used = self._used(piece, files)
        if self._record.used.get(batch_id, ()) == used:
            return
        self._record.used[batch_id] = used
        self._changed = True
        if used is not None and (self._cost_of(piece, used) or 0) > self.bound(piece):
            log.error("Batch %s cost more than its rows could cost by max_tokens and prices", batch_id)

    def _used(self, piece: Piece, files: BatchFiles) -> _Used | None:
        """Return the tokens of a batch by model; ``None`` if some are not known."""
        if files.short:
            return None
        job = self._job
        models = None
        if not job.options.models:
            models = {row.custom_id: row.body.model for row in iter_rows(job.source(piece), NamedRow)}
        # A row is billed once, though a batch may have two lines of it.
        rows: dict[str, Verdict] = {}
        problems: list[str] = []
        for verdict in verdicts_in(files, problems.append):
            if verdict.outcome is Outcome.OK and not verdict.metered:
                return None
            before = rows.get(verdict.custom_id)
            if before is None or before.prompt + before.completion < verdict.prompt + verdict.completion:
                rows[verdict.custom_id] = verdict
        if problems:
            return None
        used: dict[str, Usage] = {}
        for custom_id, verdict in rows.items():
            if verdict.prompt or verdict.completion:
                model = "" if models is None else models.get(custom_id)
                if model is None:
                    # Nobody knows the price of a row that was never sent.
                    return None
                verdict.add_usage_to(used.setdefault(model, Usage()))
        return {model: (each.prompt, each.cached, each.completion) for model, each in used.items()}

    # What is said -----------------------------------------------------------------------------------------

    def unsent(self) -> list[Piece]:
        """Return the batches that were not sent. Once rows are asked one by one, none counts as such."""
        job = self._job
        return [] if job.live_start is not None else [piece for piece in job.pieces if job.is_waiting(piece)]

    @property
    def reason(self) -> str:
        """Why they were not."""
        most = _shown(self._tariff.max_cost)
        return f"not sent, since its batch could cost more than is left of max_cost ({most} CNY)"

    def to_dict(self) -> dict[str, Any]:
        """Return the budget for the manifest, as JSON types."""
        spent, unsent = self.spent(), self.unsent()
        rows, cost = 0, Fraction()
        if self.live is not None:
            spent += _Spent(*self.live.spent())
            rows, cost = self.live.unaffordable
        self._write()
        return {
            "currency": "CNY",
            "max_cost": rounded(self._tariff.max_cost),
            "spent": rounded(spent.known),
            "held": rounded(spent.held),
            "rows_not_sent": rows + sum(piece.shard.rows for piece in unsent),
            "cost_not_sent": rounded(sum(map(self.bound, unsent), cost)),
        }

    def _write(self) -> None:
        if self._changed:
            self._job.ledger.check_owner()
            write_json(self._path, msgspec.to_builtins(self._record))
            self._changed = False


# Before anything is uploaded ------------------------------------------------------------------------------------


def estimated_prompts(job: OpenJob) -> Fraction | None:
    """
    Return the estimated cost of the prompts that a job sends, in CNY, all at the cheaper price if they may be cached.

    :returns: the cost; ``None`` if a model has no price.
    """
    options, split = job.options, job.plan.split
    to_send = [Fraction()] * len(options.replacements)
    for piece in job.pieces:
        # By what all rows of the model have, since parameters that only some models get are not prompts.
        of_model = sum(shard.bytes for shard in job.plan.shards_of(piece.model))
        to_send[piece.model] += Fraction(piece.shard.bytes, of_model)
    # Rows that name their models cost at least as much as over the cheapest of them.
    of_models = [[price_of(model, options.prices)] for model in options.models]
    total = Fraction()
    for share, prices in zip(
        to_send, of_models or [[price_of(model, options.prices) for model in split.models]], strict=True
    ):
        known = [price for price in prices if price is not None]
        if len(known) < len(prices) or not known:
            return None
        tokens = int(split.prompt_tokens * share)
        total += min(prompt_cost(tokens, cached, price) for cached in (0, tokens) for price in known)
    return total


def _spent_before(job: OpenJob) -> _Spent:
    """Return what the finished job cost whose answers a job keeps."""
    if not job.plan.kept_rounds:
        return _Spent()
    spent = KeptAnswers(job.plans).spent()
    if spent is None:
        log.warning(
            "What the job cost before it was cleared is not known, and does not count towards max_cost"
        )
        return _Spent()
    return _Spent(*spent)


def refuse_costly(job: OpenJob) -> None:
    """
    Refuse a job whose prompts alone cost more than ``max_cost``, or none of whose batches fits into it.

    :param job: a job that has not sent anything.
    :raises InvalidInputError: it is one of these, or a model has no price.
    """
    options = job.options
    tariff = options.tariff()
    if tariff is None:
        return
    tariffs = (tariff, options.live_tariff() if options.live_after else None)
    for model in options.models or job.plan.split.models:
        for each in filter(None, tariffs):
            each.rates(model)
    if not any(True for _ in job.pieces):
        # Every row has an answer that is paid for, whatever they cost.
        return
    before = _spent_before(job).total
    said = f"max_cost is {_shown(tariff.max_cost)} CNY" + (
        f", of which {_shown(before)} are spent by the job that was cleared" if before else ""
    )
    left, prompts = tariff.max_cost - before, estimated_prompts(job)
    if prompts is not None and prompts > left:
        raise InvalidInputError(
            f"{said}, but the prompts of the rows alone cost about {_shown(prompts)} CNY. Nothing was uploaded."
        )
    cheapest: Fraction | None = None
    for piece in job.pieces:
        bounds = bound_file(job.source(piece), own_models=not options.models)
        bound = tariff.cost(bounds, options.replacements[piece.model])
        if bound <= left:
            return
        cheapest = bound if cheapest is None else min(cheapest, bound)
    if cheapest is not None:
        raise InvalidInputError(
            f"{said}, but even the cheapest batch can cost {_shown(cheapest)} CNY (its prompts, max_tokens and "
            "thinking at the given prices). Nothing was uploaded."
        )


def check_balance(job: OpenJob, balance: Callable[[], str | None], *, may_refuse: bool) -> None:
    """
    Compare the estimated cost of the prompts with the balance from which batches are paid.

    :param balance: reads it from the account.
    :param may_refuse: whether a balance that is too low is an error if ``max_cost`` is set.
    :raises InvalidInputError: the balance is too low.
    """
    prompts = estimated_prompts(job)
    if not prompts:
        return
    try:
        text = balance()
        left = Fraction(str(text))
    except (SiliconFlowError, ValueError, ZeroDivisionError) as exc:
        log.info(
            "The account's charged balance is not known, so it is not compared with the prompts: %s", exc
        )
        return
    if left >= prompts:
        return
    said = (
        f"the account's charged balance is {_shown(left)} CNY, less than the estimated cost of the prompts alone, "
        f"{_shown(prompts)} CNY"
    )
    if job.options.max_cost is not None and may_refuse:
        raise InvalidInputError(f"max_cost is set, and {said}. Nothing was uploaded. Charge the account.")
    log.warning("%s. Rows may fail once the balance is used up", said[:1].upper() + said[1:])


def _shown(amount: Fraction) -> str:
    """Return an amount in CNY with as many digits as a message needs."""
    text = f"{float(amount):.6f}".rstrip("0").rstrip(".")
    return f"{float(amount):.1e}" if amount and text == "0" else text
