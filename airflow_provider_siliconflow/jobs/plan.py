"""
The plan of a job: rows split into shards, each shard over each model, in rounds.

The first try makes the plan and stores it in the job's folder, so that every later process works on the same shards.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeVar

from airflow_provider_siliconflow.api.arguments import (
    MAX_FILE_BYTES,
    MAX_FILE_LINES,
    check_completion_window,
    check_metadata,
)
from airflow_provider_siliconflow.api.bounds import MAX_COUNT
from airflow_provider_siliconflow.api.exceptions import InvalidInputError
from airflow_provider_siliconflow.api.models import ROUTE_BATCH, ROUTE_LIVE
from airflow_provider_siliconflow.batch_files.atomic_files import (
    OwnFile,
    local_path,
    temporary_folder,
    write_json,
)
from airflow_provider_siliconflow.batch_files.invalid_rows import INVALID_ROWS, InvalidLines
from airflow_provider_siliconflow.batch_files.parameters import to_json
from airflow_provider_siliconflow.batch_files.prices import cost, price_of, rounded
from airflow_provider_siliconflow.batch_files.shards import Shard, Split, split_requests, write_variant
from airflow_provider_siliconflow.batch_files.tally import ModelTally
from airflow_provider_siliconflow.jobs.folder import names_in, read_json, read_object, remove_file
from airflow_provider_siliconflow.jobs.identity import Submitter
from airflow_provider_siliconflow.jobs.options import RunOptions

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Fields of a store's file information that change if the file changes.
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

#: The file that says that a job asks rows one by one.
_LIVE = "live.json"

#: Most rounds that a job can have made, over all of its clears.
MOST_ROUNDS = 100_000
_ROUND_NAME = re.compile(r"round-\d+\.json")


@dataclass(frozen=True, slots=True)
class Piece:
    """
    One batch of a job: a shard over a model in a round.

    :param round: 0 for the first attempt of the rows, 1 for the second, and so on.
    :param model: index of the model in :attr:`RunOptions.replacements`.
    :param folder: folder of the shard, relative to the job's folder.
    :param upload_key: identity of the upload of the shard, which its models share.
    :param work_key: identity of the batch.
    :param rest_of: identity of the dead batch if these are the rows that it did not answer. They belong to the same
        round, since they have not had their attempt in it.
    :param live: whether the rows are asked one by one, so that there is no batch.
    """

    round: int
    model: int
    shard: Shard
    folder: str
    upload_key: str
    work_key: str
    rest_of: str | None = None
    live: bool = False

    @property
    def path(self) -> str:
        """The shard, relative to the job's folder."""
        return f"{self.folder}/{self.shard.name}"


@dataclass(frozen=True, slots=True)
class Round:
    """
    A later round, as planned.

    :param shards: its shards by model.
    :param live: whether its rows are asked one by one.
    """

    shards: Mapping[int, tuple[Shard, ...]]
    live: bool = False


@dataclass(frozen=True, slots=True)
class LiveStart:
    """
    The moment from which on a job sends no batches, and asks the rows that are left one by one.

    :param at: epoch seconds.
    :param cancelled: ids of the batches that the job cancelled then. Their other rows may be asked at once, unlike
        those of a batch that somebody cancelled.
    """

    at: float
    cancelled: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rest:
    """
    The rows that a dead batch did not answer.

    :param of: identity of the batch.
    :param shard: the rows; ``None`` if the batch answered all.
    """

    of: str
    shard: Shard | None

    @property
    def folder(self) -> str:
        """Folder of the shard, relative to the job's folder."""
        return f"rest-{self.of[:16]}"


