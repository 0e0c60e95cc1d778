"""
Results for the task that follows a batch: rows of a results file, or of the manifest that a task returned.

.. code-block:: python

    @task
    def score(manifest: dict) -> float:
        rows = read_results(manifest, model="deepseek-ai/DeepSeek-V3", output_type=Label)
        return sum(row.ok and row.parsed.label == "spam" for row in rows)
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
    from airflow_provider_siliconflow.batch_files.output_types import AnswerType, OutputType

    ResultSource: TypeAlias = str | Path | ObjectStoragePath | Mapping[str, Any]

__all__ = ["read_results", "to_frame"]


def read_results(
    source: ResultSource, *, model: str | None = None, output_type: OutputType | None = None
) -> Iterator[BatchResult]:
    """
    Read results row by row, in the order of the input and in constant memory.

    :param source: ``results.jsonl`` (or ``errors.jsonl``), or a manifest: the one that the task returned, or its
        ``manifest.json``. Files are paths, URIs of any scheme that Airflow's ``ObjectStoragePath`` takes, or
        such paths. A ``manifest.json`` refers to the results in the same folder, which may be copied or moved; a
        returned manifest refers to those in its ``output_dir``.
    :param model: selects one model of a manifest; required if several models ran.
    :param output_type: a pydantic model class or a JSON schema: ``.parsed`` of each row is then its answer as a model
        or as JSON types, or ``None`` if the row is not ok or its answer is not of that type.
    :return: an iterator of :class:`~airflow_provider_siliconflow.api.models.BatchResult`: ``.custom_id``,
        ``.ok``, ``.text``, ``.parsed``, ``.reasoning``, ``.usage``, ``.error``, ``.parse(PydanticModel)``.
    :raises InvalidInputError: at once, if ``output_type`` is not a type; if the manifest lacks the model, or has
        several and none is selected; if it is not a manifest; or if the folder now contains the results of another run.
    :raises FileNotFoundError: the file does not exist.
    :raises IncompleteResultsError: while reading, if a line is not JSON.
    """
    from airflow_provider_siliconflow.batch_files import result_lines

    (file,) = _results_files(source, model).values()
    return result_lines.read_results(file, None if output_type is None else _answer_type(output_type))


def to_frame(
    source: ResultSource,
    library: str | None = None,
    model: str | None = None,
    *,
    output_type: OutputType | None = None,
    prefix: str = "",
) -> Any:
    """
    Return results as a data frame with one row per result, in the order of the input.

    Columns: ``custom_id``, ``outcome``, ``text``, ``reasoning``, ``finish_reason``, ``prompt_tokens``,
    ``completion_tokens``, ``error`` (the message, or why the answer is invalid); before them ``model``, if the manifest
    is of several models and none is selected; after them the fields of ``output_type``.

    :param source: as for :func:`read_results`.
    :param library: ``pandas`` or ``polars``; by default the one that is installed, preferably pandas.
    :param model: selects one model of a manifest; by default the frame has the rows of all, one model after another.
    :param output_type: a pydantic model class or a JSON schema, whose fields become columns. They are empty for rows
        that are not ok, or whose answer is not of that type. A type without fields has one column, ``parsed``.
    :param prefix: the beginning of the names of these columns, so that they differ from the others.
    :raises ImportError: the library is not installed.
    :raises InvalidInputError: a field has the name of another column; otherwise as for :func:`read_results`.
    """
    from airflow_provider_siliconflow.batch_files import frames

    files = _results_files(source, model, all_models=True)
    return frames.to_frame(
        list(files.items()) if len(files) > 1 else next(iter(files.values())),
        library,
        answers=None if output_type is None else _answer_type(output_type),
        prefix=prefix,
    )


def _answer_type(output_type: OutputType) -> AnswerType:
    from airflow_provider_siliconflow.batch_files.output_types import answer_type

    return answer_type("output_type", output_type)


def _results_files(source: ResultSource, model: str | None, *, all_models: bool = False) -> dict[Any, Any]:
    """Return the results file by model; of several models only one is selected, unless all are wanted."""
    from airflow_provider_siliconflow.api.exceptions import InvalidInputError

    if isinstance(source, Mapping):
        return _files_of_returned(source, model, all_models)
    file = resolve_path("source", source)
    if file.name.endswith(".json"):
        return _files_of(_load_manifest(file), str(source), file.parent, model, all_models)
    if model is not None:
        raise InvalidInputError(
            f"model={model!r} selects from a manifest, but {source} is the results file of a single model"
        )
    if not file.is_file():
        hint = f"; it is a folder: did you mean {file / 'manifest.json'}?" if file.is_dir() else ""
        raise FileNotFoundError(f"no results file {source}{hint}")
    return {None: file}


def _load_manifest(file: Any) -> Any:
    from airflow_provider_siliconflow.api.exceptions import InvalidInputError
    from airflow_provider_siliconflow.batch_files.atomic_files import LARGEST_JSON

    # Links are followed here: the DAG's author chose the path.
    with file.open("rb") as stream:
        content = stream.read(LARGEST_JSON + 1)
    if len(content) > LARGEST_JSON:
        raise InvalidInputError(f"{file} is not a manifest: it has more than {LARGEST_JSON} bytes")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as exc:
        raise InvalidInputError(f"{file} is not a manifest: {exc}") from None


def _files_of_returned(
    manifest: Mapping[str, Any], model: str | None, all_models: bool
) -> dict[str | None, Any]:
    """Return the files for a manifest that a task returned, unless its folder now contains another run's results."""
    from airflow_provider_siliconflow.api.exceptions import InvalidInputError

    name = "the manifest"
    paths = manifest.get("paths")
    output_dir = paths.get("output_dir") if isinstance(paths, Mapping) else None
    if not isinstance(output_dir, str) or not output_dir.strip():
        raise InvalidInputError(f"{name} is not a manifest of this provider: it names no output_dir")
    folder = resolve_path("output_dir of the manifest", output_dir)
    files = _files_of(manifest, name, folder, model, all_models)
    try:
        stored = _load_manifest(folder / "manifest.json")
    except FileNotFoundError:
        return files
    if _job(stored) != _job(manifest):
        raise InvalidInputError(
            f"{output_dir} now contains the results of another run, {_described(stored)}; the manifest is of "
            f"{_described(manifest)}. Give each run a folder of its own, for example with {{{{ ds }}}} in its path"
        )
    return files


