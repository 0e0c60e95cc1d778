"""
Merging the service's result lines into the order of the input, with the outcome of every row.

One shard is merged at a time. Its result files are read once from start to end, to find the line of each row; then the
lines are copied byte for byte in the order of the shard. Memory does not grow with the number of shards or the length
of the answers.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from sys import intern

import msgspec

from airflow_provider_siliconflow.api.exceptions import IncompleteResultsError
from airflow_provider_siliconflow.api.models import Outcome
from airflow_provider_siliconflow.api.redaction import brief
from airflow_provider_siliconflow.api.sources import Source
from airflow_provider_siliconflow.batch_files.invalid_rows import InvalidLines
from airflow_provider_siliconflow.batch_files.lines import ByteWriter, LineReader
from airflow_provider_siliconflow.batch_files.parameters import to_json
from airflow_provider_siliconflow.batch_files.result_lines import read_lines
from airflow_provider_siliconflow.batch_files.rules import MAX_ROWS
from airflow_provider_siliconflow.batch_files.shards import iter_custom_ids, iter_rows
from airflow_provider_siliconflow.batch_files.tally import MESSAGE_CHARACTERS, ModelTally, Usage
from airflow_provider_siliconflow.batch_files.verdicts import (
    Judge,
    Verdict,
    read_verdict,
    worth_retrying,
)

log = logging.getLogger(__name__)

#: Most bytes of result lines of one shard that are kept in memory until they are written; other lines are read again.
_HELD_BYTES = 1 << 19
_BLOCK_BYTES = 1 << 16

#: Most rows of a batch without its request file, and most characters of their custom ids, that are kept.
_MOST_ROWS = 20 * MAX_ROWS
_LONGEST_ID = 256

#: The message for a row without a result.
_NO_RESULT = "the service returned no result for this row"


def _no_result(reason: str) -> str:
    """Return the message for a row without a result whose batch cannot be read completely."""
    return brief(f"no result for this row could be read: {reason}", MESSAGE_CHARACTERS)


class _AskedBody(msgspec.Struct, gc=False):
    model: str | None = None


class _AskedLine(msgspec.Struct, gc=False):
    custom_id: str
    body: _AskedBody


@dataclass(frozen=True, slots=True)
class _Asked:
    """
    The rows of a shard, in order.

    :param ids: their custom ids.
    :param models: the model that each row names; empty if the whole batch has one model.
    """

    ids: list[str]
    models: list[str | None]

    @classmethod
    def read(cls, shard: Source, *, with_models: bool) -> _Asked:
        asked = cls([], [])
        if not with_models:
            asked.ids.extend(iter_custom_ids(shard))
            return asked
        add_id, add_model = asked.ids.append, asked.models.append
        for row in iter_rows(shard, _AskedLine):
            add_id(row.custom_id)
            model = row.body.model
            add_model(model and intern(model))
        return asked


@dataclass(frozen=True, slots=True)
class BatchFiles:
    """
    The result files of one batch, downloaded.

    :param output: answers; ``None`` if the batch has no such file.
    :param errors: failures; ``None`` if the batch has no such file.
    :param round: 0 for the first attempt of the rows, 1 for the first retry and so on.
    :param shared: whether the batch also holds rows of other shards (a retry does), which are not foreign then.
    :param batch_id: for messages.
    :param short: whether the files lack results that are paid for: a row that the batch has no result of is not sent
        again then.
    :param answered: rows that the batch counts as answered. If its output has results of fewer rows, whatever its
        number of lines, it is ``short``; not for a ``shared`` batch, of which one merge sees some rows only.
    :param spoilt: why the files cannot be had or read at all; the same holds for the batch's rows then.
    :param unsent: why the rows were not sent; they are not sent again then.
    :param requests: the request file of a ``shared`` batch, which says what the batch's rows are. Without it they may
        be any.
    :param cached: whether these are answers of earlier jobs, which are not billed again.
    :param billed: whether its tokens count as billed; not if they are counted elsewhere.
    :param wanted: whether its rows were to be sent whatever earlier results say: one that has no result here or later
        is worth another attempt, even if an earlier one failed for good.
    :param live: whether its rows were asked one by one: each of its lines is billed, at the price for that.
    """

    output: Path | None
    errors: Path | None
    round: int = 0
    shared: bool = False
    batch_id: str | None = None
    short: bool = False
    answered: int = 0
    spoilt: str | None = None
    unsent: str | None = None
    requests: Source | None = None
    cached: bool = False
    billed: bool = True
    wanted: bool = False
    live: bool = False


@dataclass(frozen=True, slots=True)
class SpoiltBatch:
    """
    A batch some or all of whose results cannot be read.

    :param batch_id: as in :class:`BatchFiles`.
    :param reason: what cannot be read, and why.
    :param rows: rows that are not ok and whose result may be among the unreadable ones; 0 if every row has a result.
    """

    batch_id: str | None
    reason: str
    rows: int


@dataclass(frozen=True, slots=True)
class Unjudged:
    """
    Rows whose answers could not be judged.

    :param custom_id: the first of them.
    :param reason: why it could not be judged.
    :param rows: how many there are.
    """

    custom_id: str
    reason: str
    rows: int = 1

    def after(self, earlier: Unjudged | None) -> Unjudged:
        """Return earlier rows and these."""
        return self if earlier is None else replace(earlier, rows=earlier.rows + self.rows)


@dataclass(frozen=True, slots=True)
class MergedShard:
    """
    The outcomes of the rows of one shard.

    :param tally: the figures.
    :param retry: a byte per row for ``select_rows``, 1 if the row is worth another attempt.
    :param fresh: a byte per row, 1 if the row is ok by an answer of this job's own, so not a cached one.
    :param asked_live: a byte per row: in how many rounds it was asked by itself, up to 255.
    :param spoilt: the batches that could not be read completely. Everything readable is in the results.
    :param unjudged: the rows whose answers could not be judged. They are in the results, as invalid.
    """

    tally: ModelTally
    retry: bytearray
    fresh: bytearray
    asked_live: bytearray
    spoilt: tuple[SpoiltBatch, ...] = ()
    unjudged: Unjudged | None = None


@dataclass(frozen=True, slots=True)
class MergedBatch:
    """
    The outcomes of the rows of one batch.

    :param tally: the figures.
    :param spoilt: set if the batch could not be read completely. Everything readable is in the results.
    """

    tally: ModelTally
    spoilt: SpoiltBatch | None = None


def merge_shard(
    shard: Source,
    batches: Sequence[BatchFiles],
    results: ByteWriter | None = None,
    errors: ByteWriter | None = None,
    *,
    model: str | None = None,
    strict: bool = True,
    judge: Judge | None = None,
    invalid_rows: InvalidLines | None = None,
) -> MergedShard:
    """
    Judge every row of a shard and write its result line, in the order of the shard.

    A result that is ok takes precedence over an answer that is invalid, and that over any other; then a later round
    over an earlier one, then within one batch the first line, with the output file before the error file. The service's
    lines are written unchanged, but for a field ``invalid`` with the reason at the end of an answer that the judge does
    not accept; a row without any gets a line with the error code ``missing``. JSON that is not a result of any row
    counts as foreign.

    :param shard: the request file.
    :param batches: the batches that may contain its rows, earliest round first, all of one model.
    :param results: gets one line per row; ``None`` to only judge.
    :param errors: gets the lines of the rows that are not ok.
    :param model: the model of the whole batch; without it, the one that each row names.
    :param strict: whether a line that cannot be read is an error. Otherwise it costs one unknown row, which is missing.
        Rows of its batch without a result are then not sent again, since the line may be the paid answer to any of
        them.
    :param judge: what answers must satisfy; an invalid one is worth another attempt.
    :param invalid_rows: the lines of the input's invalid rows, which are written between those of the rows.
    :raises IncompleteResultsError: the shard is damaged; or, if ``strict``, a result line is not JSON or too long.
    """
    asked = _Asked.read(shard, with_models=model is None)
    tally = ModelTally(rows=len(asked.ids))
    index = _Index(tally, asked.ids, held=_HELD_BYTES if results is not None or errors is not None else 0)
    for batch in batches:
        index.read(batch, strict=strict, judge=judge)
    unaccounted, wanted = index.unaccounted(), index.wanted()
    retry, fresh = bytearray(len(asked.ids)), bytearray(len(asked.ids))
    # The answers of earlier jobs belong to no round of this one.
    rounds = [None if batch.cached else batch.round for batch in batches]
    unjudged: Unjudged | None = None
    for position, verdict in enumerate(index.verdicts):
        if verdict is None:
            _count_missing(unaccounted.get(position) or _NO_RESULT, 1, tally)
            worth_it = worth_retrying(Outcome.MISSING)
        else:
            number = rounds[verdict.batch]
            worth_it = (
                _count_row(verdict, model or asked.models[position], number, tally) or position in wanted
            )
            tally.live += verdict.outcome is Outcome.OK and batches[verdict.batch].live
            fresh[position] = verdict.outcome is Outcome.OK and number is not None
            if verdict.unjudged:
                unjudged = Unjudged(verdict.custom_id, verdict.message or "").after(unjudged)
        retry[position] = worth_it and position not in unaccounted
    if results is not None or errors is not None:
        _copy(index, results, errors, unaccounted, invalid_rows)
    return MergedShard(tally, retry, fresh, index.asked_live(), index.spoilt(), unjudged)


def merge_batch(
    batch: BatchFiles, results: ByteWriter, errors: ByteWriter, *, rows: int, strict: bool = True
) -> MergedBatch:
    """
    Judge every row of a batch without its request file and write its result line, in the service's order.

    As in :func:`merge_shard`, a row gets one line: the first that is ok, or else its first. JSON that is not a result
    of any row is not written, and counts as foreign.

    :param batch: the downloaded files.
    :param results: gets one line per row.
    :param errors: gets the lines of the rows that are not ok.
    :param rows: rows that the batch itself counts; those without a line are missing.
    :param strict: whether a line that cannot be read is an error; otherwise its row is missing.
    :raises IncompleteResultsError: the files have results of more rows than a batch can have; or, if ``strict``, a line
        is not JSON or too long.
    """
    tally = ModelTally()
    index = _Index(tally, held=_HELD_BYTES)
    index.read(batch, strict=strict)
    for verdict in index.verdicts:
        if verdict is not None:
            _count_row(verdict, None, batch.round, tally)
    tally.rows = max(rows, len(index.verdicts))
    missing = tally.rows - len(index.verdicts)
    spoilt = next((replace(each, rows=missing) for each in index.spoilt()), None)
    _count_missing(_no_result(spoilt.reason) if spoilt else _NO_RESULT, missing, tally)
    _copy(index, results, errors, {})
    return MergedBatch(tally, spoilt)


class _Index:
    """
    The deciding verdict of each row, with the position of its line.

    :param tally: gets the figures that are known while reading: billed tokens, duplicates and foreign lines.
    :param ids: custom ids of the rows, in order; ``None`` to add rows in the order of the lines.
    :param held: most bytes of result lines that are kept in memory.
    """

    def __init__(self, tally: ModelTally, ids: list[str] | None = None, *, held: int) -> None:
        self.ids = ids if ids is not None else []
        self.verdicts: list[Verdict | None] = [None] * len(self.ids)
        self.files: list[Path] = []
        self._positions = {custom_id: position for position, custom_id in enumerate(self.ids)}
        self._position_of = self._positions.get if ids is not None else self._add_row
        self._tally = tally
        self._budget = held
        self._batches: list[_ReadBatch] = []

    def _add_row(self, custom_id: str) -> int:
        # The custom id comes from the service, so it may be anything.
        if len(custom_id) > _LONGEST_ID:
            custom_id = hashlib.sha256(custom_id.encode("utf-8", "surrogatepass")).hexdigest()
        position = self._positions.setdefault(custom_id, len(self.ids))
        if position == len(self.ids):
            if position == _MOST_ROWS:
                raise IncompleteResultsError(
                    f"{self.files[-1].name} has results of more than {_MOST_ROWS} rows; a batch has at most "
                    f"{MAX_ROWS}",
                    retryable=False,
                )
            self.ids.append(custom_id)
            self.verdicts.append(None)
            self._batches[-1].has_result.append(0)
        return position

    def read(self, batch: BatchFiles, *, strict: bool, judge: Judge | None = None) -> None:
        """Read the files of the next batch."""
        read = _ReadBatch(batch, bytearray(len(self.ids)))
        self._batches.append(read)
        if batch.spoilt is not None:
            read.add_problem(batch.spoilt)
        if batch.output is not None:
            self._read_file(batch.output, read, strict=strict, judge=judge)
        read.short = batch.short or (not batch.shared and sum(read.has_result) < batch.answered)
        if batch.errors is not None:
            self._read_file(batch.errors, read, strict=strict, judge=judge)

    def _read_file(self, path: Path, read: _ReadBatch, *, strict: bool, judge: Judge | None) -> None:
        tally, verdicts, position_of, budget = self._tally, self.verdicts, self._position_of, self._budget
        ids, has_result, batch = self.ids, read.has_result, read.files
        number, file = len(self._batches) - 1, len(self.files)
        self.files.append(path)
        duplicates = prompt = completion = reasoning = total = cached = 0
        twice = Usage()
        with path.open("rb") as stream:
            lines = read_lines(
                LineReader(stream),
                read_verdict if judge is None else partial(read_verdict, judge=judge),
                name=path.name,
                batch_id=batch.batch_id,
                on_unreadable=None if strict else read.add_problem,
            )
            for _, offset, line, verdict in lines:
                if verdict is None:
                    tally.foreign += not batch.shared
                    continue
                position = position_of(verdict.custom_id)
                if position is None:
                    tally.foreign += not batch.shared
                    continue
                has_result[position] = 1
                before = verdicts[position]
                if before is not None and before.batch == number:
                    duplicates += 1
                    if batch.live:
                        # The row was asked twice.
                        if before.rank >= verdict.rank:
                            verdict.add_usage_to(twice)
                            continue
                    elif before.rank >= verdict.rank:
                        continue
                    else:
                        # It replaces a line that was already counted.
                        prompt -= before.prompt
                        completion -= before.completion
                        reasoning -= before.reasoning
                        total -= before.total
                        cached -= before.cached
                prompt += verdict.prompt
                completion += verdict.completion
                reasoning += verdict.reasoning
                total += verdict.total
                cached += verdict.cached
                if before is not None and before.rank > verdict.rank:
                    if verdict.outcome is Outcome.ERROR:
                        # The answer is kept, but the last attempt says whether another one makes sense.
                        before.transient &= verdict.transient
                        before.out_of_balance |= verdict.out_of_balance
                else:
                    # Thousands of verdicts are kept; their equal texts need no copies.
                    verdict.custom_id = ids[position]
                    verdict.batch = number
                    verdict.file = file
                    verdict.offset = offset
                    verdict.length = len(line)
                    if budget > len(line):
                        budget -= len(line)
                        verdict.line = line
                    verdicts[position] = verdict
        self._budget = budget
        if batch.billed and not batch.cached:
            used = Usage(prompt, completion, reasoning, total, cached)
            used.add(twice)
            tally.billed.add(used)
            if batch.live:
                tally.billed_live.add(used)
        if duplicates:
            tally.duplicates += duplicates
            if batch.live:
                log.warning(
                    "%d answers to rows that were asked live twice are left out; they are billed", duplicates
                )
            else:
                log.warning(
                    "Batch %s: %d lines of %s were left out, since the batch already has results for their rows",
                    batch.batch_id or "",
                    duplicates,
                    path.name,
                )

    def spoilt(self) -> tuple[SpoiltBatch, ...]:
        """Return the batches that could not be read completely."""
        return tuple(
            SpoiltBatch(read.files.batch_id, read.reason, sum(map(self._is_lost, self._without_result(read))))
            for read in self._batches
            if read.problems
        )

    def unaccounted(self) -> dict[int, str | None]:
        """
        Return the rows that may be paid for although no result of them can be read.

        :return: by position, the message for the row if it has no result at all; ``None`` for the default message.
        """
        found: dict[int, str | None] = {}
        for read in self._batches:
            if read.problems or read.short or read.files.unsent:
                said = _no_result(read.reason) if read.problems else read.files.unsent
                for position in self._without_result(read):
                    found[position] = found.get(position) or said
        return found

    def wanted(self) -> set[int]:
        """Return the rows without an accepted answer that were to be sent again, and have no result since."""
        return {
            position
            for number, read in enumerate(self._batches)
            if read.files.wanted
            for position in self._without_result(read)
            if self._is_lost(position)
            and not any(later.has_result[position] for later in self._batches[number + 1 :])
        }

    def asked_live(self) -> bytearray:
        """Return for each row in how many batches of rows that were asked by themselves it is."""
        counts = bytearray(len(self.ids))
        for read in self._batches:
            if read.files.live:
                for position in self._rows_of(read):
                    counts[position] = min(counts[position] + 1, 255)
        return counts

    def _rows_of(self, read: _ReadBatch) -> Iterator[int]:
        """Return the positions of a batch's rows."""
        rows: Iterable[int | None] = range(len(self.ids))
        if read.files.requests is not None:
            rows = map(self._positions.get, iter_custom_ids(read.files.requests))
        return (position for position in rows if position is not None)

    def _without_result(self, read: _ReadBatch) -> Iterator[int]:
        """Return the positions of a batch's rows that have no result in it."""
        return (position for position in self._rows_of(read) if not read.has_result[position])

    def _is_lost(self, position: int) -> bool:
        verdict = self.verdicts[position]
        return verdict is None or verdict.outcome is not Outcome.OK


