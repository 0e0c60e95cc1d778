"""Real tasks against a service that fails, loses answers, refuses or hangs: one batch per task, no task gives up."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from email.utils import formatdate, parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fault_cases import LOST_ANSWERS, REFUSALS, WAITS, Account

from airflow_provider_siliconflow.emulator.server import Emulator, running_emulator
from scripts.live_airflow import free_port
from tests.system.live import OpenAccount, add_batch, batches, cancellations, connect, eventually, files

if TYPE_CHECKING:
    from scripts.live_airflow import LiveAirflow


class Faults:
    """One run of the DAG `faults`."""

    def __init__(self, airflow: LiveAirflow, accounts: dict[str, Emulator], run_id: str) -> None:
        self.airflow, self.accounts, self.run_id = airflow, accounts, run_id

    def state(self, name: str) -> str | None:
        return self.airflow.task_state("faults", self.run_id, name)

    def tries(self, name: str) -> int:
        return self.airflow.try_numbers("faults", self.run_id)[name]

    def log(self, name: str) -> str:
        return self.airflow.task_log("faults", self.run_id, name)


@pytest.fixture(scope="module")
def faults(
    live_airflow: LiveAirflow, open_account: OpenAccount, accounts: list[Emulator], rows: Path
) -> Iterator[Faults]:
    opened: dict[str, Emulator] = {}
    waited_for: dict[str, str] = {}
    port = free_port()
    for name, account in (LOST_ANSWERS | REFUSALS | WAITS).items():
        if name == "no-connection":
            connect(live_airflow, name, f"http://127.0.0.1:{port}/v1")
            continue
        opened[name] = emulator = open_account(name, extra=account.extra, **account.settings)
        if account.foreign:
            emulator.service.seed_foreign_batches(account.foreign, age_seconds=account.foreign_age)
        if name in WAITS:
            waited_for[name] = add_batch(emulator, rows)
        for fault in copy.deepcopy(account.faults):
            emulator.faults.add(fault)
    # Set last, because the date is only 25 seconds ahead.
    for rule in opened["http-429-date"].faults.rules:
        rule.headers["Retry-After"] = formatdate(time.time() + 25, usegmt=True)
    run_id = live_airflow.trigger("faults", conf={"rows": str(rows), "batches": waited_for})
    live_airflow.wait_for_task("faults", run_id, "no-connection", "running", timeout=120)
    eventually(lambda: "sending it again" in live_airflow.task_log("faults", run_id, "no-connection"), 90)
    with running_emulator(speed=20.0, keys=opened["reset"].service.config.keys, port=port) as emulator:
        opened["no-connection"] = emulator
        accounts.append(emulator)
        noisy = [opened[name] for name in WAITS if "noisy" in name]
        eventually(lambda: all(rule.hits for one in noisy for rule in one.faults.rules), 240)
        for one in noisy:
            one.service.advance(40000)
        live_airflow.wait_for_run("faults", run_id, timeout=240)
        yield Faults(live_airflow, opened, run_id)


def _own(emulator: Emulator, account: Account) -> list[dict[str, Any]]:
    found = batches(emulator)
    assert len(found) >= account.foreign
    return [batch for batch in found if batch["input_file_id"] != "file-foreignxyz"]


@pytest.mark.parametrize("name", LOST_ANSWERS)
def test_a_lost_answer_costs_nothing(faults: Faults, name: str) -> None:
    account, emulator = LOST_ANSWERS[name], faults.accounts[name]
    assert all(rule.hits for rule in emulator.faults.rules)
    assert faults.state(name) == "success", faults.log(name)[-5000:]
    # The same try finds its batch: no retry is used.
    assert faults.tries(name) == 1
    found = _own(emulator, account)
    assert len(found) == 1
    assert len(files(emulator)) == 1
    assert faults.airflow.xcom("faults", faults.run_id, name) == found[0]["id"]
    assert emulator.request_counts["POST /batches"] == 1
    assert emulator.request_counts["POST /files"] == 1
    # Only pages that can contain the batch are read, each once. A batch older than the run ends the search.
    recent = account.foreign if account.foreign_age < 3600 else 0
    assert emulator.request_counts.get("GET /batches", 0) <= 5 + recent / 100
    assert cancellations(emulator) == 0


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refused_request_is_sent_again_later(faults: Faults, name: str) -> None:
    emulator = faults.accounts[name]
    assert all(rule.hits for rule in emulator.faults.rules)
    assert faults.state(name) == "success", faults.log(name)[-5000:]
    assert faults.tries(name) == 1
    assert len(batches(emulator)) == 1
    assert len(files(emulator)) == 1
    # After a refusal the outcome is certain, so the account is not searched.
    assert emulator.request_counts.get("GET /batches", 0) == 0
    refused = [request for request in emulator.requests if request.fault]
    assert len(refused) == sum(rule.hits for rule in emulator.faults.rules)
    for request in refused:
        later = [one for one in emulator.requests if one.route == request.route and one.at > request.at]
        # Requests are spaced out even without Retry-After.
        assert later[0].at - request.at >= 0.4
    if name == "http-429-seconds":
        assert later[0].at - refused[0].at >= 4
    if name == "http-429-date":
        (rule,) = emulator.faults.rules
        assert later[0].at >= parsedate_to_datetime(rule.headers["Retry-After"]).timestamp()


@pytest.mark.parametrize("name", [name for name in WAITS if "noisy" in name])
def test_transient_errors_do_not_end_a_wait(faults: Faults, name: str) -> None:
    emulator = faults.accounts[name]
    assert faults.state(name) == "success", faults.log(name)[-5000:]
    assert faults.tries(name) == 1
    assert [rule.hits for rule in emulator.faults.rules] == [1] * len(emulator.faults.rules)
    assert cancellations(emulator) == 0
    assert faults.airflow.xcom("faults", faults.run_id, name)["status"] == "completed"


@pytest.mark.parametrize("name", [name for name in WAITS if "401" in name])
def test_a_revoked_key_ends_a_wait_with_an_error_about_the_batch(faults: Faults, name: str) -> None:
    emulator = faults.accounts[name]
    (batch,) = batches(emulator)
    assert faults.state(name) == "failed"
    # A retry would end the same way.
    assert faults.tries(name) == 1
    log = faults.log(name)
    assert f"Waiting for batch {batch['id']} ended" in log
    assert "The batch is untouched" in log
    assert "AirflowFailException" in log
    assert cancellations(emulator) == 0
    # It goes on.
    assert batch["status"] == "in_queue"
