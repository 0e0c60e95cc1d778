"""Operators that die by SIGKILL at a given point of their first try, as if their machine lost power."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any, NoReturn

from airflow_provider_siliconflow.api.client import SiliconFlowClient
from airflow_provider_siliconflow.jobs import downloads, submission
from airflow_provider_siliconflow.jobs.ledger import NoLedger
from airflow_provider_siliconflow.jobs.states import Sent, Uploaded
from airflow_provider_siliconflow.operators.batch import CreateBatchOperator, DownloadBatchResultsOperator
from airflow_provider_siliconflow.task.ledger import TaskStateLedger
from airflow_provider_siliconflow.task.state import airflow_version


def _die(*_: Any, **__: Any) -> NoReturn:
    if airflow_version() == (3, 0):
        # Airflow 3.0 fails a task for good if only its process is killed, and retries it if its supervisor dies too.
        os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def _then_die(
    function: Callable[..., Any], when: Callable[..., bool] = lambda *_, **__: True
) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if when(*args, **kwargs):
            _die()
        return result

    return wrapper


class DyingCreate(CreateBatchOperator):
    """
    :param dies_at: a point of `crash_cases`; the test handles the points in `HELD`.
    :param store: whether to use Airflow's task state store if it exists.
    """

    def __init__(self, *, dies_at: str = "", store: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dies_at = dies_at
        self.store = store

    def execute(self, context: Any) -> str:
        self._arm(context)
        return super().execute(context)

    def _arm(self, context: Any) -> None:
        if not self.store:
            os.environ["AIRFLOW__SILICONFLOW__TASK_STATE_STORE"] = "False"
        if not os.environ.get("EXHAUSTIVE"):
            # The emulator lists a batch at once. Only the exhaustive run searches for a full minute.
            submission.LIST_LAG = 15.0  # type: ignore[attr-defined]
        if context["ti"].try_number > 1:
            return
        client: Any = SiliconFlowClient
        match self.dies_at:
            case "before-upload":
                client.upload_file = _die
            case "after-upload":
                client.upload_file = _then_die(client.upload_file)
            case "upload-recorded":
                for ledger in (TaskStateLedger, NoLedger):
                    self._die_after(ledger, "record_upload", Uploaded)
            case "before-post":
                client.create_batch = _die
            case "after-post":
                client.create_batch = _then_die(client.create_batch)
            case "recorded":
                for ledger in (TaskStateLedger, NoLedger):
                    self._die_after(ledger, "record", Sent)
            case "xcom-pushed":
                ti = context["ti"]
                object.__setattr__(ti, "xcom_push", _then_die(ti.xcom_push))
            case "before-defer":
                self.defer = _die

    @staticmethod
    def _die_after(ledger: type, method: str, state: type) -> None:
        recording = getattr(ledger, method)
        setattr(ledger, method, _then_die(recording, lambda _, __, recorded: isinstance(recorded, state)))


class DyingWhenResumed(DyingCreate):
    """Overrides `execute_complete`, so that the task does not end in the triggerer."""

    def execute_complete(self, context: Any, event: Any = None) -> str:
        if context["ti"].try_number == 1:
            _die()
        return super().execute_complete(context, event)


class DyingDownload(DownloadBatchResultsOperator):
    """:param dies_at: a point of `crash_cases.DOWNLOAD_POINTS`."""

    def __init__(self, *, dies_at: str = "", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dies_at = dies_at

    def execute(self, context: Any) -> dict[str, Any]:
        if self.dies_at == "before-manifest" and context["ti"].try_number == 1:
            downloads.write_json = _die  # type: ignore[attr-defined]
        return super().execute(context)
