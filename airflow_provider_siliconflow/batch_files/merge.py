"""What became of every row: the service's result lines, put into the order of the input.

One shard is merged at a time. Its result files are read once, front to back, noting where the line of each row
stands; then the lines are copied, byte for byte, in the order of the shard. What is held in memory does not grow
with the number of shards, nor with the length of the answers.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from sys import intern
from typing import Any

import msgspec

from airflow_provider_siliconflow.api.exceptions import IncompleteResultsError
from airflow_provider_siliconflow.api.models import Outcome
from airflow_provider_siliconflow.api.sources import Source
from airflow_provider_siliconflow.batch_files.lines import ByteWriter, LineReader
from airflow_provider_siliconflow.batch_files.result_lines import read_lines
from airflow_provider_siliconflow.batch_files.rules import MAX_ROWS
from airflow_provider_siliconflow.batch_files.shards import iter_custom_ids
from airflow_provider_siliconflow.batch_files.tally import ModelTally, Usage
from airflow_provider_siliconflow.batch_files.verdicts import (
    Verdict,
    is_balance_error,
    read_verdict,
    worth_retrying,
)

log = logging.getLogger(__name__)

#: Bytes of result lines of one shard kept from the reading to the writing; what exceeds them is read again.
_HELD_BYTES = 1 << 19
_BLOCK_BYTES = 1 << 16

#: Rows of a batch whose request file is not at hand, and characters of a custom id of theirs, that are kept.
_MOST_ROWS = 20 * MAX_ROWS
_LONGEST_ID = 256

_MISSING_ERROR = {"code": Outcome.MISSING.value, "message": "the service returned no result for this row"}


class _AskedBody(msgspec.Struct, gc=False):
    model: str | None = None


class _AskedLine(msgspec.Struct, gc=False):
    custom_id: str
    body: _AskedBody


class _AskedId(msgspec.Struct, gc=False):
    custom_id: str


@dataclass(frozen=True, slots=True)
class _Asked:
    """
    The rows of a shard, in order.

    :param ids: their custom ids.
    :param models: the model that each row names; empty where one is asked of the whole batch.
    """

    ids: list[str]
    models: list[str | None]

    @classmethod
    def read(cls, shard: Source, *, with_models: bool) -> _Asked:
        asked = cls([], [])
        add_id, add_model = asked.ids.append, asked.models.append
        kind: type[Any] = _AskedLine if with_models else _AskedId
        decode: Callable[[bytes], Any] = msgspec.json.Decoder(kind).decode
        with shard.open("rb") as stream:
            for line in LineReader(stream):
                # A shard's lines were checked when it was written.
                row = decode(line or b"")
                add_id(row.custom_id)
                if with_models:
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
    :param short: whether answers that were paid for are lacking: a row without a result is not sent again then.
    """

    output: Path | None
    errors: Path | None
    round: int = 0
    shared: bool = False
    batch_id: str | None = None
    short: bool = False


@dataclass(frozen=True, slots=True)
class MergedShard:
    """
    What became of the rows of one shard.

    :param tally: the figures.
    :param retry: a byte per row, 1 if another attempt is worth it; fit for ``select_rows``.
    """

    tally: ModelTally
    retry: bytearray


def merge_shard(
    shard: Source,
    batches: Sequence[BatchFiles],
    results: ByteWriter | None = None,
    errors: ByteWriter | None = None,
    *,
    model: str | None = None,
) -> MergedShard:
    """
    Judge every row of a shard and write its result line, in the order of the shard.

    An answer that is ok wins over one that is not, a later round over an earlier one, and within one batch the
    first line, those of the output file before those of the error file. The service's lines are written as they
    are; for a row without any, a line with the error code ``missing`` is made. JSON that is no result of any row
    counts as foreign.

    :param shard: the request file.
    :param batches: the batches that may hold its rows, earliest round first, all of one model.
    :param results: takes one line per row; ``None`` to judge only.
    :param errors: takes the lines of the rows that are not ok.
    :param model: the model asked of the whole batch; without it the one that each row names.
    :raises IncompleteResultsError: a result file holds a line that is not JSON or too long.
    """
    asked = _Asked.read(shard, with_models=model is None)
    tally = ModelTally(rows=len(asked.ids))
    index = _Index(tally, asked.ids, held=_HELD_BYTES if results is not None or errors is not None else 0)
    for number, batch in enumerate(batches):
        index.read(batch, number)
    retry = bytearray(len(asked.ids))
    rounds = [batch.round for batch in batches]
    for position, verdict in enumerate(index.verdicts):
        wanted = model or asked.models[position]
        if count_row(verdict, wanted, rounds[verdict.batch] if verdict is not None else 0, tally):
            retry[position] = not (verdict is None and any(batch.short for batch in batches))
    if results is not None or errors is not None:
        _copy(index, results, errors)
    return MergedShard(tally, retry)


