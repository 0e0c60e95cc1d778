"""The verdict on one batch whose counts and files come late, or never: nothing fails for good before it is settled."""

from __future__ import annotations

import json
from typing import Any

import pytest

from airflow_provider_siliconflow.api.client import SiliconFlowClient
from airflow_provider_siliconflow.api.exceptions import (
    BatchError,
    BatchExpiredError,
    BatchFailedError,
    BatchPartialFailureError,
    IncompleteResultsError,
)
from airflow_provider_siliconflow.api.models import Batch
from airflow_provider_siliconflow.api.settings import ClientSettings
from airflow_provider_siliconflow.emulator.server import Emulator
from airflow_provider_siliconflow.jobs.options import RunOptions
from airflow_provider_siliconflow.jobs.outcome import finish_batch, judge_run
from tests.unit.jobs.whole_job import MODELS, Clock

pytestmark = pytest.mark.emulator(speed=1000.0)

NEVER = 365 * 86400.0
FAIL = "[[emulator:error=400]]"
COUNTS = ["zeros", "null", "empty"]


def ended(emulator: Emulator, client: SiliconFlowClient, *texts: str) -> Batch:
    lines = [
        {"custom_id": f"r{n}", "body": {"model": MODELS[0], "messages": [{"role": "user", "content": text}]}}
        for n, text in enumerate(texts)
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file = emulator.service.add_file("rows.jsonl", "batch", [content])["data"]
    request = {"endpoint": "/v1/chat/completions", "completion_window": "24h", "input_file_id": file["id"]}
    batch_id = emulator.service.create_batch(request)["id"]
    while not (batch := client.get_batch(batch_id)).is_terminal:
        emulator.service.advance(0.01)
    return batch


def verdict(emulator: Emulator, *texts: str, **options: Any) -> str | None:
    with SiliconFlowClient(ClientSettings("sk-1", emulator.base_url, backoff=0.01)) as client:
        return finish_batch(
            client,
            ended(emulator, client, *texts),
            **({"fail_on_partial_error": False, "allow_all_failed": False} | options),
            clock=Clock(emulator),
        )


@pytest.mark.parametrize("settle_as", COUNTS)
@pytest.mark.parametrize("settle", [20.0, NEVER])
@pytest.mark.parametrize("late", [{}, {"late_output_seconds": 30.0}])
def test_the_files_are_counted_if_the_counts_do_not_add_up(
    emulator: Emulator, settle_as: str, settle: float, late: dict[str, float]
) -> None:
    emulator.service.configure({"settle_as": settle_as, "settle_seconds": settle, **late})
    assert verdict(emulator, "Hi", "Hi", "Hi", fail_on_partial_error=True) is None
    assert "2 of 3 rows succeeded, 1 did not" in (verdict(emulator, "Hi", FAIL, "Hi") or "")
    with pytest.raises(BatchPartialFailureError, match="2 of 3"):
        verdict(emulator, "Hi", FAIL, "Hi", fail_on_partial_error=True)


def test_a_file_that_stays_partial_is_no_verdict(emulator: Emulator) -> None:
    """Half of the rows are there: the counts say that there are more, and nobody knows what became of them."""
    emulator.service.configure({"settle_seconds": NEVER, "partial_output_seconds": 1000.0})
    with pytest.raises(IncompleteResultsError) as caught:
        verdict(emulator, "Hi", "Hi", "Hi", "Hi", fail_on_partial_error=True)
    assert caught.value.retryable


@pytest.mark.parametrize("settle_as", COUNTS)
def test_a_batch_that_names_no_file_yet_has_not_failed_for_good(emulator: Emulator, settle_as: str) -> None:
    emulator.service.configure(
        {"settle_as": settle_as, "settle_seconds": NEVER, "late_output_seconds": 1000.0}
    )
    with pytest.raises(BatchError) as caught:
        verdict(emulator, "Hi", "Hi")
    assert caught.value.retryable


@pytest.mark.parametrize("settle_as", COUNTS)
def test_an_error_file_alone_is_no_verdict_unless_it_answers_every_row(
    emulator: Emulator, settle_as: str
) -> None:
    emulator.service.configure({"settle_as": settle_as, "settle_seconds": NEVER})
    with pytest.raises(BatchError) as caught:
        verdict(emulator, FAIL, FAIL)
    # Only with a total it is known that no row is still to come.
    assert caught.value.retryable == (settle_as != "zeros")
    if settle_as == "zeros":
        assert isinstance(caught.value, BatchFailedError)


@pytest.mark.emulator(speed=1.0, queue_seconds=10**6)
def test_a_batch_that_expired_in_the_queue_is_read_again_as_long_as_it_has_no_counts(
    emulator: Emulator,
) -> None:
    with SiliconFlowClient(ClientSettings("sk-1", emulator.base_url, backoff=0.01)) as client:
        emulator.service.configure({"speed": 10**6})
        batch = ended(emulator, client, "Hi", "Hi")
        assert batch.status == "expired"
        with pytest.raises(BatchExpiredError, match="0 of 2 rows") as caught:
            finish_batch(
                client, batch, fail_on_partial_error=False, allow_all_failed=False, clock=Clock(emulator)
            )
        assert caught.value.retryable


@pytest.mark.parametrize(
    ("lost", "total", "rate", "passes"),
    [
        *((29, 100, 0.29, True), (30, 100, 0.29, False), (7, 100, 0.07, True), (57, 1000, 0.057, True)),
        *((1, 3, 0.3333333333333333, False), (0, 1, 0.0, True), (1, 10**9, 0.0, False), (5, 5, 1, True)),
    ],
)
def test_rates_are_compared_as_they_were_written(lost: int, total: int, rate: float, passes: bool) -> None:
    manifest = {
        "rows": {"total": total, "ok": total - lost, "error": lost, "invalid": 0, "expired": 0, "missing": 0},
        "errors": {},
        "paths": {"output_dir": "/out"},
    }
    options = RunOptions(max_error_rate=rate, allow_all_failed=True)
    if passes:
        judge_run(manifest, options)
    else:
        with pytest.raises(BatchPartialFailureError, match="max_error_rate"):
            judge_run(manifest, options)
