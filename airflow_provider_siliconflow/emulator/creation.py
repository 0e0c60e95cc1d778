"""What the service decides when a batch is created: whether the request is valid, and which rows are special."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from airflow_provider_siliconflow.emulator.answers import transient_status
from airflow_provider_siliconflow.emulator.refusals import invalid_parameter
from airflow_provider_siliconflow.emulator.rows import ENDPOINT, decode_row_name
from airflow_provider_siliconflow.emulator.timeline import FinishOrder

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from airflow_provider_siliconflow.emulator.records import BatchRecord, FileRecord

_WINDOW = re.compile(r"(\d{1,4})h")

#: Row index, custom id, model, and what happens to the row: a status, ``"missing"`` or ``"expire"``.
Failure = tuple[int, str, str, str]


def check_creation(request: object) -> tuple[int, dict[str, Any]]:
    """
    Check the body of ``POST /batches``.

    :return: the completion window in hours, and the ``replace`` object.
    :raises ServiceError: 400.
    """
    if not isinstance(request, dict):
        raise invalid_parameter("The body must be a JSON object.")
    for name in ("input_file_id", "endpoint", "completion_window"):
        if not isinstance(request.get(name), str) or not request[name]:
            raise invalid_parameter(f"{name} is required and must be a string.")
    if request["endpoint"] != ENDPOINT:
        raise invalid_parameter(f"endpoint must be {ENDPOINT}.")
    window = _WINDOW.fullmatch(request["completion_window"])
    if window is None or not 24 <= int(window[1]) <= 336:
        raise invalid_parameter("completion_window must lie between 24h and 336h.")
    _check_metadata(request.get("metadata"))
    replace = request.get("replace")
    if replace is None:
        return int(window[1]), {}
    if not isinstance(replace, dict):
        raise invalid_parameter("replace must be an object.")
    if not isinstance(replace.get("model", ""), str):
        raise invalid_parameter("replace.model must be a string.")
    return int(window[1]), replace


def _check_metadata(metadata: object) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict):
        raise invalid_parameter("metadata must be an object.")
    if len(metadata) > 16:
        raise invalid_parameter("metadata can have at most 16 pairs.")
    for key, value in metadata.items():
        if len(key) > 64:
            raise invalid_parameter("A key of metadata can have at most 64 characters.")
        if not isinstance(value, str) or len(value) > 512:
            raise invalid_parameter("A value of metadata must be a string of at most 512 characters.")


def transient_failures(content: Path, model: str | None, rate: float) -> Iterator[Failure]:
    """
    Yield the rows that fail the first time they are run.

    :param content: the input file, which is read whole.
    :param model: ``replace.model``.
    :param rate: share of the rows.
    """
    with content.open("rb", buffering=1 << 20) as lines:
        for row, line in enumerate(lines):
            name = decode_row_name(line)
            used = model or name.body.model or ""
            status = transient_status(name.custom_id, used, rate)
            if status is not None:
                yield row, name.custom_id, used, str(status)


class RowFates:
    """Chooses what happens to special rows. Remembers which of them have failed their one time."""

    def __init__(self) -> None:
        self._failed_once: set[tuple[str, str]] = set()

    def remember(self, batch: BatchRecord) -> None:
        """Count the failures of a batch that an earlier run created."""
        self._failed_once.update(batch.first_failures)

    def decide(
        self, batch: BatchRecord, file: FileRecord, model: str | None, transient: Iterable[Failure]
    ) -> None:
        """Choose at creation, since "the first time" goes by the order in which batches are created."""
        candidates = list(transient)
        for marked in file.scan.marked:
            for marker in marked.markers:
                name, _, value = marker.partition("=")
                if name == "error" or marker in ("missing", "expire"):
                    batch.outcomes.setdefault(marked.row, value or marker)
                elif name == "once" or marker == "missing-once":
                    candidates.append(
                        (marked.row, marked.custom_id, model or marked.model or "", value or "missing")
                    )
        for row, custom_id, used, outcome in candidates:
            if (custom_id, used) not in self._failed_once:
                batch.outcomes.setdefault(row, outcome)
                batch.first_failures.append((custom_id, used))
        self._failed_once.update(batch.first_failures)
        order = FinishOrder(batch.timeline.total)
        for row, outcome in batch.outcomes.items():
            positions = batch.missing_positions if outcome == "missing" else batch.failed_positions
            positions.append(order.position_of(row))
        batch.failed_positions.sort()
        batch.missing_positions.sort()
