"""The base classes of this provider's operators."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.providers.common.compat.sdk import AirflowTaskTimeout, BaseOperator, conf

from airflow_provider_siliconflow.hooks.siliconflow import SiliconFlowHook
from airflow_provider_siliconflow.links.batch import BatchConsoleLink
from airflow_provider_siliconflow.task.arguments import Arguments
from airflow_provider_siliconflow.task.arguments import on_clear as read_on_clear
from airflow_provider_siliconflow.task.errors import PaidWork, task_errors
from airflow_provider_siliconflow.task.state import TaskTry, airflow_version, is_ended_by_a_person

if TYPE_CHECKING:
    from airflow_provider_siliconflow.api.models import Batch


class SiliconFlowOperator(BaseOperator):
    """Base class of all operators of this provider."""

    template_fields: Sequence[str] = ("conn_id",)
    operator_extra_links = (BatchConsoleLink(),)
    ui_color = "#e8e4fb"

    #: The readers of the arguments; a subclass checks the known ones at the end of its constructor.
    ARGUMENTS: ClassVar[Arguments]

    def __init__(self, *, conn_id: str, fail_fast: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.conn_id = conn_id
        self.fail_fast = fail_fast

    @cached_property
    def hook(self) -> SiliconFlowHook:
        """Return the hook for the connection."""
        return SiliconFlowHook(conn_id=self.conn_id)


class FileOperator(SiliconFlowOperator):
    """Base class of operators that read a request file or write result files, which go to OpenLineage."""

    #: The manifest of the results, also if the task then fails because of them.
    _manifest: dict[str, Any] | None = None

    def lineage_input(self) -> Any:
        """Return the request file, or ``None``."""
        return None

    def get_openlineage_facets_on_start(self) -> Any:
        """Return the request file."""
        from airflow_provider_siliconflow.task.lineage import lineage

        return lineage(self.lineage_input())

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> Any:
        """Return the request file and the result files."""
        from airflow_provider_siliconflow.task.lineage import lineage

        return lineage(self.lineage_input(), self._manifest)

    #: A task that fails because of its rows has written the result files.
    get_openlineage_facets_on_failure = get_openlineage_facets_on_complete


class SubmittingOperator(FileOperator):
    """
    Base class of operators that pay for batches and wait for them.

    :param deferrable: wait in the triggerer, without a worker slot.
    :param poll_interval: seconds between two polls of a batch, or a ``timedelta``.
    :param timeout: seconds to wait, or a ``timedelta``.
    :param cancel_on_kill: cancel the batches if the task is ended by hand.
    :param cancel_on_timeout: cancel the batches if the wait times out.
    :param completion_window: ``"24h"`` to ``"336h"``, a number of hours or a ``timedelta``.
    :param metadata: pairs of strings for the batches.
    :param on_clear: ``"reuse"`` or ``"resubmit"``: what a manual clear does to work that is paid for.
    """

    #: Whether a retry continues with the batches.
    durable = True

    def __init__(
        self,
        *,
        deferrable: bool,
        poll_interval: float | timedelta | str,
        timeout: float | timedelta | str | None,
        cancel_on_kill: bool,
        cancel_on_timeout: bool,
        completion_window: str | int | timedelta,
        metadata: dict[str, str] | str | None,
        on_clear: str,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.on_clear = read_on_clear("on_clear", on_clear)
        self.completion_window = completion_window
        self.metadata = metadata
        self.deferrable = deferrable
        self.poll_interval = poll_interval
        self.timeout = timeout
        self.cancel_on_kill = cancel_on_kill
        self.cancel_on_timeout = cancel_on_timeout
        self._try: TaskTry | None = None
        self._killed = False

    def known_batches(self) -> Sequence[str]:
        """Return the ids of the batches that this try knows."""
        raise NotImplementedError

    def open_batches(self) -> Sequence[str]:
        """Return the ids of the known batches that may still run."""
        raise NotImplementedError

    def errors(self, *, earlier_tries: bool) -> AbstractContextManager[None]:
        """
        Return the context manager that ends the task if one of our errors is raised.

        :param earlier_tries: whether an earlier try, or this try before a deferral, may have left batches.
        """
        return task_errors(
            fail_fast=self.fail_fast,
            paid=PaidWork(self.known_batches, possible=earlier_tries, clear_pays=self.on_clear == "resubmit")
            if self.durable
            else None,
            cancel_at_timeout=self._cancel_open_batches if self.cancel_on_timeout else None,
        )

    def _cancel_open_batches(self) -> Sequence[str]:
        batch_ids = self.open_batches()
        self.cancel(batch_ids, is_ours=self.ownership())
        return batch_ids

    def ownership(self) -> Callable[[Batch], bool] | None:
        """Return what proves that an open batch is the task's; ``None`` if nobody else can have written its id."""
        return None

    def kill_cancels(self) -> bool:
        """
        Whether ``on_kill`` must cancel the batches.

        Airflow also calls ``on_kill`` for ``execution_timeout``, which is a timeout and follows ``cancel_on_timeout``,
        and whenever the worker, the machine or the connection to Airflow's database goes down. A cancelled batch cannot
        be restored, but a retry continues with a running one, and so does a clear that reuses it. So cancelling needs
        proof that the task was ended by hand.
        """
        if isinstance(sys.exc_info()[1], AirflowTaskTimeout):
            return self.cancel_on_timeout
        if not self.cancel_on_kill:
            return False
        # Without identity a retry cannot find the batch, so there is no reason to keep it.
        if not self.durable or self._try is None:
            return True
        return is_ended_by_a_person(self._try.ti, clear_ends=self.on_clear == "resubmit")

    @staticmethod
    def kill_patience() -> float:
        """
        Return how long ``on_kill`` may search for a batch whose request is under way, in seconds.

        Airflow 3 lets the task run for a while, which then cancels the batch once the answer contains its id. Airflow 2
        interrupts the request when ``on_kill`` returns, and kills the process if it takes too long.
        """
        if airflow_version() >= (3, 0):
            return 0.0
        return float(conf.getint("core", "killed_task_cleanup_time", fallback=60)) / 2

    def cancel(self, batch_ids: Sequence[str], *, is_ours: Callable[[Batch], bool] | None = None) -> None:
        """
        Ask for batches to be cancelled; what fails is logged, so that it does not hide what happened before.

        :param is_ours: for ids that others may have written: whether a batch, once read, may be cancelled.
        """
        from dataclasses import replace

        from airflow_provider_siliconflow.api.client import SiliconFlowClient
        from airflow_provider_siliconflow.jobs.cancelling import cancel_all

        # Airflow leaves a task that is being ended five seconds.
        settings = replace(self.hook.settings, max_retries=min(self.hook.settings.max_retries, 2))
        cancel_all(batch_ids, lambda: SiliconFlowClient(settings), is_ours=is_ours)