@dataclass(frozen=True, slots=True)
class Reuse:
    """
    What a job takes from the cache.

    :param to_send: by model, the shards of the first round: those of the plan if nothing is cached, else shards of the
        rows without an answer. Models that lack the same rows have the same shards, and so one upload.
    :param cached: by model, the number of cached answers for each shard of the plan.
    """

    to_send: Mapping[int, tuple[Shard, ...]]
    cached: Mapping[int, tuple[int, ...]]

    def folder(self, model: int) -> str | None:
        """
        Return the folder of a model's shards in that of the first round; ``None`` if they are those of the plan.
        """
        shards = self.to_send[model]
        if not shards or not shards[0].sources:
            return None
        return self.folder_of(
            next(other for other, theirs in sorted(self.to_send.items()) if theirs == shards)
        )

    @staticmethod
    def folder_of(model: int) -> str:
        """Return the folder of shards that were first written for a model."""
        return f"unanswered-{model}"

    def to_dict(self) -> dict[str, Any]:
        """Return the decision as JSON types."""
        return {
            "to_send": {
                str(model): [each.to_dict() for each in shards] for model, shards in self.to_send.items()
            },
            "cached": {str(model): list(counts) for model, counts in self.cached.items()},
        }

    @classmethod
    def from_dict(cls, data: Any, split: Split, shards: Sequence[tuple[Shard, ...]]) -> Reuse:
        """
        Return the decision that :meth:`to_dict` encoded.

        :param split: the shards of the plan.
        :param shards: for each model, these shards with what the model gets.
        :raises ValueError: it is damaged.
        """
        to_send = {int(m): tuple(map(Shard.from_dict, shards)) for m, shards in data["to_send"].items()}
        cached = {int(model): tuple(map(int, counts)) for model, counts in data["cached"].items()}
        if set(to_send) != set(range(len(shards))) or set(cached) != set(to_send):
            raise ValueError("it reuses answers for other models")
        for model, counts in cached.items():
            sent = sum(shard.rows for shard in to_send[model])
            if len(counts) != len(split.shards) or min(counts) < 0 or sent + sum(counts) != split.rows:
                raise ValueError("it reuses answers of other rows")
            if any(source >= len(split.shards) for shard in to_send[model] for source in shard.sources):
                raise ValueError("it sends rows of other shards")
            if not all(shard.sources for shard in to_send[model]) and to_send[model] != shards[model]:
                raise ValueError("it sends other shards")
        return cls(to_send, cached)