@dataclass(slots=True)
class _ReadBatch:
    """
    A batch while it is read.

    :param has_result: a byte per row, 1 if the batch has a result of it.
    :param short: whether its output lacks results of rows that it counts as answered.
    :param problems: lines that cannot be read, and whatever else is wrong.
    :param first_problem: the first of them.
    """

    files: BatchFiles
    has_result: bytearray
    short: bool = False
    problems: int = 0
    first_problem: str = ""

    def add_problem(self, problem: str) -> None:
        self.problems += 1
        self.first_problem = self.first_problem or problem

    @property
    def reason(self) -> str:
        more = f", and {self.problems - 1} more lines cannot be read" if self.problems > 1 else ""
        return f"{self.first_problem}{more}"


def _count_row(verdict: Verdict, model: str | None, round: int | None, tally: ModelTally) -> bool:
    """
    Count the outcome of one row.

    :param verdict: the verdict on its result line.
    :param model: the requested model, if known.
    :param round: the round of the verdict; ``None`` if the answer is cached.
    :param tally: gets the figures, except ``rows`` and ``billed``.
    :return: whether the row is worth another attempt.
    """
    verdict.add_usage_to(tally.usage)
    answered_by = verdict.model
    if model != answered_by and model and answered_by and model.lower() != answered_by.lower():
        tally.mismatches += 1
    if verdict.outcome is Outcome.OK:
        tally.ok += 1
        if round is None:
            tally.cached += 1
            verdict.add_usage_to(tally.saved)
        else:
            tally.ok_in_round[round] = tally.ok_in_round.get(round, 0) + 1
        reason = verdict.finish_reason
        if reason is not None:
            reasons = tally.finish_reasons
            # Not a method call, since this runs for every row.
            if reason in reasons:
                reasons[reason] += 1
            else:
                tally.add_finish_reason(reason)
            if reason == "length":
                tally.truncated += 1
        if verdict.empty:
            tally.empty += 1
        if not verdict.metered:
            tally.without_usage += 1
        return False
    if verdict.outcome is Outcome.INVALID:
        tally.invalid += 1
        tally.add_invalid_reason(verdict.message or "")
        tally.without_usage += not verdict.metered
    elif verdict.outcome is Outcome.EXPIRED:
        tally.expired += 1
    elif verdict.outcome is Outcome.MISSING:
        tally.missing += 1
    else:
        tally.error += 1
    tally.add_message(verdict.message or f"({verdict.outcome} without a message)")
    tally.balance_errors += verdict.out_of_balance
    return verdict.transient


