"""
A finished job whose task is cleared by hand: its answers are kept, and only its other rows are sent again.

The service keeps result files for 30 days, and a finished job has removed its folder. So what counts is what the job
wrote: the manifest says which rows it was about, and ``results.jsonl`` has a line for each of them. The lines are
copied into the new job's folder, shard by shard, since the files of the output folder are replaced when the new job
ends.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

from airflow_provider_siliconflow.api.bounds import MAX_COUNT
from airflow_provider_siliconflow.api.exceptions import IncompleteResultsError, InvalidInputError
from airflow_provider_siliconflow.api.models import ROUTE_LIVE, Outcome
from airflow_provider_siliconflow.batch_files.atomic_files import (
    OwnFile,
    create_file,
    local_path,
    make_folder,
    open_own,
    temporary_folder,
    write_json,
)
from airflow_provider_siliconflow.batch_files.invalid_rows import of_valid_rows
from airflow_provider_siliconflow.batch_files.lines import LineReader
from airflow_provider_siliconflow.batch_files.manifest import BatchSummary, results_folder
from airflow_provider_siliconflow.batch_files.merge import BatchFiles, unmarked
from airflow_provider_siliconflow.batch_files.result_lines import read_lines
from airflow_provider_siliconflow.batch_files.shards import Shard, iter_custom_ids, select_rows
from airflow_provider_siliconflow.batch_files.tally import ModelTally, Usage
from airflow_provider_siliconflow.batch_files.verdicts import Judge, Verdict, read_verdict
from airflow_provider_siliconflow.jobs.folder import read_json
from airflow_provider_siliconflow.jobs.options import RunOptions
from airflow_provider_siliconflow.jobs.plan import MOST_ROUNDS, InputMark, Plan, PlanFolder

log = logging.getLogger(__name__)

#: The figures of the finished job, and the folder of its result lines, in the folder of the new one.
_FIGURES, _LINES = "kept.json", "kept"
#: The round of the kept lines while they are merged; their real rounds are among the kept figures.
_KEPT_ROUND = -1


class _UnusableResultsError(Exception):
    """The result files are not those of the finished job."""


@dataclass(frozen=True, slots=True)
class Finished:
    """
    A job that wrote its manifest as its last step.

    :param manifest: as it was read. The folder may be writable by others, so only its figures are used, never its
        paths.
    """

    manifest: Mapping[str, Any]

    @property
    def epoch(self) -> int:
        """The epoch of the try that finished it."""
        return _count(_mapping(self.manifest.get("task")).get("epoch"))

    @property
    def try_number(self) -> int:
        """The number of that try."""
        return _count(_mapping(self.manifest.get("input")).get("try_number"))

    @property
    def run_start(self) -> str:
        """The start of the run, as that try saw it."""
        return str(_mapping(self.manifest.get("task")).get("run_start") or "")

    @property
    def rounds(self) -> int:
        """The number of the next round."""
        numbers = [_count(each.get("round")) for each in _mappings(self.manifest.get("rounds"))]
        return max(numbers, default=0) + 1

    @property
    def all_ok(self) -> bool:
        """Whether every row has an answer."""
        rows = _mapping(self.manifest.get("rows"))
        # Nothing can be sent for a row that is invalid.
        valid = _count(rows.get("total")) - _count(self.manifest.get("invalid_input"))
        return 0 < valid == _count(rows.get("ok"))

    @property
    def input(self) -> InputMark | None:
        """What identifies its rows; ``None`` if the manifest does not say."""
        return InputMark.read(_mapping(self.manifest.get("input")))

    def has_results(self, output_dir: Any, options: RunOptions) -> bool:
        """Whether the result file of every model is there."""
        try:
            for path in _result_paths(output_dir, options):
                with open_own(path):
                    pass
        # Stores raise errors of their own.
        except Exception as exc:  # noqa: BLE001
            log.warning("The results of the finished job are gone, so its batches are searched for: %s", exc)
            return False
        return True


def input_entry(plan: Plan, *, try_number: int) -> dict[str, Any]:
    """Return what a manifest says about the rows of its job and the try that finished it."""
    return {**plan.input.to_dict(), "try_number": try_number}


def take_over(
    finished: Finished, plans: PlanFolder, plan: Plan, output_dir: Any, options: RunOptions
) -> bool:
    """
    Copy the result lines of a finished job into the folder of a new one, and plan a round of the rows that are not ok.

    :param plans: the new job's folder, with the shards of the first round.
    :param plan: the new job's plan over the same rows.
    :returns: whether the results were usable; otherwise nothing is kept.
    """
    rounds: dict[int, tuple[Shard, ...]] = {}
    tariff = options.tariff()
    try:
        if plan.kept_rounds > MOST_ROUNDS:
            raise _UnusableResultsError("its manifest names more rounds than a job can have")
        for model, path in enumerate(_result_paths(output_dir, options)):
            sources = plans.sources(plan, model)
            chosen = [bytearray(shard.rows) for shard in plan.split.shards]
            with open_own(path) as stream:
                lines = read_lines(
                    LineReader(stream), partial(_verdict_on, judge=options.acceptance.judge), name=str(path)
                )
                lines = of_valid_rows(lines, plans.invalid_lines(plan.split))
                _copy_lines(lines, plan, plans.path / _LINES / str(model), sources, chosen)
            selected = select_rows(
                sources,
                chosen,
                plans.path / f"round-{plan.kept_rounds}" / str(model),
                max_rows=options.max_rows,
                max_bytes=options.max_bytes,
                transform=options.acceptance.next_attempt(
                    OwnFile(path.parent / "errors.jsonl"), options.max_bytes
                ),
                tariff=tariff,
            )
            if selected:
                rounds[model] = selected
    except (_UnusableResultsError, IncompleteResultsError, InvalidInputError, OSError) as exc:
        log.warning(
            "The results in %s are not those that the finished job wrote (%s), so its batches are searched for",
            output_dir,
            exc,
        )
        return False
    write_json(
        plans.path / _FIGURES,
        {
            "models": _mappings(finished.manifest.get("models")),
            "budget": _mapping(finished.manifest.get("budget")),
            "cost": _mapping(finished.manifest.get("cost")),
        },
    )
    plans.write_round(plan.kept_rounds, rounds)
    sent = sum(shard.rows for shards in rounds.values() for shard in shards)
    log.info(
        "The task was cleared: %d answers are kept, and %d rows without one are sent again",
        plan.split.rows * len(options.replacements) - sent,
        sent,
    )
    return True


def _result_paths(output_dir: Any, options: RunOptions) -> Iterator[Any]:
    names = options.replacements
    for name in names:
        yield results_folder(output_dir, name, several=len(names) > 1) / "results.jsonl"


def _verdict_on(line: bytes, judge: Judge | None) -> Verdict | None:
    return read_verdict(unmarked(line), judge)


def _copy_lines(
    lines: Iterator[tuple[int, int, bytes, Verdict | None]],
    plan: Plan,
    folder: Any,
    sources: list[OwnFile],
    chosen: list[bytearray],
) -> None:
    """
    Copy the lines of a result file, one file for each shard, as the service sent them.

    :param lines: of the valid rows.
    :param chosen: for each shard, gets 1 for each row that is not ok.
    """
    make_folder(folder)
    for shard, source, wanted in zip(plan.split.shards, sources, chosen, strict=True):
        with create_file(folder / shard.name) as target:
            for position, custom_id in enumerate(iter_custom_ids(source)):
                number, _, line, verdict = next(lines, (0, 0, b"", None))
                if verdict is None or verdict.custom_id != custom_id:
                    raise _UnusableResultsError(f"it has no result of {custom_id!r} at line {number}")
                # An answer that cannot be judged may be what was asked for, and it is paid for.
                wanted[position] = verdict.outcome is not Outcome.OK and not verdict.unjudged
                target.write(unmarked(line) + b"\n")
    if next(lines, None) is not None:
        raise _UnusableResultsError("it has more lines than rows were sent")


class KeptAnswers:
    """
    The answers that a job took over from a finished one.

    :param plans: the job's folder.
    """

    def __init__(self, plans: PlanFolder) -> None:
        self._path = plans.path
        stored = read_json(plans.path / _FIGURES, otherwise="the manifest lacks the earlier batches") or {}
        self._models = _mappings(stored.get("models"))
        self._budget, self._cost = _mapping(stored.get("budget")), _mapping(stored.get("cost"))

    def spent(self) -> tuple[Fraction, Fraction] | None:
        """
        Return what the finished job cost in CNY, and the most that some of its batches may cost in addition.

        ``None`` if its manifest does not say.
        """
        spent, held = _amount(self._budget.get("spent")), _amount(self._budget.get("held"))
        if spent is not None and held is not None:
            return spent, held
        total = _amount(self._cost.get("total"))
        return None if total is None else (total, Fraction())

    @contextlib.contextmanager
    def files(self, model: int, shard: Shard) -> Iterator[BatchFiles]:
        """Return the kept result lines of a shard."""
        path = self._path / _LINES / str(model) / shard.name
        with contextlib.ExitStack() as stack:
            local = local_path(path)
            if local is None:
                local = stack.enter_context(temporary_folder()) / shard.name
                with open_own(path) as source, create_file(local) as target:
                    shutil.copyfileobj(source, target)
            yield BatchFiles(local, None, round=_KEPT_ROUND, shared=True, billed=False)

    def add_figures(self, model: int, tally: ModelTally) -> None:
        """Add what the manifest of the finished job says about a model: its bill and its rounds."""
        tally.ok_in_round.pop(_KEPT_ROUND, None)
        figures = self._figures(model)
        tally.billed.add(_usage(figures.get("billed_usage")))
        live = _mapping(figures.get("live"))
        tally.live += _count(live.get("rows"))
        tally.billed_live.add(_usage(live))
        tally.cached += _count(_mapping(figures.get("cached")).get("rows"))
        tally.saved.add(_usage(figures.get("cached")))
        for each in _mappings(figures.get("rounds")):
            number = _count(each.get("round"))
            tally.ok_in_round[number] = tally.ok_in_round.get(number, 0) + _count(each.get("ok"))

    def live_rounds(self, model: int) -> dict[int, int]:
        """Return the rows of each round of the finished job that was asked row by row."""
        rounds = _mappings(self._figures(model).get("rounds"))
        return {
            _count(each.get("round")): _count(each.get("rows"))
            for each in rounds
            if each.get("route") == ROUTE_LIVE
        }

    def batches(self, model: int) -> Iterator[BatchSummary]:
        """Yield the batches of the finished job."""
        for each in _mappings(self._figures(model).get("batches")):
            counts = _mapping(each.get("counts"))
            yield BatchSummary(
                id=str(each.get("id")),
                status=str(each.get("status")),
                rows=_count(each.get("rows")),
                shard=_count(each.get("shard")),
                round=_count(each.get("round")),
                counts={
                    name: _count(counts[name]) for name in ("total", "completed", "failed") if name in counts
                },
            )

    def _figures(self, model: int) -> Mapping[str, Any]:
        return self._models[model] if model < len(self._models) else {}


def _usage(value: Any) -> Usage:
    names = ("prompt_tokens", "completion_tokens", "reasoning_tokens", "total_tokens", "cached_tokens")
    return Usage(*(_count(_mapping(value).get(name)) for name in names))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [each for each in value if isinstance(each, Mapping)] if isinstance(value, list) else []


def _amount(value: Any) -> Fraction | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT
    # It was rounded to that.
    return (
        Fraction(str(value)) + Fraction(1, 1_000_000) if usable and value else Fraction() if usable else None
    )


def _count(value: Any) -> int:
    usable = isinstance(value, int) and not isinstance(value, bool)
    return min(max(value, 0), MAX_COUNT) if usable else 0
