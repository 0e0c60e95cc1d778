"""What the operators of this provider share."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import AirflowTaskTimeout, BaseOperator, conf

from airflow_provider_siliconflow.api import arguments
from airflow_provider_siliconflow.hooks.siliconflow import SiliconFlowHook
from airflow_provider_siliconflow.links.batch import BatchConsoleLink
from airflow_provider_siliconflow.task.state import airflow_version, only_the_worker_ends
from airflow_provider_siliconflow.task.templating import (
    is_templated,
    is_templated_inside,
    rendered_mapping,
    rendered_number,
    rendered_seconds,
)

if TYPE_CHECKING:
    from airflow_provider_siliconflow.api.models import Batch

#: Airflow's own limit on a deferral comes this many seconds after ours, as a backstop.
DEFERRAL_BACKSTOP = 900.0


class SiliconFlowOperator(BaseOperator):
    """What all operators of this provider share."""

    template_fields: Sequence[str] = ("conn_id",)
    operator_extra_links = (BatchConsoleLink(),)
    ui_color = "#e8e4fb"

    def __init__(
        self, *, conn_id: str = SiliconFlowHook.default_conn_name, fail_fast: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.conn_id = conn_id
        self.fail_fast = fail_fast

    @cached_property
    def hook(self) -> SiliconFlowHook:
        """Return the hook for the connection."""
        return SiliconFlowHook(conn_id=self.conn_id)


class FileOperator(SiliconFlowOperator):
    """What the operators share that read a request file or write result files: they tell OpenLineage of them."""

    #: What the task made, once it did; also where it fails by its verdict on it.
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

    #: A task that fails by its verdict on the rows has written them.
    get_openlineage_facets_on_failure = get_openlineage_facets_on_complete


class SubmittingOperator(FileOperator):
    """
    What the operators share that pay for batches and wait for them.

    :param deferrable: wait in the triggerer, without a worker slot.
    :param poll_interval: seconds between two looks at a batch, or a ``timedelta``.
    :param timeout: seconds to wait, or a ``timedelta``.
    :param cancel_on_kill: cancel the batches when a person ends the task.
    :param cancel_on_timeout: cancel the batches when the wait times out.
    :param completion_window: ``"24h"`` to ``"336h"``, a number of hours or a ``timedelta``.
    :param metadata: pairs of strings for the batches.
    :param durable: whether a retry takes the batches up.
    """

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
        durable: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not is_templated(poll_interval):
            arguments.check_seconds("poll_interval", rendered_seconds(poll_interval))
        if timeout is not None and not is_templated(timeout):
            arguments.check_seconds("timeout", rendered_seconds(timeout))
        if not is_templated(completion_window):
            arguments.check_completion_window(rendered_number(completion_window))
        if metadata is not None and not is_templated(metadata) and not is_templated_inside(metadata):
            arguments.check_metadata(rendered_mapping(metadata), reserved=1 if durable else 0)
        self.completion_window = completion_window
        self.metadata = metadata
        self.deferrable = deferrable
        self.poll_interval = poll_interval
        self.timeout = timeout
        self.cancel_on_kill = cancel_on_kill
        self.cancel_on_timeout = cancel_on_timeout
        self.durable = durable
        self._ti: Any = None
        self._killed = False

    def wait_arguments(self) -> tuple[float, float | None]:
        """
        Return ``poll_interval`` and ``timeout`` in seconds.

        :raises InvalidInputError: what a template rendered is none.
        """
        interval, timeout = rendered_seconds(self.poll_interval), rendered_seconds(self.timeout)
        arguments.check_seconds("poll_interval", interval)
        if timeout is not None:
            arguments.check_seconds("timeout", timeout)
        return interval, timeout

    def kill_cancels(self) -> bool:
        """
        Whether ``on_kill`` is to cancel.

        ``execution_timeout`` comes this way too; that is a timeout, and follows ``cancel_on_timeout``. So does the end
        of the worker: there the batches are left for the retry.
        """
        if isinstance(sys.exc_info()[1], AirflowTaskTimeout):
            return self.cancel_on_timeout
        if not self.cancel_on_kill:
            return False
        if self.durable and self._ti is not None and only_the_worker_ends(self._ti):
            self.log.warning(
                "The worker is ending, or Airflow ends this try; the batches go on, and a retry takes them up"
            )
            return False
        return True

    @staticmethod
    def kill_patience() -> float:
        """
        Return how long ``on_kill`` may look for a batch whose request is on its way, in seconds.

        Airflow 3 lets the task go on for a while, and it cancels the batch once the answer tells its id. Airflow 2
        breaks the request off when ``on_kill`` returns, and kills the process when it takes too long.
        """
        if airflow_version() >= (3, 0):
            return 0.0
        return float(conf.getint("core", "killed_task_cleanup_time", fallback=60)) / 2

    def cancel(self, batch_ids: Sequence[str]) -> None:
        """Ask for batches to be cancelled where a failure to do so must not hide what happened before."""
        from dataclasses import replace

        from airflow_provider_siliconflow.api.client import SiliconFlowClient
        from airflow_provider_siliconflow.jobs.cancelling import cancel_all

        # Airflow leaves a task that is ended five seconds.
        settings = replace(self.hook.settings, max_retries=min(self.hook.settings.max_retries, 2))
        cancel_all(batch_ids, lambda: SiliconFlowClient(settings))

    def cancelled_at_timeout(self, batch_ids: Sequence[str]) -> Exception:
        """Cancel batches whose wait timed out, and return the error that says so."""
        from airflow_provider_siliconflow.api.exceptions import BatchCancelledAtTimeoutError

        self.cancel(batch_ids)
        return BatchCancelledAtTimeoutError(
            f"The wait timed out and cancel_on_timeout is set: {', '.join(batch_ids[:10])} ({len(batch_ids)} in "
            "all) were asked to be cancelled. Rows that are done are billed and can be downloaded for 30 days; a "
            "retry submits the cancelled batches anew and pays for them again.",
            batch_id=batch_ids[0] if batch_ids else None,
        )


def wait_deadline(batch: Batch, timeout: float | None) -> float:
    """Return the absolute time (epoch seconds) at which the wait for a batch ends, fixed once per try."""
    from airflow_provider_siliconflow.jobs.waiting import default_deadline

    now = time.time()
    return default_deadline(batch, now) if timeout is None else now + timeout
