"""Cutting the rows of a job into shards."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from airflow_provider_siliconflow.api.exceptions import (
    InvalidInputError,
)
from airflow_provider_siliconflow.batch_files.shards import Split, split_requests
from airflow_provider_siliconflow.jobs.options import RunOptions


def plan(requests: Any, folder: Any, *, name: str, options: RunOptions) -> Split:
    """
    Cut rows into shards.

    :param requests: a file (something that opens) or rows.
    :param folder: where the shards go.
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
