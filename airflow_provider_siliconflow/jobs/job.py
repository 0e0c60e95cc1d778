"""An open job: its batches, and what each is now."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from airflow_provider_siliconflow.api import arguments
from airflow_provider_siliconflow.api.models import DEAD_STATUSES, Batch
from airflow_provider_siliconflow.batch_files.shards import Shard
from airflow_provider_siliconflow.jobs.identity import BatchWork, Submitter
from airflow_provider_siliconflow.jobs.ledger import FolderLedger
from airflow_provider_siliconflow.jobs.options import RunOptions
from airflow_provider_siliconflow.jobs.plan import FIRST_ROUND, Piece, Plan, PlanFolder
from airflow_provider_siliconflow.jobs.states import Ended, Planned, Refused, Sending, Sent, State
from airflow_provider_siliconflow.jobs.submission import Submission

log = logging.getLogger(__name__)


class OpenJob:
    """
    A job whose plan was made, in this process.

    :param options: what is asked; window and metadata are taken from the plan.
    :param submitter: who asks.
    :param conn_id: the connection, a part of each identity. Not the host: under another name of the same service the
        work is the same, and must not be paid again.
    :param plans: the job's folder.
    :param ledger: what each batch is.
    :param submission: submits over that ledger.
    """

    def __init__(
        self,
        options: RunOptions,
        plan: Plan,
        *,
        submitter: Submitter,
        conn_id: str,
        plans: PlanFolder,
        ledger: FolderLedger,
        submission: Submission,
    ) -> None:
        self.options = replace(options, completion_window=plan.completion_window, metadata=plan.metadata)
        self.plan = plan
        self.plans = plans
        self.ledger = ledger
        self.submission = submission
        self._submitter = submitter
        self._where = {"conn_id": conn_id}
        self.rounds = [self._pieces(0, dict.fromkeys(self.models, plan.split.shards))]
        while (shards := plans.read_round(len(self.rounds))) is not None:
            self.rounds.append(self._pieces(len(self.rounds), shards))

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
        """The batches of the last round, and those of earlier ones that have not ended, having been refused before."""
        late = [piece for pieces in self.rounds[:-1] for piece in pieces if self.ended(piece) is None]
        return [*late, *self.rounds[-1]]

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
            folder=FIRST_ROUND if number == 0 else f"round-{number}/{model}",
            upload_key=self._submitter.key(upload=shard.sha256, **self._where),
            work_key=self._submitter.key(
                input=shard.sha256,
                completion_window=self.options.completion_window,
                model=self.options.replacements[model],
                round=number,
                **self._where,
            ),
        )

    def add_round(self, shards: Mapping[int, Sequence[Shard]]) -> None:
        """Plan another round of these shards, by model."""
        number = len(self.rounds)
        self.plans.write_round(number, shards)
        self.rounds.append(self._pieces(number, shards))

    def name(self, piece: Piece) -> str:
        """Return what messages call a batch that has no id yet."""
        model = self.options.replacements[piece.model]
        return f"shard {piece.shard.index} of round {piece.round}{f', {model}' if model else ''}"

    def source(self, piece: Piece) -> Any:
        """Return the request file of a batch."""
        return self.plans.path / piece.path

    def work(self, piece: Piece, file_id: str) -> BatchWork:
        """Return the request for a batch, over the uploaded file."""
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

    # States -----------------------------------------------------------------------------------------------

    def state(self, piece: Piece) -> State:
        """Return what a batch is."""
        return self.ledger.state(piece.work_key)

    def batch_id(self, piece: Piece) -> str | None:
        """Return the id of a batch that was created."""
        state = self.state(piece)
        return state.batch_id if isinstance(state, Sent | Ended) else None

    def ended(self, piece: Piece) -> Ended | None:
        """Return what became of a batch that has ended."""
        state = self.state(piece)
        return state if isinstance(state, Ended) else None

    def dead(self, piece: Piece) -> Ended | None:
        """Return what became of a batch that failed or was cancelled."""
        ended = self.ended(piece)
        return ended if ended is not None and ended.status in DEAD_STATUSES else None

    def refused(self, piece: Piece) -> Refused | None:
        """Return what the service said if it did not take the batch in this try."""
        state = self.state(piece)
        return state if isinstance(state, Refused) else None

    def is_waiting(self, piece: Piece) -> bool:
        """Whether a batch is still to be submitted, or to be searched for."""
        return isinstance(self.state(piece), Planned | Sending)

    def retired(self, piece: Piece) -> tuple[Ended, ...]:
        """Return the batches that died before the present one; rows of theirs may be paid for."""
        return self.ledger.retired(piece.work_key)

    @property
    def batch_ids(self) -> tuple[str, ...]:
        """Ids of all batches so far."""
        return tuple(batch_id for piece in self.pieces if (batch_id := self.batch_id(piece)))

    @property
    def open_batches(self) -> tuple[str, ...]:
        """Ids of the batches that were submitted and have not ended as far as this job knows."""
        states = map(self.state, self.current)
        return tuple(state.batch_id for state in states if isinstance(state, Sent))

    @property
    def has_paid(self) -> bool:
        """Whether a batch was created, dead ones included."""
        return bool(self.batch_ids) or any(map(self.retired, self.current))

    def record_ended(self, batches: Iterable[Batch]) -> None:
        """Record what became of batches: those that ended are not waited for any more."""
        by_id = {batch.id: batch for batch in batches if batch.is_terminal}
        states: dict[str, State] = {}
        for piece in self.current:
            state = self.state(piece)
            batch = by_id.get(state.batch_id) if isinstance(state, Sent) else None
            if isinstance(state, Sent) and batch is not None:
                states[piece.work_key] = ended_state(state, batch)
        if not states:
            return
        self.ledger.record_all(states)
        pieces = self.rounds[-1]
        done = sum(self.ended(piece) is not None for piece in pieces)
        log.info("Round %d: %d of %d batches have ended", len(self.rounds) - 1, done, len(pieces))


def ended_state(sent: Sent, batch: Batch) -> Ended:
    """Return the state of a batch that reached a terminal status."""
    return Ended(
        batch.id,
        sent.number,
        batch.status,
        batch.request_counts.model_dump(mode="json", include={"total", "completed", "failed"}),
        tuple(batch.error_messages[:3]),
    )
