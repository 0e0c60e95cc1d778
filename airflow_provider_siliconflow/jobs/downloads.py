"""Reading what a batch produced: fresh references, patience where they come late, nothing lost in silence."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

from airflow_provider_siliconflow.api.exceptions import (
    BatchError,
    IncompleteResultsError,
)
from airflow_provider_siliconflow.api.models import Batch, BatchStatus
from airflow_provider_siliconflow.batch_files.atomic_files import write_json, write_whole
from airflow_provider_siliconflow.batch_files.lines import LineReader
from airflow_provider_siliconflow.batch_files.manifest import (
    BatchSummary,
    ModelRun,
    build_manifest,
    render_summary,
)
from airflow_provider_siliconflow.batch_files.merge import BatchFiles, merge_batch
from airflow_provider_siliconflow.jobs.clock import Clock, SystemClock

log = logging.getLogger(__name__)

Kind = Literal["output", "error"]
KINDS: tuple[Kind, ...] = ("output", "error")

#: Pauses while the result files of a completed batch are not named yet, in seconds: a minute in all.
LATE_FILE_PATIENCE = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)


class ResultAPI(Protocol):
    """The calls a download needs; ``SiliconFlowClient`` has them."""

    def get_batch(self, batch_id: str) -> Batch:
        """Read a batch."""
        ...

    def iter_file(self, reference: str, refresh: Callable[[], str | None]) -> Iterator[bytes]:
        """Yield the bytes of a result file."""
        ...


class ResultFiles:
    """
    The result files of one ended batch.

    :param api: the calls.
    :param batch_id: the batch; it is read anew, since a signature may have aged.
    :param clock: time.
    :param patience: pauses, in seconds, while a file that must exist is not named yet.
    :raises BatchError: the batch has not ended.
    :raises IncompleteResultsError: rows succeeded, but the service names no file with them.
    """

    def __init__(
        self,
        api: ResultAPI,
        batch_id: str,
        clock: Clock | None = None,
        *,
        patience: Sequence[float] = LATE_FILE_PATIENCE,
    ) -> None:
        self._api = api
        self._clock: Clock = clock or SystemClock()
        self._patience = patience
        self.batch = self._settled(batch_id, iter(patience))

    def _settled(self, batch_id: str, pauses: Iterator[float]) -> Batch:
        while True:
            batch = self._api.get_batch(batch_id)
            if not batch.is_terminal:
                raise BatchError(
                    f"Batch {batch_id} is {batch.status}; its results can be read once it has ended.",
                    batch_id=batch_id,
                )
            counts = batch.request_counts
            owed = counts.completed > 0 and not batch.output_file_id
            unclear = (
                batch.status in (BatchStatus.COMPLETED, BatchStatus.EXPIRED)
                and not counts.total
                and not batch.output_file_id
            )
            unexplained = counts.failed > 0 and not batch.error_file_id and not batch.output_file_id
            if not (owed or unclear or unexplained):
                return batch
            pause = next(pauses, None)
            if pause is None:
                if owed:
                    raise IncompleteResultsError(
                        f"Batch {batch_id} is {batch.status} with {counts.completed} successful rows, but the "
                        "service names no output file yet. The rows are paid for and kept for 30 days; a retry "
                        "asks for them again.",
                        batch_id=batch_id,
                    )
                log.warning("Batch %s is %s and names no output file", batch_id, batch.status)
                return batch
            log.info("Batch %s names no output file yet; asking again in %.0f s", batch_id, pause)
            self._clock.sleep(pause)

    def reference(self, kind: Kind) -> str | None:
        """Return the URL or id of a result file, or ``None`` where there is none."""
        return self.batch.output_file_id if kind == "output" else self.batch.error_file_id

    def _refresh(self, kind: Kind) -> str | None:
        fresh, known = self._api.get_batch(self.batch.id), self.batch
        # A replica of the service that lags behind must not make a file disappear, nor the batch pending again.
        self.batch = (fresh if fresh.is_terminal else known).model_copy(
            update={
                "output_file_id": fresh.output_file_id or known.output_file_id,
                "error_file_id": fresh.error_file_id or known.error_file_id,
            }
        )
        return self.reference(kind)

    def chunks(self, kind: Kind) -> Iterator[bytes]:
        """Yield the bytes of a result file; nothing where there is none."""
        reference = self.reference(kind)
        if reference is not None:
            yield from self._api.iter_file(reference, lambda: self._refresh(kind))

    def copy(self, kind: Kind, target: BinaryIO) -> int:
        """Write a result file to an open stream and return its number of lines."""
        lines, last = 0, b"\n"
        for chunk in self.chunks(kind):
            target.write(chunk)
            lines += chunk.count(b"\n")
            last = chunk[-1:]
        return lines + (last != b"\n")

    def fetch(self, kind: Kind, path: Path) -> bool:
        """
        Download a result file; one that holds fewer rows than the batch counts is asked for again for a while.

        What the service had at best is all there is: the rows without a result count as missing.

        :returns: whether rows are lacking.
        """
        counts = self.batch.request_counts
        promised = counts.completed if kind == "output" else 0
        pauses = iter(self._patience)
        part = path.with_name(f"{path.name}.part")
        best = -1
        while True:
            with part.open("wb") as target:
                lines = self.copy(kind, target)
            if lines > best:
                best = lines
                part.replace(path)
            if best >= promised:
                return False
            story = (
                f"The {kind} file of batch {self.batch.id} has {lines} rows, but the batch counts {promised}"
            )
            pause = next(pauses, None)
            if pause is None:
                part.unlink(missing_ok=True)
                log.warning("%s; the others count as missing", story)
                return True
            log.warning("%s; downloading it again in %.0f s", story, pause)
            self._clock.sleep(pause)
            self._refresh(kind)

    def lines(self, kind: Kind) -> Iterator[bytes]:
        """
        Yield the lines of a result file, without their line ends and without blank ones.

        :raises IncompleteResultsError: fewer rows came than the batch's own counts promise.
        """
        rows = 0
        for line in LineReader(_Chunks(self.chunks(kind))):
            if line is None:
                raise IncompleteResultsError(
                    f"The {kind} file of batch {self.batch.id} has a line too long to read after line {rows}",
                    batch_id=self.batch.id,
                )
            if line.strip():
                rows += 1
                yield line
        if kind == "output":
            check_rows(self.batch, rows)


@contextlib.contextmanager
def downloaded(
    api: ResultAPI,
    batch_id: str,
    clock: Clock | None = None,
    *,
    number: int = 0,
    shared: bool = False,
    patience: Sequence[float] = LATE_FILE_PATIENCE,
) -> Iterator[tuple[Batch, BatchFiles]]:
    """
    Download the result files of a batch into a temporary folder, for as long as the block lasts.

    :param number: the round the batch belongs to.
    :param shared: whether the batch holds rows of several shards.
    :param patience: pauses, in seconds, while rows or a file that must exist are not there yet.
    """
    files = ResultFiles(api, batch_id, clock, patience=patience)
    with tempfile.TemporaryDirectory(prefix="siliconflow-") as folder:
        paths: dict[Kind, Path] = {}
        short = False
        for kind in KINDS:
            if files.reference(kind) is not None:
                paths[kind] = Path(folder) / f"{kind}.jsonl"
                short |= files.fetch(kind, paths[kind])
        output, errors = paths.get("output"), paths.get("error")
        yield (
            files.batch,
            BatchFiles(output, errors, round=number, shared=shared, batch_id=batch_id, short=short),
        )


def download_results(
    api: ResultAPI, batch_id: str, output_dir: Any, clock: Clock | None = None
) -> dict[str, Any]:
    """
    Write what a batch produced to a folder, and return the manifest.

    :param output_dir: a ``pathlib.Path`` or an ``ObjectStoragePath``.
    :raises IncompleteResultsError: the files hold fewer rows than the batch counts as successful.
    """
    with downloaded(api, batch_id, clock) as (batch, files):
        paths = {name: str(output_dir / f"{name}.jsonl") for name in ("results", "errors")}
        with (
            write_whole(output_dir / "results.jsonl") as results,
            write_whole(output_dir / "errors.jsonl") as errors,
        ):
            tally = merge_batch(files, results, errors, rows=batch.request_counts.total).tally
        summary = BatchSummary(
            batch.id, batch.status, tally.rows, counts=batch.request_counts.model_dump(mode="json")
        )
        manifest = build_manifest(
            [ModelRun(None, tally, [summary], paths)],
            paths={"manifest": str(output_dir / "manifest.json"), "output_dir": str(output_dir)},
        )
        write_json(output_dir / "manifest.json", manifest)
    log.info("Results of batch %s are in %s\n%s", batch_id, output_dir, render_summary(manifest))
    return manifest


class _Chunks:
    """An iterator of pieces that reads like a stream, whatever size is asked for."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks

    def read(self, size: int = -1, /) -> bytes:
        """Return the next piece, or ``b""`` at the end."""
        return next((chunk for chunk in self._chunks if chunk), b"")


def check_rows(batch: Batch, ok: int) -> None:
    """
    Compare the rows read with the batch's own counts.

    :param ok: successful rows that were read.
    :raises IncompleteResultsError: successful rows are missing.
    """
    promised = batch.request_counts.completed
    if ok < promised:
        raise IncompleteResultsError(
            f"The results of batch {batch.id} hold {ok} successful rows, but the batch counts {promised}. The "
            "rows are paid for and kept for 30 days; a retry downloads them again.",
            batch_id=batch.id,
        )
