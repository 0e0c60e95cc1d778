"""Datasets for OpenLineage: the request file that a task read and the result files that it wrote."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from airflow.providers.openlineage.extractors import OperatorLineage


def lineage(requests: Any, manifest: Mapping[str, Any] | None = None) -> OperatorLineage:
    """
    Return the datasets of a task.

    :param requests: path or URI of the input; rows that were passed as values are not a dataset.
    :param manifest: the manifest of the results.
    """
    from airflow.providers.common.compat.openlineage.facet import (
        InputDataset,
        OutputDataset,
        OutputStatisticsOutputDatasetFacet,
    )
    from airflow.providers.openlineage.extractors import OperatorLineage

    inputs = [InputDataset(*_name(requests))] if _is_file(requests) else []
    outputs = []
    for path, rows in _results(manifest or {}):
        facets = {"outputStatistics": OutputStatisticsOutputDatasetFacet(rowCount=rows)}
        outputs.append(OutputDataset(*_name(path), outputFacets=facets))
    return OperatorLineage(inputs=inputs, outputs=outputs)


def _results(manifest: Mapping[str, Any]) -> Iterable[tuple[str, int]]:
    for model in manifest.get("models", ()):
        rows = model["rows"]
        yield model["paths"]["results"], rows["total"]
        yield model["paths"]["errors"], rows["total"] - rows["ok"]


def _is_file(requests: Any) -> bool:
    if hasattr(requests, "__fspath__") or hasattr(requests, "protocol"):
        return True
    return isinstance(requests, str) and not requests.lstrip().startswith("[")


def _name(path: Any) -> tuple[str, str]:
    """Return namespace and name of a file for OpenLineage, without the user part, which may be a connection id."""
    parts = urlsplit(str(path))
    if parts.scheme in ("", "file", "local"):
        return "file", str(Path(parts.path if parts.scheme else str(path)).absolute())
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}", parts.path.lstrip("/") or "/"
