"""Cancelling many batches in the few seconds that Airflow leaves a task that is being ended."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Protocol

from airflow_provider_siliconflow.api.exceptions import InvalidRequestError, SiliconFlowError
from airflow_provider_siliconflow.api.models import Batch

log = logging.getLogger(__name__)

#: Batches that are cancelled at a time.
_AT_ONCE = 32


class CancelAPI(Protocol):
    """The calls that cancelling needs; ``SiliconFlowClient`` has them."""

    def cancel_batch(self, batch_id: str) -> Batch:
        """Request the cancellation of a batch."""
        ...

    def get_batch(self, batch_id: str) -> Batch:
        """Read a batch."""
        ...


def cancel(api: CancelAPI, batch_id: str) -> Batch:
    """
    Request the cancellation of a batch; a batch that has already ended is returned as it is.

    :returns: the batch, which may still show its old status.
    """
    try:
        batch = api.cancel_batch(batch_id)
    except InvalidRequestError:
        batch = api.get_batch(batch_id)
        if not batch.is_terminal:
            raise
        log.info("Batch %s has already ended: %s", batch_id, batch.status)
        return batch
    log.info("Requested cancellation of batch %s; its status is %s", batch_id, batch.status)
    return batch


def cancel_all(
    batch_ids: Sequence[str],
    open_api: Callable[[], AbstractContextManager[CancelAPI]],
    *,
    is_ours: Callable[[Batch], bool] | None = None,
) -> None:
    """
    Request the cancellation of batches, several at a time. Failures are only logged: the task is already ending.

    :param open_api: returns a client for one thread.
    :param is_ours: for ids that come from a ledger, which may name batches of others: each batch is read first, and is
        not cancelled if this returns ``False`` for it. Several threads may call it at once.
    """

    def work(some: Sequence[str]) -> None:
        with open_api() as api:
            for batch_id in some:
                try:
                    if is_ours is None or _check(api, batch_id, is_ours):
                        cancel(api, batch_id)
                except SiliconFlowError as exc:
                    log.warning(
                        "Batch %s could not be cancelled; it may continue and be billed: %s", batch_id, exc
                    )

    threads = min(_AT_ONCE, len(batch_ids))
    with ThreadPoolExecutor(max(threads, 1), thread_name_prefix="cancel") as pool:
        shares = [batch_ids[number::threads] for number in range(threads)]
        futures = [pool.submit(work, share) for share in shares]
    for share, future in zip(shares, futures, strict=True):
        if (error := future.exception()) is not None:
            log.error(
                "Not all of %s could be cancelled: %s: %s", ", ".join(share), type(error).__name__, error
            )


def _check(api: CancelAPI, batch_id: str, is_ours: Callable[[Batch], bool]) -> bool:
    batch = api.get_batch(batch_id)
    if batch.id == batch_id and is_ours(batch):
        return True
    log.error("Batch %s is in this task's record but belongs to other work; it is not cancelled", batch_id)
    return False
