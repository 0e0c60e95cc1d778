"""The sensor that waits for batches."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.providers.common.compat.sdk import (
    AirflowSensorTimeout,
    BaseSensorOperator,
    PokeReturnValue,
    conf,
)
from airflow.triggers.base import StartTriggerArgs

from airflow_provider_siliconflow.hooks.siliconflow import SiliconFlowHook
from airflow_provider_siliconflow.links.batch import BatchConsoleLink
from airflow_provider_siliconflow.task import arguments as read
from airflow_provider_siliconflow.task.deferral import defer
from airflow_provider_siliconflow.task.errors import task_errors
from airflow_provider_siliconflow.task.state import airflow_version
from airflow_provider_siliconflow.task.templating import rendered_list
from airflow_provider_siliconflow.triggers.batch import BatchTrigger

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context

    from airflow_provider_siliconflow.api.models import Batch
    from airflow_provider_siliconflow.jobs.waiting import BatchWait

#: The sensor's default timeout in seconds: the longest completion window and a day.
_LONGEST_WAIT = 15 * 86400.0

#: Pauses before a sensor in reschedule mode polls a batch again that the account did not know, in seconds.
_SECOND_POLLS = (2.0, 5.0)


class BatchSensor(BaseSensorOperator):
    """
    Wait until one or more batches have ended, and fail if one of them did not succeed.

    Transient faults of the service do not end the wait. An expired or partly failed batch is a success with a
    warning, so that its results are downloaded, unless ``fail_on_partial_error`` is set or not one row
    succeeded. The sensor never cancels a batch.

    :param batch_id: one id, or a list of ids that share one trigger. (templated)
    :param conn_id: the connection. (templated)
    :param deferrable: wait in the triggerer, without a worker slot. Default: ``[operators]
        default_deferrable``. Otherwise ``mode`` is ``"poke"`` or ``"reschedule"``, as for any sensor.
    :param fail_on_partial_error: fail if any row failed or expired; by default that is a warning.
    :param allow_all_failed: succeed even if not one row of a batch succeeded.
    :param start_from_trigger: begin in the triggerer without a worker. This needs Airflow 3.3+, and a ``batch_id`` and
        ``conn_id`` that the triggerer can render: values, another task's ``.output``, or templates whose ``xcom_pull``
        names ``map_indexes``. Otherwise a worker starts the wait and then defers.
    :param timeout: seconds until ``AirflowSensorTimeout``; by default an hour after the batches expire.
    :param poke_interval: seconds between two polls of a batch.
    :param fail_fast: fail at once, without the task's retries, if a retry cannot help.
    :returns: the final batch as a JSON object, or a list of them for a list of ids.
    """

    template_fields: Sequence[str] = ("batch_id", "conn_id")
    operator_extra_links = (BatchConsoleLink(),)
    ui_color = "#e8e4fb"
    ARGUMENTS: ClassVar = read.Arguments({"batch_id": read.identifiers, "conn_id": read.text})

    def __init__(
        self,
        *,
        batch_id: str | Sequence[str],
        conn_id: str = "siliconflow_default",
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        fail_on_partial_error: bool = False,
        allow_all_failed: bool = False,
        start_from_trigger: bool = False,
        start_trigger_args: StartTriggerArgs | None = None,
        timeout: float | timedelta | None = None,
        fail_fast: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(timeout=_LONGEST_WAIT if timeout is None else timeout, **kwargs)
        self.batch_id = batch_id
        self.conn_id = conn_id
        self.deferrable = deferrable or start_from_trigger
        self.fail_on_partial_error = fail_on_partial_error
        self.allow_all_failed = allow_all_failed
        self.fail_fast = fail_fast
        self._has_timeout = timeout is not None
        self._wait: BatchWait | None = None
        self.ARGUMENTS.check(self)
        # Airflow 2.11 and 3.0 would not render the templates of the trigger; 3.1 and 3.2 would not start it.
        self.start_from_trigger = False
        if not start_from_trigger or airflow_version() < (3, 3):
            return
        rendered = {"batch_id": _for_triggerer(batch_id), "conn_id": _for_triggerer(conn_id)}
        if start_trigger_args is not None or None not in rendered.values():
            self.start_from_trigger = True
            self.start_trigger_args = start_trigger_args or StartTriggerArgs(
                trigger_cls=f"{BatchTrigger.__module__}.{BatchTrigger.__qualname__}",
                next_method="execute_complete",
                trigger_kwargs={**rendered, "poll_interval": self.poke_interval},
                timeout=timedelta(seconds=self.timeout) if self._has_timeout else None,
            )

    @cached_property
    def hook(self) -> SiliconFlowHook:
        """Return the hook for the connection."""
        return SiliconFlowHook(conn_id=self.conn_id)

    def execute(self, context: Context) -> Any:
        """Defer, or poke."""
        if not self.deferrable:
            return super().execute(context)
        # Poll once first: ended batches need no trigger, and a wrong setting fails here.
        polled = self.poke(context)
        if isinstance(polled, PokeReturnValue):
            return polled.xcom_value
        deadline = time.time() + self.timeout if self._has_timeout else None
        trigger = BatchTrigger(
            batch_ids=self._batch_ids(),
            conn_id=self.conn_id,
            poll_interval=self.poke_interval,
            deadline=deadline,
        )
        return defer(self, trigger, deadline=deadline)

    def execute_complete(self, context: Context, event: Any = None) -> Any:
        """Resume after the trigger."""
        from airflow_provider_siliconflow.jobs.events import batches_of

        with self._errors():
            return self._judged(batches_of(event))

    def _errors(self) -> AbstractContextManager[None]:
        """Return the context manager that ends the sensor if one of our errors is raised."""
        return task_errors(
            fail_fast=self.fail_fast, soft_fail=self.soft_fail, timeout_error=AirflowSensorTimeout
        )

    def poke(self, context: Context) -> bool | PokeReturnValue:
        """Poll every open batch once."""
        from airflow_provider_siliconflow.jobs.waiting import BatchWait

        with self._errors():
            if self._wait is None:
                self._wait = BatchWait(
                    self._batch_ids(), time.time(), self.poke_interval, began=self._first_poke(context)
                )
            self._poll(self._wait)
            if self.reschedule:
                # If each poke is a process of its own, a single 404 must not decide.
                for pause in _SECOND_POLLS:
                    if not self._wait.has_missing:
                        break
                    time.sleep(pause)
                    self._poll(self._wait)
                # For the same reason, one poke must wait for late counts until it gives up.
                while self._wait.settling:
                    time.sleep(self._wait.pause(time.time()))
                    self.hook.poll_once(self._wait)
            if not self._wait.finished:
                self._wait.check_deadline(time.time())
                return False
            return PokeReturnValue(is_done=True, xcom_value=self._judged(self._wait.batches))

    def _poll(self, wait: BatchWait) -> None:
        now = time.time()
        wait.make_all_due(now)
        before: set[str] = set()
        # If the same batches are due again, the clock was set back, and polling on would not end.
        while (due := set(wait.due(now))) and due != before:
            self.hook.poll_once(wait)
            before = due

    def _first_poke(self, context: Context) -> float | None:
        """Return when the wait began if pokes are processes of their own and this is not the first; else ``None``."""
        if not self.reschedule:
            return None
        ti = context["ti"]
        if airflow_version() < (3, 0):
            from airflow.sensors.base import _orig_start_date

            began = _orig_start_date(ti.dag_id, ti.task_id, ti.run_id, ti.map_index, ti.try_number)
        else:
            began = ti.get_first_reschedule_date(context)
        return None if began is None else began.timestamp()

    def _batch_ids(self) -> list[str]:
        found: list[str] = self.ARGUMENTS.read(self, "batch_id")["batch_id"]
        return found

    def _judged(self, batches: list[Batch]) -> Any:
        """Judge and log every batch, then fail with the error of the first failed one."""
        from airflow_provider_siliconflow.api.exceptions import BatchError
        from airflow_provider_siliconflow.jobs.outcome import finish_batch

        failures: list[BatchError] = []
        for batch in batches:
            try:
                warning = finish_batch(
                    self.hook.get_conn(),
                    batch,
                    fail_on_partial_error=self.fail_on_partial_error,
                    allow_all_failed=self.allow_all_failed,
                )
            except BatchError as exc:
                self.log.error("%s", exc)
                failures.append(exc)
            else:
                if warning:
                    self.log.warning("%s", warning)
        if failures:
            raise failures[0]
        found = [batch.to_json_dict() for batch in batches]
        return found if isinstance(rendered_list(self.batch_id), list | tuple) else found[0]


def _for_triggerer(value: Any) -> Any:
    """
    Return an argument in a form that a triggerer can render, or ``None`` if there is none.

    The triggerer of Airflow 3.3 answers ``xcom_pull`` only for a given map index. Without one, as in a task's
    ``.output``, it never answers, and the wait would hang forever.
    """
    if isinstance(value, list | tuple):
        items = [_for_triggerer(item) for item in value]
        return None if None in items else items
    if isinstance(value, str):
        return None if "xcom_pull" in value and "map_indexes" not in value else value
    operator, key = getattr(value, "operator", None), getattr(value, "key", None)
    if operator is None or key is None or operator.is_mapped or operator.get_closest_mapped_task_group():
        return None
    pulled = f"task_ids={operator.task_id!r}, dag_id={operator.dag_id!r}, key={key!r}, map_indexes=-1"
    return f"{{{{ task_instance.xcom_pull({pulled}) }}}}"
