"""
Answers that earlier jobs paid for, reused by later ones.

What a job reuses is decided once, when it is planned, and kept in its folder: a retry sees the same, whatever happens
to the cache meanwhile. Rows without an answer make up the job's first round; the cached answers join the merge like
the results of a batch. At its end, a job adds its own answers as an immutable segment of its own name, so any number of
jobs may share a cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import struct
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

from airflow_provider_siliconflow.api.exceptions import InvalidInputError
from airflow_provider_siliconflow.api.models import Outcome
from airflow_provider_siliconflow.batch_files.answer_keys import KEY_BYTES, answer_key, read_request
from airflow_provider_siliconflow.batch_files.atomic_files import (
    local_path,
    make_private_folder,
    open_own,
    temporary_folder,
    write_whole,
)
from airflow_provider_siliconflow.batch_files.buckets import BUCKETS, Buckets
from airflow_provider_siliconflow.batch_files.custom_ids import custom_id_of
from airflow_provider_siliconflow.batch_files.invalid_rows import of_valid_rows
from airflow_provider_siliconflow.batch_files.lines import LineReader
from airflow_provider_siliconflow.batch_files.live_lines import without_route
from airflow_provider_siliconflow.batch_files.merge import BatchFiles
from airflow_provider_siliconflow.batch_files.segments import (
    Hit,
    Segment,
    Segments,
    SegmentWriter,
    UnreadableSegmentError,
    read_segments,
    segment_name,
    segments_folder,
    with_custom_id,
    without_custom_id,
)
from airflow_provider_siliconflow.batch_files.shards import Shard, Split, iter_custom_ids, select_rows
from airflow_provider_siliconflow.batch_files.verdicts import (
    Judge,
    UnreadableLineError,
    Verdict,
    read_verdict,
)
from airflow_provider_siliconflow.jobs.options import RunOptions
from airflow_provider_siliconflow.jobs.plan import FIRST_ROUND, Plan, PlanFolder, Reuse

log = logging.getLogger(__name__)

#: A key and the position of its row, and a position and where its answer is.
_WANTED = struct.Struct(f"<{KEY_BYTES}sQ")
_FOUND = struct.Struct("<QIQIII")
_NO_KEY = bytes(KEY_BYTES)
#: Cached answers that are read at a time.
_HITS_AT_ONCE = 1000


def _cached_path(folder: Any, model: int, shard: Shard) -> Any:
    return folder / "cached" / str(model) / shard.name


# Planning ---------------------------------------------------------------------------------------------------


def find_answers(cache_dir: Any, plans: PlanFolder, plan: Plan, options: RunOptions) -> Reuse | None:
    """
    Decide which rows of a job need not be sent, and write their answers into the job's folder.

    A row is sent if its cached answer does not satisfy what the job asks of its answers.

    :param cache_dir: the cache.
    :param plans: folder of the job; the shards of the other rows go to its folder for the first round.
    :param plan: the plan, without this decision.
    :returns: ``None`` if nothing is cached.
    :raises InvalidInputError: the cache is not ours alone, or cannot be created.
    """
    segments = _open_cache(cache_dir)
    if not segments:
        log.info("%s has no answers yet", cache_dir)
        return None
    split, tariff = plan.split, options.tariff()
    to_send: dict[int, tuple[Shard, ...]] = {}
    cached: dict[int, tuple[int, ...]] = {}
    known: dict[tuple[tuple[Shard, ...], bytes], tuple[Shard, ...]] = {}
    digests_of: dict[tuple[Shard, ...], _Digests] = {}
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(Segments(segments))
        for number, model in enumerate(options.replacements):
            shards, sources = plan.shards_of(number), plans.sources(plan, number)
            digests = digests_of.get(shards)
            if digests is None:
                digests = stack.enter_context(_Digests.of(sources, own_model=model is None))
                digests_of[shards] = digests
            missing = [bytearray(b"\1") * shard.rows for shard in shards]
            with Buckets() as found:
                _look_up(opened, digests, model, found, split.rows)
                taken = _take(
                    opened, found, number, split, sources, plans.path, missing, options.acceptance.judge
                )
                cached[number] = tuple(taken)
            rows = sum(cached[number])
            log.info("%s: %d of %d rows have a cached answer", model or "All models", rows, split.rows)
            rows_missing = b"".join(hashlib.sha256(each).digest() for each in missing)
            pattern = shards, hashlib.sha256(rows_missing).digest()
            if not rows:
                to_send[number] = shards
            elif pattern in known:
                to_send[number] = known[pattern]
            else:
                known[pattern] = to_send[number] = select_rows(
                    sources,
                    missing,
                    plans.path / FIRST_ROUND / Reuse.folder_of(number),
                    max_rows=options.max_rows,
                    max_bytes=options.max_bytes,
                    tariff=tariff,
                )
    return Reuse(to_send, cached) if any(map(any, cached.values())) else None


def _open_cache(cache_dir: Any) -> list[Any]:
    folder = segments_folder(cache_dir)
    try:
        make_private_folder(folder)
    except InvalidInputError as exc:
        raise InvalidInputError(f"cache_dir: {exc}") from None
    except OSError as exc:
        if local_path(folder) is None:
            raise
        raise InvalidInputError(f"cache_dir: {folder} cannot be created: {exc}. Nothing was sent") from exc
    try:
        segments, unreadable = read_segments(folder)
    except FileNotFoundError:
        # A store has no empty folders.
        return []
    for name, reason in unreadable.items():
        log.warning("The cached answers in %s are not used: %s", folder / name, reason)
    return segments


class _Digests:
    """
    The digests of all rows, in a temporary file.

    :param stream: the file.
    :param own_model: whether they are whole keys, since the rows name their models.
    """

    def __init__(self, stream: IO[bytes], *, own_model: bool) -> None:
        self._stream = stream
        self._own_model = own_model

    @classmethod
    @contextlib.contextmanager
    def of(cls, sources: Sequence[Any], *, own_model: bool) -> Iterator[_Digests]:
        with tempfile.TemporaryFile(prefix="siliconflow-", buffering=1 << 16) as stream:
            for source in sources:
                with open_own(source) as lines:
                    for line in LineReader(lines):
                        request = None if line is None else read_request(line)
                        if request is None:
                            stream.write(_NO_KEY)
                            continue
                        digest, model = request
                        stream.write(answer_key(digest, model or "") if own_model else digest)
            yield cls(stream, own_model=own_model)

    def keys(self, model: str | None) -> Iterator[bytes | None]:
        """Yield the key of each row for a model; ``None`` for a row without one."""
        self._stream.seek(0)
        while block := self._stream.read(KEY_BYTES << 10):
            for at in range(0, len(block), KEY_BYTES):
                digest = block[at : at + KEY_BYTES]
                if digest == _NO_KEY:
                    yield None
                else:
                    yield digest if self._own_model else answer_key(digest, model or "")


def _look_up(segments: Segments, digests: _Digests, model: str | None, found: Buckets, rows: int) -> None:
    """Find the answers of all rows; they go into buckets by the position of the row."""
    unpack, pack = _WANTED.iter_unpack, _FOUND.pack
    with Buckets() as wanted:
        for position, key in enumerate(digests.keys(model)):
            if key is not None:
                wanted.add(key[0], _WANTED.pack(key, position))
        for number in range(BUCKETS):
            positions: dict[bytes, list[int]] = {}
            for key, position in unpack(wanted.records(number)):
                positions.setdefault(key, []).append(position)
            keys: dict[int, list[bytes]] = {}
            for key in positions:
                keys.setdefault(int.from_bytes(key[:8], "big"), []).append(key)
            for key, hit in segments.find(number, keys) if keys else ():
                for position in positions[key]:
                    found.add(position * BUCKETS // rows, pack(position, *hit))


def _take(
    segments: Segments,
    found: Buckets,
    model: int,
    split: Split,
    sources: Sequence[Any],
    folder: Any,
    missing: list[bytearray],
    judge: Judge | None,
) -> Iterator[int]:
    """
    Write the cached answers of a model, a file for each shard; yield how many there are in it.

    :param missing: a byte per row of each shard, which is set to 0 for those that are answered.
    """
    hits = _Ahead(
        hit for number in range(BUCKETS) for hit in sorted(_FOUND.iter_unpack(found.records(number)))
    )
    for shard, source, unanswered in zip(split.shards, sources, missing, strict=True):
        end = shard.first_row + shard.rows
        if not hits.has_below(end):
            yield 0
            continue
        taken = 0
        with write_whole(_cached_path(folder, model, shard)) as target:
            ids = enumerate(iter_custom_ids(source), shard.first_row)
            while block := list(islice(hits.below(end), _HITS_AT_ONCE)):
                lines = segments.lines([Hit(*each) for _, *each in block])
                for (row, number, _, _, place, _), stored in zip(block, lines, strict=True):
                    custom_id = next(custom_id for position, custom_id in ids if position == row)
                    line = None if stored is None else with_custom_id(stored, place, custom_id)
                    verdict = None if line is None else _verdict_on(line, custom_id, judge)
                    if line is None or verdict is None:
                        segments.report_damage(number)
                        continue
                    # An answer that cannot be judged is paid for; the merge says so, and nothing is sent for it.
                    if verdict.outcome is not Outcome.OK and not verdict.unjudged:
                        continue
                    target.write(line + b"\n")
                    unanswered[row - shard.first_row] = 0
                    taken += 1
        yield taken


def _verdict_on(line: bytes, custom_id: str, judge: Judge | None) -> Verdict | None:
    """
    Return the verdict on a cached line, the same as that of the merge; ``None`` if it is not an answer to the row.

    A row whose cached answer does not pass is sent.
    """
    try:
        verdict = None if b"\n" in line else read_verdict(line, judge)
    except UnreadableLineError:
        return None
    if verdict is None or verdict.custom_id != custom_id:
        return None
    return verdict if verdict.outcome in (Outcome.OK, Outcome.INVALID) else None


class _Ahead:
    """Hits in the order of their rows, of which the next one can be looked at."""

    def __init__(self, hits: Iterator[tuple[int, ...]]) -> None:
        self._hits = hits
        self._next = next(hits, None)

    def has_below(self, row: int) -> bool:
        """Whether the next hit is of a row below this one."""
        return self._next is not None and self._next[0] < row

    def below(self, row: int) -> Iterator[tuple[int, ...]]:
        """Yield the hits of rows below this one."""
        while self._next is not None and self._next[0] < row:
            found, self._next = self._next, next(self._hits, None)
            yield found


# Merging ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def cached_files(reuse: Reuse | None, folder: Any, model: int, shard: Shard) -> Iterator[list[BatchFiles]]:
    """
    Open the cached answers of a shard, as files to merge.

    :param reuse: the decision.
    :param folder: folder of the job.
    """
    if reuse is None or not reuse.cached[model][shard.index]:
        yield []
        return
    path = _cached_path(folder, model, shard)
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(open_own(path))
        local = local_path(path)
        if local is None:
            local = stack.enter_context(temporary_folder()) / "cached.jsonl"
            _copy(stream, local)
        yield [BatchFiles(local, None, cached=True)]


def _copy(stream: IO[bytes], path: Path) -> None:
    with path.open("wb") as target:
        while block := stream.read(1 << 20):
            target.write(block)


# Keeping ----------------------------------------------------------------------------------------------------


def keep_answers(
    cache_dir: Any,
    job: str,
    number: int,
    plans: PlanFolder,
    plan: Plan,
    results: Any,
    fresh: Sequence[bytearray],
    *,
    now: float,
) -> int:
    """
    Add the answers of a job over one model to the cache.

    :param cache_dir: the cache.
    :param job: identity of the job.
    :param number: index of the model.
    :param plans: folder of the job.
    :param plan: its plan.
    :param results: the merged results, a line per row.
    :param fresh: for each shard, a byte per row: 1 if the merge counts the row as ok, and its answer is not from the
        cache.
    :param now: epoch seconds.
    :returns: how many were added.
    """
    if not any(map(any, fresh)):
        return 0
    # A job may run again under the same identity and send other rows: those that the first run's answers lack.
    sent = plan.reuse.to_send[number] if plan.reuse else plan.shards_of(number)
    name = hashlib.sha256(" ".join((job, *(shard.sha256 for shard in sent))).encode()).hexdigest()
    path = segments_folder(cache_dir) / segment_name(name, number)
    if _has_more(path, sum(map(sum, fresh))):
        log.warning("%s has more answers of an earlier try, and is not replaced", path)
        return 0
    kept = 0
    model, label = plan.models[number] if plan.models else None, plan.submitter.label
    with open_own(results) as stream, SegmentWriter(path, created=now, model=model, label=label) as writer:
        answers = of_valid_rows(iter(LineReader(stream)), plans.invalid_lines(plan.split))
        for source, wanted in zip(plans.sources(plan, number), fresh, strict=True):
            with open_own(source) as requests:
                # Not more answers than the shard has rows: the iterator goes on with the next one.
                for is_fresh, request, answer in zip(wanted, LineReader(requests), answers, strict=False):
                    if is_fresh and request is not None and answer is not None:
                        kept += _keep(writer, request, answer, model)
    return kept


def _has_more(path: Any, answers: int) -> bool:
    try:
        return Segment.read(path).answers > answers
    except (UnreadableSegmentError, FileNotFoundError):
        return False


def _keep(writer: SegmentWriter, request: bytes, answer: bytes, model: str | None) -> bool:
    digest, cut = read_request(request), without_custom_id(without_route(answer))
    # The results may have been replaced since they were written.
    if digest is None or cut is None or custom_id_of(request) != custom_id_of(answer):
        return False
    writer.add(answer_key(digest[0], model or digest[1] or ""), *cut)
    return True
