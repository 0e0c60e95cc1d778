"""The manifest of a run: its batches, outcomes, tokens, cost and files."""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, TypeAlias

from airflow_provider_siliconflow.api.bounds import MAX_COUNT, MAX_ID
from airflow_provider_siliconflow.api.models import ROUTE_BATCH, ROUTE_LIVE
from airflow_provider_siliconflow.api.redaction import brief, shown_word
from airflow_provider_siliconflow.batch_files.prices import (
    Price,
    cost,
    live_prices,
    price_of,
    prompt_cost,
    rounded,
)
from airflow_provider_siliconflow.batch_files.tally import ModelTally, Usage

log = logging.getLogger(__name__)

#: Increased if a key of the manifest changes its meaning.
MANIFEST_VERSION = 1

_SLUG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True)
class BatchSummary:
    """
    One batch of a run.

    :param id: the batch.
    :param status: its last status.
    :param rows: rows sent in it.
    :param shard: index of the shard sent in it, among those of its round.
    :param round: 0 for the first attempt, 1 for the second, and so on.
    :param counts: ``total``, ``completed`` and ``failed`` as the service counted them.
    :param spoilt: why its results could not be read completely; ``None`` if they were.
    """

    id: str
    status: str
    rows: int
    shard: int = 0
    round: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)
    spoilt: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the batch as JSON types."""
        summary = {
            "id": shown_word(self.id, MAX_ID),
            "status": shown_word(self.status),
            "counts": {
                name: _number(self.counts[name])
                for name in ("total", "completed", "failed")
                if name in self.counts
            },
            "rows": self.rows,
            "shard": self.shard,
            "round": self.round,
        }
        return summary if self.spoilt is None else {**summary, "spoilt": brief(self.spoilt)}


@dataclass(frozen=True, slots=True)
class ModelRun:
    """
    The results of one model.

    :param model: ``None`` if the rows name their models themselves.
    :param tally: the figures over all shards.
    :param batches: the batches of all rounds.
    :param paths: the files written, such as ``results`` and ``errors``, by name.
    :param live_rounds: the rows of each round that was asked row by row.
    """

    model: str | None
    tally: ModelTally
    batches: Sequence[BatchSummary]
    paths: Mapping[str, str] = field(default_factory=dict)
    live_rounds: Mapping[int, int] = field(default_factory=dict)


def build_manifest(
    runs: Sequence[ModelRun],
    *,
    prices: Mapping[str, Price] | None = None,
    paths: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """
    Return the manifest as JSON types, safe for XCom: no rows, no signed URLs.

    Rows, tokens and cost are given by model and in total. ``usage`` counts the answers that were kept,
    ``billed_usage`` all answers; ``cost`` is computed from the latter. ``live`` is the part of rows, billed tokens and
    cost that was asked row by row.

    :param runs: one per model.
    :param prices: prices by model, in any case, as checked by :func:`~.prices.check_prices`.
    :param paths: the files and folders of the whole run, by name.
    """
    total = ModelTally()
    models = []
    costs, costs_live = [], []
    live = live_prices(prices)
    live_rounds: Counter[int] = Counter()
    for run in runs:
        total.add(run.tally)
        live_rounds.update(run.live_rounds)
        of_live = _costs(run.tally.billed_live, price_of(run.model, live))
        costs_live.append(of_live)
        in_batches = _costs(run.tally.billed.without(run.tally.billed_live), price_of(run.model, prices))
        costs.append(_sum([in_batches, of_live if run.tally.billed_live != Usage() else _NOTHING]))
        models.append(
            {
                "model": run.model,
                **_figures(run.tally, run.batches, run.live_rounds),
                "live": _live_entry(run.tally, of_live),
                "cost": _cost_entry(costs[-1]),
                "batches": [batch.to_dict() for batch in run.batches],
                "paths": dict(run.paths),
            }
        )
    known = [each for each in costs if each is not None]
    if prices and len(known) < len(models):
        log.warning(
            "The manifest has no cost for %s, and so no total cost: prices has %s; rows that were asked live need the "
            "prices 'live' of their model",
            ", ".join(
                each["model"] or "rows that name their models" for each in models if each["cost"] is None
            ),
            ", ".join(prices),
        )
    for each in models:
        if each["without_usage"]:
            log.warning(
                "%d answers of %s do not state their tokens; tokens and cost in the manifest are too low",
                each["without_usage"],
                each["model"] or "the models that the rows name",
            )
    # A sum without one of the models would look like the total.
    total_costs = _sum(costs) if known else None
    return {
        "version": MANIFEST_VERSION,
        **_figures(total, [batch for run in runs for batch in run.batches], live_rounds),
        "live": _live_entry(total, _sum(costs_live)),
        "cost": _cost_entry(total_costs),
        "models": models,
        "paths": dict(paths or {}),
    }


_Costs: TypeAlias = tuple[Fraction, Fraction]
_NOTHING: _Costs = (Fraction(), Fraction())


def _sum(costs: Sequence[_Costs | None]) -> _Costs | None:
    """Return the sum of costs; ``None`` if one of them is not known."""
    known = [each for each in costs if each is not None]
    if len(known) < len(costs):
        return None
    return sum((each[0] for each in known), Fraction()), sum((each[1] for each in known), Fraction())


def _live_entry(tally: ModelTally, costs: _Costs | None) -> dict[str, Any]:
    return {"rows": tally.live, **_tokens(tally.billed_live), "cost": _cost_entry(costs)}


def _figures(
    tally: ModelTally, batches: Sequence[BatchSummary], live_rounds: Mapping[int, int]
) -> dict[str, Any]:
    return {
        "rows": {
            "total": _number(tally.rows),
            "ok": tally.ok,
            "error": tally.error,
            "invalid": tally.invalid,
            "expired": tally.expired,
            "missing": _number(tally.missing),
        },
        "finish_reasons": dict(tally.finish_reasons),
        "truncated": tally.truncated,
        "empty": tally.empty,
        "without_usage": tally.without_usage,
        "model_mismatches": tally.mismatches,
        "duplicates": tally.duplicates,
        "foreign": tally.foreign,
        "invalid_input": tally.invalid_input,
        "usage": _tokens(tally.usage),
        "billed_usage": _tokens(tally.billed),
        "cached": {"rows": tally.cached, **_tokens(tally.saved)},
        "errors": tally.most_common_errors(),
        "invalid_reasons": dict(Counter(tally.invalid_reasons).most_common()),
        "rounds": [
            {
                "round": number,
                "route": ROUTE_LIVE if number in live_rounds else ROUTE_BATCH,
                "batches": sum(batch.round == number for batch in batches),
                "rows": sum(batch.rows for batch in batches if batch.round == number)
                + live_rounds.get(number, 0),
                "ok": tally.ok_in_round.get(number, 0),
            }
            for number in sorted(
                {batch.round for batch in batches} | set(tally.ok_in_round) | set(live_rounds)
            )
        ],
    }


def _tokens(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": _number(usage.prompt),
        "cached_tokens": _number(usage.cached),
        "completion_tokens": _number(usage.completion),
        "reasoning_tokens": _number(usage.reasoning),
        "total_tokens": _number(usage.total),
    }


def _number(value: int) -> int:
    """Return a number from outside, limited to what XCom can store."""
    return min(max(value, 0), MAX_COUNT)


def _costs(billed: Usage, price: Price | None) -> tuple[Fraction, Fraction] | None:
    """Return the cost of prompts and completions, unrounded. Completions include reasoning."""
    if price is None:
        return None
    return prompt_cost(billed.prompt, billed.cached, price), cost(billed.completion, price["completion"])


def _cost_entry(costs: tuple[Fraction, Fraction] | None) -> dict[str, Any] | None:
    if costs is None:
        return None
    prompt, completion = costs
    return {
        "currency": "CNY",
        "prompt": rounded(prompt),
        "completion": rounded(completion),
        "total": rounded(prompt + completion),
    }


def model_slug(model: str) -> str:
    """
    Return the name of a model's folder: safe in file systems and URLs, and different for every model.

    ``deepseek-ai/DeepSeek-V3`` becomes ``deepseek-ai--DeepSeek-V3``. A name that cannot be converted back gets a digest
    at its end.
    """
    slug = model.replace("/", "--")
    if _SLUG.fullmatch(slug) and slug.replace("--", "/") == model:
        return slug
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", slug).strip("-")[:80]
    digest = hashlib.sha256(model.encode("utf-8", "surrogatepass")).hexdigest()[:10]
    return f"{readable or 'model'}-{digest}"


def results_folder(output_dir: Any, model: str | None, *, several: bool) -> Any:
    """
    Return the folder of a model's ``results.jsonl`` and ``errors.jsonl``.

    :param output_dir: the folder of the whole run.
    :param model: ``None`` if the rows name their models themselves.
    :param several: whether the run is over several models, so that each has its own folder.
    """
    return output_dir / model_slug(model) if several and model is not None else output_dir


_TABLE = (
    "model",
    "rows",
    "ok",
    "error",
    "invalid",
    "expired",
    "missing",
    "truncated",
    "empty",
    "prompt",
    "completion",
    "CNY",
)


def render_summary(manifest: Mapping[str, Any]) -> str:
    """Return a manifest as a short table for the log."""
    models = manifest["models"]
    lines = [_table_row(each["model"] or "(models of the rows)", each) for each in models]
    if len(models) > 1:
        lines.append(_table_row("total", manifest))
    # Columns of zeros are left out, except those for all rows and for rows that are ok.
    shown = [
        column
        for column, name in enumerate(_TABLE)
        if name in ("model", "rows", "ok", "error") or any(line[column] not in ("0", "") for line in lines)
    ]
    table = [[line[column] for column in shown] for line in (_TABLE, *lines)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    text = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]
    rounds = manifest["rounds"]
    if len(rounds) > 1:
        text += [
            f"round {each['round']}: {each['rows']:,} rows {_how(each)}, {each['ok']:,} ok" for each in rounds
        ]
    if (live := manifest["live"])["rows"]:
        money = "" if live["cost"] is None else f", for {live['cost']['total']:.2f} CNY"
        text.append(f"{live['rows']:,} rows were answered live{money}")
    if cached := manifest["cached"]["rows"]:
        saved = manifest["cached"]["total_tokens"]
        text.append(f"{cached:,} rows were answered by the cache, which saved {saved:,} tokens")
    for name, label in (
        ("model_mismatches", "answers of another model than the requested one"),
        ("duplicates", "second results of a row, left out"),
        ("foreign", "results of rows that were never sent"),
        ("invalid_input", "invalid rows of the input, which were not sent"),
        ("without_usage", "answers do not state their tokens, so tokens and cost are too low"),
    ):
        if manifest[name]:
            text.append(f"{manifest[name]:,} {label}")
    text += [f"{count:,} x {message}" for message, count in manifest["errors"].items()]
    return "\n".join(text)


def _how(round: Mapping[str, Any]) -> str:
    return "asked live" if round["route"] == ROUTE_LIVE else f"in {round['batches']:,} batches"


def _table_row(name: str, figures: Mapping[str, Any]) -> list[str]:
    rows = figures["rows"]
    usage = figures["billed_usage"]
    counts = (
        *(rows[key] for key in ("total", "ok", "error", "invalid", "expired", "missing")),
        *(figures["truncated"], figures["empty"], usage["prompt_tokens"], usage["completion_tokens"]),
    )
    cost = figures["cost"]
    return [name, *(f"{count:,}" for count in counts), "" if cost is None else f"{cost['total']:.2f}"]
