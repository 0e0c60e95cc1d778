"""The options of a job, with the check of the arguments they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from airflow_provider_siliconflow.api import arguments
from airflow_provider_siliconflow.batch_files.cost_bounds import Tariff
from airflow_provider_siliconflow.batch_files.decimals import exact
from airflow_provider_siliconflow.batch_files.parameters import check_model_parameters, check_parameters
from airflow_provider_siliconflow.batch_files.prices import (
    Price,
    check_max_cost,
    check_prices,
)
from airflow_provider_siliconflow.jobs.acceptance import Acceptance, check_acceptance

#: Rows that are asked at once by default.
LIVE_CONCURRENCY = 16
#: What an invalid row does to a job.
ON_INVALID_ROW = ("fail", "report")


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
    :param model_params: body parameters of each model, for rows that lack them: before those of ``request_params``.
    :param acceptance: which answers are accepted, and what a row gets that is sent again.
    :param max_cost: the most that the job may cost, in CNY; ``None`` for no limit.
    :param reports_invalid: whether an invalid row becomes an error row; otherwise it fails the job.
    :param live_after: when the rows that are open are asked one by one; ``None`` for never.
    :param live_concurrency: how many of them are asked at once.
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
    prices: Mapping[str, Price] | None = None
    request_params: Mapping[str, Any] | None = None
    model_params: tuple[Mapping[str, Any], ...] = ()
    reports_invalid: bool = False
    max_cost: Fraction | None = None
    acceptance: Acceptance = field(default_factory=Acceptance)
    live_after: arguments.LiveAfter | None = None
    live_concurrency: int = LIVE_CONCURRENCY

    @property
    def body_defaults(self) -> Mapping[str, Any]:
        """Body parameters for rows that lack them, whatever the model."""
        return {key: value for key, value in self._defaults.items() if key not in self._of_models}

    @property
    def _defaults(self) -> dict[str, Any]:
        return {**self.acceptance.defaults, **(self.request_params or {})}

    @property
    def _of_models(self) -> set[str]:
        return {key for params in self.model_params for key in params}

    @property
    def variants(self) -> tuple[Mapping[str, Any], ...]:
        """Further body parameters for rows that lack them, for each model; empty if no model has its own."""
        if not self._of_models:
            return ()
        common = {key: value for key, value in self._defaults.items() if key in self._of_models}
        return tuple({**common, **params} for params in self.model_params)

    @property
    def body_content(self) -> Mapping[str, Any]:
        """Everything that a job puts into the bodies of its rows, as JSON types."""
        own = {"of models": list(self.variants)} if self.variants else {}
        return {**(self.request_params or {}), **self.acceptance.content, **own}

    @property
    def replacements(self) -> tuple[str | None, ...]:
        """The models to run over; ``None`` stands for the models that the rows name."""
        return self.models or (None,)

    def tariff(self) -> Tariff | None:
        """
        Return what limits the cost of batches; ``None`` without ``max_cost``.

        :raises InvalidInputError: a model has no price.
        """
        if self.max_cost is None:
            return None
        return Tariff(
            self.models,
            self.prices,
            self.max_cost,
            sent_again=self.acceptance.with_retry_params,
            variants=self.variants,
        )

    def live_tariff(self) -> Tariff | None:
        """
        Return what limits the cost of rows that are asked one by one; ``None`` without ``max_cost``.

        :raises InvalidInputError: a model has no price for that.
        """
        if self.max_cost is None:
            return None
        return Tariff(self.models, self.prices, self.max_cost, live=True)


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
    on_invalid_row: Any = "fail",
    max_cost: Any = None,
    live_after: arguments.LiveAfter | None = None,
    live_concurrency: Any = LIVE_CONCURRENCY,
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
    check_model_parameters("models", models)
    check_prices(prices)
    check_max_cost(max_cost)
    options = RunOptions(
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
        model_params=tuple(models.values()) if isinstance(models, Mapping) else (),
        acceptance=check_acceptance(
            output_type=output_type,
            accept=accept,
            structured_output=structured_output,
            retry_params=retry_params,
        ),
        reports_invalid=arguments.check_choice("on_invalid_row", on_invalid_row, ON_INVALID_ROW) == "report",
        max_cost=None if max_cost is None else exact(max_cost),
        live_after=live_after,
        live_concurrency=arguments.check_concurrency("live_concurrency", live_concurrency),
        **rest,
    )
    options.tariff()
    if live_after is not None:
        options.live_tariff()
    return options