def merge_batch(batch: BatchFiles, results: ByteWriter, errors: ByteWriter, *, rows: int) -> ModelTally:
    """
    Judge every row of a batch whose request file is not at hand and write its result line, in the service's order.

    As in :func:`merge_shard` a row gets one line: the first that is ok, else its first. JSON that is no result of
    any row is not written, and counts as foreign.

    :param batch: the downloaded files.
    :param results: takes one line per row.
    :param errors: takes the lines of the rows that are not ok.
    :param rows: rows that the batch itself counts; those without a line are missing.
    :raises IncompleteResultsError: a result file holds a line that is not JSON or too long, or results of more rows
        than any batch has.
    """
    tally = ModelTally()
    index = _Index(tally, held=_HELD_BYTES)
    index.read(batch, 0)
    for verdict in index.verdicts:
        count_row(verdict, None, batch.round, tally)
    tally.rows = max(rows, len(index.verdicts))
    count_missing(tally.rows - len(index.verdicts), tally)
    _copy(index, results, errors)
    return tally


class _Index:
    """
    The verdict that holds for each row, and where its line stands.

    :param tally: takes what is known while reading: what was billed, duplicates and foreign lines.
    :param ids: custom ids of the rows, in order; ``None`` to take the rows as they come.
    :param held: bytes of result lines that may be kept in memory.
    """

    def __init__(self, tally: ModelTally, ids: list[str] | None = None, *, held: int) -> None:
        self.ids = ids if ids is not None else []
        self.verdicts: list[Verdict | None] = [None] * len(self.ids)
        self.files: list[Path] = []
        self._positions = {custom_id: position for position, custom_id in enumerate(self.ids)}
        self._position_of = self._positions.get if ids is not None else self._add_row
        self._tally = tally
        self._budget = held

    def _add_row(self, custom_id: str) -> int:
        # The service names the row, and may say anything.
        if len(custom_id) > _LONGEST_ID:
            custom_id = hashlib.sha256(custom_id.encode("utf-8", "surrogatepass")).hexdigest()
        position = self._positions.setdefault(custom_id, len(self.ids))
        if position == len(self.ids):
            if position == _MOST_ROWS:
                raise IncompleteResultsError(
                    f"{self.files[-1].name} holds results of more than {_MOST_ROWS} rows; a batch has at most "
                    f"{MAX_ROWS}",
                    retryable=False,
                )
            self.ids.append(custom_id)
            self.verdicts.append(None)
        return position

    def read(self, batch: BatchFiles, number: int) -> None:
        """Take in the files of the batch that is the ``number``-th."""
        for path in (batch.output, batch.errors):
            if path is not None:
                self._read_file(path, batch, number)

    def _read_file(self, path: Path, batch: BatchFiles, number: int) -> None:
        tally, verdicts, position_of, budget = self._tally, self.verdicts, self._position_of, self._budget
        ids = self.ids
        file = len(self.files)
        self.files.append(path)
        duplicates = prompt = completion = reasoning = total = 0
        with path.open("rb") as stream:
            lines = read_lines(LineReader(stream), read_verdict, name=path.name, batch_id=batch.batch_id)
            for _, offset, line, verdict in lines:
                if verdict is None:
                    tally.foreign += not batch.shared
                    continue
                position = position_of(verdict.custom_id)
                if position is None:
                    tally.foreign += not batch.shared
                    continue
                before = verdicts[position]
                if before is not None and before.batch == number:
                    duplicates += 1
                    if before.outcome is Outcome.OK or verdict.outcome is not Outcome.OK:
                        continue
                    # It takes the place of a line that was counted.
                    prompt -= before.prompt
                    completion -= before.completion
                    reasoning -= before.reasoning
                    total -= before.total
                prompt += verdict.prompt
                completion += verdict.completion
                reasoning += verdict.reasoning
                total += verdict.total
                if before is None or before.outcome is not Outcome.OK or verdict.outcome is Outcome.OK:
                    # Thousands of them are kept, and need no copies of what they share.
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
        tally.billed.add(Usage(prompt, completion, reasoning, total))
        if duplicates:
            tally.duplicates += duplicates
            log.warning(
                "Batch %s: %d lines of %s were left out, as the batch has a result for their rows already",
                batch.batch_id or "",
                duplicates,
                path.name,
            )