@dataclass(frozen=True, slots=True)
class InputMark:
    """
    What identifies the rows of a job, so that they can be compared without being kept.

    :param digest: over the shards, see :attr:`Plan.input`.
    :param params: digest of the body parameters that were put into the rows.
    :param source: version of the input when it was read, see :func:`source_version`.
    :param model_params: digest of the body parameters that only some models get, see :func:`model_params_of`.
    :param shard_rows: rows of each shard.
    :param max_bytes: most bytes per shard, as used for the split.
    """

    digest: str
    params: str
    model_params: str
    source: str | None
    shard_rows: tuple[int, ...]
    max_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the mark as JSON types."""
        return {**asdict(self), "shard_rows": list(self.shard_rows)}

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> InputMark | None:
        """Return the mark that :meth:`to_dict` encoded; ``None`` if it is damaged."""
        try:
            source = data["source"]
            return cls(
                str(data["digest"]),
                str(data["params"]),
                str(data["model_params"]),
                None if source is None else str(source),
                tuple(min(max(int(rows), 1), MAX_FILE_LINES) for rows in data["shard_rows"]),
                min(max(int(data["max_bytes"]), 1), MAX_FILE_BYTES),
            )
        except (KeyError, TypeError, ValueError, OverflowError):
            return None

    def has_rows_of(self, other: InputMark) -> bool:
        """Whether these are certainly the same rows; if they were split otherwise, they may be all the same."""
        return (self.digest, self.model_params) == (other.digest, other.model_params)

    def is_of(self, requests: Any, options: RunOptions, *, name: str) -> bool:
        """
        Whether these are the rows.

        A file with the same :func:`source_version` is not read. Any other input is split again, and the shards are
        compared.

        :param requests: a file (something that opens) or rows.
        """
        if self.model_params != model_params_of(options):
            return False
        same_params = self.params == digest_of(options.body_content)
        if same_params and self.source is not None and self.source == source_version(requests):
            return True
        # If invalid rows failed the job now, that would not make them other rows.
        # Nor would other prices, by which the shards may have been cut.
        options = replace(
            options, max_rows=MAX_FILE_LINES, max_bytes=self.max_bytes, reports_invalid=True, max_cost=None
        )
        with temporary_folder() as folder:
            try:
                split = plan(requests, folder, name=name, options=options, rows_per_shard=self.shard_rows)
            except InvalidInputError as exc:
                log.warning("The rows can no longer be planned: %s", exc)
                return False
        return _digest_of_content(split) == self.digest


@dataclass(frozen=True, slots=True)
class Plan:
    """
    What the first try of a job fixes for all later ones.

    It keeps the window and the metadata, since a template such as ``now()`` renders differently on every try, and the
    same work under another identity would be paid for again.

    :param submitter: the task instance to which the job belongs.
    :param conn_id: the connection of its batches.
    :param models: models given by ``replace``, in the order of their indexes.
    :param max_rows: most rows per shard, as used for the split.
    :param max_bytes: most bytes per shard, as used for the split.
    :param params: digest of what was put into the bodies of the rows, see :attr:`RunOptions.body_content`.
    :param source: version of the input when it was read, see :func:`source_version`.
    :param complete: whether the folder knows every batch that earlier tries can have sent.
    :param reuse: which rows are answered by the cache and not sent; ``None`` if all are sent.
    :param kept_rounds: rounds of the finished job whose answers this one keeps: it sends no first round, but a round
        with this number, of the rows that are not ok. See :mod:`~.jobs.finished`.
    :param model_params: digest of the body parameters that only some models get, see :func:`model_params_of`.
    :param variants: the shards once more for each set of body parameters that only some models get.
    :param variant_of: for each model the number of its variant, counted from 1, or 0 for the shards of the split; empty
        if no model has parameters of its own.
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
    reuse: Reuse | None = None
    kept_rounds: int = 0
    model_params: str = ""
    variants: tuple[tuple[Shard, ...], ...] = ()
    variant_of: tuple[int, ...] = ()
    began: float = 0.0

    def shards_of(self, model: int) -> tuple[Shard, ...]:
        """Return the shards of a model: all rows, with what the model gets in their bodies."""
        number = self._variant_of(model)
        return self.variants[number - 1] if number else self.split.shards

    def folder_of(self, model: int) -> str:
        """Return the folder of these shards, relative to the job's folder."""
        number = self._variant_of(model)
        return f"{FIRST_ROUND}/params-{number}" if number else FIRST_ROUND

    def _variant_of(self, model: int) -> int:
        return self.variant_of[model] if self.variant_of else 0

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
            "reuse": self.reuse and self.reuse.to_dict(),
            "kept_rounds": self.kept_rounds,
            "model_params": self.model_params,
            "variants": [[shard.to_dict() for shard in shards] for shards in self.variants],
            "variant_of": list(self.variant_of),
            "began": self.began,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """
        Return the plan that :meth:`to_dict` encoded.

        :raises ValueError: it is damaged, or not written by this code.
        """
        split = Split.from_dict(data["split"])
        models = tuple(str(model) for model in data["models"])
        reuse = data.get("reuse")
        variants = _variants(data, split, models)
        planned = cls(
            split=split,
            completion_window=check_completion_window(data["completion_window"]),
            metadata=check_metadata(data["metadata"], identified=True),
            submitter=_checked_submitter(Submitter(**data["task"])),
            conn_id=str(data["conn_id"]),
            models=models,
            max_rows=int(data["max_rows"]),
            max_bytes=int(data["max_bytes"]),
            params=str(data["params"]),
            source=None if data["source"] is None else str(data["source"]),
            complete=data["complete"] is True,
            kept_rounds=_checked_rounds(data.get("kept_rounds", 0)),
            model_params=str(data.get("model_params", "")),
            variants=variants,
            variant_of=tuple(int(number) for number in data.get("variant_of", ())),
            began=_checked_time(data.get("began", 0.0)),
        )
        if reuse is None:
            return planned
        shards = [planned.shards_of(model) for model in range(len(models) or 1)]
        return replace(planned, reuse=Reuse.from_dict(reuse, split, shards))

    @property
    def input(self) -> InputMark:
        """What identifies the rows of the plan."""
        digest = _digest_of_content(self.split)
        rows = tuple(shard.rows for shard in self.split.shards)
        return InputMark(digest, self.params, self.model_params, self.source, rows, self.max_bytes)


def _digest_of_content(split: Split) -> str:
    digests = [*(shard.sha256 for shard in split.shards), split.invalid_sha256]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _variants(data: Mapping[str, Any], split: Split, models: Sequence[str]) -> tuple[tuple[Shard, ...], ...]:
    variants = tuple(tuple(map(Shard.from_dict, shards)) for shards in data.get("variants", ()))
    for shards in variants:
        if [(each.index, each.rows) for each in shards] != [(each.index, each.rows) for each in split.shards]:
            raise ValueError("it has shards of other rows for a model")
    numbers = data.get("variant_of", ())
    if numbers and (len(numbers) != len(models) or not all(0 <= each <= len(variants) for each in numbers)):
        raise ValueError("it has body parameters for other models")
    return variants


