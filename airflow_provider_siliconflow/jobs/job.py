"""An open job: its batches and their states."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from airflow_provider_siliconflow.api import arguments
from airflow_provider_siliconflow.api.models import DEAD_STATUSES, Batch, UploadedFile
from airflow_provider_siliconflow.batch_files.atomic_files import OwnFile
from airflow_provider_siliconflow.batch_files.shards import Shard
from airflow_provider_siliconflow.jobs.identity import BatchWork, Submitter, Upload, upload_name
from airflow_provider_siliconflow.jobs.ledger import FolderLedger
from airflow_provider_siliconflow.jobs.options import RunOptions
from airflow_provider_siliconflow.jobs.plan import FIRST_ROUND, LiveStart, Piece, Plan, PlanFolder, Rest
from airflow_provider_siliconflow.jobs.settled import SETTLE_PATIENCE, is_settled
from airflow_provider_siliconflow.jobs.states import Ended, Planned, Refused, Sending, Sent, State
from airflow_provider_siliconflow.jobs.submission import Submission

log = logging.getLogger(__name__)


class OpenJob:
    """
    A job that has a plan, opened in this process.

    :param options: the job's options; models, window and metadata are taken from the plan.
    :param plan: the plan.
    :param plans: the job's folder.
    :param ledger: the states of its batches.
    :param submission: submits batches and records them in that ledger.
    """

    def __init__(
        self,
        options: RunOptions,
        plan: Plan,
        *,
        plans: PlanFolder,
        ledger: FolderLedger,
        submission: Submission,
    ) -> None:
        self.options = replace(
            options,
            models=plan.models,
            completion_window=plan.completion_window,
            metadata=plan.metadata,
        )
        self.plan = plan
        self.plans = plans
        self.ledger = ledger
        self.submission = submission
        self.submitter: Submitter = plan.submitter
        # Without the host: the same service under another name is the same work, and must not be paid for again.
        self._where = {"conn_id": plan.conn_id}
        first = plan.reuse.to_send if plan.reuse else {model: plan.shards_of(model) for model in self.models}
        self.rounds: list[list[Piece]] = [[] for _ in range(plan.kept_rounds)] or [self._pieces(0, first)]
        #: The rounds after these, whose rows are asked one by one.
        self.live_rounds: list[list[Piece]] = []
        self.live_start = plans.read_live()
        while (planned := plans.read_round(self._next_round, self.models)) is not None:
            self._take_round(planned.shards, live=planned.live)
        self._rests: list[Rest] = []
        self._unreadable: dict[str, str] = {}
        for rest in plans.read_rests():
            self._take_rest(rest)

    # Pieces -----------------------------------------------------------------------------------------------

    @property
    def models(self) -> range:
        """Indexes of the models."""
        return range(len(self.options.replacements))

    @property
    def pieces(self) -> Iterator[Piece]:
        """The batches of all rounds."""
        return (piece for pieces in self.rounds for piece in pieces)

    @property
    def current(self) -> list[Piece]:
        """
        The batches of the last round, and those of earlier ones that no later round stands for.

        Those had been refused, and have not ended; or they died since.
        """
        late = [piece for pieces in self.rounds[:-1] for piece in pieces if self._is_late(piece)]
        return [*late, *self.rounds[-1]]

    def _is_late(self, piece: Piece) -> bool:
        if self.ended(piece) is None:
            return True
        if self.dead(piece) is None:
            return False
        sources = set(piece.shard.sources or (piece.shard.index,))
        return all(
            sources.isdisjoint(later.shard.sources)
            for pieces in self.rounds[piece.round + 1 :]
            for later in pieces
            if later.model == piece.model
        )

    def _pieces(self, number: int, shards: Mapping[int, Sequence[Shard]]) -> list[Piece]:
        """Return the batches of a round shard by shard, so that the models of an upload follow each other."""
        pieces = [
            self._piece(number, model, shard, folder=folder)
            for model, model_shards in shards.items()
            for folder in [self._folder(number, model)]
            for shard in model_shards
        ]
        return sorted(pieces, key=lambda piece: (piece.shard.index, piece.model))

    def _folder(self, number: int, model: int) -> str:
        if number:
            return f"round-{number}/{model}"
        unanswered = self.plan.reuse.folder(model) if self.plan.reuse else None
        return self.plan.folder_of(model) if unanswered is None else f"{FIRST_ROUND}/{unanswered}"

    def _piece(
        self, number: int, model: int, shard: Shard, *, folder: str, rest_of: str | None = None
    ) -> Piece:
        return Piece(
            round=number,
            model=model,
            shard=shard,
            folder=folder,
            rest_of=rest_of,
            upload_key=self.submitter.key(upload=shard.sha256, **self._where),
            work_key=self.submitter.key(
                input=shard.sha256,
                completion_window=self.options.completion_window,
                model=self.options.replacements[model],
                round=number,
                **self._where,
            ),
        )

    @property
    def attempts(self) -> int:
        """How often this job has sent rows in batches, without what it kept of a finished one."""
        return len(self.rounds) - self.plan.kept_rounds

    @property
    def _next_round(self) -> int:
        return len(self.rounds) + len(self.live_rounds)

    def add_round(self, shards: Mapping[int, Sequence[Shard]], *, live: bool = False) -> list[Piece]:
        """
        Plan another round, and return its pieces.

        :param shards: its shards by model.
        :param live: whether its rows are asked one by one; only such rounds can follow one.
        """
        self.plans.write_round(self._next_round, shards, live=live)
        return self._take_round(shards, live=live)

    def _take_round(self, shards: Mapping[int, Sequence[Shard]], *, live: bool) -> list[Piece]:
        pieces = self._pieces(self._next_round, shards)
        if live or self.live_rounds:
            pieces = [replace(piece, live=True) for piece in pieces]
            self.live_rounds.append(pieces)
        else:
            self.rounds.append(pieces)
        return pieces

    # Asking row by row ------------------------------------------------------------------------------------

    @property
    def live_at(self) -> float | None:
        """When the rows that are open are asked one by one, in epoch seconds; ``None`` if they are not."""
        if self.live_start is not None:
            return self.live_start.at
        after = self.options.live_after
        return None if after is None else after.time(self.plan.began)

    @property
    def live_pieces(self) -> Iterator[Piece]:
        """The shards whose rows are asked one by one, of all rounds."""
        return (piece for pieces in self.live_rounds for piece in pieces)

    def start_live(self, at: float, cancelled: Iterable[str]) -> None:
        """
        Record that the job sends no more batches; this is final.

        :param at: epoch seconds.
        :param cancelled: ids of open batches that are about to be cancelled.
        """
        before = self.live_start
        known = () if before is None else before.cancelled
        start = LiveStart(at if before is None else before.at, tuple(dict.fromkeys((*known, *cancelled))))
        if start != before:
            self.plans.write_live(start)
            self.live_start = start

    def is_asked_live(self, piece: Piece) -> bool:
        """Whether rows of a batch are asked one by one."""
        sources = set(piece.shard.sources or (piece.shard.index,))
        return any(
            live.model == piece.model and not sources.isdisjoint(live.shard.sources)
            for live in self.live_pieces
        )

    def add_rest(self, piece: Piece, shard: Shard | None) -> None:
        """Plan a batch of the rows that a dead batch did not answer; ``None`` if it answered all."""
        if shard is not None:
            # Keep from which shards of the first round they come: the merge then reads only the batches it needs.
            shard = replace(shard, sources=piece.shard.sources or (piece.shard.index,))
        rest = Rest(piece.work_key, shard)
        self.plans.write_rests([*self._rests, rest])
        self._take_rest(rest)

    def _take_rest(self, rest: Rest) -> None:
        dead = next((piece for piece in self.pieces if piece.work_key == rest.of), None)
        if dead is None:
            log.warning("The rest of %s belongs to no batch of this job; it is not used", rest.of)
            return
        self._rests.append(rest)
        if rest.shard is not None:
            made = self._piece(dead.round, dead.model, rest.shard, folder=rest.folder, rest_of=rest.of)
            self.rounds[dead.round].append(made)

    def name(self, piece: Piece) -> str:
        """Return how messages call a batch that has no id yet."""
        model = self.options.replacements[piece.model]
        what = "the unanswered rows of a batch that died" if piece.rest_of else f"shard {piece.shard.index}"
        return f"{what} of round {piece.round}{f', {model}' if model else ''}"

    def source(self, piece: Piece) -> OwnFile:
        """Return the request file of a batch."""
        return OwnFile(self.plans.path / piece.path)

    def planned(self, shard: Shard) -> OwnFile:
        """Return a shard of the plan: rows in their order, whatever the model, and whether or not they are sent."""
        return OwnFile(self.plans.path / FIRST_ROUND / shard.name)

    def work(self, piece: Piece, send: Callable[[str], UploadedFile]) -> BatchWork:
        """
        Return the request for a batch.

        :param send: uploads its request file under a name, when it is needed.
        """
        model = self.options.replacements[piece.model]
        # Without round and index: the same rows in another round are the same upload, and the name of the file is part
        # of the proof that a batch over it is ours.
        name = upload_name(self.submitter.task_id, piece.upload_key)
        upload = Upload(piece.upload_key, name, piece.shard.bytes, piece.shard.sha256, lambda: send(name))
        return BatchWork(
            key=piece.work_key,
            label=self.submitter.label,
            input_file_id=None,
            endpoint=arguments.CHAT_COMPLETIONS,
            completion_window=self.options.completion_window,
            metadata=self.options.metadata,
            replace={"model": model} if model else None,
            upload=upload,
            submitter=self.submitter,
        )

    # States -----------------------------------------------------------------------------------------------

    def state(self, piece: Piece) -> State:
        """Return the state of a batch."""
        return self.ledger.state(piece.work_key)

    def batch_id(self, piece: Piece) -> str | None:
        """Return the id of a batch that was created."""
        state = self.state(piece)
        return state.batch_id if isinstance(state, Sent | Ended) else None

    def ended(self, piece: Piece) -> Ended | None:
        """Return the state of a batch that has ended; ``None`` for any other."""
        state = self.state(piece)
        return state if isinstance(state, Ended) else None

    def dead(self, piece: Piece) -> Ended | None:
        """Return the state of a batch that failed or was cancelled, unless a batch of its rest is planned."""
        ended = self.ended(piece)
        if ended is None or ended.status not in DEAD_STATUSES:
            return None
        return None if any(rest.of == piece.work_key for rest in self._rests) else ended

    def refused(self, piece: Piece) -> Refused | None:
        """Return the refusal of a batch if the service refused it in this try."""
        state = self.state(piece)
        return state if isinstance(state, Refused) else None

    def leave_out(self, piece: Piece, reason: str) -> None:
        """Go on in this process without a batch that was created and cannot be read; it stays recorded."""
        self._unreadable[piece.work_key] = reason

    def left_out(self, piece: Piece) -> str | None:
        """Return why a batch is left out."""
        return self._unreadable.get(piece.work_key)

    def is_waiting(self, piece: Piece) -> bool:
        """Whether a batch must still be submitted or searched for."""
        return isinstance(self.state(piece), Planned | Sending)

    def retired(self, piece: Piece) -> tuple[Ended, ...]:
        """Return the batches that died before the current one; some of their rows may be paid for."""
        return self.ledger.retired(piece.work_key)

    @property
    def batch_ids(self) -> tuple[str, ...]:
        """Ids of all batches so far."""
        return tuple(batch_id for piece in self.pieces if (batch_id := self.batch_id(piece)))

    @property
    def open_batches(self) -> tuple[str, ...]:
        """Ids of the batches that were submitted and are not known to have ended and settled."""
        states = map(self.state, self.current)
        return tuple(state.batch_id for state in states if isinstance(state, Sent))

    @property
    def awaited(self) -> tuple[str, ...]:
        """Ids of those that are to be waited for: all but the ones that are left out."""
        return tuple(state.batch_id for state in self._awaited)

    @property
    def settles_at(self) -> float | None:
        """
        When the results of all batches that are awaited are certainly complete, in epoch seconds.

        ``None`` if one of them has not reached a terminal status.
        """
        since = [state.terminal_since for state in self._awaited]
        return max(since) + SETTLE_PATIENCE + 1.0 if since and all(since) else None

    @property
    def running(self) -> int:
        """Number of the batches that have not ended, but for those that are left out."""
        return sum(not state.terminal_since for state in self._awaited)

    @property
    def _awaited(self) -> Iterator[Sent]:
        for piece in self.current:
            state = self.state(piece)
            if isinstance(state, Sent) and self.left_out(piece) is None:
                yield state

    @property
    def has_paid(self) -> bool:
        """Whether any batch was created, dead ones included."""
        return bool(self.batch_ids) or any(map(self.retired, self.current))

    def record_ended(self, batches: Iterable[Batch], *, at: float) -> None:
        """
        Record batches that have ended; those that are settled need no more waiting.

        :param batches: batches as they were read; those that have not ended are ignored.
        :param at: when they were first seen to have ended, in epoch seconds.
        """
        by_id = {batch.id: batch for batch in batches if batch.is_terminal}
        states: dict[str, State] = {}
        for piece in self.current:
            state = self.state(piece)
            batch = by_id.get(state.batch_id) if isinstance(state, Sent) else None
            if not isinstance(state, Sent) or batch is None:
                continue
            if is_settled(batch):
                states[piece.work_key] = Ended.of(batch, state.number, at=state.terminal_since or at)
            elif not state.terminal_since:
                states[piece.work_key] = replace(state, terminal_since=at)
        self._record(states)

    def record_settled(self, piece: Piece, batch: Batch) -> None:
        """Record that a batch is settled now which was not settled when it was first seen to have ended."""
        state = self.state(piece)
        assert isinstance(state, Sent)
        assert state.terminal_since
        self._record({piece.work_key: Ended.of(batch, state.number, at=state.terminal_since)})

    def _record(self, states: Mapping[str, State]) -> None:
        if not states:
            return
        self.ledger.record_all(states)
        pieces = self.rounds[-1]
        done = sum(self.ended(piece) is not None for piece in pieces)
        log.info("Round %d: %d of %d batches have ended", len(self.rounds) - 1, done, len(pieces))
