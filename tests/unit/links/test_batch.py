"""The link to the console."""

from __future__ import annotations

from airflow_provider_siliconflow.links.batch import BatchConsoleLink
from airflow_provider_siliconflow.operators.batch import CancelBatchOperator


def test_every_task_links_to_the_console() -> None:
    task = CancelBatchOperator(task_id="t", batch_id="batch_1")
    (link,) = task.operator_extra_links
    assert isinstance(link, BatchConsoleLink)
    assert link.get_link(task, ti_key=None).startswith("https://cloud.siliconflow.cn/")
