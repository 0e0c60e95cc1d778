"""
What a job consists of: rows cut into shards, each shard over each model, in rounds.

A plan is made once, by the first try, and kept in the job's folder: every later process works on the same shards.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from airflow_provider_siliconflow.api.exceptions import InvalidInputError
from airflow_provider_siliconflow.batch_files.atomic_files import write_json
from airflow_provider_siliconflow.batch_files.shards import Shard, Split, split_requests
from airflow_provider_siliconflow.jobs.folder import read_json
from airflow_provider_siliconflow.jobs.options import RunOptions

#: Folder of the shards of the first round.
FIRST_ROUND = "round-0"


@dataclass(frozen=True, slots=True)
class Piece:
    """
    One batch of a job: a shard over a model in a round.

    :param round: 0 for the first attempt of the rows, 1 for the first retry and so on.
    :param model: index of the model among :attr:`RunOptions.replacements`.
    :param folder: where the shard is, below the job's folder.
    :param upload_key: identity of the upload of the shard, which its models share.
    :param work_key: identity of the batch.
    """

    round: int
    model: int
    shard: Shard
    folder: str
    upload_key: str
    work_key: str

    @property
    def path(self) -> str:
        """The shard, relative to the job's folder."""
        return f"{self.folder}/{self.shard.name}"


@dataclass(frozen=True, slots=True)
class Plan:
    """
    What the try that planned the job fixed for all later ones.

    The window and the metadata are kept, since a template such as ``now()`` renders anew on every try, and the same
    work under another identity would be paid for again.

    :param complete: whether no earlier try can have sent a batch that the folder does not know of.
    """

    split: Split
    completion_window: str
    metadata: Mapping[str, str]
    complete: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON types."""
        return {
            "split": self.split.to_dict(),
            "completion_window": self.completion_window,
            "metadata": dict(self.metadata),
            "complete": self.complete,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Return the plan that :meth:`to_dict` described."""
        return cls(
            split=Split.from_dict(data["split"]),
            completion_window=data["completion_window"],
            metadata=data["metadata"],
            complete=data["complete"],
        )


class PlanFolder:
    """
    The plan of a job and of its rounds, in the job's folder.

    :param path: a ``pathlib.Path`` or an fsspec-backed path.
    """

    def __init__(self, path: Any) -> None:
        self.path = path

    def __str__(self) -> str:
        """Return the path."""
        return str(self.path)

    def read(self) -> Plan | None:
        """Return the plan; ``None`` if there is none."""
        stored = read_json(self.path / "plan.json", or_cut="the plan is made anew")
        return None if stored is None else Plan.from_dict(stored)

    def write(self, plan: Plan) -> None:
        """Keep the plan."""
        write_json(self.path / "plan.json", plan.to_dict())

    def read_round(self, number: int) -> dict[int, tuple[Shard, ...]] | None:
        """Return the shards of a later round by model; ``None`` if it was not planned."""
        stored = read_json(self.path / f"round-{number}.json", or_cut="the round is planned anew")
        if stored is None:
            return None
        return {int(model): tuple(map(Shard.from_dict, items)) for model, items in stored["shards"].items()}

    def write_round(self, number: int, shards: Mapping[int, Sequence[Shard]]) -> None:
        """Keep the shards of a later round, by model."""
        planned = {str(model): [shard.to_dict() for shard in items] for model, items in shards.items()}
        write_json(self.path / f"round-{number}.json", {"shards": planned})


def plan(requests: Any, folder: Any, *, name: str, options: RunOptions) -> Split:
    """
    Cut rows into shards.

    :param requests: a file (something that opens) or rows.
    :param folder: where the shards go.
    :param name: what messages call the rows.
    :raises InvalidInputError: rows are wrong, or some name no model and none is given.
    """
    split = split_requests(
        requests,
        folder,
        name=name,
        max_rows=options.max_rows,
        max_bytes=options.max_bytes,
        defaults=options.request_params,
    )
    if split.rows_without_model and not options.models:
        raise InvalidInputError(
            f"{name}: {split.rows_without_model} of {split.rows} rows name no model; give model= or models=, or "
            "put it into their body. Nothing was uploaded."
        )
    return split


def estimate(requests: Any, *, name: str, options: RunOptions) -> dict[str, Any]:
    """
    Plan a job without sending anything, and return what it would take.

    Prompt tokens are estimated at a quarter per ASCII character of the messages and one per other character;
    completions cannot be known, so ``cost`` is that of the prompts alone.
    """
    with tempfile.TemporaryDirectory(prefix="siliconflow-") as folder:
        split = plan(requests, Path(folder), name=name, options=options)
    models = []
    for model in options.replacements:
        price = (options.prices or {}).get(model or "")
        models.append(
            {
                "model": model,
                "batches": len(split.shards),
                "prompt_tokens": split.prompt_tokens,
                "prompt_cost": round(split.prompt_tokens * price["prompt"] / 1e6, 6) if price else None,
            }
        )
    return {
        "dry_run": True,
        "rows": split.rows,
        "bytes": split.bytes,
        "shards": len(split.shards),
        "batches": len(split.shards) * len(models),
        "models": models,
        "models_named_by_rows": list(split.models),
    }
