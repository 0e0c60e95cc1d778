"""
The bill: what the rows that were answered so far cost.

It is made from the answers themselves, so a test can hold what a client read and added up against it.

The names that tests rely on: ``bill.lines``, each with ``model``, ``route`` (``"batch"`` or ``"live"``), ``rows``
(answers), ``prompt_tokens``, ``cached_tokens``, ``completion_tokens``, ``cost``, and on the live route ``refused``
(requests with a 429) and ``lost`` (answered and billed, but the client did not get it); ``bill.total``,
``bill.cost(model, route)``, ``bill.rows(model, route)``. The live route costs ``prices[model].live``. How often bodies
were answered is not on the bill, but in ``emulator.live`` (control call ``GET live``): ``answered``, ``lost``,
``refused``, ``failed``, ``open``, ``most_open``, ``asked`` (different bodies) and ``asked_again`` (answers beyond the
first of their body).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from airflow_provider_siliconflow.emulator.live import LiveCount
from airflow_provider_siliconflow.emulator.results import finished_rows, style_of
from airflow_provider_siliconflow.emulator.rows import decode_row

if TYPE_CHECKING:
    from array import array
    from collections.abc import Mapping
    from pathlib import Path

    from airflow_provider_siliconflow.emulator.answers import Answerer, Usage
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
    :param refused: live requests that were refused with 429; they cost nothing.
    :param lost: live answers that the client did not get; they are among ``rows``.
    """

    model: str
    route: Route
    rows: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cost: Decimal | None
    refused: int = 0
    lost: int = 0


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
        return self._part(model, route).total

    def rows(self, model: str | None = None, route: Route | None = None) -> int:
        """Return how many answers belong to a model, a route or both."""
        return sum(line.rows for line in self._part(model, route).lines)

    def _part(self, model: str | None, route: Route | None) -> Bill:
        lines = (one for one in self.lines if model in (None, one.model) and route in (None, one.route))
        return Bill(tuple(lines))

    def as_dict(self) -> dict[str, Any]:
        """Return the bill as the control calls show it; amounts are texts, so that they stay exact."""
        lines = [
            {**vars(line), "cost": None if line.cost is None else format(line.cost, "f")}
            for line in self.lines
        ]
        return {"total": format(self.total, "f"), "currency": "CNY", "lines": lines}


def make_bill(
    batches: Mapping[str, Usage], live: Mapping[str, LiveCount], prices: Mapping[str, Price]
) -> Bill:
    """
    Make a bill.

    :param batches: what was used in batches, by model.
    :param live: what was asked live, by model.
    :param prices: by model.
    """
    lines = []
    sections: list[tuple[str, Route, LiveCount]] = []
    sections += [(model, "batch", LiveCount(used)) for model, used in batches.items()]
    sections += [(model, "live", count) for model, count in live.items()]
    for model, route, count in sorted(sections, key=lambda one: one[:2]):
        used = count.usage
        rates = prices[model].rates(route) if model in prices else None
        cost = None
        if rates is not None:
            cached = rates.prompt if rates.cached_prompt is None else rates.cached_prompt
            millionths = (used.prompt - used.cached) * rates.prompt
            millionths += used.cached * cached + used.completion * rates.completion
            cost = millionths / 1_000_000
        lines.append(
            BillLine(
                model=model,
                route=route,
                rows=used.rows,
                prompt_tokens=used.prompt,
                cached_tokens=used.cached,
                completion_tokens=used.completion,
                cost=cost,
                refused=count.refused,
                lost=count.lost,
            )
        )
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
