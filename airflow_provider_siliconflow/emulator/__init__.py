"""
A local SiliconFlow: try DAGs and test clients without a key or any spending.

Run ``siliconflow-emulator`` for a local Airflow, or :func:`running_emulator` in a test::

    with running_emulator(speed=1000) as emulator:
        monkeypatch.setenv("AIRFLOW_CONN_SILICONFLOW_DEFAULT", emulator.airflow_connection)
"""

from __future__ import annotations

from airflow_provider_siliconflow.emulator.bill import Bill, BillLine
from airflow_provider_siliconflow.emulator.config import EmulatorConfig
from airflow_provider_siliconflow.emulator.faults import Fault, Faults
from airflow_provider_siliconflow.emulator.live import LiveFigures
from airflow_provider_siliconflow.emulator.server import Emulator, running_emulator
from airflow_provider_siliconflow.emulator.service import EmulatedService, ServiceError

__all__ = [
    "Bill",
    "BillLine",
    "EmulatedService",
    "Emulator",
    "EmulatorConfig",
    "Fault",
    "Faults",
    "LiveFigures",
    "ServiceError",
    "running_emulator",
]
