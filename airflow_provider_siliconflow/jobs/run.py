"""
A whole job: rows cut into shards, each shard over each model, in rounds, back into files in the input's order.

Everything a later process needs lies in a folder below the output: the plan, the shards and a ledger of what was
uploaded and created. A process may die anywhere; the next one opens the folder and goes on.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from airflow_provider_siliconflow.api import arguments
from airflow_provider_siliconflow.api.client import SiliconFlowClient
from airflow_provider_siliconflow.api.exceptions import (
    APIError,
    BatchFailedError,
    IncompleteResultsError,
    InsufficientBalanceError,
    InvalidInputError,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
    SiliconFlowError,
)
from airflow_provider_siliconflow.api.models import DEAD_STATUSES, Batch, BatchStatus, UploadedFile
from airflow_provider_siliconflow.batch_files.atomic_files import write_json, write_whole
from airflow_provider_siliconflow.batch_files.manifest import (
    BatchSummary,
    ModelRun,
    build_manifest,
    model_slug,
    render_summary,
)
from airflow_provider_siliconflow.batch_files.merge import BatchFiles, merge_shard, refused_lines
from airflow_provider_siliconflow.batch_files.shards import Shard, Split, select_rows
from airflow_provider_siliconflow.batch_files.tally import ModelTally
from airflow_provider_siliconflow.jobs.downloads import LATE_FILE_PATIENCE, downloaded
from airflow_provider_siliconflow.jobs.folder import read_json, remove_tree
from airflow_provider_siliconflow.jobs.identity import BatchWork, Submitter, upload_name
from airflow_provider_siliconflow.jobs.ledger import FolderLedger
from airflow_provider_siliconflow.jobs.options import RunOptions
from airflow_provider_siliconflow.jobs.plan import plan
from airflow_provider_siliconflow.jobs.states import Ended, Planned, Refused, Sending, Sent
from airflow_provider_siliconflow.jobs.submission import Submission

log = logging.getLogger(__name__)

#: Folder below the output in which jobs keep what outlives a process.
WORK_FOLDER = ".siliconflow"

#: Batches of a model that the service refuses, taking none, before the others of the model are not sent either.
_REFUSALS_OF_A_MODEL = 3

OpenSubmission = Callable[[FolderLedger], Submission]


@dataclass(frozen=True, slots=True)
class Piece:
    """One batch of a job: a shard over a model in a round."""

    round: int
    model: int
    shard: Shard
    folder: str
    upload_key: str
    work_key: str

    @property
    def path(self) -> str:
        """Where the shard lies below the job's folder."""
        return f"{self.folder}/{self.shard.name}"


