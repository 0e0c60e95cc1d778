"""Decisions at the creation of a batch: whether the request is valid, and which rows are special."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from airflow_provider_siliconflow.emulator.answers import transient_status
from airflow_provider_siliconflow.emulator.flaws import FLAWS, drawn_flaw
from airflow_provider_siliconflow.emulator.parameters import (
    CHECKED_PARAMETERS,
    PARAMETER_ERRORS,
    can_be_refused,
    refused_parameter,
)
from airflow_provider_siliconflow.emulator.refusals import invalid_parameter, unknown_model
from airflow_provider_siliconflow.emulator.rows import ENDPOINT, decode_row_name
from airflow_provider_siliconflow.emulator.timeline import FinishOrder

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from airflow_provider_siliconflow.emulator.config import EmulatorConfig
    from airflow_provider_siliconflow.emulator.records import BatchRecord, FileRecord
    from airflow_provider_siliconflow.emulator.rows import FileScan

_WINDOW = re.compile(r"(\d{1,4})h")

#: Row index, custom id, model, and what happens to the row: a status, ``"missing"``, ``"expire"``, why its
#: parameters are refused, or a flaw of its answer.
Special = tuple[int, str, str, str]


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


def check_models(file: FileScan, model: str | None, config: EmulatorConfig) -> None:
    """
    Check the models of a batch: ``replace.model``, or those of its lines.

    :raises ServiceError: 400, one does not exist or is none that batches take.
    """
    for name in [model] if model is not None else file.models:
        if name not in (config.batch_models or config.models):
            raise unknown_model()


def needs_rows(file: FileScan, replace: Mapping[str, Any], config: EmulatorConfig) -> bool:
    """Return whether the settings make some rows special, so that all must be read."""
    parameters = {*file.parameters, *(name for name in CHECKED_PARAMETERS if name in replace)}
    return config.row_error_rate > 0 or config.answer_rate > 0 or can_be_refused(parameters, config)


def special_rows(content: Path, replace: Mapping[str, Any], config: EmulatorConfig) -> Iterator[Special]:
    """
    Yield the rows that the settings make special: each fails, or its answer has a flaw, if it is run the first time.

    A row whose parameters are refused fails whenever it is run.

    :param content: the input file, which is read whole.
    :param replace: what takes the place of the rows' own parameters.
    """
    model = replace.get("model")
    with content.open("rb", buffering=1 << 20) as lines:
        for row, line in enumerate(lines):
            name = decode_row_name(line)
            used = model or name.body.model or ""
            parameters = {one: replace.get(one, getattr(name.body, one)) for one in CHECKED_PARAMETERS}
            what = refused_parameter(used, parameters, config)
            if what is None and config.row_error_rate > 0:
                status = transient_status(name.custom_id, used, config.row_error_rate)
                what = None if status is None else str(status)
            if what is not None:
                yield row, name.custom_id, used, what
            flaw = drawn_flaw(name.custom_id, used, 0, config)
            if flaw is not None:
                yield row, name.custom_id, used, flaw


class RowFates:
    """
    Chooses what happens to special rows.

    Remembers which of them have failed their one time, and how often each was answered wrongly.
    """

    def __init__(self) -> None:
        self._failed_once: set[tuple[str, str]] = set()
        self._answered_wrongly: Counter[tuple[str, str]] = Counter()

    def remember(self, batch: BatchRecord) -> None:
        """Count the failures of a batch that an earlier run created."""
        self._failed_once.update(batch.first_failures)
        self._answered_wrongly.update(batch.first_flaws)

    def decide(
        self,
        batch: BatchRecord,
        file: FileRecord,
        model: str | None,
        special: Iterable[Special],
        config: EmulatorConfig,
    ) -> None:
        """Choose at creation, since "the first time" depends on the order in which batches are created."""
        candidates: list[Special] = []
        flawed: list[Special] = []
        for one in special:
            if one[3] in PARAMETER_ERRORS:
                batch.outcomes.setdefault(one[0], one[3])
            else:
                (flawed if one[3] in FLAWS else candidates).append(one)
        once: list[Special] = []
        for marked in file.scan.marked:
            for marker in marked.markers:
                name, _, value = marker.partition("=")
                used = model or marked.model or ""
                if name == "error" or marker in ("missing", "expire"):
                    batch.outcomes.setdefault(marked.row, value or marker)
                elif name == "once" or marker == "missing-once":
                    candidates.append((marked.row, marked.custom_id, used, value or "missing"))
                elif marker.endswith("-once"):
                    once.append((marked.row, marked.custom_id, used, marker.removesuffix("-once")))
        for row, custom_id, used, outcome in candidates:
            if (custom_id, used) not in self._failed_once:
                batch.outcomes.setdefault(row, outcome)
                batch.first_failures.append((custom_id, used))
        self._failed_once.update(batch.first_failures)
        self._decide_answers(batch, once, flawed, config)
        order = FinishOrder(batch.timeline.total)
        for row, outcome in batch.outcomes.items():
            positions = batch.missing_positions if outcome == "missing" else batch.failed_positions
            positions.append(order.position_of(row))
        batch.failed_positions.sort()
        batch.missing_positions.sort()

    def _decide_answers(
        self, batch: BatchRecord, once: list[Special], flawed: list[Special], config: EmulatorConfig
    ) -> None:
        """
        Choose which rows that do not fail are answered wrongly.

        :param once: rows with a marker for a flaw of the first answer.
        :param flawed: rows that the settings give a flaw at first.
        """
        for row, custom_id, used, flaw in once:
            if row not in batch.outcomes and not self._answered_wrongly[custom_id, used]:
                batch.flaws.setdefault(row, flaw)
        for row, custom_id, used, _ in flawed:
            drawn = drawn_flaw(custom_id, used, self._answered_wrongly[custom_id, used], config)
            if drawn is not None and row not in batch.outcomes:
                batch.flaws.setdefault(row, drawn)
        for row, custom_id, used, _ in {one[0]: one for one in (*once, *flawed)}.values():
            if row in batch.flaws:
                batch.first_flaws.append((custom_id, used))
        self._answered_wrongly.update(batch.first_flaws)
