"""
What a job consists of: rows cut into shards, each shard over each model, in rounds.

A plan is made once, by the first try, and kept in the job's folder: every later process works on the same shards.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeVar

from airflow_provider_siliconflow.api.arguments import check_completion_window, check_metadata
from airflow_provider_siliconflow.api.exceptions import InvalidInputError
from airflow_provider_siliconflow.batch_files.atomic_files import local_path, temporary_folder, write_json
from airflow_provider_siliconflow.batch_files.prices import cost, price_of, rounded
from airflow_provider_siliconflow.batch_files.shards import Shard, Split, split_requests
from airflow_provider_siliconflow.jobs.folder import read_json
from airflow_provider_siliconflow.jobs.identity import Submitter
from airflow_provider_siliconflow.jobs.options import RunOptions

log = logging.getLogger(__name__)

T = TypeVar("T")

#: What stores say of a file that changes when the file does.
_VERSION_FIELDS = (
    "ETag",
    "etag",
    "LastModified",
    "last_modified",
    "mtime",
    "updated",
    "md5Hash",
    "generation",
)

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

    :param submitter: whose job it is.
    :param conn_id: the connection that leads to its batches.
    :param models: models by ``replace``, in the order of their indexes.
    :param max_rows: rows per shard at most, as the rows were cut.
    :param max_bytes: bytes per shard at most.
    :param params: digest of the body parameters that were put into the rows.
    :param source: what told the input's version cheaply when it was read, see :func:`source_version`.
    :param complete: whether no earlier try can have sent a batch that the folder does not know of.
    """

    split: Split
    completion_window: str
    metadata: Mapping[str, str]
    submitter: Submitter
    conn_id: str
    models: tuple[str, ...]
    max_rows: int
    max_bytes: int
    params: str
    source: str | None
    complete: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON types."""
        return {
            "split": self.split.to_dict(),
            "completion_window": self.completion_window,
            "metadata": dict(self.metadata),
            "task": asdict(self.submitter),
            "conn_id": self.conn_id,
            "models": list(self.models),
            "max_rows": self.max_rows,
            "max_bytes": self.max_bytes,
            "params": self.params,
            "source": self.source,
            "complete": self.complete,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """
        Return the plan that :meth:`to_dict` described.

        :raises ValueError: it was damaged, or others wrote it.
        """
        return cls(
            split=Split.from_dict(data["split"]),
            completion_window=check_completion_window(data["completion_window"]),
            metadata=check_metadata(data["metadata"], identified=True),
            submitter=_checked_submitter(Submitter(**data["task"])),
            conn_id=str(data["conn_id"]),
            models=tuple(str(model) for model in data["models"]),
            max_rows=int(data["max_rows"]),
            max_bytes=int(data["max_bytes"]),
            params=str(data["params"]),
            source=None if data["source"] is None else str(data["source"]),
            complete=data["complete"] is True,
        )

    def is_of(self, requests: Any, options: RunOptions, *, name: str) -> bool:
        """
        Whether the plan was made of these rows.

        A file that is the same by :func:`source_version` is not read; anything else is cut into shards again, which are
        compared with those of the plan.

        :param requests: a file (something that opens) or rows.
        """
        same_params = self.params == digest_of(options.request_params)
        if same_params and self.source is not None and self.source == source_version(requests):
            return True
        options = replace(options, max_rows=self.max_rows, max_bytes=self.max_bytes)
        with temporary_folder() as folder:
            try:
                split = plan(requests, folder, name=name, options=options)
            except InvalidInputError as exc:
                log.warning("The rows can no longer be planned: %s", exc)
                return False
        return [shard.sha256 for shard in split.shards] == [shard.sha256 for shard in self.split.shards]


def digest_of(params: Mapping[str, Any] | None) -> str:
    """Return a digest of body parameters."""
    text = json.dumps(params or {}, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def source_version(requests: Any) -> str | None:
    """
    Return what tells a version of a file from another without reading it: its size, and what its store says of it.

    :param requests: a file or rows.
    :returns: ``None`` for rows, and where the store says too little.
    """
    try:
        if (local := local_path(requests)) is not None:
            found = local.stat()
            return f"{found.st_size} bytes, changed {found.st_mtime_ns}"
        if not hasattr(requests, "fs"):
            return None
        info = requests.fs.info(requests.path)
    # Stores raise errors of their own kinds, and the file is read then.
    except Exception as exc:  # noqa: BLE001
        log.info("Cannot tell the version of the input without reading it: %s", exc)
        return None
    known = {name: str(info[name])[:200] for name in _VERSION_FIELDS if info.get(name)}
    return json.dumps({"size": info.get("size"), **known}, sort_keys=True) if known else None


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

    def read_round(self, number: int, models: range) -> dict[int, tuple[Shard, ...]] | None:
        """
        Return the shards of a later round by model; ``None`` if it was not planned.

        :param models: indexes of the models that the job has.
        """
        decode = partial(_shards_by_model, models=models)
        return self._read(f"round-{number}.json", decode, or_cut="the round is planned anew")

    def read_rests(self) -> list[Rest]:
        """Return the rests of dead batches, in the order of their making."""
        read = self._read("rests.json", _rests, or_cut="the rests of dead batches are looked up again")
        return read or []

    def write_rests(self, rests: Sequence[Rest]) -> None:
        """Keep the rests of dead batches."""
        stored = [{"of": rest.of, "shard": rest.shard and rest.shard.to_dict()} for rest in rests]
        write_json(self.path / "rests.json", {"rests": stored})

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
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as exc:
            log.warning("%s is damaged, or not one of ours (%s); %s", self.path / name, exc, or_cut)
            return None


def _checked_submitter(submitter: Submitter) -> Submitter:
    texts = (submitter.dag_id, submitter.run_id, submitter.task_id)
    numbers = (submitter.map_index, submitter.generation)
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(each, int) for each in numbers):
        raise ValueError("it does not name its task")
    return submitter


def _rests(stored: dict[str, Any]) -> list[Rest]:
    return [
        Rest(item["of"], None if item["shard"] is None else Shard.from_dict(item["shard"]))
        for item in stored["rests"]
    ]


def _shards_by_model(stored: dict[str, Any], models: range) -> dict[int, tuple[Shard, ...]]:
    by_model = {int(model): tuple(map(Shard.from_dict, items)) for model, items in stored["shards"].items()}
    if not all(model in models for model in by_model):
        raise ValueError("it names a model that the job does not have")
    return by_model


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
    with temporary_folder() as folder:
        split = plan(requests, folder, name=name, options=options)
    models = []
    for model in options.replacements:
        price = price_of(model, options.prices)
        models.append(
            {
                "model": model,
                "batches": len(split.shards),
                "prompt_tokens": split.prompt_tokens,
                "prompt_cost": rounded(cost(split.prompt_tokens, price["prompt"])) if price else None,
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
