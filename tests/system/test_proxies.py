"""A live Airflow behind a TLS proxy that loses responses to workers and to the triggerer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.proxies import ProxiedService, proxied
from tests.system.live import ROWS, OpenAccount, batches, connect

if TYPE_CHECKING:
    from airflow_provider_siliconflow.emulator.server import Emulator
    from scripts.live_airflow import LiveAirflow


@pytest.fixture
def account(open_account: OpenAccount) -> Emulator:
    # Storage on the loopback is refused beside an API on the internet, so the API hands out the results.
    return open_account("not_behind_proxy", speed=30.0, results_as_file_ids=True)


@pytest.fixture
def way(live_airflow: LiveAirflow, account: Emulator, tmp_path: Path) -> Iterator[ProxiedService]:
    with proxied(account.base_url, tmp_path / "certificates") as way:
        connect(live_airflow, "behind_proxy", way.base_url, way.extra())
        yield way


def test_each_piece_of_work_is_paid_once_behind_a_proxy_that_loses_responses(
    live_airflow: LiveAirflow, account: Emulator, way: ProxiedService, rows: Path, tmp_path: Path
) -> None:
    creating = way.lose("POST /v1/batches", times=8)
    polling = way.lose("GET /v1/batches/.*", chance=0.3, ending="reset")
    conf = {"rows": str(rows), "folder": str(tmp_path / "results")}
    run_id = live_airflow.trigger("behind_proxy", conf=conf)
    assert live_airflow.wait_for_run("behind_proxy", run_id, timeout=420) == "success"
    assert len(creating.lost) == 8
    assert polling.lost
    # One batch per create task, and one per row of the job.
    assert len(batches(account)) == way.seen["POST /v1/batches"] == 6 + ROWS
    ids = {live_airflow.xcom("behind_proxy", run_id, f"create-{number}") for number in range(6)}
    assert len(ids) == 6
    lines = (tmp_path / "results" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["custom_id"] for line in lines] == [f"row-{number}" for number in range(ROWS)]