def _checked_time(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_COUNT:
        raise ValueError("it has a time that is none")
    return float(value)


def _checked_rounds(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST_ROUNDS:
        raise ValueError("it does not say how many rounds are kept")
    return value


def model_params_of(options: RunOptions) -> str:
    """Return a digest of the body parameters that only some models get; empty if there are none."""
    return digest_of(options.variants) if options.variants else ""


def digest_of(params: Any) -> str:
    """Return a digest of body parameters."""
    text = json.dumps(params or {}, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def source_version(requests: Any) -> str | None:
    """
    Return the version of a file without reading it: its size, and what its store reports about it and its place.

    :param requests: a file or rows.
    :returns: the version; ``None`` for rows, and if the store reports too little.
    """
    try:
        if (local := local_path(requests)) is not None:
            found = local.stat()
            # Copies can keep the time of another file, or get the same.
            return f"{found.st_size} bytes, inode {found.st_ino}, changed {found.st_mtime_ns} and {found.st_ctime_ns}"
        if not hasattr(requests, "fs"):
            return None
        info = requests.fs.info(requests.path)
    # Stores raise errors of their own; after any of them the file is read instead.
    except Exception as exc:  # noqa: BLE001
        log.info("The version of the input is unknown, so the input is read: %s", exc)
        return None
    known = {name: str(info[name])[:200] for name in _VERSION_FIELDS if info.get(name)}
    version = {"path": str(requests.path), "size": info.get("size"), **known}
    return json.dumps(version, sort_keys=True) if known else None


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

    def sources(self, plan: Plan, model: int) -> list[OwnFile]:
        """Return the files of a model's shards, see :meth:`Plan.shards_of`."""
        folder = self.path / plan.folder_of(model)
        return [OwnFile(folder / shard.name) for shard in plan.split.shards]

    def write_variants(
        self, split: Split, options: RunOptions
    ) -> tuple[tuple[tuple[Shard, ...], ...], tuple[int, ...]]:
        """
        Write the shards of models that get body parameters of their own.

        :returns: :attr:`Plan.variants` and :attr:`Plan.variant_of`.
        """
        folder = self.path / FIRST_ROUND
        sources = [OwnFile(folder / shard.name) for shard in split.shards]
        written: dict[str, tuple[Shard, ...]] = {}
        for params in filter(None, options.variants):
            if (key := digest_of(params)) not in written:
                target = folder / f"params-{len(written) + 1}"
                written[key] = write_variant(split.shards, sources, target, params)
        numbers = {key: number for number, key in enumerate(written, 1)}
        variant_of = tuple(numbers[digest_of(params)] if params else 0 for params in options.variants)
        return tuple(written.values()), variant_of

    def invalid_lines(self, split: Split, tally: ModelTally | None = None) -> InvalidLines:
        """
        Return the result lines of the input's invalid rows.

        :param tally: gets their figures.
        """
        path = OwnFile(self.path / FIRST_ROUND / INVALID_ROWS) if split.invalid else None
        return InvalidLines(path, tally or ModelTally(), rows=split.invalid)

    def read(self) -> Plan | None:
        """Return the plan; ``None`` if there is none, or if the rows that it sends beside kept answers are unknown."""
        plan = self._read("plan.json", Plan.from_dict, otherwise="a new plan is made")
        if plan is None or not plan.kept_rounds:
            return plan
        # It was written before the plan. Without it the job would end without these rows.
        return plan if self.read_round(plan.kept_rounds, range(len(plan.models) or 1)) is not None else None

    def write(self, plan: Plan) -> None:
        """Store the plan."""
        write_json(self.path / "plan.json", plan.to_dict())

    def read_round(self, number: int, models: range) -> Round | None:
        """
        Return a later round; ``None`` if it was not planned.

        :param models: indexes of the models that the job has.
        """
        decode = partial(_round, models=models)
        return self._read(f"round-{number}.json", decode, otherwise="the round is planned again")

    def forget(self) -> None:
        """Remove the plan, so that another one can be made; the ledger of the folder stays."""
        names = [name for name in names_in(self.path) if _ROUND_NAME.fullmatch(name)]
        # The plan goes last: what is left of the others would become a part of the next plan.
        for name in (*names, _LIVE, "rests.json", "plan.json"):
            remove_file(self.path / name)

    def read_rests(self) -> list[Rest]:
        """Return the rests of dead batches, in the order in which they were planned."""
        read = self._read("rests.json", _rests, otherwise="the rests of dead batches are determined again")
        return read or []

    def write_rests(self, rests: Sequence[Rest]) -> None:
        """Store the rests of dead batches."""
        stored = [{"of": rest.of, "shard": rest.shard and rest.shard.to_dict()} for rest in rests]
        write_json(self.path / "rests.json", {"rests": stored})

    def write_round(self, number: int, shards: Mapping[int, Sequence[Shard]], *, live: bool = False) -> None:
        """
        Store a later round.

        :param shards: its shards by model.
        :param live: whether its rows are asked one by one.
        """
        planned = {str(model): [shard.to_dict() for shard in items] for model, items in shards.items()}
        write_json(
            self.path / f"round-{number}.json",
            {"shards": planned, "route": ROUTE_LIVE if live else ROUTE_BATCH},
        )

    def read_live(self) -> LiveStart | None:
        """Return when the job began to ask rows one by one; ``None`` if it did not."""
        # A damaged record still says that it did. Its batches then count as cancelled by somebody else.
        path = self.path / _LIVE
        try:
            stored = read_object(path, otherwise="the job continues to ask rows one by one") or {}
        except FileNotFoundError:
            return None
        cancelled = stored.get("cancelled")
        ids = [each for each in cancelled if isinstance(each, str)] if isinstance(cancelled, list) else []
        try:
            return LiveStart(_checked_time(stored.get("at", 0.0)), tuple(ids))
        except ValueError:
            return LiveStart(0.0, tuple(ids))

    def write_live(self, start: LiveStart) -> None:
        """Store that the job asks rows one by one."""
        write_json(self.path / _LIVE, {"at": start.at, "cancelled": list(start.cancelled)})

    def _read(self, name: str, decode: Callable[[dict[str, Any]], T], *, otherwise: str) -> T | None:
        stored = read_json(self.path / name, otherwise=otherwise)
        if stored is None:
            return None
        try:
            return decode(stored)
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as exc:
            log.warning(
                "%s is damaged, or was not written by this provider (%s); %s",
                self.path / name,
                exc,
                otherwise,
            )
            return None


def _checked_submitter(submitter: Submitter) -> Submitter:
    texts = (submitter.dag_id, submitter.run_id, submitter.task_id, submitter.run_start)
    numbers = (submitter.map_index, submitter.generation, submitter.epoch)
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(each, int) for each in numbers):
        raise ValueError("it does not name its task")
    return submitter


def _rests(stored: dict[str, Any]) -> list[Rest]:
    return [
        Rest(item["of"], None if item["shard"] is None else Shard.from_dict(item["shard"]))
        for item in stored["rests"]
    ]


def _round(stored: dict[str, Any], models: range) -> Round:
    by_model = {int(model): tuple(map(Shard.from_dict, items)) for model, items in stored["shards"].items()}
    if not all(model in models for model in by_model):
        raise ValueError("it names a model that the job does not have")
    return Round(by_model, live=stored.get("route") == ROUTE_LIVE)


def plan(
    requests: Any, folder: Any, *, name: str, options: RunOptions, rows_per_shard: Sequence[int] = ()
) -> Split:
    """
    Split rows into shards.

    :param requests: a file (something that opens) or rows.
    :param folder: folder for the shards.
    :param name: how messages call the rows.
    :param rows_per_shard: rows of the shards, to split as before.
    :raises InvalidInputError: rows are wrong, or some name no model and none is given.
    """
    reserved = max((len(to_json(params)) for params in options.variants), default=0)
    if reserved >= options.max_bytes:
        raise InvalidInputError(
            f"max_bytes_per_batch is {options.max_bytes}, but the body parameters that a model gets by models take up "
            f"to {reserved} bytes of each row. Nothing was uploaded. Raise max_bytes_per_batch."
        )
    split = split_requests(
        requests,
        folder,
        name=name,
        max_rows=options.max_rows,
        max_bytes=options.max_bytes,
        defaults=options.body_defaults,
        defaults_name="request_params",
        instruction=options.acceptance.instruction,
        report_invalid=options.reports_invalid,
        needs_model=not options.models,
        tariff=options.tariff(),
        rows_per_shard=rows_per_shard,
        reserved_bytes=reserved,
    )
    if split.rows_without_model and not options.models:
        raise InvalidInputError(
            f"{name}: {split.rows_without_model} of {split.rows} rows name no model. Give model or models, or put a "
            "model into each row's body. Nothing was uploaded."
        )
    return split


def estimate(requests: Any, *, name: str, options: RunOptions) -> dict[str, Any]:
    """
    Plan a job without sending anything, and return its estimated size and cost.

    Prompt tokens are estimated at a quarter per ASCII character of the messages and one per other character. The length
    of the completions is unknown, so ``cost`` covers only the prompts.
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
        "invalid_input": split.invalid,
        "bytes": split.bytes,
        "shards": len(split.shards),
        "batches": len(split.shards) * len(models),
        "models": models,
        "models_named_by_rows": list(split.models),
    }
