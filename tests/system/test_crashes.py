"""A task is killed at any point of its work: the retry does not pay again and loses nothing."""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from crash_cases import CRASH_CASES, DOWNLOAD_POINTS, HELD, CrashCase

from airflow_provider_siliconflow.api.client import SiliconFlowClient
from airflow_provider_siliconflow.api.settings import ClientSettings
from airflow_provider_siliconflow.jobs.downloads import download_results
from scripts.live_airflow import LiveAirflow, LiveAirflowError
from tests.system.live import EXHAUSTIVE, KEY, ROWS, OpenAccount, add_batch, batches, files

if TYPE_CHECKING:
    from airflow_provider_siliconflow.emulator.server import Emulator

#: Seconds for which a request is still held after its client died, so that the retry already searches for it.
LATE = 4.0


class Crashes:
    """One run of the DAG `crashes`, in which every task died once."""

    def __init__(self, airflow: LiveAirflow, accounts: dict[str, Emulator], output: Path) -> None:
        self.airflow, self.accounts, self.output = airflow, accounts, output
        self.run_id = ""
        self.seen_at_kill: dict[str, list[str]] = {}
        self._over = threading.Event()

    def kill_when_held(self, name: str, point: str) -> None:
        """Kill the task while its emulator holds one of its requests."""
        account = self.accounts[name]
        while not account.held:
            if self._over.wait(0.1):
                return
        folder = self.output / name
        self.seen_at_kill[name] = sorted(path.name for path in folder.glob("[!.]*"))
        with suppress(LiveAirflowError):
            self.airflow.kill_task("crashes", self.run_id, name, supervisor=point == "machine-dies")
        time.sleep(LATE)
        account.release()

    def finish(self) -> None:
        self._over.set()


@pytest.fixture(scope="module")
def crashes(
    live_airflow: LiveAirflow, open_account: OpenAccount, rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> Crashes:
    output = tmp_path_factory.mktemp("downloads")
    accounts = {case.name: open_account(case.name) for case in CRASH_CASES}
    accounts |= {point: open_account(point, speed=1000.0) for point in DOWNLOAD_POINTS}
    crashes = Crashes(live_airflow, accounts, output)
    killed = {case.name: case.point for case in CRASH_CASES if case.point in HELD}
    for name, point in killed.items():
        match, kind = HELD[point]
        accounts[name].faults.add(match=match, kind=kind)
    accounts["download-held"].faults.add(match="GET storage", kind="hold")
    conf: dict[str, Any] = {"rows": str(rows), "files": {}, "batches": {}, "output_dir": str(output)}
    for name, account in accounts.items():
        if name.startswith("id."):
            added = account.service.add_file("rows.jsonl", "batch", [rows.read_bytes()])
            conf["files"][name] = added.get("data", added)["id"]
    for point in DOWNLOAD_POINTS:
        conf["batches"][point] = add_batch(accounts[point], rows)
    run_id = crashes.run_id = live_airflow.trigger("crashes", conf=conf)
    killers = [
        threading.Thread(target=crashes.kill_when_held, args=pair, daemon=True)
        for pair in [*killed.items(), ("download-held", "download-held")]
    ]
    for killer in killers:
        killer.start()
    try:
        live_airflow.wait_for_run("crashes", run_id, timeout=1500 if EXHAUSTIVE else 300)
    finally:
        crashes.finish()
    return crashes


@pytest.mark.parametrize("case", CRASH_CASES, ids=lambda case: case.name)
def test_a_killed_create_task_pays_once(crashes: Crashes, case: CrashCase, tmp_path: Path) -> None:
    airflow, account = crashes.airflow, crashes.accounts[case.name]
    log = airflow.task_log("crashes", crashes.run_id, case.name)
    assert airflow.task_state("crashes", crashes.run_id, case.name) == "success", log[-5000:]
    # The first try did die. On a busy machine Airflow mistakes a quick retry for the previous try and kills it too.
    assert airflow.try_numbers("crashes", crashes.run_id)[case.name] >= 2
    found = batches(account)
    assert len(found) == 1, log[-5000:]
    assert len(files(account)) == 1
    assert airflow.xcom("crashes", crashes.run_id, case.name) == found[0]["id"]
    assert airflow.xcom("crashes", crashes.run_id, case.name, key="batch_id") == found[0]["id"]
    if case.wait == "none":
        account.service.advance(3600)
    settings = ClientSettings(api_key=KEY, base_url=account.base_url)
    with SiliconFlowClient(settings) as client:
        manifest = download_results(client, found[0]["id"], tmp_path)
    assert (manifest["rows"]["ok"], manifest["rows"]["total"]) == (ROWS, ROWS)


@pytest.mark.parametrize("point", DOWNLOAD_POINTS)
def test_a_killed_download_leaves_nothing_half_written(crashes: Crashes, point: str) -> None:
    airflow, folder = crashes.airflow, crashes.output / point
    assert airflow.task_state("crashes", crashes.run_id, point) == "success"
    assert airflow.try_numbers("crashes", crashes.run_id)[point] >= 2
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert sorted(line["custom_id"] for line in lines) == [f"row-{number}" for number in range(ROWS)]
    assert json.loads((folder / "manifest.json").read_text())["rows"]["ok"] == ROWS
    if point == "download-held":
        assert crashes.seen_at_kill[point] == []
