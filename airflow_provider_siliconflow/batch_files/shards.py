"""Splitting any number of rows into shards: request files that each fit into one batch."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import msgspec

from airflow_provider_siliconflow.api.exceptions import IncompleteResultsError, InvalidInputError, NoRowsError
from airflow_provider_siliconflow.api.sources import Source
from airflow_provider_siliconflow.batch_files.atomic_files import (
    create_file,
    make_folder,
    open_own,
    sync,
    temporary_folder,
)
from airflow_provider_siliconflow.batch_files.bodies import raw_parameters, with_defaults
from airflow_provider_siliconflow.batch_files.cost_bounds import Tariff, UnboundedRowError
from airflow_provider_siliconflow.batch_files.custom_ids import CustomIdSet, LineId
from airflow_provider_siliconflow.batch_files.duplicates import Duplicates
from airflow_provider_siliconflow.batch_files.invalid_rows import ReportedProblems
from airflow_provider_siliconflow.batch_files.lines import ByteWriter, Directory, LineReader
from airflow_provider_siliconflow.batch_files.reader import RequestRow, read_rows
from airflow_provider_siliconflow.batch_files.rules import MAX_BYTES, MAX_ROWS, Problems

#: Bytes of lines that are collected before they are hashed and written, since every call has a fixed cost.
_BLOCK_BYTES = 1 << 16

#: Lines that are passed to the writer at a time, for the same reason.
_LINES_AT_ONCE = 64

#: Most shards of a valid plan: 5,000,000,000 rows.
_MOST_SHARDS = 1_000_000

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Shard:
    """
    One request file.

    :param index: position among the shards written together, from 0.
    :param first_row: position of its first row among the rows written together, from 0.
    :param rows: number of request lines.
    :param bytes: size of the file.
    :param sha256: hex digest of the file's bytes.
    :param name: file name in the folder it was written to.
    :param sources: for a shard of selected rows, the indexes of the shards they were selected from.
    """

    index: int
    first_row: int
    rows: int
    bytes: int
    sha256: str
    name: str
    sources: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the shard as JSON types."""
        return {**asdict(self), "sources": list(self.sources)}

    @classmethod
    def from_dict(cls, data: Any) -> Shard:
        """
        Return the shard that :meth:`to_dict` encoded.

        :raises InvalidInputError: the data is not an encoded shard.
        """
        shard = _converted(cls, data)
        for problem, found in (
            ("index", not 0 <= shard.index < _MOST_SHARDS),
            ("name", shard.name != shard_name(shard.index)),
            ("first_row", shard.first_row < 0),
            ("rows", not 0 < shard.rows <= MAX_ROWS),
            # A request and its newline take at least two bytes.
            ("bytes", not 2 * shard.rows <= shard.bytes <= MAX_BYTES),
            ("sha256", not _SHA256.fullmatch(shard.sha256)),
            ("sources", any(not 0 <= source < _MOST_SHARDS for source in shard.sources)),
        ):
            if found:
                raise InvalidInputError(
                    f"the plan has a shard whose {problem} is {getattr(shard, problem)!r:.80}"
                )
        return shard