def _job(manifest: Any) -> Any:
    """Return the identity of a manifest's job: its key, or else its batches."""
    if not isinstance(manifest, Mapping):
        return None
    key = manifest.get("run") or manifest.get("unfinished")
    if key is not None:
        return key, manifest.get("task")
    try:
        return [batch["id"] for each in manifest["models"] for batch in each["batches"]]
    except (TypeError, KeyError):
        return None


def _described(manifest: Any) -> str:
    task = manifest.get("task") if isinstance(manifest, Mapping) else None
    if not isinstance(task, Mapping):
        return "a download of one batch"
    return f"task {task.get('task_id')!r} of DAG {task.get('dag_id')!r}, run {task.get('run_id')!r}"


def _files_of(
    manifest: Any, name: str, folder: Any, model: str | None, all_models: bool
) -> dict[str | None, Any]:
    """Return the results files of models in a folder. Their paths depend only on the models, not on the manifest."""
    from airflow_provider_siliconflow.api.exceptions import InvalidInputError
    from airflow_provider_siliconflow.batch_files.manifest import results_folder

    try:
        models = [each["model"] for each in manifest["models"]]
    except (TypeError, KeyError):
        models = []
    if not models or not all(each is None or isinstance(each, str) for each in models):
        raise InvalidInputError(f"{name} is not a manifest of this provider: it names no results")
    known = ", ".join(repr(each) for each in models if each is not None)
    chosen = models if model is None else [model]
    if model is None:
        if len(models) != 1 and not all_models:
            raise InvalidInputError(f"{name} has results of several models; model must be one of {known}")
    elif model not in models:
        raise InvalidInputError(
            f"{name} has no results of model {model!r}; "
            + (f"it has {known}" if known else "its rows named their models themselves, so leave model out")
        )
    files = {each: results_folder(folder, each, several=len(models) > 1) / "results.jsonl" for each in chosen}
    for file in files.values():
        if not file.is_file():
            raise FileNotFoundError(f"no results file {file}, which belongs to {name}")
    return files
