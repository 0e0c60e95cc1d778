"""
Downloading the results of a batch: with fresh references, once it is settled, and without losing rows silently.

Result files come from outside, so their size is limited by the rows that were sent and by the free disk space.
"""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from airflow_provider_siliconflow.api.arguments import MAX_FILE_LINES
from airflow_provider_siliconflow.api.exceptions import BatchError, IncompleteResultsError
from airflow_provider_siliconflow.api.models import Batch, BatchResult, BatchStatus, Outcome
from airflow_provider_siliconflow.api.sources import Source
from airflow_provider_siliconflow.batch_files.atomic_files import temporary_folder, write_json, write_whole
from airflow_provider_siliconflow.batch_files.lines import LineReader
from airflow_provider_siliconflow.batch_files.manifest import (
    BatchSummary,
    ModelRun,
    build_manifest,
    render_summary,
)
from airflow_provider_siliconflow.batch_files.merge import BatchFiles, merge_batch
from airflow_provider_siliconflow.batch_files.result_lines import OnUnreadable, read_lines
from airflow_provider_siliconflow.batch_files.shards import iter_custom_ids
from airflow_provider_siliconflow.batch_files.verdicts import Verdict, read_result, read_verdict
from airflow_provider_siliconflow.jobs.clock import Clock, SystemClock
from airflow_provider_siliconflow.jobs.settled import (
    SETTLE_LIMIT,
    SETTLE_PATIENCE,
    Held,
    Settled,
    judge_files,
)
from airflow_provider_siliconflow.jobs.storable import storable

log = logging.getLogger(__name__)

Kind = Literal["output", "error"]
KINDS: tuple[Kind, ...] = ("output", "error")

#: Pauses while the result files of a batch are not complete yet, in seconds; one minute in total.
LATE_FILE_PATIENCE = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)

#: Seconds by which the service's clock may be wrong.
_CLOCK_ERROR = 2 * 3600.0

#: Most bytes of a result file: so many per row on average, and so many in addition. An answer of 128,000 tokens has
#: 1 MB, one with log probabilities several.
_ROW_BYTES, _SPARE_BYTES = 4 << 20, 64 << 20
#: Bytes that a download leaves free on the disk.
_RESERVED_BYTES = 256 << 20

#: The field of a batch that states when it ended, by its status.
_END_FIELDS = {
    BatchStatus.COMPLETED: "completed_at",
    BatchStatus.FAILED: "failed_at",
    BatchStatus.EXPIRED: "expired_at",
    BatchStatus.CANCELLED: "cancelled_at",
}


class ResultAPI(Protocol):
    """The calls a download needs; ``SiliconFlowClient`` has them."""

    def get_batch(self, batch_id: str) -> Batch:
        """Read a batch."""
        ...

    def iter_file(
        self, reference: str, refresh: Callable[[], str | None], *, limit: int | None = None
    ) -> Iterator[bytes]:
        """Yield the bytes of a result file, at most ``limit``."""
        ...


class ResultFiles:
    """
    The result files of one ended batch.

    :param api: the calls.
    :param batch_id: the batch; it is read again, since the signatures of its URLs may have expired.
    :param rows: rows that were sent in it, if known.
    :raises BatchError: the batch has not ended.
    """

    def __init__(self, api: ResultAPI, batch_id: str, *, rows: int | None = None) -> None:
        self._api = api
        self._rows = rows
        self.batch = self._api.get_batch(batch_id)
        if not self.batch.is_terminal:
            raise BatchError(
                f"Batch {batch_id} is {self.batch.status}; its results can be read once it has ended.",
                batch_id=batch_id,
            )

    def reference(self, kind: Kind) -> str | None:
        """Return the URL or id of a result file; ``None`` if there is none."""
        return self.batch.output_file_id if kind == "output" else self.batch.error_file_id

    def refresh(self) -> None:
        """Read the batch again."""
        fresh, known = self._api.get_batch(self.batch.id), self.batch
        # A stale answer must neither make a file disappear nor make the batch pending again.
        self.batch = (fresh if fresh.is_terminal else known).model_copy(
            update={
                "output_file_id": fresh.output_file_id or known.output_file_id,
                "error_file_id": fresh.error_file_id or known.error_file_id,
            }
        )

    def chunks(self, kind: Kind) -> Iterator[bytes]:
        """
        Yield the bytes of a result file; nothing if there is none.

        :raises IncompleteResultsError: it is larger than the results of its rows can be.
        """
        reference = self.reference(kind)
        if reference is None:
            return

        def fresh() -> str | None:
            self.refresh()
            return self.reference(kind)

        rows = self._rows or min(self.batch.request_counts.total, MAX_FILE_LINES) or MAX_FILE_LINES
        yield from self._api.iter_file(reference, fresh, limit=rows * _ROW_BYTES + _SPARE_BYTES)

    def copy(self, kind: Kind, path: Path) -> int:
        """
        Write a result file to the disk, and return its number of lines.

        :raises IncompleteResultsError: the disk has no room for it, or as for :meth:`chunks`.
        """
        lines, last, written = 0, b"\n", 0
        room = shutil.disk_usage(path.parent).free - _RESERVED_BYTES
        with path.open("wb") as target:
            for chunk in self.chunks(kind):
                written += len(chunk)
                if written > room:
                    raise IncompleteResultsError(
                        f"The {kind} file of batch {self.batch.id} does not fit on the disk of {path.parent}, where "
                        f"only {max(room, 0)} bytes may be used. The service keeps the results for 30 days; a retry "
                        "downloads them.",
                        batch_id=self.batch.id,
                    )
                target.write(chunk)
                lines += chunk.count(b"\n")
                last = chunk[-1:] or last
        return lines + (last != b"\n")


