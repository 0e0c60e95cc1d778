"""The operators; import them from here."""

from __future__ import annotations

from airflow_provider_siliconflow.operators.cancel import CancelBatchOperator
from airflow_provider_siliconflow.operators.create import CreateBatchOperator
from airflow_provider_siliconflow.operators.download import DownloadBatchResultsOperator
from airflow_provider_siliconflow.operators.run import RunBatchOperator
from airflow_provider_siliconflow.operators.upload import UploadBatchFileOperator

__all__ = [
    "CancelBatchOperator",
    "CreateBatchOperator",
    "DownloadBatchResultsOperator",
    "RunBatchOperator",
    "UploadBatchFileOperator",
]