class BatchRun:
    """
    One job, opened by one process.

    :param options: what is asked.
    :param submitter: who asks.
    :param client: the calls.
    :param conn_id: the connection, a part of the identity.
    :param output_dir: ``pathlib.Path`` or ``ObjectStoragePath`` of the results.
    :param open_submission: makes the submission over the job's ledger.
    :param earlier_tries: whether an earlier try of this generation may have left batches behind.
    """

    def __init__(
        self,
        options: RunOptions,
        *,
        submitter: Submitter,
        client: SiliconFlowClient,
        conn_id: str,
        output_dir: Any,
        open_submission: OpenSubmission,
        earlier_tries: bool,
    ) -> None:
        self.options = options
        self._submitter = submitter
        self._client = client
        # Not the host: under another name of the same service the work is the same, and must not be paid again.
        self._where = {"conn_id": conn_id}
        self.output_dir = output_dir
        self.key = submitter.key(run=str(output_dir), models=list(options.models), **self._where)
        self.folder = output_dir / WORK_FOLDER / self.key[:16]
        self._open_submission = open_submission
        self._earlier_tries = earlier_tries
        self._tallies: dict[int, ModelTally] = {}
        self._rounds: list[list[Piece]] = []
        self._worth_another_attempt = 0
        self._told_of_refusals = False
        self._short: set[str] = set()
        self._alive: set[str] = set()
        self._cancels_late = False
        self._stopped = False

    # Planning ---------------------------------------------------------------------------------------------

    def finished_before(self) -> dict[str, Any] | None:
        """Return the manifest when an earlier try of this job wrote it, having done everything else."""
        manifest = self._manifest()
        # On a first try it is of a run that was deleted and made again under the same id.
        return manifest if self._earlier_tries and manifest.get("run") == self.key else None

    def _manifest(self) -> dict[str, Any]:
        return read_json(self.output_dir / "manifest.json", or_cut="it will be replaced") or {}

    def _refuse_sibling(self) -> None:
        """
        Refuse to write over the results of another map index of the same task and run.

        :raises InvalidInputError: they are there.
        """
        theirs, mine = self._manifest().get("task") or {}, asdict(self._submitter)
        same = {"dag_id", "run_id", "task_id", "generation"}
        if theirs.get("map_index") != mine["map_index"] and {n: theirs.get(n) for n in same} == {
            n: mine[n] for n in same
        }:
            raise InvalidInputError(
                f"output_dir: {self.output_dir} holds the results of map index {theirs['map_index']} of this task. "
                "A mapped task needs a folder per map index, such as '.../{{ ti.map_index }}'"
            )

    def prepare(self, requests: Callable[[], Any], name: str) -> None:
        """
        Make the plan, or take up the one an earlier try made.

        :param requests: returns the rows, a file or Python objects; only called when there is no plan yet.
        :param name: what messages call them.
        :raises InvalidRequestFileError: rows are wrong; nothing was uploaded.
        """
        self._refuse_sibling()
        if (manifest := self._manifest()) and manifest.get("unfinished") != self.key:
            log.warning("%s holds the results of another job; they will be replaced", self.output_dir)
        stored = self._plan()
        if stored is not None and not self._earlier_tries:
            log.warning("%s is left of a run that was deleted; it is not used", self.folder)
            remove_tree(self.folder)
            stored = None
        if stored is None:
            self._make_plan(requests(), name)
        else:
            log.info("Going on with the rows as an earlier try planned them")
        self.open()
        log.info(
            "%d rows in %d shards over %s: %d batches, about %d prompt tokens each time",
            self.split.rows,
            len(self.split.shards),
            ", ".join(self.options.models) or "the models that the rows name",
            len(self.split.shards) * len(self.options.replacements),
            self.split.prompt_tokens,
        )

    def _plan(self) -> dict[str, Any] | None:
        return read_json(self.folder / "plan.json", or_cut="the plan is made anew")

    def _make_plan(self, requests: Any, name: str) -> None:
        try:
            split = plan(requests, self.folder / "round-0", name=name, options=self.options)
        except InvalidInputError:
            remove_tree(self.folder)
            raise
        self._warn_of_unknown_models()
        # Before the plan: a plan without a ledger tells that the ledger was lost.
        write_json(self.folder / "ledger.json", {})
        write_json(
            self.folder / "plan.json",
            {
                "split": split.to_dict(),
                # What a batch is asked for is fixed here: a template such as now() renders anew at every
                # resumption, and the same work under another identity would be paid for again.
                "completion_window": self.options.completion_window,
                "metadata": dict(self.options.metadata),
                # An earlier try may have sent batches that this folder knows nothing of.
                "complete": not self._earlier_tries,
            },
        )

    def _warn_of_unknown_models(self) -> None:
        """Look the models up in the account's list, which costs nothing; the list does not say which batches take."""
        if not self.options.models:
            return
        try:
            known = set(self._client.list_models(repeat=False))
        except SiliconFlowError as exc:
            log.info("The account's models cannot be listed, so none is looked up: %s", exc)
            return
        unknown = [model for model in self.options.models if model not in known]
        if known and unknown:
            log.warning(
                "The account does not list %s among its chat models; the service may refuse it",
                ", ".join(unknown),
            )

    def open(self) -> None:
        """
        Open a job that was prepared.

        :raises InvalidInputError: its folder is gone.
        """
        stored = self._plan()
        if stored is None:
            raise InvalidInputError(
                f"{self.folder} holds no plan any more: output_dir must be seen by every worker, and render the "
                "same, while the task waits. The batches are untouched. A retry makes the plan anew, searches the "
                "account and adopts them; a clear would pay for all again.",
                retryable=True,
            )
        self.split = Split.from_dict(stored["split"])
        self.options = replace(
            self.options,
            completion_window=stored["completion_window"],
            metadata=stored["metadata"],
        )
        self.ledger = FolderLedger(self.folder / "ledger.json", complete=stored["complete"])
        self._submission = self._open_submission(self.ledger)
        if self._stopped:
            self._submission.stop()
        self._rounds = [self._pieces(0, dict.fromkeys(self._model_numbers, self.split.shards))]
        while (planned := self._planned_round(len(self._rounds))) is not None:
            shards = {int(i): tuple(map(Shard.from_dict, items)) for i, items in planned["shards"].items()}
            self._rounds.append(self._pieces(len(self._rounds), shards))

    def _planned_round(self, number: int) -> dict[str, Any] | None:
        return read_json(self.folder / f"round-{number}.json", or_cut="the round is planned anew")

    @property
    def deadline(self) -> float | None:
        """When this try's wait ends, in epoch seconds; ``None`` leaves it to the batches."""
        return self.ledger.deadline

    def set_deadline(self, deadline: float | None) -> None:
        """Fix the end of this try's wait, over all of its deferrals."""
        self.ledger.deadline = deadline

    def wake_after(self, open_batches: int) -> int | None:
        """Return how many batches must end before the next ones are submitted; ``None`` for all."""
        waiting = sum(self._is_waiting(piece) for piece in self._current)
        return max(open_batches // 4, 1) if waiting else None

    @property
    def batch_ids(self) -> list[str]:
        """Ids of all batches so far."""
        pieces = (piece for pieces in self._rounds for piece in pieces)
        return [batch_id for piece in pieces if (batch_id := self._batch_id(piece))]

    @property
    def _model_numbers(self) -> range:
        return range(len(self.options.replacements))

    def _pieces(self, number: int, shards: Mapping[int, Sequence[Shard]]) -> list[Piece]:
        """Return the batches of a round, shard by shard, so that an upload serves its models one after another."""
        pieces = [
            self._piece(number, model, shard)
            for model, model_shards in shards.items()
            for shard in model_shards
        ]
        return sorted(pieces, key=lambda piece: (piece.shard.index, piece.model))

    def _piece(self, number: int, model: int, shard: Shard) -> Piece:
        return Piece(
            round=number,
            model=model,
            shard=shard,
            folder="round-0" if number == 0 else f"round-{number}/{model}",
            upload_key=self._submitter.key(upload=shard.sha256, **self._where),
            work_key=self._submitter.key(
                input=shard.sha256,
                completion_window=self.options.completion_window,
                model=self.options.replacements[model],
                round=number,
                **self._where,
            ),
        )

    # Submitting -------------------------------------------------------------------------------------------

    @property
    def _current(self) -> list[Piece]:
        """The batches of the last round, and those of earlier ones that have not ended, having been refused before."""
        late = [piece for pieces in self._rounds[:-1] for piece in pieces if not self._ended(piece)]
        return [*late, *self._rounds[-1]]

    def _batch_id(self, piece: Piece) -> str | None:
        state = self.ledger.state(piece.work_key)
        return state.batch_id if isinstance(state, Sent | Ended) else None

    def _ended(self, piece: Piece) -> Ended | None:
        state = self.ledger.state(piece.work_key)
        return state if isinstance(state, Ended) else None

    def _refused(self, piece: Piece) -> Refused | None:
        """Return what the service said where it did not take the batch in this try."""
        state = self.ledger.state(piece.work_key)
        return state if isinstance(state, Refused) else None

    def _is_waiting(self, piece: Piece) -> bool:
        return not self._batch_id(piece) and not self._refused(piece)

    def _dead(self, piece: Piece) -> tuple[Ended, ...]:
        """Return the batches that died before the present one; rows of theirs may be paid."""
        return self.ledger.retired(piece.work_key)

    @property
    def open_batches(self) -> list[str]:
        """Ids of the batches that were submitted and have not ended as far as this job knows."""
        found = ((self._batch_id(piece), self._ended(piece)) for piece in self._current)
        return [batch_id for batch_id, ended in found if batch_id and not ended]

    def revive(self) -> None:
        """
        Take up the batches of an earlier try: one that failed or was cancelled is submitted anew.

        Called once per try, since within a try a batch that failed stays failed.
        """
        self.note(filter(None, map(self._looked_at, list(self._current))))
        adopted = []
        for piece in self._current:
            ended = self._ended(piece)
            if ended and ended.status in DEAD_STATUSES:
                self.ledger.retire(piece.work_key)
            elif self._refused(piece):
                self.ledger.record(piece.work_key, Planned())
            elif self._batch_id(piece) and piece.work_key not in self._alive:
                adopted.append(self._submission.submit(self._work(piece, self._file_id(piece))))
        self.note(adopted)

    def _looked_at(self, piece: Piece) -> Batch | None:
        """Read the batch that an earlier try recorded, so that one that died is known to have, with its rows."""
        batch_id = self._batch_id(piece)
        if batch_id is None or self._ended(piece):
            return None
        batch = self._submission.look(batch_id)
        if batch is not None and not batch.is_dead and batch.status != BatchStatus.CANCELLING:
            log.info(
                "Adopting batch %s (%s) of an earlier try: nothing is paid again", batch_id, batch.status
            )
            self._alive.add(piece.work_key)
        return batch

    def submit_due(self) -> list[str]:
        """
        Submit as many batches as may be open at once, and return the ids of all open ones.

        A batch that the service refuses stops no other: those that were taken are paid, and their results wanted. The
        job fails at its end then.

        :raises SiliconFlowError: the service refuses, and has taken no batch of this job.
        """
        # What is adopted may have ended already, and makes room for more.
        while self._submit_some():
            pass
        self.ledger.flush()
        return self.open_batches

    def _submit_some(self) -> bool:
        open_batches = self.open_batches
        limit = self.options.max_in_flight or len(self._current)
        waiting = [piece for piece in self._current if self._is_waiting(piece)]
        now = waiting[: max(limit - len(open_batches), 0)]
        for piece in now:
            try:
                batch = self._submission.submit(self._work(piece, self._file_id(piece)))
            except InsufficientBalanceError as exc:
                self._refuse([piece, *self._surely_unsent(waiting, piece)], exc)
                return True
            except NotFoundError as exc:
                if not self.batch_ids:
                    raise
                # Perhaps the file is gone: the retry uploads it again.
                self.ledger.record_upload(piece.upload_key, Planned())
                self._refuse([piece], exc)
                return True
            except (InvalidRequestError, PermissionDeniedError) as exc:
                self._refuse(self._refused_alike(piece), exc)
                return True
            self.note([batch])
            if self._cancels_late:
                # Ended while the request was on its way, when there was no batch to be found yet.
                self._client.cancel_batch(batch.id)
            log.info("Batch %s: %s", batch.id, self._name(piece))
        return bool(now)

    def _name(self, piece: Piece) -> str:
        model = self.options.replacements[piece.model]
        return f"shard {piece.shard.index} of round {piece.round}{f', {model}' if model else ''}"

    def _refused_alike(self, piece: Piece) -> list[Piece]:
        """Return a refused batch, and all others of its model once enough of them were refused and none was taken."""
        same = [other for other in self._current if other.model == piece.model and other.round == piece.round]
        tried = sum(self._refused(other) is not None for other in same) + 1
        if tried < _REFUSALS_OF_A_MODEL or any(map(self._batch_id, same)):
            return [piece]
        return [piece, *self._surely_unsent(same, piece)]

    def _surely_unsent(self, pieces: Iterable[Piece], but: Piece) -> list[Piece]:
        """Return those of which no try can have left a batch: one with an intent is looked for, and may be paid."""
        return [
            piece
            for piece in pieces
            if piece != but and isinstance(self.ledger.state(piece.work_key), Planned)
        ]

    def _refuse(self, pieces: Iterable[Piece], error: APIError) -> None:
        """
        Note batches that the service does not take, and go on to collect the others.

        :raises SiliconFlowError: there are no others; nothing was paid, so there is nothing to lose.
        """
        refused = list(pieces)
        why = Refused(error.status_code, error.message)
        self.ledger.record_all({piece.work_key: why for piece in refused})
        nothing_paid = not self.batch_ids and not any(map(self._dead, self._current))
        if nothing_paid and not any(map(self._is_waiting, self._current)):
            raise error
        log.error("Refused: %s: %s", self._name(refused[0]), error)
        if len(refused) > 1:
            log.error("%d more like it are not sent in this try", len(refused) - 1)
        if not self._told_of_refusals:
            self._told_of_refusals = True
            log.error(
                "The batches that were taken go on. Their results are collected, and the task fails then; a retry "
                "sends what was refused, and nothing else."
            )

    def _work(self, piece: Piece, file_id: str) -> BatchWork:
        model = self.options.replacements[piece.model]
        return BatchWork(
            key=piece.work_key,
            label=self._submitter.label,
            input_file_id=file_id,
            endpoint=arguments.CHAT_COMPLETIONS,
            completion_window=self.options.completion_window,
            metadata=self.options.metadata,
            replace={"model": model} if model else None,
        )

    def _file_id(self, piece: Piece) -> str:
        source = self.folder / piece.path
        name = upload_name(f"r{piece.round}-{piece.shard.name}", piece.upload_key)

        def send() -> UploadedFile:
            return self._client.upload_file(source, size=piece.shard.bytes, filename=name)

        return self._submission.upload(piece.upload_key, name, piece.shard.bytes, send).id

    def note(self, batches: Iterable[Batch]) -> None:
        """Take what became of batches: those that ended are not waited for any more."""
        by_id = {batch.id: batch for batch in batches if batch.is_terminal}
        if not by_id:
            return
        for piece in self._current:
            batch = by_id.get(self._batch_id(piece) or "")
            if batch is None or self._ended(piece):
                continue
            counts = batch.request_counts.model_dump(mode="json", include={"total", "completed", "failed"})
            state = self.ledger.state(piece.work_key)
            number = state.number if isinstance(state, Sent) else 0
            ended = Ended(batch.id, number, batch.status, counts, tuple(batch.error_messages[:3]))
            self.ledger.record(piece.work_key, ended)
        self.ledger.flush()
        pieces = self._rounds[-1]
        done = sum(self._ended(piece) is not None for piece in pieces)
        log.info("Round %d: %d of %d batches have ended", len(self._rounds) - 1, done, len(pieces))

    # Results ----------------------------------------------------------------------------------------------

    def merge(self) -> bool:
        """
        Write the results of all rounds so far; return whether another round was planned.

        Rows that may be answered another time go into it, as long as attempts are left and the account can pay.
        """
        self._refuse_sibling()
        retries = {model: self._merge_model(model) for model in self._model_numbers}
        self._worth_another_attempt = sum(map(sum, _flat(retries)))
        if len(self._rounds) >= self.options.max_row_attempts or not self._worth_another_attempt:
            return False
        if any(tally.balance_errors for tally in self._tallies.values()):
            log.error("Rows failed because the account is empty: no row is sent again")
            return False
        number = len(self._rounds)
        shards: dict[int, tuple[Shard, ...]] = {}
        sources = [self.folder / "round-0" / shard.name for shard in self.split.shards]
        for model, chosen in retries.items():
            shards[model] = select_rows(
                sources,
                chosen,
                self.folder / f"round-{number}" / str(model),
                max_rows=self.options.max_rows,
                max_bytes=self.options.max_bytes,
            )
        planned = {str(model): [shard.to_dict() for shard in items] for model, items in shards.items()}
        write_json(self.folder / f"round-{number}.json", {"shards": planned})
        self._rounds.append(self._pieces(number, shards))
        log.info(
            "Round %d: %d rows are sent again in %d batches",
            number,
            sum(piece.shard.rows for piece in self._current),
            len(self._current),
        )
        return True

    def _model_folder(self, model: int) -> Any:
        name = self.options.replacements[model]
        return (
            self.output_dir / model_slug(name) if name and len(self.options.models) > 1 else self.output_dir
        )

    def _merge_model(self, model: int) -> list[bytearray]:
        """Write the results of one model, and return for each shard which rows are worth another attempt."""
        folder = self._model_folder(model)
        name = self.options.replacements[model]
        tally = ModelTally()
        retries: list[bytearray] = []
        first = {piece.shard.index: piece for piece in self._rounds[0] if piece.model == model}
        with contextlib.ExitStack() as stack:
            later = [
                files
                for pieces in self._rounds[1:]
                for piece in pieces
                if piece.model == model
                for files in stack.enter_context(self._files(piece, shared=True))
            ]
            results = stack.enter_context(write_whole(folder / "results.jsonl"))
            errors = stack.enter_context(write_whole(folder / "errors.jsonl"))
            for shard in self.split.shards:
                piece = first[shard.index]
                with self._files(piece) as files:
                    merged = merge_shard(
                        self.folder / piece.path, [*files, *later], results, errors, model=name
                    )
                if merged.tally.rows != shard.rows:
                    raise IncompleteResultsError(
                        f"{self.folder / piece.path} has {merged.tally.rows} rows, but {shard.rows} were planned: the "
                        "file is damaged. The batches are untouched, and so are the results of theirs at the service.",
                        batch_id=self._batch_id(piece),
                    )
                tally.add(merged.tally)
                retries.append(merged.retry)
        self._tallies[model] = tally
        log.info("%s: %d of %d rows are ok", name or "Results", tally.ok, tally.rows)
        return retries

    @contextlib.contextmanager
    def _files(self, piece: Piece, *, shared: bool = False) -> Iterator[list[BatchFiles]]:
        """Download what a piece brought: its batch, the ones that died before it, or why it was refused."""
        batch_id, refused = self._batch_id(piece), self._refused(piece)
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

            for dead in self._dead(piece):
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
                lines = refused_lines(
                    self.folder / piece.path, status=refused.status, message=refused.message
                )
                path = Path(folder) / "error.jsonl"
                with path.open("wb") as stream:
                    stream.writelines(lines)
                found.append(BatchFiles(None, path, shared=shared))
            elif refused is None:
                raise AssertionError(f"no batch for {piece}")
            yield found

    def finish(self) -> dict[str, Any]:
        """
        Write the manifest and return it.

        :raises BatchError: the outcome is a failure by the job's options; the results are written.
        """
        runs = [
            ModelRun(
                self.options.replacements[model],
                self._tallies[model],
                [
                    summary
                    for pieces in self._rounds
                    for piece in pieces
                    if piece.model == model
                    for summary in self._summaries(piece)
                ],
                {name: str(self._model_folder(model) / f"{name}.jsonl") for name in ("results", "errors")},
            )
            for model in self._model_numbers
        ]
        paths = {"output_dir": str(self.output_dir), "manifest": str(self.output_dir / "manifest.json")}
        manifest = build_manifest(runs, prices=self.options.prices, paths=paths)
        log.info("Results are in %s\n%s", self.output_dir, render_summary(manifest))
        manifest["worth_another_attempt"] = self._worth_another_attempt
        manifest["task"] = asdict(self._submitter)
        if unfinished := self._unfinished():
            manifest["unfinished"] = self.key
            write_json(self.output_dir / "manifest.json", manifest)
            raise unfinished
        # With this key the manifest says that nothing is left to do, whatever the verdict on it.
        manifest["run"] = self.key
        write_json(self.output_dir / "manifest.json", manifest)
        remove_tree(self.folder)
        return manifest

    def _unfinished(self) -> BatchFailedError | None:
        """Return the error for batches that a retry has to submit (again); the results of the others are written."""
        pieces = [piece for pieces in self._rounds for piece in pieces]
        said: list[str] = []
        first = None
        # The rows of a batch that failed in an earlier round went into the next one.
        dead = [
            (self._batch_id(piece), ended)
            for piece in self._rounds[-1]
            if (ended := self._ended(piece)) and ended.status in DEAD_STATUSES
        ]
        if dead:
            first = dead[0][0]
            named = ", ".join(f"{batch_id} ({ended.status})" for batch_id, ended in dead[:5])
            reasons = [message for _, ended in dead for message in ended.errors]
            reason = f"; the service says: {reasons[0]}" if reasons else ""
            said.append(f"{len(dead)} of {len(pieces)} batches failed or were cancelled: {named}{reason}.")
        if refused := [(piece, why) for piece in pieces if (why := self._refused(piece))]:
            models = {
                self.options.replacements[piece.model] or "the rows' own models" for piece, _ in refused
            }
            said.append(
                f"{len(refused)} of {len(pieces)} batches were refused, of {', '.join(sorted(models))}: HTTP "
                f"{refused[0][1].status}, {refused[0][1].message.rstrip('.')}."
            )
        if not said:
            return None
        also = " (of a cancelled one also the rows that were done)" if dead else ""
        return BatchFailedError(
            f"{' '.join(said)} The rows of the others are written to {self.output_dir}. A retry submits these "
            f"batches{also} and pays for nothing else again; a clear would pay for all.",
            batch_id=first,
        )

    def _summaries(self, piece: Piece) -> Iterator[BatchSummary]:
        for state in [*self._dead(piece), self.ledger.state(piece.work_key)]:
            if isinstance(state, Sent | Ended):
                ended = state if isinstance(state, Ended) else None
                yield BatchSummary(
                    id=state.batch_id,
                    status=ended.status if ended else "",
                    rows=piece.shard.rows,
                    shard=piece.shard.index,
                    round=piece.round,
                    counts=dict(ended.counts) if ended else {},
                )

    def stop(self, *, cancels: bool) -> list[str]:
        """
        Send nothing from now on, and return the ids of the batches that are known to be open.

        :param cancels: whether to cancel a batch that is being created right now, once its answer comes.
        """
        self._stopped = True
        self._cancels_late = cancels
        if not self._rounds:
            # Ended before the folder was opened; an earlier try, or deferral, may have batches open all the same.
            try:
                self.open()
            except InvalidInputError:
                return []
        self._submission.stop()
        return self.open_batches

    def check_not_stopped(self) -> None:
        """
        Refuse to go on after :meth:`stop`.

        :raises SiliconFlowError: the task was ended.
        """
        if self._stopped:
            raise SiliconFlowError("The job does not go on: the task was ended from outside")

    def find_unrecorded(self, patience: float) -> list[str]:
        """
        Search the account for batches that were being created.

        :param patience: how long to look again for one that is not listed, in seconds.
        :raises SiliconFlowError: the account cannot be searched.
        """
        unrecorded = (
            [piece for piece in self._current if isinstance(self.ledger.state(piece.work_key), Sending)]
            if self._rounds
            else []
        )
        works = (self._work(piece, "") for piece in unrecorded)
        return [batch.id for batch in self._submission.find(works, patience)] if unrecorded else []


def _flat(retries: Mapping[int, Sequence[bytearray]]) -> Iterator[bytearray]:
    for chosen in retries.values():
        yield from chosen
