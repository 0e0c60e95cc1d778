"""Cancelling many batches in the few seconds that a task has when it is ended."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Protocol

from airflow_provider_siliconflow.api.exceptions import InvalidRequestError, SiliconFlowError
from airflow_provider_siliconflow.api.models import Batch

log = logging.getLogger(__name__)

#: Batches that are cancelled at once.
_AT_ONCE = 32


class CancelAPI(Protocol):
    """The calls that cancelling needs; ``SiliconFlowClient`` has them."""

    def cancel_batch(self, batch_id: str) -> Batch:
        """Ask for a batch to be cancelled."""
        ...

    def get_batch(self, batch_id: str) -> Batch:
        """Read a batch."""
        ...


def cancel(api: CancelAPI, batch_id: str) -> Batch:
    """
    Ask for a batch to be cancelled; one that has ended already is returned as it is.

    :returns: the batch, which may still show its old status.
    """
    try:
        batch = api.cancel_batch(batch_id)
    except InvalidRequestError:
        batch = api.get_batch(batch_id)
        if not batch.is_terminal:
            raise
        log.info("Batch %s had ended already: %s", batch_id, batch.status)
        return batch
    log.info("Asked for batch %s to be cancelled; its status is %s", batch_id, batch.status)
    return batch


def cancel_all(batch_ids: Sequence[str], open_api: Callable[[], AbstractContextManager[CancelAPI]]) -> None:
    """
    Ask for batches to be cancelled, many at once; what fails is logged, since something happened before.

    :param open_api: makes the calls for one thread.
    """

    def work(some: Sequence[str]) -> None:
        with open_api() as api:
            for batch_id in some:
                try:
                    cancel(api, batch_id)
                except SiliconFlowError as exc:
                    log.warning(
                        "Batch %s could not be cancelled; it may go on and be billed: %s", batch_id, exc
                    )

    threads = min(_AT_ONCE, len(batch_ids))
    with ThreadPoolExecutor(max(threads, 1), thread_name_prefix="cancel") as pool:
        for number in range(threads):
            pool.submit(work, batch_ids[number::threads])
