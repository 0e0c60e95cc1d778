"""Results as a data frame."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from typing import Any

from airflow_provider_siliconflow.api.exceptions import InvalidInputError
from airflow_provider_siliconflow.api.models import BatchResult
from airflow_provider_siliconflow.api.redaction import valid_text
from airflow_provider_siliconflow.api.sources import Source
from airflow_provider_siliconflow.batch_files.output_types import AnswerType
from airflow_provider_siliconflow.batch_files.result_lines import read_results
from airflow_provider_siliconflow.batch_files.verdicts import (
    whole_number,
)

#: Columns of :func:`to_frame` that are whole numbers; the others are text.
_WHOLE_COLUMNS = ("prompt_tokens", "completion_tokens")
_MODEL = "model"


def to_frame(
    results: Source | Sequence[tuple[str | None, Source]],
    library: str | None = None,
    *,
    answers: AnswerType | None = None,
    prefix: str = "",
) -> Any:
    """
    Return results as a data frame with one row per result.

    Columns: ``model``, if there are several; ``custom_id``, ``outcome``, ``text``, ``reasoning``, ``finish_reason``,
    ``prompt_tokens``, ``completion_tokens``, ``error`` (the message); and the fields of the answers.

    :param results: a result file, or several with the model of each.
    :param library: ``pandas`` or ``polars``; by default the one that is installed, preferably pandas.
    :param answers: the type of the answers.
    :param prefix: the beginning of the names of the columns for their fields.
    :raises ImportError: it is not installed.
    :raises InvalidInputError: two columns have the same name.
    """
    if library not in (None, "pandas", "polars"):
        raise InvalidInputError(f"library must be 'pandas' or 'polars', not {library!r}")
    several = isinstance(results, Sequence)
    names = [*([_MODEL] if several else []), *_COLUMNS]
    fields = {field: f"{prefix}{field}" for field in answers.fields} if answers is not None else {}
    if clash := sorted(set(names).intersection(fields.values())):
        raise InvalidInputError(
            f"output_type has fields with the names of other columns ({', '.join(clash)}); give prefix, such as "
            "prefix='answer_', with which the columns of the fields then begin"
        )
    frames = _import_frames((library,) if library else ("pandas", "polars"))
    columns: dict[str, list[Any]] = {name: [] for name in (*names, *fields.values())}
    for model, file in results if isinstance(results, Sequence) else [(None, results)]:
        for row in read_results(file, answers):
            if several:
                columns[_MODEL].append(model)
            for name, read in _COLUMNS.items():
                columns[name].append(read(row))
            for field, value in _values(answers, fields, row):
                columns[fields[field]].append(value)
    if frames.__name__ == "pandas":
        frame = frames.DataFrame(columns).astype(dict.fromkeys(_WHOLE_COLUMNS, "Int64"))
        # Otherwise a whole number would become a float as soon as one row has none.
        frame[list(fields.values())] = frame[list(fields.values())].convert_dtypes()
        return frame
    return frames.DataFrame(
        [
            _polars_column(frames, name, values)
            if name in fields.values()
            else frames.Series(name, values, dtype=frames.Int64 if name in _WHOLE_COLUMNS else frames.String)
            for name, values in columns.items()
        ]
    )


def _values(answers: AnswerType | None, fields: Iterable[str], row: BatchResult) -> Iterator[tuple[str, Any]]:
    """Yield the value of each field of an answer; ``None`` for one that it does not have."""
    found = answers.values(row.parsed) if answers is not None and row.parsed is not None else {}
    for field in fields:
        value = found.get(field)
        yield field, value.value if isinstance(value, Enum) else value


def _polars_column(frames: Any, name: str, values: list[Any]) -> Any:
    try:
        return frames.Series(name, values)
    # Values of several types: each stays what it is.
    except (TypeError, frames.exceptions.PolarsError):
        return frames.Series(name, values, dtype=frames.Object)


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
