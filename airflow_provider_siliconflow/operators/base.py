"""What the operators of this provider share."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import AirflowTaskTimeout, BaseOperator

from airflow_provider_siliconflow.hooks.siliconflow import SiliconFlowHook
from airflow_provider_siliconflow.links.batch import BatchConsoleLink

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

    def kill_cancels(self) -> bool:
        """
        Whether ``on_kill`` is to cancel.

        ``execution_timeout`` comes this way too; that is a timeout, and follows ``cancel_on_timeout``.
        """
        timed_out = isinstance(sys.exc_info()[1], AirflowTaskTimeout)
        return bool(getattr(self, "cancel_on_timeout" if timed_out else "cancel_on_kill"))

    def cancel_quietly(self, batch_ids: Iterable[str]) -> None:
        """Ask for batches to be cancelled where a failure to do so must not hide what happened before."""
        from airflow_provider_siliconflow.api.exceptions import SiliconFlowError

        for batch_id in batch_ids:
            try:
                self.hook.cancel_batch(batch_id)
            except SiliconFlowError as exc:
                self.log.warning(
                    "Batch %s could not be cancelled; it may go on and be billed: %s", batch_id, exc
                )

    def cancelled_at_timeout(self, batch_ids: Sequence[str]) -> Exception:
        """Cancel batches whose wait timed out, and return the error that says so."""
        from airflow_provider_siliconflow.api.exceptions import BatchTimeoutError

        self.cancel_quietly(batch_ids)
        return BatchTimeoutError(
            f"The wait timed out and cancel_on_timeout is set: {', '.join(batch_ids[:10])} ({len(batch_ids)} in "
            "all) were asked to be cancelled. Rows that are done are billed and can be downloaded for 30 days; a "
            "retry submits the cancelled batches anew and pays for them again.",
            batch_id=batch_ids[0] if batch_ids else None,
        )


def check_wait_arguments(*, poll_interval: Any, timeout: Any) -> None:
    """
    Refuse waiting arguments that cannot work, when the DAG is parsed.

    :raises ValueError: one is not a positive number.
    """
    for name, value in (("poll_interval", poll_interval), ("timeout", timeout)):
        if value is None and name == "timeout":
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"{name} must be a number of seconds above 0; got {value!r}")


def wait_deadline(batch: Batch, timeout: float | None) -> float:
    """Return the absolute time (epoch seconds) at which the wait for a batch ends, fixed once per try."""
    from airflow_provider_siliconflow.jobs.waiting import default_deadline

    now = time.time()
    return default_deadline(batch, now) if timeout is None else now + timeout


def finish_batch(
    hook: SiliconFlowHook, batch: Batch, *, fail_on_partial_error: bool, allow_all_failed: bool
) -> str | None:
    """
    Judge an ended batch; where it is not flawless, look up the commonest error first.

    :returns: a warning, or ``None``.
    :raises BatchError: the batch is a failure.
    """
    from airflow_provider_siliconflow.jobs.downloads import commonest_error
    from airflow_provider_siliconflow.jobs.waiting import is_flawless, judge_batch

    hook.log.info("Batch %s has ended: %s", batch.id, batch.status)
    reason = None if is_flawless(batch) else commonest_error(hook.get_conn(), batch)
    return judge_batch(
        batch, fail_on_partial_error=fail_on_partial_error, allow_all_failed=allow_all_failed, reason=reason
    )
