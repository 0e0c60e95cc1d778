"""From the batches of a job to its results: downloads, the merge in the order of the rows, and the manifest."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from airflow_provider_siliconflow.api.exceptions import IncompleteResultsError
from airflow_provider_siliconflow.batch_files.atomic_files import write_whole
from airflow_provider_siliconflow.batch_files.manifest import (
    BatchSummary,
    ModelRun,
    build_manifest,
    model_slug,
)
from airflow_provider_siliconflow.batch_files.merge import BatchFiles, merge_shard, refused_lines
from airflow_provider_siliconflow.batch_files.shards import Shard, select_rows
from airflow_provider_siliconflow.batch_files.tally import ModelTally
from airflow_provider_siliconflow.jobs.downloads import LATE_FILE_PATIENCE, ResultAPI, downloaded
from airflow_provider_siliconflow.jobs.job import OpenJob
from airflow_provider_siliconflow.jobs.plan import FIRST_ROUND, Piece
from airflow_provider_siliconflow.jobs.states import Ended

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Collected:
    """
    What the batches of all rounds so far brought.

    :param tallies: the figures, by model.
    :param retries: by model, for each shard of the first round a byte per row: 1 if another attempt is worth it.
    """

    tallies: dict[int, ModelTally] = field(default_factory=dict)
    retries: dict[int, list[bytearray]] = field(default_factory=dict)

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
    Writes the results of a job.

    :param job: the job; every batch of it has ended, or was refused.
    :param client: the calls.
    :param output_dir: folder of the results.
    """

    def __init__(self, job: OpenJob, client: ResultAPI, output_dir: Any) -> None:
        self._job = job
        self._client = client
        self._output_dir = output_dir
        self._short: set[str] = set()

    def collect(self) -> Collected:
        """
        Download what all batches brought, and write the results of each model in the order of the rows.

        :raises IncompleteResultsError: results cannot be read whole; a retry reads them again.
        """
        collected = Collected()
        for model in self._job.models:
            self._merge_model(model, collected)
        return collected

    def next_round(self, collected: Collected) -> dict[int, tuple[Shard, ...]] | None:
        """
        Write the shards of the rows that are worth another attempt.

        :returns: the shards by model; ``None`` if no row is, no attempt is left, or the account is empty.
        """
        job = self._job
        number = len(job.rounds)
        if number >= job.options.max_row_attempts or not collected.worth_another_attempt:
            return None
        if collected.out_of_balance:
            log.error("Rows failed because the account is empty: no row is sent again")
            return None
        folder = job.plans.path
        sources = [folder / FIRST_ROUND / shard.name for shard in job.plan.split.shards]
        return {
            model: select_rows(
                sources,
                chosen,
                folder / f"round-{number}" / str(model),
                max_rows=job.options.max_rows,
                max_bytes=job.options.max_bytes,
            )
            for model, chosen in collected.retries.items()
        }

    # Merging ----------------------------------------------------------------------------------------------

    def _model_folder(self, model: int) -> Any:
        name = self._job.options.replacements[model]
        if name is None or len(self._job.options.models) < 2:
            return self._output_dir
        return self._output_dir / model_slug(name)

    def _merge_model(self, model: int, collected: Collected) -> None:
        job = self._job
        folder = self._model_folder(model)
        name = job.options.replacements[model]
        tally = collected.tallies[model] = ModelTally()
        retries: list[bytearray] = collected.retries.setdefault(model, [])
        first = {piece.shard.index: piece for piece in job.rounds[0] if piece.model == model}
        with contextlib.ExitStack() as stack:
            later = [
                files
                for pieces in job.rounds[1:]
                for piece in pieces
                if piece.model == model
                for files in stack.enter_context(self._files(piece, shared=True))
            ]
            results = stack.enter_context(write_whole(folder / "results.jsonl"))
            errors = stack.enter_context(write_whole(folder / "errors.jsonl"))
            for shard in job.plan.split.shards:
                piece = first[shard.index]
                with self._files(piece) as files:
                    merged = merge_shard(job.source(piece), [*files, *later], results, errors, model=name)
                if merged.tally.rows != shard.rows:
                    raise IncompleteResultsError(
                        f"{job.source(piece)} has {merged.tally.rows} rows, but {shard.rows} were planned: the file is "
                        "damaged. The batches are untouched, and so are their results at the service.",
                        batch_id=job.batch_id(piece),
                    )
                tally.add(merged.tally)
                retries.append(merged.retry)
        log.info("%s: %d of %d rows are ok", name or "Results", tally.ok, tally.rows)

    @contextlib.contextmanager
    def _files(self, piece: Piece, *, shared: bool = False) -> Iterator[list[BatchFiles]]:
        """Download what a piece brought: its batch, the ones that died before it, or why it was refused."""
        job = self._job
        batch_id, refused = job.batch_id(piece), job.refused(piece)
        found: list[BatchFiles] = []
        with contextlib.ExitStack() as stack:

            def download(one: str) -> BatchFiles:
                # What was waited for in vain once is not waited for in each round.
                patience = () if one in self._short else LATE_FILE_PATIENCE
                downloading = downloaded(
                    self._client, one, number=piece.round, shared=shared, patience=patience
                )
                files = stack.enter_context(downloading)[1]
                if files.short:
                    self._short.add(one)
                return files

            for dead in job.retired(piece):
                try:
                    found.append(download(dead.batch_id))
                except IncompleteResultsError as exc:
                    log.warning(
                        "%s Batch %s was replaced, so the job goes on without it.", exc, dead.batch_id
                    )
            if batch_id is not None:
                found.append(download(batch_id))
            elif refused is not None and piece.round == 0:
                # In a later round the rows have a result already, which says more.
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="siliconflow-"))
                path = Path(folder) / "error.jsonl"
                with path.open("wb") as stream:
                    stream.writelines(
                        refused_lines(job.source(piece), status=refused.status, message=refused.message)
                    )
                found.append(BatchFiles(None, path, shared=shared))
            elif refused is None:
                raise AssertionError(f"no batch for {piece}")
            yield found

    # Manifest ---------------------------------------------------------------------------------------------

    def manifest(self, collected: Collected) -> dict[str, Any]:
        """Return the manifest of what was collected."""
        options = self._job.options
        runs = [
            ModelRun(
                options.replacements[model],
                collected.tallies[model],
                [
                    summary
                    for piece in self._job.pieces
                    if piece.model == model
                    for summary in self._summaries(piece)
                ],
                {name: str(self._model_folder(model) / f"{name}.jsonl") for name in ("results", "errors")},
            )
            for model in self._job.models
        ]
        paths = {"output_dir": str(self._output_dir), "manifest": str(self._output_dir / "manifest.json")}
        manifest = build_manifest(runs, prices=options.prices, paths=paths)
        manifest["worth_another_attempt"] = collected.worth_another_attempt
        return manifest

    def _summaries(self, piece: Piece) -> Iterator[BatchSummary]:
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
            )