def count_row(verdict: Verdict | None, model: str | None, round: int, tally: ModelTally) -> bool:
    """
    Count what became of one row.

    :param verdict: of its result line; ``None`` for a row without any.
    :param model: the model asked, where it is known.
    :param round: the round that brought the verdict.
    :param tally: takes the figures, but for ``rows`` and ``billed``.
    :return: whether the row is worth another attempt.
    """
    if verdict is None:
        count_missing(1, tally)
        return worth_retrying(Outcome.MISSING)
    verdict.add_usage_to(tally.usage)
    answered_by = verdict.model
    if model != answered_by and model and answered_by and model.lower() != answered_by.lower():
        tally.mismatches += 1
    if verdict.outcome is Outcome.OK:
        tally.ok += 1
        tally.ok_in_round[round] = tally.ok_in_round.get(round, 0) + 1
        reason = verdict.finish_reason
        if reason is not None:
            tally.finish_reasons[reason] = tally.finish_reasons.get(reason, 0) + 1
            if reason == "length":
                tally.truncated += 1
        if verdict.empty:
            tally.empty += 1
        return False
    if verdict.outcome is Outcome.EXPIRED:
        tally.expired += 1
    elif verdict.outcome is Outcome.MISSING:
        tally.missing += 1
    else:
        tally.error += 1
    tally.add_message(verdict.message or f"({verdict.outcome} without a message)")
    code, message, status = verdict.code, verdict.message, verdict.status
    tally.balance_errors += is_balance_error(code=code, message=message, status=status)
    return worth_retrying(verdict.outcome, code=code, message=message, status=status)


def count_missing(rows: int, tally: ModelTally) -> None:
    """Count rows without any result line."""
    if rows:
        tally.missing += rows
        tally.add_message(_MISSING_ERROR["message"], rows)


def _copy(index: _Index, results: ByteWriter | None, errors: ByteWriter | None) -> None:
    with ExitStack() as opened:
        descriptors = [opened.enter_context(path.open("rb")).fileno() for path in index.files]
        to_results = _LineBlock(results)
        to_errors = _LineBlock(errors)
        for custom_id, verdict in zip(index.ids, index.verdicts, strict=True):
            if verdict is None:
                line = _missing_line(custom_id)
            elif verdict.line is not None:
                line = verdict.line
            else:
                line = os.pread(descriptors[verdict.file], verdict.length, verdict.offset)
                if len(line) != verdict.length:
                    raise IncompleteResultsError(
                        f"{index.files[verdict.file].name} was cut while it was read"
                    )
            to_results.add(line)
            if verdict is None or verdict.outcome is not Outcome.OK:
                to_errors.add(line)
        to_results.flush()
        to_errors.flush()


class _LineBlock:
    """
    Gathers lines before they are written, as writing costs by the call.

    :param stream: takes the lines, each with a newline; ``None`` to drop them.
    """

    def __init__(self, stream: ByteWriter | None) -> None:
        self._stream = stream
        self._lines: list[bytes] = []
        self._bytes = 0

    def add(self, line: bytes) -> None:
        """Take a line, without its newline."""
        self._lines.append(line)
        self._bytes += len(line)
        if self._bytes >= _BLOCK_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was gathered."""
        if self._stream is not None and self._lines:
            self._lines.append(b"")
            self._stream.write(b"\n".join(self._lines))
        self._lines = []
        self._bytes = 0


def _missing_line(custom_id: str) -> bytes:
    return msgspec.json.encode(
        {"id": None, "custom_id": custom_id, "response": None, "error": _MISSING_ERROR}
    )


def refused_lines(shard: Source, *, status: int, message: str) -> Iterator[bytes]:
    """
    Make error lines for the rows of a shard whose batch the service did not take.

    :param status: HTTP status of the refusal, the lines' error code.
    :param message: what the service said.
    """
    error = {"code": str(status), "message": message}
    for custom_id in iter_custom_ids(shard):
        yield (
            msgspec.json.encode({"id": None, "custom_id": custom_id, "response": None, "error": error})
            + b"\n"
        )
