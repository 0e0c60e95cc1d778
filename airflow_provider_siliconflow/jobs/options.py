"""The options of a job, with the check of the arguments they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from airflow_provider_siliconflow.api import arguments
from airflow_provider_siliconflow.batch_files.parameters import check_parameters
from airflow_provider_siliconflow.batch_files.prices import check_prices
from airflow_provider_siliconflow.jobs.acceptance import Acceptance, check_acceptance


@dataclass(frozen=True, slots=True)
class RunOptions:
    """
    The options of a job, checked.

    :param models: models given by ``replace``; empty if the rows name their models.
    :param max_rows: most rows per batch.
    :param max_bytes: most bytes per batch.
    :param max_in_flight: most open batches at a time; ``None`` for no limit.
    :param max_row_attempts: how often a row is sent at most.
    :param max_error_rate: share of rows (0 to 1) that may fail; ``None`` for no limit.
    :param request_params: body parameters for rows that lack them.
    :param acceptance: which answers are accepted, and what a row gets that is sent again.
    """

    models: tuple[str, ...] = ()
    completion_window: str = "24h"
    metadata: Mapping[str, str] = field(default_factory=dict)
    max_rows: int = arguments.MAX_FILE_LINES
    max_bytes: int = arguments.MAX_FILE_BYTES
    max_in_flight: int | None = None
    max_row_attempts: int = 1
    max_error_rate: float | None = None
    fail_on_partial_error: bool = False
    allow_all_failed: bool = False
    prices: Mapping[str, Mapping[str, float]] | None = None
    request_params: Mapping[str, Any] | None = None
    acceptance: Acceptance = field(default_factory=Acceptance)

    @property
    def body_defaults(self) -> Mapping[str, Any]:
        """Body parameters for rows that lack them."""
        return {**self.acceptance.defaults, **(self.request_params or {})}

    @property
    def body_content(self) -> Mapping[str, Any]:
        """Everything that a job puts into the bodies of its rows, as JSON types."""
        return {**(self.request_params or {}), **self.acceptance.content}

    @property
    def replacements(self) -> tuple[str | None, ...]:
        """The models to run over; ``None`` stands for the models that the rows name."""
        return self.models or (None,)


def check_options(
    *,
    model: Any,
    models: Any,
    completion_window: Any,
    metadata: Any,
    max_rows_per_batch: Any,
    max_bytes_per_batch: Any,
    max_in_flight: Any,
    max_row_attempts: Any,
    max_error_rate: Any,
    prices: Any,
    request_params: Any,
    output_type: Any = None,
    accept: Any = None,
    structured_output: Any = None,
    retry_params: Any = None,
    **rest: Any,
) -> RunOptions:
    """
    Check the arguments of a job.

    :raises InvalidInputError: an argument is wrong; the message names it.
    """
    arguments.check_limits(
        max_rows_per_batch=max_rows_per_batch,
        max_bytes_per_batch=max_bytes_per_batch,
        max_in_flight=max_in_flight,
        max_row_attempts=max_row_attempts,
        max_error_rate=max_error_rate,
    )
    check_parameters("request_params", request_params)
    check_prices(prices)
    return RunOptions(
        models=arguments.check_models(model, models),
        completion_window=arguments.check_completion_window(completion_window),
        metadata=arguments.check_metadata(metadata, identified=True),
        max_rows=max_rows_per_batch,
        max_bytes=max_bytes_per_batch,
        max_in_flight=max_in_flight,
        max_row_attempts=max_row_attempts,
        max_error_rate=max_error_rate,
        prices=prices,
        request_params=request_params,
        acceptance=check_acceptance(
            output_type=output_type,
            accept=accept,
            structured_output=structured_output,
            retry_params=retry_params,
        ),
        **rest,
    )
