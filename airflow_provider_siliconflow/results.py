"""
Results for the task after a batch: rows of a results file, or of the manifest that a task returned.

.. code-block:: python

    @task
    def score(manifest: dict) -> float:
        rows = read_results(manifest, model="Qwen/Qwen3-32B")
        return sum(row.ok and row.parse(Label).label == "spam" for row in rows)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from airflow_provider_siliconflow.paths import resolve_path

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import ObjectStoragePath

    from airflow_provider_siliconflow.api.models import BatchResult

    ResultSource: TypeAlias = str | Path | ObjectStoragePath | Mapping[str, Any]

__all__ = ["read_results", "to_frame"]


def read_results(source: ResultSource, *, model: str | None = None) -> Iterator[BatchResult]:
    """
    Read results row by row, in the order of the input and in constant memory.

    :param source: ``results.jsonl`` (or ``errors.jsonl``), or a manifest: what the task returned, or its
        ``manifest.json``. Files are paths, URIs of any scheme that Airflow's ``ObjectStoragePath`` takes, or
        such paths.
    :param model: picks one model of a manifest; needed where several models ran.
    :return: an iterator of :class:`~airflow_provider_siliconflow.api.models.BatchResult`: ``.custom_id``,
        ``.ok``, ``.text``, ``.reasoning``, ``.usage``, ``.error``, ``.parse(PydanticModel)``.
    :raises InvalidInputError: at once: no such model in the manifest, or several and none named; not a manifest.
    :raises FileNotFoundError: there is no such file.
    :raises IncompleteResultsError: while reading: a line is not JSON.
    """
    from airflow_provider_siliconflow.batch_files import result_lines

    return result_lines.read_results(_results_file(source, model))


def to_frame(source: ResultSource, library: str | None = None, model: str | None = None) -> Any:
    """
    Return results as a data frame, a row each, in the order of the input.

    Columns: ``custom_id``, ``outcome``, ``text``, ``reasoning``, ``finish_reason``, ``prompt_tokens``,
    ``completion_tokens``, ``error`` (the message).

    :param source: as for :func:`read_results`.
    :param library: ``pandas`` or ``polars``; without it whichever is installed, pandas first.
    :param model: as for :func:`read_results`.
    :raises ImportError: the library is not installed.
    """
    from airflow_provider_siliconflow.batch_files import frames

    return frames.to_frame(_results_file(source, model), library)


def _results_file(source: ResultSource, model: str | None) -> Any:
    from airflow_provider_siliconflow.api.exceptions import InvalidInputError

    if isinstance(source, Mapping):
        return _of_manifest(source, "the manifest", model)
    file = resolve_path("source", source)
    if file.name.endswith(".json"):
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as exc:
            raise InvalidInputError(f"{source} is not a manifest: {exc}") from None
        return _of_manifest(manifest, str(source), model)
    if model is not None:
        raise InvalidInputError(
            f"model={model!r} picks from a manifest; {source} holds the results of one model already"
        )
    if not file.is_file():
        hint = f"; it is a folder: did you mean {file / 'manifest.json'}?" if file.is_dir() else ""
        raise FileNotFoundError(f"no results file {source}{hint}")
    return file


def _of_manifest(manifest: Any, name: str, model: str | None) -> Any:
    from airflow_provider_siliconflow.api.exceptions import InvalidInputError

    try:
        paths = {each["model"]: each["paths"]["results"] for each in manifest["models"]}
    except (TypeError, KeyError):
        raise InvalidInputError(f"{name} is not a manifest of this provider: it names no results") from None
    known = ", ".join(repr(each) for each in paths if each is not None)
    if model is None:
        if len(paths) != 1:
            raise InvalidInputError(f"{name} has results of several models; say which: model= one of {known}")
        (path,) = paths.values()
    elif model in paths:
        path = paths[model]
    else:
        raise InvalidInputError(
            f"{name} has no results of model {model!r}; "
            + (f"it has {known}" if known else "its rows named their models themselves: leave model= out")
        )
    file = resolve_path(name, path)
    if not file.is_file():
        raise FileNotFoundError(f"no results file {path}, which {name} points to")
    return file
