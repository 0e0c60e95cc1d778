"""How an error ends a task: the one rule."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from airflow.providers.common.compat.sdk import AirflowFailException, AirflowSkipException


@contextlib.contextmanager
def task_errors(*, fail_fast: bool, soft_fail: bool = False) -> Iterator[None]:
    """
    Turn errors that no retry can mend into ``AirflowFailException``.

    :param fail_fast: ``False`` leaves every error to the task's retries.
    :param soft_fail: skip the task instead of failing it.
    """
    from airflow_provider_siliconflow.api.exceptions import SiliconFlowError

    try:
        yield
    except SiliconFlowError as exc:
        if soft_fail:
            raise AirflowSkipException(f"Skipping, since soft_fail is set: {exc}") from exc
        if fail_fast and not exc.retryable:
            raise AirflowFailException(f"{exc} (A retry would end the same way, so none is made.)") from exc
        raise