def _count_missing(said: str, rows: int, tally: ModelTally) -> None:
    """Count rows without any result line."""
    if rows:
        tally.missing += rows
        tally.add_message(said, rows)


def _copy(
    index: _Index,
    results: ByteWriter | None,
    errors: ByteWriter | None,
    unaccounted: Mapping[int, str | None],
    invalid: InvalidLines | None = None,
) -> None:
    with ExitStack() as opened:
        descriptors = [opened.enter_context(path.open("rb")).fileno() for path in index.files]
        to_results = _LineBlock(results)
        to_errors = _LineBlock(errors)
        for position, verdict in enumerate(index.verdicts):
            for line in invalid.before_next() if invalid is not None else ():
                to_results.add(line)
                to_errors.add(line)
            if verdict is None:
                line = _missing_line(index.ids[position], unaccounted.get(position) or _NO_RESULT)
            elif verdict.line is not None:
                line = verdict.line
            else:
                line = os.pread(descriptors[verdict.file], verdict.length, verdict.offset)
                if len(line) != verdict.length:
                    raise IncompleteResultsError(
                        f"{index.files[verdict.file].name} was cut off while it was read"
                    )
            if verdict is not None and verdict.outcome is Outcome.INVALID:
                line = _marked(line, verdict.message or "")
            to_results.add(line)
            if verdict is None or verdict.outcome is not Outcome.OK:
                to_errors.add(line)
        to_results.flush()
        to_errors.flush()


