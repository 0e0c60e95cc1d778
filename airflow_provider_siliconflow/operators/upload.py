"""The operator that uploads a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from airflow_provider_siliconflow.operators.base import FileOperator
from airflow_provider_siliconflow.task import arguments as read
from airflow_provider_siliconflow.task.errors import task_errors
from airflow_provider_siliconflow.task.ledger import open_submission
from airflow_provider_siliconflow.task.state import TaskTry

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context

    from airflow_provider_siliconflow.api.models import UploadedFile
    from airflow_provider_siliconflow.api.sources import Source
    from airflow_provider_siliconflow.batch_files.reader import RequestFileSummary
    from airflow_provider_siliconflow.hooks.siliconflow import SiliconFlowHook
    from airflow_provider_siliconflow.jobs.identity import Submitter, Upload


class UploadBatchFileOperator(FileOperator):
    """
    Check a batch input file and upload it once; a retry reuses the file that an earlier try uploaded.

    :param input_path: path or URI (any scheme Airflow's ``ObjectStoragePath`` takes) of a JSONL file with at
        most 5,000 lines and 1 GB. (templated)
    :param conn_id: the connection. (templated)
    :param fail_fast: fail at once, without the task's retries, if a retry cannot help.
    :returns: the file id, also pushed to XCom as ``file_id``. The service keeps the file for 30 days.
    """

    template_fields: Sequence[str] = ("input_path", "conn_id")
    ARGUMENTS: ClassVar = read.Arguments({"input_path": read.place, "conn_id": read.text})

    def __init__(
        self,
        *,
        input_path: str,
        conn_id: str = "siliconflow_default",
        fail_fast: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(conn_id=conn_id, fail_fast=fail_fast, **kwargs)
        self.input_path = input_path
        self.ARGUMENTS.check(self)

    def lineage_input(self) -> Any:
        """Return the file."""
        return self.input_path

    def execute(self, context: Context) -> str:
        """Upload, and return the file id."""
        with task_errors(fail_fast=self.fail_fast):
            given = self.ARGUMENTS.read(self)
            task_try = TaskTry.of(context)
            submission = open_submission(task_try, self.hook.get_conn())
            upload = upload_of(self.hook, task_try.submitter, given["input_path"])
            file_id = submission.upload(upload).id
        task_try.push("file_id", file_id)
        return file_id


def upload_of(
    hook: SiliconFlowHook, submitter: Submitter, input_path: Any, *, needs_model: bool = False
) -> Upload:
    """
    Check a file, and return its upload.

    :param needs_model: whether to refuse lines that name no model.
    :raises InvalidInputError: it cannot be read, or a line is wrong; nothing was uploaded.
    """
    from airflow_provider_siliconflow.jobs.identity import Upload, upload_name

    source, summary = checked_file(input_path, needs_model=needs_model)
    client = hook.get_conn()
    key = submitter.key(upload=summary.sha256, conn_id=hook.conn_id)
    name = upload_name(str(input_path), key)

    def send() -> UploadedFile:
        file = client.upload_file(source, size=summary.bytes, filename=name)
        hook.log.info("%s (%d rows, %d bytes) is file %s", input_path, summary.rows, summary.bytes, file.id)
        return file

    return Upload(key, name, summary.bytes, summary.sha256, send)


def checked_file(input_path: Any, *, needs_model: bool) -> tuple[Source, RequestFileSummary]:
    """
    Open a file of request lines and check every line.

    :param needs_model: whether to refuse lines that name no model.
    :raises InvalidInputError: it cannot be read, or a line is wrong; nothing was uploaded.
    """
    from airflow_provider_siliconflow.api.exceptions import InvalidInputError
    from airflow_provider_siliconflow.batch_files.reader import check_request_file
    from airflow_provider_siliconflow.paths import open_source

    source = open_source(input_path, "input_path")
    summary = check_request_file(source, name=str(input_path))
    if needs_model and summary.rows_without_model:
        raise InvalidInputError(
            f"{input_path}: {summary.rows_without_model} of {summary.rows} lines name no model in body.model. Add it, "
            "or name one model for all lines with replace={'model': ...}. Nothing was uploaded."
        )
    return source, summary
