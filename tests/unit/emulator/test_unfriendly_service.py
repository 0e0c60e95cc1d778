"""Settings that make the service hard to live with, driven with a clock of our own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from airflow_provider_siliconflow.emulator import EmulatorConfig, ServiceError
from tests.unit.emulator.clients import Account, row, rows

if TYPE_CHECKING:
    from pathlib import Path


def pages(account: Account, size: int) -> list[str]:
    """Return the ids a client finds that follows the cursor."""
    found: list[str] = []
    after = None
    while True:
        page = account.service.list_batches(size, after)
        found += [batch["id"] for batch in page["data"]]
        after = page["last_id"]
        if not page["has_more"]:
            return found


@pytest.mark.parametrize(
    ("shown", "early"),
    [("zeros", {"total": 4, "completed": 0, "failed": 0}), ("null", None), ("empty", {})],
)
def test_counts_settle_later_than_the_status(tmp_path: Path, shown: str, early: object) -> None:
    account = Account(tmp_path, settle_seconds=60, settle_as=shown, speed=1000)
    batch = account.create(account.upload(rows(4)))
    account.clock.time += 40
    batch = account.service.get_batch(batch["id"])
    assert (batch["status"], batch["request_counts"]) == ("completed", early)
    assert batch["output_file_id"] is not None
    account.clock.time += 60
    settled = account.service.get_batch(batch["id"])["request_counts"]
    assert settled == {"total": 4, "completed": 4, "failed": 0}


def test_result_files_are_named_each_in_its_time(tmp_path: Path) -> None:
    account = Account(tmp_path, late_output_seconds=60, late_error_seconds=30, speed=1000)
    batch = account.create(account.upload([row("a"), row("b", "[[emulator:error=400]]")]))
    seen = []
    for seconds in (5, 30, 30):
        account.clock.time += seconds
        now = account.service.get_batch(batch["id"])
        seen.append((now["output_file_id"] is not None, now["error_file_id"] is not None))
    assert seen == [(False, False), (False, True), (True, True)]


def test_output_file_is_partial_and_then_whole(tmp_path: Path) -> None:
    account = Account(tmp_path, partial_output_seconds=60, speed=1000, kept_results=1)
    file_id = account.upload(rows(7))
    batch, other = account.create(file_id), account.create(file_id)
    account.clock.time += 5
    early = account.ids(batch, "output")
    account.service.open_results(other["id"], "output")
    assert {path.parent.name for path in (tmp_path / "results").glob("*/output*")} == {other["id"]}
    assert account.ids(batch, "output") == early, "dropped from disk and written again"
    account.clock.time += 60
    whole = account.ids(batch, "output")
    assert (len(early), len(whole)) == (3, 7)
    assert whole[:3] == early


def test_list_can_begin_with_the_oldest(tmp_path: Path) -> None:
    account = Account(tmp_path, list_oldest_first=True)
    file_id = account.upload(rows(1))
    created = [account.create(file_id)["id"] for _ in range(7)]
    assert pages(account, 3) == created


def test_list_can_be_short_and_without_pages(tmp_path: Path) -> None:
    account = Account(tmp_path, list_limit=2)
    file_id = account.upload(rows(1))
    created = [account.create(file_id)["id"] for _ in range(4)]
    for after in (None, created[3]):
        page = account.service.list_batches(100, after)
        assert ([batch["id"] for batch in page["data"]], page["has_more"]) == (created[:1:-1], False)


def test_endless_list_shows_true_batches_first_and_always_new_ones(tmp_path: Path) -> None:
    account = Account(tmp_path, list_endless=True)
    created = account.create(account.upload(rows(1)))["id"]
    ids: list[str] = []
    after = None
    for _ in range(50):
        page = account.service.list_batches(10, after)
        assert page["has_more"]
        ids += [batch["id"] for batch in page["data"]]
        after = page["last_id"]
    assert ids[0] == created
    assert len(set(ids)) == len(ids) == 500
    assert account.service.state()["batch_count"] == 1


@pytest.mark.parametrize(
    ("form", "shown"),
    [
        ("missing", "nothing"),
        ("null", None),
        ("text", '{"k": "v", "n": "1"}'),
        ("pairs", [["k", "v"], ["n", "1"]]),
    ],
)
def test_metadata_has_odd_forms_where_asked(tmp_path: Path, form: str, shown: object) -> None:
    account = Account(tmp_path, list_metadata=form)
    given = {"k": "v", "n": "1"}
    batch = account.create(account.upload(rows(1)), metadata=given)
    assert batch["metadata"] == given
    assert account.service.list_batches()["data"][0].get("metadata", "nothing") == shown
    account.service.configure({"list_metadata": "object", "batch_metadata": form})
    assert account.service.get_batch(batch["id"]).get("metadata", "nothing") == shown
    assert account.service.list_batches()["data"][0]["metadata"] == given
    # What a test reads of the truth is not spoilt.
    assert account.service.state()["batches"][0]["metadata"] == given


def test_clock_that_is_off_shows_in_every_time_and_changes_nothing_else(tmp_path: Path) -> None:
    straight = Account(tmp_path / "straight").run(rows(2))
    account = Account(tmp_path / "off", clock_offset_seconds=-7200)
    batch = account.run(rows(2))
    moved = {name: value for name, value in batch.items() if name.endswith("_at")}
    assert moved == {
        name: None if straight[name] is None else straight[name] - 7200
        for name in straight
        if name.endswith("_at")
    }
    (file,) = account.service.list_files("batch")["data"]["data"]
    assert file["created_at"] == batch["created_at"]
    path, _, query = batch["output_file_id"].removeprefix("http://localhost").partition("?")
    given = dict(part.split("=") for part in query.split("&"))
    account.service.check_signature(path, given)
    account.clock.time += 31 * 86400
    with pytest.raises(ServiceError, match="ExpiredToken"):
        account.service.check_signature(path, given)


def test_full_account_takes_a_batch_when_another_has_ended(tmp_path: Path) -> None:
    account = Account(tmp_path, max_open_batches=2)
    account.service.seed_foreign_batches(5)
    file_id = account.upload(rows(1))
    first, _ = account.create(file_id), account.create(file_id)
    with pytest.raises(ServiceError, match="rate limiting") as refused:
        account.create(file_id)
    assert refused.value.status == 429
    account.service.cancel_on_console(first["id"], at_once=True)
    account.create(file_id)


@pytest.mark.parametrize("status", [400, 404])
@pytest.mark.parametrize("still_listed", [True, False])
def test_forgotten_file_is_unknown(tmp_path: Path, status: int, still_listed: bool) -> None:
    account = Account(tmp_path, missing_file_status=status)
    file_id = account.upload(rows(2))
    batch = account.create(file_id)
    account.service.forget_file(file_id, still_listed=still_listed)
    with pytest.raises(ServiceError, match="does not exist") as refused:
        account.create(file_id)
    assert refused.value.status == status
    assert len(account.service.list_files("batch")["data"]["data"]) == still_listed
    account.clock.time += 1000
    assert len(account.ids(batch, "output")) == 2


def test_batch_cancelled_on_the_console_keeps_the_rows_that_were_done(tmp_path: Path) -> None:
    account = Account(tmp_path, rows_per_second=1)
    file_id = account.upload(rows(100))
    slow, quick = account.create(file_id), account.create(file_id)
    account.clock.time += 70
    assert account.service.cancel_on_console(slow["id"])["status"] == "cancelling"
    done = account.service.cancel_on_console(quick["id"], at_once=True)
    assert (done["status"], done["request_counts"]["completed"]) == ("cancelled", 40)
    account.clock.time += 5
    for batch in (slow, quick):
        assert account.service.get_batch(batch["id"])["status"] == "cancelled"
        assert len(account.ids(batch, "output")) == 40


@pytest.mark.parametrize(
    "setting",
    [
        {"settle_as": "nothing"},
        {"list_metadata": "xml"},
        {"missing_file_status": 500},
        {"settle_seconds": -1},
        {"late_error_seconds": -1},
        {"list_limit": -1},
        {"clock_offset_seconds": float("nan")},
        {"invalid_rate": 1.1},
        {"empty_rate": float("nan")},
        {"truncated_rate": 0.6, "fenced_rate": 0.6},
        {"cached_share": -0.1},
        {"wrong_attempts": -1},
        {"thinking_tokens": -1},
        {"batch_models": ["no/such-model"]},
        {"no_json_models": ["no/such-model"]},
        {"no_thinking_models": "Qwen/Qwen3-32B"},
        {"prices": {"a": {"prompt": "much", "completion": 1}}},
    ],
)
def test_wrong_setting_is_named(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        EmulatorConfig(**setting)
    with pytest.raises(ValueError, match=next(iter(setting))):
        EmulatorConfig().changed(setting)