class _LineBlock:
    """
    Collects lines before they are written, since every write has a fixed cost.

    :param stream: gets the lines, each with a newline; ``None`` to drop them.
    """

    def __init__(self, stream: ByteWriter | None) -> None:
        self._stream = stream
        self._lines: list[bytes] = []
        self._bytes = 0

    def add(self, line: bytes) -> None:
        """Add a line, without its newline."""
        self._lines.append(line)
        self._bytes += len(line)
        if self._bytes >= _BLOCK_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the collected lines."""
        if self._stream is not None and self._lines:
            self._lines.append(b"")
            self._stream.write(b"\n".join(self._lines))
        self._lines = []
        self._bytes = 0


def unmarked(line: bytes) -> bytes:
    """Return the line of an invalid answer as the service sent it; any other line unchanged."""
    head, found, reason = line.rpartition(b',"invalid":')
    if not found:
        return line
    try:
        msgspec.json.decode(reason.rstrip().removesuffix(b"}"), type=str)
    except (msgspec.DecodeError, ValueError):
        return line
    return head + b"}"


def _marked(line: bytes, reason: str) -> bytes:
    """Return the line of an answer that is invalid, with the reason; what the service sent is not touched."""
    return b'%b,"invalid":%b}' % (line.rstrip().removesuffix(b"}"), to_json(reason))


def _error_line(custom_id: str, code: str, message: str) -> bytes:
    error = {"code": code, "message": message}
    return msgspec.json.encode({"id": None, "custom_id": custom_id, "response": None, "error": error})


def _missing_line(custom_id: str, said: str) -> bytes:
    return _error_line(custom_id, Outcome.MISSING.value, said)


def refused_lines(shard: Source, *, status: int, message: str) -> Iterator[bytes]:
    """
    Yield error lines for the rows of a shard whose batch the service refused.

    :param status: HTTP status of the refusal, the error code of the lines.
    :param message: the service's message.
    """
    message = brief(message)
    for custom_id in iter_custom_ids(shard):
        yield _error_line(custom_id, str(status), message) + b"\n"