@dataclass(frozen=True, slots=True)
class Split:
    """
    The shards of an input, with its figures.

    :param shards: in the order of the rows.
    :param rows: number of rows.
    :param bytes: size of all shards.
    :param models: every ``body.model`` that the rows name, sorted.
    :param rows_without_model: rows that name no model.
    :param prompt_tokens: an estimate: a quarter per ASCII character of the messages, one per other character.
    :param invalid: rows that are reported as invalid, beside ``rows``.
    :param invalid_sha256: hex digest of the file of these rows; empty if there are none.
    """

    shards: tuple[Shard, ...]
    rows: int
    bytes: int
    models: tuple[str, ...]
    rows_without_model: int
    prompt_tokens: int
    invalid: int = 0
    invalid_sha256: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the split as JSON types."""
        shards = [shard.to_dict() for shard in self.shards]
        return {**asdict(self), "shards": shards, "models": list(self.models)}

    @classmethod
    def from_dict(cls, data: Any) -> Split:
        """
        Return the split that :meth:`to_dict` encoded.

        :raises InvalidInputError: the data is not an encoded split, or its figures do not add up.
        """
        shards = data.get("shards") if isinstance(data, Mapping) else None
        if not isinstance(shards, list) or not 0 < len(shards) <= _MOST_SHARDS:
            raise InvalidInputError("the plan names no shards, or too many")
        found = tuple(map(Shard.from_dict, shards))
        split = replace(_converted(cls, {**data, "shards": []}), shards=found)
        first_row = 0
        for index, shard in enumerate(found):
            if (shard.index, shard.first_row) != (index, first_row):
                raise InvalidInputError(f"the plan has shard {shard.index} out of order")
            first_row += shard.rows
        sums = (first_row, sum(shard.bytes for shard in found))
        fits = 0 <= split.rows_without_model <= split.rows and 0 <= split.prompt_tokens <= split.bytes
        fits = fits and split.invalid >= 0
        if (split.rows, split.bytes) != sums or not fits:
            raise InvalidInputError("the plan has figures that do not match those of its shards")
        return split


T = TypeVar("T")


def _converted(kind: type[T], data: Any) -> T:
    try:
        return msgspec.convert(data, kind)
    except (msgspec.ValidationError, RecursionError) as exc:
        raise InvalidInputError(f"the plan was not written by this provider: {exc}") from None


def shard_name(index: int) -> str:
    """Return the file name of a shard by its position."""
    return f"shard-{index:05d}.jsonl"


def split_requests(
    requests: Source | Iterable[Any],
    work_dir: Directory,
    *,
    name: str,
    max_rows: int = MAX_ROWS,
    max_bytes: int = MAX_BYTES,
    defaults: Mapping[str, Any] | None = None,
    defaults_name: str = "defaults",
    instruction: str | None = None,
    report_invalid: bool = False,
    needs_model: bool = False,
    tariff: Tariff | None = None,
    rows_per_shard: Sequence[int] = (),
    reserved_bytes: int = 0,
) -> Split:
    """
    Turn rows into request lines and write them as shards, in one pass and in bounded memory.

    If this raises, ``work_dir`` may contain some shards; they are meaningless until the caller has stored the split.

    :param requests: a JSONL file or rows as Python objects, see :func:`~.reader.read_rows`.
    :param work_dir: folder for the shards; created if need be.
    :param name: how messages call ``requests``.
    :param max_rows: most rows of a shard.
    :param max_bytes: most bytes of a shard.
    :param defaults: body parameters for rows that lack them.
    :param defaults_name: the argument with these parameters, for messages.
    :param instruction: text for the model that is added to the messages of every row.
    :param report_invalid: whether to leave out invalid rows and write them to ``invalid.jsonl`` in ``work_dir``, see
        :mod:`~.invalid_rows`. Memory then grows with the number of duplicate custom ids.
    :param needs_model: whether a row without a model is invalid too, if invalid rows are reported.
    :param tariff: limits what the rows of a shard can cost; a row without such a limit is an error in any case.
    :param rows_per_shard: rows of the first shards, to split as before; the limits hold for the others.
    :param reserved_bytes: bytes by which each line may grow without its shard becoming larger than ``max_bytes``.
    :raises InvalidRequestFileError: rows are invalid, or share a ``custom_id``; with ``report_invalid``, all are. Or a
        row can cost any sum.
    :raises InvalidInputError: there are no rows, or an argument is wrong.
    """
    custom_ids = CustomIdSet()
    new_writer = partial(
        ShardWriter,
        work_dir,
        max_rows=max_rows,
        max_bytes=max_bytes,
        tariff=tariff,
        rows_per_shard=rows_per_shard,
        reserved_bytes=reserved_bytes,
    )
    max_bytes -= reserved_bytes
    unbounded = Problems(name)
    read = partial(
        read_rows,
        requests,
        defaults=defaults,
        defaults_name=defaults_name,
        instruction=instruction,
        max_bytes=max_bytes,
    )
    if not report_invalid:
        problems = Problems(name)
        with new_writer() as writer:
            rows = _bounded_rows(read(problems), tariff, writer, problems, unbounded)
            figures = _write_rows(rows, writer, custom_ids.add)
        shards = writer.shards
        if suspects := custom_ids.suspects():
            # The shards contain every row except the refused ones, which gives the line numbers of their rows.
            numbers = itertools.filterfalse(problems.lines.__contains__, itertools.count(1))
            written = itertools.chain.from_iterable(
                iter_custom_ids(work_dir / shard.name) for shard in shards
            )
            custom_ids.name_duplicates(suspects, zip(numbers, written, strict=False), problems)
        problems.raise_if_any()
    else:
        with new_writer() as writer, ReportedProblems(name, work_dir, custom_ids.add) as reported:
            rows = read(reported)
            rows = _rows_with_model(rows, reported) if needs_model else rows
            rows = _bounded_rows(rows, tariff, writer, reported, unbounded)
            figures = _write_rows(rows, writer, custom_ids.add)
        unbounded.raise_if_any()
        if suspects := custom_ids.suspects():
            with temporary_folder() as folder:
                paths = [work_dir / shard.name for shard in writer.shards]
                duplicates = Duplicates(paths, work_dir, reported, suspects, folder, max_bytes=max_bytes)
                if duplicates.found:
                    reported = ReportedProblems(name, work_dir, lambda custom_id: None)
                    weighs = writer.weighs
                    with new_writer() as writer, reported:
                        if not weighs:
                            writer.stop_weighing()
                        # Written over the shards that they are read from: see there.
                        rows = duplicates.other_rows(reported)
                        figures = _write_rows(rows, writer, lambda custom_id: None)
        shards = writer.shards
        if not shards:
            reported.fail_if_all()
        figures = replace(figures, invalid=reported.count, invalid_sha256=reported.sha256)
    unbounded.raise_if_any()
    if not shards:
        raise NoRowsError(f"{name} holds no rows; nothing was uploaded")
    return replace(
        figures,
        shards=shards,
        rows=sum(shard.rows for shard in shards),
        bytes=sum(shard.bytes for shard in shards),
    )


def _write_rows(rows: Iterable[RequestRow], writer: ShardWriter, add_id: Callable[[str], None]) -> Split:
    """Write rows, and return their figures: a split without its shards."""
    models: set[str] = set()
    without_model = prompt_tokens = 0
    lines: list[bytes] = []
    size = 0
    for row in rows:
        lines.append(row.line)
        size += len(row.line)
        if len(lines) == _LINES_AT_ONCE or size >= _BLOCK_BYTES:
            writer.extend(lines)
            lines.clear()
            size = 0
        add_id(row.custom_id)
        prompt_tokens += row.prompt_tokens
        if row.model is None:
            without_model += 1
        else:
            models.add(row.model)
    writer.extend(lines)
    return Split((), 0, 0, tuple(sorted(models)), without_model, prompt_tokens)


def _bounded_rows(
    rows: Iterator[RequestRow],
    tariff: Tariff | None,
    writer: ShardWriter,
    problems: Problems,
    unbounded: Problems,
) -> Iterator[RequestRow]:
    """
    Return the rows; those that can cost any sum are problems.

    :param writer: weighs no more rows once the prompts alone cost too much: the job is refused then, and shards of one
        row each would only take time.
    :param problems: the invalid rows so far, which the line numbers depend on.
    :param unbounded: gets the problems.
    """
    if tariff is None:
        return rows

    def check(tariff: Tariff) -> Iterator[RequestRow]:
        for position, row in enumerate(rows):
            number = position + problems.count + 1
            try:
                # A row without any model fails the job later, with a message of its own.
                has_model = tariff.models or row.model
                if not has_model or not tariff.allows_prompt(row.model, row.prompt_tokens):
                    writer.stop_weighing()
                if has_model:
                    tariff.check(row.line)
            except UnboundedRowError as exc:
                writer.stop_weighing()
                unbounded.add(number, f"{exc}. max_cost needs it", row.custom_id)
            yield row

    return check(tariff)


def _rows_with_model(rows: Iterable[RequestRow], problems: ReportedProblems) -> Iterator[RequestRow]:
    valid = 0
    for row in rows:
        if row.model is None:
            # Every line before this one is valid, or was reported.
            problems.add(valid + problems.count + 1, "the row names no model", row.custom_id)
        else:
            valid += 1
            yield row


def iter_custom_ids(shard: Source) -> Iterator[str]:
    """
    Return the ``custom_id`` of every line of a shard, in order.

    :raises IncompleteResultsError: the shard is damaged.
    """
    return (row.custom_id for row in iter_rows(shard, LineId))


class NamedRow(msgspec.Struct, gc=False):
    """The ``custom_id`` of a row, and the model that it names."""

    class Body(msgspec.Struct, gc=False):
        """What is read of the body."""

        model: str | None = None

    custom_id: str
    body: Body


def iter_rows(shard: Source, kind: type[T]) -> Iterator[T]:
    """
    Decode every line of a shard, in order.

    :param kind: a ``msgspec.Struct`` with the needed fields.
    :raises IncompleteResultsError: the shard is damaged, since its lines were checked when it was written.
    """
    decode = msgspec.json.Decoder(kind).decode
    with open_own(shard) as stream:
        for number, line in enumerate(LineReader(stream), 1):
            try:
                row = decode(line or b"")
            except (msgspec.DecodeError, ValueError, RecursionError):
                raise IncompleteResultsError(
                    f"line {number} of the request file {shard} is damaged. Its batches and their results at the "
                    "service are untouched"
                ) from None
            yield row


def write_variant(
    shards: Sequence[Shard], sources: Sequence[Source], work_dir: Directory, defaults: Mapping[str, Any]
) -> tuple[Shard, ...]:
    """
    Write shards once more, with body parameters for the rows that lack them.

    :param sources: the files of the shards.
    :param work_dir: folder for the new ones, which have the same rows.
    """
    params = raw_parameters(defaults)
    rows = [shard.rows for shard in shards]
    with ShardWriter(work_dir, max_rows=MAX_ROWS, max_bytes=MAX_BYTES, rows_per_shard=rows) as writer:
        for source in sources:
            with open_own(source) as stream:
                for line in LineReader(stream):
                    if line is not None:
                        writer.add(with_defaults(line, params))
    if [shard.rows for shard in writer.shards] != rows:
        raise IncompleteResultsError(f"the request files in {work_dir} are damaged. Nothing was sent")
    return writer.shards


def select_rows(
    shards: Sequence[Source],
    chosen: Sequence[Collection[int]],
    work_dir: Directory,
    *,
    max_rows: int = MAX_ROWS,
    max_bytes: int = MAX_BYTES,
    transform: Callable[[bytes], bytes] | None = None,
    tariff: Tariff | None = None,
) -> tuple[Shard, ...]:
    """
    Write new shards of selected rows, with their lines byte for byte.

    :param shards: the shards to select from.
    :param chosen: for each shard, a ``bytearray`` with a byte per row that is not 0 if the row is selected, or the set
        of selected positions.
    :param work_dir: folder for the new shards; created if necessary.
    :param transform: changes each line; it is called with the selected lines in their order.
    :param tariff: limits what the rows of a shard can cost.
    :return: the new shards; the ``sources`` of each are the shards that its rows come from.
    """
    with ShardWriter(work_dir, max_rows=max_rows, max_bytes=max_bytes, tariff=tariff) as writer:
        for index, (shard, wanted) in enumerate(zip(shards, chosen, strict=True)):
            positions = (
                {position for position, byte in enumerate(wanted) if byte}
                if isinstance(wanted, bytes | bytearray)
                else wanted
            )
            if not positions:
                continue
            with open_own(shard) as stream:
                for position, line in enumerate(LineReader(stream)):
                    if line is not None and position in positions:
                        writer.add(line if transform is None else transform(line), source=index)
    return writer.shards


class ShardWriter:
    """
    Writes lines into files that stay below the limits: ``shard-00000.jsonl`` and so on.

    :param work_dir: folder for the files; created if need be.
    :param max_rows: lines of the longest file.
    :param max_bytes: bytes of the largest file.
    :param tariff: limits what the rows of a file can cost.
    :param rows_per_shard: lines of the first files.
    :param reserved_bytes: bytes by which each line may grow.
    """

    def __init__(
        self,
        work_dir: Directory,
        *,
        max_rows: int,
        max_bytes: int,
        tariff: Tariff | None = None,
        rows_per_shard: Sequence[int] = (),
        reserved_bytes: int = 0,
    ) -> None:
        if max_rows < 1 or max_bytes < 1:
            raise InvalidInputError(
                f"a batch needs room for at least one row: max_rows is {max_rows}, max_bytes {max_bytes}"
            )
        self._work_dir = work_dir
        self._most_rows = max_rows
        self._rows_per_shard = iter(rows_per_shard)
        self._max_bytes = max_bytes
        self._reserved = reserved_bytes
        self._tariff = tariff
        self._shards: list[Shard] = []
        self._first_row = 0
        self._opened: AbstractContextManager[ByteWriter] | None = None
        self._start()

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The files finished so far: all of them, once the writer is closed."""
        return tuple(self._shards)

    def add(self, line: bytes, *, source: int | None = None) -> None:
        """
        Write one line.

        :param line: without its newline.
        :param source: index of the shard the line comes from.
        """
        size = len(line) + 1
        tariff = self._tariff
        weight = 0 if tariff is None else tariff.weigh(line)
        is_full = self._rows == self._max_rows or (self._rows and self._size_with(1, size) > self._max_bytes)
        if is_full or (tariff and self._rows and self._weight + weight > tariff.most_per_batch):
            self._finish()
        self._weight += weight
        self._block.append(line)
        self._rows += 1
        self._bytes += size
        self._block_bytes += size
        if source is not None and (not self._sources or self._sources[-1] != source):
            self._sources.append(source)
        if self._block_bytes >= _BLOCK_BYTES:
            self._flush()

    def extend(self, lines: Sequence[bytes]) -> None:
        """Write lines, as :meth:`add` does one by one."""
        size = sum(map(len, lines)) + len(lines)
        if (
            self._tariff is None
            and self._rows + len(lines) <= self._max_rows
            and self._size_with(len(lines), size) <= self._max_bytes
        ):
            self._block += lines
            self._rows += len(lines)
            self._bytes += size
            self._block_bytes += size
            if self._block_bytes >= _BLOCK_BYTES:
                self._flush()
        else:
            for line in lines:
                self.add(line)

    @property
    def weighs(self) -> bool:
        """Whether the cost of the rows is limited."""
        return self._tariff is not None

    def _size_with(self, lines: int, size: int) -> int:
        """Return the size that the shard may grow to with more lines."""
        return self._bytes + size + self._reserved * (self._rows + lines)

    def stop_weighing(self) -> None:
        """Write shards as large as they may be, whatever they cost."""
        self._tariff = None

    def __enter__(self) -> ShardWriter:
        make_folder(self._work_dir)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            if self._rows:
                self._finish()
        elif self._opened is not None:
            self._opened.__exit__(kind, exc, traceback)

    def _start(self) -> None:
        self._name = shard_name(len(self._shards))
        self._digest = hashlib.sha256()
        self._rows = self._bytes = self._block_bytes = self._weight = 0
        self._max_rows = next(self._rows_per_shard, self._most_rows)
        self._block: list[bytes] = []
        self._sources: list[int] = []

    def _flush(self) -> None:
        self._block.append(b"")
        data = b"\n".join(self._block)
        self._block = []
        self._block_bytes = 0
        if self._opened is None:
            self._opened = create_file(self._work_dir / self._name)
            self._stream = self._opened.__enter__()
        self._digest.update(data)
        self._stream.write(data)

    def _finish(self) -> None:
        if self._block:
            self._flush()
        if self._opened is not None:
            sync(self._stream)
            opened, self._opened = self._opened, None
            opened.__exit__(None, None, None)
        digest = self._digest.hexdigest()
        self._shards.append(
            Shard(
                len(self._shards),
                self._first_row,
                self._rows,
                self._bytes,
                digest,
                self._name,
                tuple(self._sources),
            )
        )
        self._first_row += self._rows
        self._start()
