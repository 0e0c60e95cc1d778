"""The operator that cancels a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from airflow_provider_siliconflow.operators.base import SiliconFlowOperator
from airflow_provider_siliconflow.task import arguments as read
from airflow_provider_siliconflow.task.errors import task_errors

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context


class CancelBatchOperator(SiliconFlowOperator):
    """
    Request the cancellation of a batch. Rows that are done are billed and can still be downloaded.

    If the batch has already ended, the task changes nothing and succeeds.

    :param batch_id: the batch. (templated)
    :param conn_id: the connection. (templated)
    :param fail_fast: fail at once, without the task's retries, if a retry cannot help.
    :returns: the batch as JSON; it may still show its old status.
    """

    template_fields: Sequence[str] = ("batch_id", "conn_id")
    ARGUMENTS: ClassVar = read.Arguments({"batch_id": read.identifier, "conn_id": read.text})

    def __init__(
        self,
        *,
        batch_id: str,
        conn_id: str = "siliconflow_default",
        fail_fast: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(conn_id=conn_id, fail_fast=fail_fast, **kwargs)
        self.batch_id = batch_id
        self.ARGUMENTS.check(self)

    def execute(self, context: Context) -> dict[str, Any]:
        """Cancel, and return the batch."""
        with task_errors(fail_fast=self.fail_fast):
            given = self.ARGUMENTS.read(self)
            batch: dict[str, Any] = self.hook.cancel_batch(given["batch_id"]).to_json_dict()
            return batch