@dataclass(slots=True)
class _Copies:
    """The best copy of each result file so far: a later copy with fewer lines must not replace it."""

    folder: Path
    lines: dict[Kind, int] = field(default_factory=dict)

    def path(self, kind: Kind) -> Path | None:
        return self.folder / f"{kind}.jsonl" if kind in self.lines else None

    def take(self, files: ResultFiles) -> None:
        for kind in KINDS:
            if files.reference(kind) is None:
                continue
            part = self.folder / f"{kind}.part"
            lines = files.copy(kind, part)
            if lines > self.lines.get(kind, -1):
                self.lines[kind] = lines
                part.replace(self.folder / f"{kind}.jsonl")
            else:
                part.unlink()

    def held(self, batch_id: str) -> Held:
        found = BatchFiles(self.path("output"), self.path("error"), batch_id=batch_id)
        return Held(self.lines.get("output", 0), self.lines.get("error", 0), lambda: len(outcomes_in(found)))


@contextlib.contextmanager
def downloaded(
    api: ResultAPI,
    batch_id: str,
    clock: Clock | None = None,
    *,
    number: int = 0,
    shared: bool = False,
    rows: int | None = None,
    ended_at: float | None = None,
    patience: Sequence[float] = LATE_FILE_PATIENCE,
    requests: Source | None = None,
) -> Iterator[tuple[Batch, BatchFiles]]:
    """
    Download the result files of a settled batch into a temporary folder that lasts as long as the block.

    :param number: the round to which the batch belongs.
    :param shared: whether the batch contains rows of several shards.
    :param rows: rows that were sent in it, if known.
    :param ended_at: when it was first seen in a terminal status, by our own clock; by default the end that the service
        states.
    :param patience: pauses while the batch is not settled, in seconds.
    :param requests: the request file of a ``shared`` batch.
    :raises IncompleteResultsError: the batch is not settled; a retry downloads it again.
    """
    clock = clock or SystemClock()
    with temporary_folder() as folder:
        copies = _Copies(folder)
        files = ResultFiles(api, batch_id, rows=rows)
        pauses = iter(patience)
        while True:
            copies.take(files)
            batch, held = files.batch, copies.held(batch_id)
            found = judge_files(batch, held, rows)
            # Measured by our own clock, if a process of ours saw the batch end.
            age = None if ended_at is None else clock.time() - ended_at
            if found is Settled.YES or (found is Settled.PERHAPS and (age or 0.0) >= SETTLE_PATIENCE):
                break
            pause = next(pauses, None) if (age or 0.0) < SETTLE_LIMIT else None
            if pause is None:
                if found is Settled.PERHAPS and age is None:
                    break
                if _is_final(batch, age, clock.time()):
                    log.warning("%s That is final, more than an hour after its end.", _story(batch, held))
                    break
                raise IncompleteResultsError(
                    f"{_story(batch, held)} The rows are paid for and kept for 30 days; a retry downloads them again "
                    "at no extra cost.",
                    batch_id=batch_id,
                )
            log.warning("%s Downloading them again in %.0f s.", _story(batch, held), pause)
            clock.sleep(pause)
            files.refresh()
        # Rows that are counted as answered are paid for, whether or not the files have them.
        answered = batch.request_counts.completed
        found_files = BatchFiles(
            copies.path("output"),
            copies.path("error"),
            round=number,
            shared=shared,
            batch_id=batch_id,
            short=held.output < answered,
            answered=answered,
            requests=requests,
        )
        if requests is not None and not found_files.short:
            found_files = replace(found_files, short=_answered_in(found_files, requests) < answered)
        yield batch, found_files


def _is_final(batch: Batch, age: float | None, now: float) -> bool:
    """Whether nothing can come any more; without an age by our own clock, the service's may be wrong by hours."""
    if age is None:
        return now - stated_end(batch, now) >= SETTLE_LIMIT + _CLOCK_ERROR
    return age >= SETTLE_LIMIT


