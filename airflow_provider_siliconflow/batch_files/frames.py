"""Results as a data frame."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from airflow_provider_siliconflow.api.exceptions import InvalidInputError
from airflow_provider_siliconflow.api.models import BatchResult
from airflow_provider_siliconflow.api.redaction import valid_text
from airflow_provider_siliconflow.api.sources import Source
from airflow_provider_siliconflow.batch_files.result_lines import read_results
from airflow_provider_siliconflow.batch_files.verdicts import (
    whole_number,
)

#: Columns of :func:`to_frame` that are whole numbers; the others are text.
_WHOLE_COLUMNS = ("prompt_tokens", "completion_tokens")


def to_frame(results: Source | Iterable[BatchResult], library: str | None = None) -> Any:
    """
    Return results as a data frame with one row per result.

    Columns: ``custom_id``, ``outcome``, ``text``, ``reasoning``, ``finish_reason``, ``prompt_tokens``,
    ``completion_tokens``, ``error`` (the message).

    :param results: a result file, or the iterator from :func:`read_results`.
    :param library: ``pandas`` or ``polars``; by default the one that is installed, preferably pandas.
    :raises ImportError: it is not installed.
    """
    if library not in (None, "pandas", "polars"):
        raise InvalidInputError(f"library must be 'pandas' or 'polars', not {library!r}")
    frames = _import_frames((library,) if library else ("pandas", "polars"))
    rows = results if isinstance(results, Iterable) else read_results(results)
    columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    for row in rows:
        for name, read in _COLUMNS.items():
            columns[name].append(read(row))
    if frames.__name__ == "pandas":
        return frames.DataFrame(columns).astype(dict.fromkeys(_WHOLE_COLUMNS, "Int64"))
    schema = {name: frames.Int64 if name in _WHOLE_COLUMNS else frames.String for name in columns}
    return frames.DataFrame(columns, schema=schema)


def _text(value: Any) -> str | None:
    return valid_text(value) if isinstance(value, str) else None


_COLUMNS: dict[str, Callable[[BatchResult], Any]] = {
    "custom_id": lambda row: _text(row.custom_id),
    "outcome": lambda row: row.outcome.value,
    "text": lambda row: _text(row.text),
    "reasoning": lambda row: _text(row.reasoning),
    "finish_reason": lambda row: _text(row.finish_reason),
    "prompt_tokens": lambda row: whole_number(row.usage.get("prompt_tokens")),
    "completion_tokens": lambda row: whole_number(row.usage.get("completion_tokens")),
    "error": lambda row: _text(row.error_message),
}


def _import_frames(names: Sequence[str]) -> Any:
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as exc:
            if exc.name != name:
                raise
    raise ImportError(
        f"a data frame needs {' or '.join(names)}: pip install 'airflow-provider-siliconflow[{names[0]}]'"
    )
