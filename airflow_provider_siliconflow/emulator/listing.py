"""Which batches a page of the list shows, in the documented and in the odd forms."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING

from airflow_provider_siliconflow.emulator.records import BatchRecord, new_id
from airflow_provider_siliconflow.emulator.refusals import unknown_object

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from airflow_provider_siliconflow.emulator.config import EmulatorConfig


def list_page(
    order: Sequence[tuple[float, int, str]],
    batches: Mapping[str, BatchRecord],
    config: EmulatorConfig,
    *,
    now: float,
    size: int,
    after: str | None,
) -> tuple[list[BatchRecord], bool]:
    """
    Return one page, and whether the service claims that there are more.

    :param order: sort keys of all batches, oldest first.
    :param now: the service's clock in epoch seconds.
    :param size: batches on a page.
    :param after: id of the last batch of the previous page.
    :raises ServiceError: 404, the cursor names no batch.
    """
    if config.list_limit:
        size, after = config.list_limit, None
    page: list[BatchRecord] = []
    more = False
    for batch in _following(order, batches, config, after):
        if now - batch.timeline.created < config.list_lag_seconds:
            continue
        if len(page) == size:
            more = True
            break
        page.append(batch)
    if config.list_limit:
        return page, False
    if config.list_endless:
        missing = size - len(page)
        # As new as possible, so that no client stops because the batches are too old.
        page += [BatchRecord.of_another_user(new_id("batch_"), 0, now) for _ in range(missing)]
        return page, True
    return page, more or (config.ignore_cursor and bool(page))


def _following(
    order: Sequence[tuple[float, int, str]],
    batches: Mapping[str, BatchRecord],
    config: EmulatorConfig,
    after: str | None,
) -> Iterator[BatchRecord]:
    """Yield the batches behind the cursor, in the order of the list."""
    oldest_first = config.list_oldest_first
    place = 0 if oldest_first else len(order)
    if after and not config.ignore_cursor:
        cursor = batches.get(after)
        if cursor is not None:
            key = cursor.sort_key()
            place = bisect_right(order, key) if oldest_first else bisect_left(order, key)
        elif config.list_endless:
            # A batch made up for an earlier page: all real ones came before it.
            return
        else:
            raise unknown_object("Batch", after)
    places = range(place, len(order)) if oldest_first else range(place - 1, -1, -1)
    for one in places:
        yield batches[order[one][2]]
