"""
The bill: what the rows that were answered so far cost.

It is made from the answers themselves, so a test can hold what a client read and added up against it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from airflow_provider_siliconflow.emulator.answers import Usage
from airflow_provider_siliconflow.emulator.results import finished_rows, style_of
from airflow_provider_siliconflow.emulator.rows import decode_row

if TYPE_CHECKING:
    from array import array
    from collections.abc import Mapping
    from pathlib import Path

    from airflow_provider_siliconflow.emulator.answers import Answerer
    from airflow_provider_siliconflow.emulator.prices import Price, Route
    from airflow_provider_siliconflow.emulator.records import BatchRecord


@dataclass(frozen=True)
class BillLine:
    """
    What one model was paid on one route.

    :param route: ``"batch"`` or ``"live"``.
    :param rows: answers.
    :param prompt_tokens: of the prompts, the cached ones included.
    :param cached_tokens: those of the prompts that came from the service's cache.
    :param completion_tokens: of the answers, thinking included.
    :param cost: in CNY, exact; None when ``prices`` has no price for it.
    """

    model: str
    route: Route
    rows: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cost: Decimal | None


@dataclass(frozen=True)
class Bill:
    """What the account has to pay. A model without a price adds nothing to the total."""

    lines: tuple[BillLine, ...] = ()

    @property
    def total(self) -> Decimal:
        """The sum in CNY, exact."""
        return sum((line.cost for line in self.lines if line.cost is not None), Decimal(0))

    def cost(self, model: str | None = None, route: Route | None = None) -> Decimal:
        """Return the part of the total that belongs to a model, a route or both."""
        chosen = [one for one in self.lines if model in (None, one.model) and route in (None, one.route)]
        return Bill(tuple(chosen)).total

    def as_dict(self) -> dict[str, Any]:
        """Return the bill as the control calls show it; amounts are texts, so that they stay exact."""
        lines = [
            {**vars(line), "cost": None if line.cost is None else format(line.cost, "f")}
            for line in self.lines
        ]
        return {"total": format(self.total, "f"), "currency": "CNY", "lines": lines}


def make_bill(usage: Mapping[tuple[str, Route], Usage], prices: Mapping[str, Price]) -> Bill:
    """
    Make a bill.

    :param usage: by model and route.
    :param prices: by model.
    """
    lines = []
    for (model, route), used in sorted(usage.items()):
        rates = prices[model].rates(route) if model in prices else None
        cost = None
        if rates is not None:
            cached = rates.prompt if rates.cached_prompt is None else rates.cached_prompt
            millionths = (used.prompt - used.cached) * rates.prompt
            millionths += used.cached * cached + used.completion * rates.completion
            cost = millionths / 1_000_000
        lines.append(BillLine(model, route, used.rows, used.prompt, used.cached, used.completion, cost))
    return Bill(tuple(lines))


class BatchMeter:
    """
    Adds up what the rows of one batch used. Safe to use from any thread.

    An answer is made again for the bill, but only once: the next reading goes on where the last one ended.

    :param batch: the batch.
    :param content: its input file.
    """

    def __init__(self, batch: BatchRecord, content: Path) -> None:
        self._batch = batch
        self._content = content
        self._lock = threading.Lock()
        self._done = 0
        self._used: dict[str, Usage] = {}

    def read(self, done: int, offsets: array[int], answerer: Answerer) -> dict[str, Usage]:
        """
        Return the usage by model. Rows without an answer used nothing.

        :param done: how many rows have been run.
        :param offsets: where the lines of the input begin, and its size.
        """
        batch, style = self._batch, style_of(self._batch)
        replace = batch.request.get("replace") or {}
        with self._lock:
            if done < self._done:
                # The batch was given another end.
                self._done, self._used = 0, {}
            for row, line in finished_rows(batch, self._content, offsets, self._done, done):
                if row in batch.outcomes:
                    continue
                request = decode_row(line)
                body = {**request.body, **replace}
                answer = answerer.answer(request.custom_id, body, batch.flaws.get(row), style)
                before = self._used.get(body["model"])
                self._used[body["model"]] = answer.usage if before is None else before + answer.usage
            self._done = max(self._done, done)
            return dict(self._used)
