"""The operator that downloads the results of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from airflow_provider_siliconflow.operators.base import FileOperator
from airflow_provider_siliconflow.task import arguments as read
from airflow_provider_siliconflow.task.errors import task_errors

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context


class DownloadBatchResultsOperator(FileOperator):
    """
    Download the results of an ended batch: completed, expired or cancelled.

    Writes ``results.jsonl`` (every row that the service returned, unchanged), ``errors.jsonl`` (the rows that did
    not succeed) and ``manifest.json`` into ``output_dir``. A file appears only when it is complete.

    :param batch_id: the batch. (templated)
    :param output_dir: path or URI of a folder. (templated)
    :param conn_id: the connection. (templated)
    :param fail_on_partial_error: fail if any row failed, expired or is missing; the files are written first.
    :param fail_fast: fail at once, without the task's retries, if a retry cannot help.
    :returns: the manifest.
    """

    template_fields: Sequence[str] = ("batch_id", "output_dir", "conn_id")
    ARGUMENTS: ClassVar = read.Arguments(
        {"batch_id": read.identifier, "output_dir": read.place, "conn_id": read.text}
    )

    def __init__(
        self,
        *,
        batch_id: str,
        output_dir: str,
        conn_id: str = "siliconflow_default",
        fail_on_partial_error: bool = False,
        fail_fast: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(conn_id=conn_id, fail_fast=fail_fast, **kwargs)
        self.batch_id = batch_id
        self.output_dir = output_dir
        self.fail_on_partial_error = fail_on_partial_error
        self.ARGUMENTS.check(self)

    def execute(self, context: Context) -> dict[str, Any]:
        """Download, and return the manifest."""
        from airflow_provider_siliconflow.jobs.outcome import refuse_partial

        with task_errors(fail_fast=self.fail_fast):
            given = self.ARGUMENTS.read(self)
            self._manifest = self.hook.download_results(given["batch_id"], given["output_dir"])
            if self.fail_on_partial_error:
                refuse_partial(self._manifest, given["batch_id"])
        return self._manifest