def stated_end(batch: Batch, now: float) -> float:
    """Return the end of a batch as the service states it, in epoch seconds; minus infinity if it does not."""
    field_name = _END_FIELDS.get(BatchStatus(batch.status)) if batch.is_terminal else None
    stated = getattr(batch, field_name) if field_name else None
    # A day allows for a wrong clock; a later time is not in seconds.
    return float(stated) if stated is not None and 0 < stated < now + 86400.0 else -math.inf


def _story(batch: Batch, held: Held) -> str:
    counts = batch.request_counts
    return (
        f"Batch {batch.id} is {batch.status} and counts {counts.completed} rows of {counts.total} as answered and "
        f"{counts.failed} as failed, but its output file has {held.output} lines and its error file {held.errors}."
    )


def outcomes_in(files: BatchFiles, on_unreadable: OnUnreadable | None = None) -> dict[str, Outcome]:
    """
    Return the outcomes of the rows in the files of a batch, by ``custom_id``.

    A row that never ran because its batch was cancelled counts as expired.

    :param files: the downloaded files.
    :param on_unreadable: as for :func:`read_lines`.
    :raises IncompleteResultsError: a file cannot be read.
    """
    found: dict[str, Outcome] = {}
    for verdict in verdicts_in(files, on_unreadable):
        if found.get(verdict.custom_id) is Outcome.OK:
            continue
        never_ran = verdict.outcome is Outcome.ERROR and "cancel" in (verdict.code or "").lower()
        found[verdict.custom_id] = Outcome.EXPIRED if never_ran else verdict.outcome
    return found


def verdicts_in(files: BatchFiles, on_unreadable: OnUnreadable | None = None) -> Iterator[Verdict]:
    """
    Yield a verdict on every result line of a batch, first those of the output file.

    :param files: the downloaded files.
    :param on_unreadable: as for :func:`read_lines`.
    :raises IncompleteResultsError: a file cannot be read.
    """
    for path in filter(None, (files.output, files.errors)):
        with path.open("rb") as stream:
            lines = read_lines(
                LineReader(stream),
                read_verdict,
                name=path.name,
                batch_id=files.batch_id,
                on_unreadable=on_unreadable,
            )
            yield from (verdict for *_, verdict in lines if verdict is not None)


def _answered_in(files: BatchFiles, requests: Source) -> int:
    """Return how many rows of a request file have a result in the output of their batch."""
    try:
        answered = outcomes_in(replace(files, errors=None))
    except IncompleteResultsError:
        # The merge sees it, too, and accounts for it.
        return files.answered
    return sum(custom_id in answered for custom_id in iter_custom_ids(requests))


def iter_results(api: ResultAPI, batch_id: str, clock: Clock | None = None) -> Iterator[BatchResult]:
    """
    Yield the results of an ended batch line by line: first those of the output file, then those of the error file.

    :param api: the calls.
    :param batch_id: the batch.
    :raises IncompleteResultsError: the batch is not settled, or a file cannot be read.
    """
    with downloaded(api, batch_id, clock) as (_, files):
        for path, kind in ((files.output, "output"), (files.errors, "error")):
            if path is not None:
                with path.open("rb") as stream:
                    lines = LineReader(stream)
                    for *_, result in read_lines(
                        lines, read_result, name=f"the {kind} file", batch_id=batch_id
                    ):
                        if result is not None:
                            yield result


def download_results(
    api: ResultAPI, batch_id: str, output_dir: Any, clock: Clock | None = None
) -> dict[str, Any]:
    """
    Write the results of a batch to a folder, and return the manifest.

    :param output_dir: a ``pathlib.Path`` or an ``ObjectStoragePath``.
    :raises IncompleteResultsError: the batch is not settled: its files have fewer rows than it counts.
    """
    with downloaded(api, batch_id, clock) as (batch, files):
        paths = {name: str(output_dir / f"{name}.jsonl") for name in ("results", "errors")}
        with (
            write_whole(output_dir / "results.jsonl") as results,
            write_whole(output_dir / "errors.jsonl") as errors,
        ):
            rows = min(batch.request_counts.total, MAX_FILE_LINES)
            tally = merge_batch(files, results, errors, rows=rows).tally
        summary = BatchSummary(
            batch.id, batch.status, tally.rows, counts=batch.request_counts.model_dump(mode="json")
        )
        manifest: dict[str, Any] = storable(
            build_manifest(
                [ModelRun(None, tally, [summary], paths)],
                paths={"manifest": str(output_dir / "manifest.json"), "output_dir": str(output_dir)},
            )
        )
        write_json(output_dir / "manifest.json", manifest)
    log.info("Results of batch %s are in %s\n%s", batch_id, output_dir, render_summary(manifest))
    return manifest
