"""
What a job consists of: rows cut into shards, each shard over each model, in rounds.

A plan is made once, by the first try, and kept in the job's folder: every later process works on the same shards.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from airflow_provider_siliconflow.api.arguments import check_completion_window, check_metadata
from airflow_provider_siliconflow.api.exceptions import InvalidInputError
from airflow_provider_siliconflow.batch_files.atomic_files import write_json
from airflow_provider_siliconflow.batch_files.shards import Shard, Split, split_requests
from airflow_provider_siliconflow.jobs.folder import read_json
from airflow_provider_siliconflow.jobs.options import RunOptions

log = logging.getLogger(__name__)

T = TypeVar("T")

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
    :param rest_of: identity of the batch that died, if these are the rows that it did not answer. They are in the round
        of that batch: none of them has had an attempt in it.
    """

    round: int
    model: int
    shard: Shard
    folder: str
    upload_key: str
    work_key: str
    rest_of: str | None = None

    @property
    def path(self) -> str:
        """The shard, relative to the job's folder."""
        return f"{self.folder}/{self.shard.name}"


@dataclass(frozen=True, slots=True)
class Rest:
    """
    The rows that a dead batch did not answer.

    :param of: identity of the batch.
    :param shard: the rows; ``None`` if it answered all.
    """

    of: str
    shard: Shard | None

    @property
    def folder(self) -> str:
        """Where the shard is, below the job's folder."""
        return f"rest-{self.of[:16]}"


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
            split=_checked_split(Split.from_dict(data["split"])),
            completion_window=check_completion_window(data["completion_window"]),
            metadata=check_metadata(data["metadata"], reserved=1),
            complete=data["complete"] is True,
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
        return self._read("plan.json", Plan.from_dict, or_cut="the plan is made anew")

    def write(self, plan: Plan) -> None:
        """Keep the plan."""
        write_json(self.path / "plan.json", plan.to_dict())

    def read_round(self, number: int) -> dict[int, tuple[Shard, ...]] | None:
        """Return the shards of a later round by model; ``None`` if it was not planned."""
        return self._read(f"round-{number}.json", _shards_by_model, or_cut="the round is planned anew")

    def write_round(self, number: int, shards: Mapping[int, Sequence[Shard]]) -> None:
        """Keep the shards of a later round, by model."""
        planned = {str(model): [shard.to_dict() for shard in items] for model, items in shards.items()}
        write_json(self.path / f"round-{number}.json", {"shards": planned})


    def _read(self, name: str, decode: Callable[[dict[str, Any]], T], *, or_cut: str) -> T | None:
        stored = read_json(self.path / name, or_cut=or_cut)
        if stored is None:
            return None
        try:
            return decode(stored)
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            log.warning("%s is damaged, or none of ours (%s); %s", self.path / name, exc, or_cut)
            return None


def _checked_split(split: Split) -> Split:
    for shard in split.shards:
        _checked(shard)
    if not split.shards or split.rows != sum(shard.rows for shard in split.shards):
        raise ValueError("its rows are not those of its shards")
    return split


def _rests(stored: dict[str, Any]) -> list[Rest]:
    return [
        Rest(item["of"], None if item["shard"] is None else _checked(Shard.from_dict(item["shard"])))
        for item in stored["rests"]
    ]


def _shards_by_model(stored: dict[str, Any]) -> dict[int, tuple[Shard, ...]]:
    return {
        int(model): tuple(_checked(Shard.from_dict(item)) for item in items)
        for model, items in stored["shards"].items()
    }


def _checked(shard: Shard) -> Shard:
    """
    Return a shard that was read from a folder in which others may write.

    :raises ValueError: its name leads elsewhere, or a figure is none.
    """
    numbers = (shard.index, shard.first_row, shard.rows, shard.bytes, *shard.sources)
    if not all(isinstance(number, int) and 0 <= number < 1 << 53 for number in numbers):
        raise ValueError("a figure of a shard is none")
    if shard.name != f"shard-{shard.index:05d}.jsonl" or not re.fullmatch("[0-9a-f]{64}", shard.sha256):
        raise ValueError(f"a shard has the name {shard.name!r:.80}")
    return shard


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
        defaults_name="request_params",
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
