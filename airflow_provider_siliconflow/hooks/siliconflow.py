"""The hook: an Airflow connection, and the calls made with it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import BaseHook

from airflow_provider_siliconflow.hooks.connection_form import CONN_TYPE
from airflow_provider_siliconflow.paths import open_folder, open_source

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import ObjectStoragePath

    from airflow_provider_siliconflow.api.client import SiliconFlowClient
    from airflow_provider_siliconflow.api.models import Batch, BatchResult, UploadedFile
    from airflow_provider_siliconflow.api.settings import ClientSettings
    from airflow_provider_siliconflow.batch_files.prices import Price
    from airflow_provider_siliconflow.jobs.waiting import BatchWait

log = logging.getLogger(__name__)


class SiliconFlowHook(BaseHook):
    """
    Call SiliconFlow's batch API.

    The connection's password is the API key and its host the base URL (default
    ``https://api.siliconflow.cn/v1``). Its extra may contain ``timeout`` and ``connect_timeout`` (seconds),
    ``max_retries``, ``proxies`` (a URL, or an object of URLs by scheme), ``verify`` (true, false or the path of
    a CA bundle), ``headers`` and ``secret_headers`` (objects; Airflow hides the second in its UI) and ``prices``.

    .. seealso:: `The API <https://docs.siliconflow.cn/cn/api-reference/batch/create-batch>`__

    :param conn_id: the connection to use.
    """

    conn_name_attr = "conn_id"
    default_conn_name = "siliconflow_default"
    conn_type = CONN_TYPE
    hook_name = "SiliconFlow"

    def __init__(self, conn_id: str = default_conn_name, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.conn_id = conn_id

    @classmethod
    def get_connection_form_widgets(cls) -> dict[str, Any]:
        """Return the additional fields of the form, for Airflow before 3.2."""
        from airflow_provider_siliconflow.hooks.connection_form import form_widgets

        return form_widgets()

    @classmethod
    def get_ui_field_behaviour(cls) -> dict[str, Any]:
        """Return how the standard fields of the form are shown."""
        from airflow_provider_siliconflow.hooks.connection_form import ui_field_behaviour

        return ui_field_behaviour()

    @cached_property
    def settings(self) -> ClientSettings:
        """
        The checked settings of the connection; its secrets are registered with Airflow's secret masker.

        :raises InvalidInputError: it is not defined, is of another type, or has a field that is missing or wrong.
        """
        from airflow_provider_siliconflow.hooks.connection import read_connection

        return read_connection(self.conn_id)

    @cached_property
    def prices(self) -> dict[str, Price] | None:
        """
        The prices by model, in CNY per million tokens: of the connection's extra, then of ``[siliconflow] prices``.

        :raises InvalidInputError: the connection is not defined or of another type, or prices are wrong.
        """
        from airflow_provider_siliconflow.batch_files.prices import merge_prices
        from airflow_provider_siliconflow.hooks.connection import read_prices
        from airflow_provider_siliconflow.task.prices import configured_prices

        return merge_prices(read_prices(self.conn_id), configured_prices())

    @cached_property
    def _client(self) -> SiliconFlowClient:
        from airflow_provider_siliconflow.api.client import SiliconFlowClient

        return SiliconFlowClient(self.settings)

    def get_conn(self) -> SiliconFlowClient:
        """Return the client for this connection, which is created once."""
        return self._client

    def test_connection(self) -> tuple[bool, str]:
        """Read the account of the key. This costs nothing."""
        from dataclasses import replace

        from airflow_provider_siliconflow.api.client import SiliconFlowClient
        from airflow_provider_siliconflow.api.exceptions import SiliconFlowError

        try:
            with SiliconFlowClient(replace(self.settings, max_retries=0)) as client:
                account = client.get_account()
        except SiliconFlowError as exc:
            return False, str(exc)
        who = account.name or account.id or "an account without a name"
        message = f"Connected to {self.settings.base_url} as {who}"
        if account.status and account.status != "normal":
            message += f" (account status: {account.status})"
        message += (
            f". Charged balance, from which batches are paid: {account.charge_balance or 'unknown'} CNY; "
            f"total balance: {account.total_balance or 'unknown'} CNY."
        )
        return True, message

    def upload_file(
        self, source: str | Path | ObjectStoragePath | bytes, *, filename: str | None = None
    ) -> UploadedFile:
        """
        Check a batch input file and upload it as a stream.

        :param source: path, URI, ``ObjectStoragePath`` or the content as bytes: JSONL, at most 5,000 lines and
            1 GB.
        :param filename: name at the service; by default the source's.
        :returns: the file; the service keeps it for 30 days.
        :raises InvalidRequestFileError: a line is not a valid request; nothing was uploaded.
        """
        from airflow_provider_siliconflow.batch_files.reader import check_request_file

        opened = open_source(source, "source")
        summary = check_request_file(opened, name=describe_source(source))
        name = filename or (Path(str(opened)).name if not isinstance(source, bytes) else "requests.jsonl")
        file = self._client.upload_file(opened, size=summary.bytes, filename=name)
        log.info("Uploaded %s (%d rows, %d bytes) as %s", name, summary.rows, summary.bytes, file.id)
        return file

    def create_batch(
        self,
        input_file_id: str,
        *,
        endpoint: str = "/v1/chat/completions",
        completion_window: Any = "24h",
        metadata: Mapping[str, str] | None = None,
        replace: Mapping[str, Any] | None = None,
    ) -> Batch:
        """
        Create a batch, which costs money. The batch carries no identity, and the request is never sent twice.

        For submission that survives retries, use
        :class:`~airflow_provider_siliconflow.operators.batch.CreateBatchOperator`.

        :param input_file_id: an uploaded file.
        :param endpoint: only ``/v1/chat/completions``.
        :param completion_window: ``"24h"`` to ``"336h"``, a number of hours or a ``timedelta``.
        :param metadata: at most 16 pairs of strings.
        :param replace: ``{"model": "..."}`` overrides the model of every line.
        :raises SubmissionUnknownError: it is unknown whether the batch exists.
        :raises InvalidInputError: an argument is wrong.
        """
        from airflow_provider_siliconflow.api import arguments, protocol
        from airflow_provider_siliconflow.api.exceptions import SiliconFlowError, SubmissionUnknownError

        try:
            return self._client.create_batch(
                input_file_id=arguments.check_identifier("input_file_id", input_file_id),
                endpoint=arguments.check_endpoint(endpoint),
                completion_window=arguments.check_completion_window(completion_window),
                metadata=arguments.check_metadata(metadata),
                replace=arguments.check_replace(replace),
            )
        except SiliconFlowError as exc:
            if not protocol.leaves_effect_open(exc):
                raise
            raise SubmissionUnknownError(
                f"A batch over {input_file_id} was requested, but it is unknown whether it exists: {exc} The request "
                "was not sent again, since that might pay twice. Before you create another batch, search "
                "list_batches() or the console for a new batch with this input_file_id."
            ) from exc

    def get_batch(self, batch_id: str) -> Batch:
        """
        Read a batch.

        :param batch_id: the batch.
        """
        from airflow_provider_siliconflow.api.arguments import check_identifier

        return self._client.get_batch(check_identifier("batch_id", batch_id))

    def list_batches(self) -> Iterator[Batch]:
        """Yield the account's batches, newest first; pages are read as they are needed."""
        return self._client.list_batches()

    def cancel_batch(self, batch_id: str) -> Batch:
        """
        Request the cancellation of a batch. Rows that are done are billed and can still be downloaded.

        A batch that has already ended is returned as it is.

        :param batch_id: the batch.
        :returns: the batch, which may still show its old status.
        """
        from airflow_provider_siliconflow.api.arguments import check_identifier
        from airflow_provider_siliconflow.jobs.cancelling import cancel

        return cancel(self._client, check_identifier("batch_id", batch_id))

    def wait_for_batch(
        self, batch_id: str, *, poll_interval: float = 60, timeout: float | None = None
    ) -> Batch:
        """
        Wait until a batch has ended, with any status. Transient faults of the service do not end the wait.

        :param batch_id: the batch.
        :param poll_interval: seconds between two polls.
        :param timeout: seconds; by default until an hour after the batch expires.
        :raises BatchTimeoutError: the timeout has passed; the batch is untouched.
        :raises BatchWaitError: the wait cannot continue (401, 403, 404).
        """
        deadline = None if timeout is None else time.time() + timeout
        return self.wait_for_batches([batch_id], poll_interval=poll_interval, deadline=deadline)[0]

    def wait_for_batches(
        self,
        batch_ids: Sequence[str],
        *,
        poll_interval: float = 60,
        deadline: float | None = None,
        min_ended: int | None = None,
        resume_at: float | None = None,
    ) -> list[Batch]:
        """
        Wait until several batches have ended; see :meth:`wait_for_batch`.

        :param deadline: epoch seconds.
        :param min_ended: how many ended batches end the wait; by default all.
        :param resume_at: epoch seconds at which the wait ends, whatever has ended by then.
        :returns: the ended batches.
        """
        from airflow_provider_siliconflow.api.arguments import check_identifiers
        from airflow_provider_siliconflow.jobs.progress import ProgressBar
        from airflow_provider_siliconflow.jobs.waiting import BatchWait

        wait = BatchWait(
            check_identifiers("batch_ids", list(batch_ids)),
            time.time(),
            poll_interval,
            deadline,
            min_ended,
            resume_at=resume_at,
        )
        with ProgressBar(wait) as bar:
            while True:
                self.poll_once(wait)
                bar.show()
                if wait.is_over(time.time()):
                    return wait.batches
                wait.check_deadline(time.time())
                time.sleep(wait.pause(time.time()))

    def poll_once(self, wait: BatchWait) -> None:
        """
        Read every batch of a wait that is due.

        :param wait: decides which batches are due, and records the answers.
        """
        from airflow_provider_siliconflow.api.exceptions import SiliconFlowError

        for batch_id in wait.due(time.time()):
            try:
                # The wait polls again anyway; repeating the call here would only hide failures from it.
                batch = self._client.get_batch(batch_id, repeat=False, within=wait.poll_limit(time.time()))
            except SiliconFlowError as exc:
                wait.fault(batch_id, exc, time.time())
            else:
                wait.observe(batch_id, batch, time.time())
        wait.log_summary(time.time())

    def iter_results(self, batch: Batch | str) -> Iterator[BatchResult]:
        """
        Yield the results of an ended batch line by line: first those of the output file, then those of the error file.

        :param batch: the batch or its id; it is read again for fresh URLs.
        :raises IncompleteResultsError: a file is cut off, or has fewer rows than the batch counts.
        """
        from airflow_provider_siliconflow.jobs.downloads import iter_results

        yield from iter_results(self._client, batch if isinstance(batch, str) else batch.id)

    def download_results(self, batch_id: str, output_dir: str | Path | ObjectStoragePath) -> dict[str, Any]:
        """
        Write the results of an ended batch to a folder: completed, expired or cancelled.

        :param batch_id: the batch.
        :param output_dir: path or URI of the folder for ``results.jsonl`` (every row that the service returned),
            ``errors.jsonl`` (the rows that did not succeed) and ``manifest.json``.
        :returns: the manifest.
        :raises IncompleteResultsError: the files have fewer rows than the batch counts as successful.
        """
        from airflow_provider_siliconflow.api.arguments import check_identifier
        from airflow_provider_siliconflow.jobs.downloads import download_results

        batch_id = check_identifier("batch_id", batch_id)
        return download_results(self._client, batch_id, open_folder("output_dir", output_dir))


def describe_source(source: Any) -> str:
    """Return how messages call a source."""
    return "the given bytes" if isinstance(source, bytes) else str(source)
