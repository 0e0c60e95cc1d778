"""A triggerer with honest waits beside hostile ones: the honest ones end, and the triggerer lives on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from hostile_cases import HOSTILE, READABLE, WAITS

from tests.system.live import AIRFLOW, OpenAccount, add_batch, eventually

if TYPE_CHECKING:
    from airflow_provider_siliconflow.emulator.server import Emulator
    from scripts.live_airflow import LiveAirflow


def triggerer_pids(airflow: LiveAirflow) -> set[int]:
    """Return the triggerer's processes: it ends itself when the one that runs the triggers has died."""
    process = airflow.components["triggerer"].process
    assert process is not None
    main = psutil.Process(process.pid)
    return {main.pid, *(child.pid for child in main.children())}


def is_polled(account: Emulator) -> bool:
    return account.request_counts.get("GET /batches/*", 0) > 0


@pytest.mark.skipif(
    AIRFLOW < (3, 3), reason="before Airflow 3.3 every wait begins on a worker; what it polls is the same"
)
def test_hostile_answers_hurt_neither_the_triggerer_nor_other_waits(
    live_airflow: LiveAirflow, open_account: OpenAccount, rows: Path
) -> None:
    airflow = live_airflow
    honest = open_account("honest", speed=1.0, queue_seconds=36000.0)
    accounts = {name: open_account(name, speed=1.0, queue_seconds=36000.0) for name in HOSTILE}
    conf: dict[str, object] = {"honest": [add_batch(honest, rows) for _ in range(WAITS)]}
    for name, account in accounts.items():
        conf[name] = add_batch(account, rows)
        account.service.advance(40000)
        account.faults.add(match="GET /batches/*", times=-1, **HOSTILE[name])
    pids = triggerer_pids(airflow)
    run_id = airflow.trigger("hostile", conf=conf)
    eventually(lambda: honest.request_counts.get("GET /batches/*", 0) >= WAITS, 120)
    eventually(lambda: all(is_polled(account) for account in accounts.values()), 120)
    honest.service.advance(40000)
    names = [f"honest-{number}" for number in range(WAITS)]
    for name in names:
        airflow.wait_for_task("hostile", run_id, name, "success", timeout=240)
    airflow.wait_for_run("hostile", run_id, timeout=400)
    assert triggerer_pids(airflow) == pids
    states = {name: airflow.task_state("hostile", run_id, name) for name in HOSTILE}
    assert states == {name: "success" if name in READABLE else "failed" for name in HOSTILE}
    # No busy loop: at most a poll a second, and one more for each end.
    assert all(account.request_counts["GET /batches/*"] < 200 for account in accounts.values())
