"""The rules of the service, driven with a clock of our own."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airflow_provider_siliconflow.emulator import ServiceError
from tests.unit.emulator.clients import MODEL, Account, row, rows

if TYPE_CHECKING:
    from pathlib import Path

TIME_FIELDS = {
    "completed": "completed_at",
    "failed": "failed_at",
    "expired": "expired_at",
    "cancelled": "cancelled_at",
}
RANKS = {
    name: rank
    for rank, name in enumerate(["in_queue", "in_progress", "finalizing", "cancelling", *TIME_FIELDS])
}


@pytest.fixture
def account(tmp_path: Path) -> Account:
    return Account(tmp_path)


def test_batch_object_has_the_documented_fields_in_every_status(account: Account) -> None:
    batch = account.create(account.upload(rows(100)), metadata={"description": "nightly"})
    assert re.fullmatch(r"batch_[a-z]{10}", batch.pop("id"))
    assert re.fullmatch(r"file-[a-z]{10}", batch.pop("input_file_id"))
    assert batch == {
        "object": "batch",
        "endpoint": "/v1/chat/completions",
        "errors": None,
        "completion_window": "24h",
        "status": "in_queue",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": 1741685413,
        "in_progress_at": None,
        "expires_at": 1741771813,
        "finalizing_at": None,
        "completed_at": None,
        "failed_at": None,
        "expired_at": None,
        "cancelling_at": None,
        "cancelled_at": None,
        "request_counts": None,
        "metadata": {"description": "nightly"},
    }


def test_undisturbed_batch_goes_through_every_status_on_time(account: Account) -> None:
    batch_id = account.create(account.upload(rows(100)))["id"]
    seen = []
    for seconds in (29, 1, 1, 1, 5):
        account.clock.time += seconds
        batch = account.service.get_batch(batch_id)
        seen.append((batch["status"], (batch["request_counts"] or {}).get("completed")))
    assert seen == [
        ("in_queue", None),
        ("in_progress", 0),
        ("in_progress", 50),
        ("finalizing", 100),
        ("completed", 100),
    ]
    start = batch["created_at"]
    assert [batch[name] - start for name in ("in_progress_at", "finalizing_at", "completed_at")] == [
        30,
        32,
        37,
    ]


@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(1, 40),
    marked=st.dictionaries(
        st.integers(0, 39), st.sampled_from(["error=400", "once=429", "missing", "missing-once", "expire"])
    ),
    rate=st.sampled_from([0.0001, 0.002, 1.0, 50.0]),
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("wait"), st.floats(0, 60_000)),
            st.tuples(st.just("speed"), st.sampled_from([0.5, 1.0, 60.0, 5000.0])),
            st.tuples(st.just("cancel"), st.just(0.0)),
        ),
        max_size=12,
    ),
)
def test_a_batch_never_goes_back_and_its_files_agree_with_its_counts(
    tmp_path_factory: pytest.TempPathFactory,
    count: int,
    marked: dict[int, str],
    rate: float,
    steps: list[tuple[str, float]],
) -> None:
    account = Account(tmp_path_factory.mktemp("account"), rows_per_second=rate)
    lines = [
        row(f"r{n}", f"Hello [[emulator:{marked[n]}]]" if n in marked else "Hello") for n in range(count)
    ]
    before = account.create(account.upload(lines))
    for what, value in [*steps, ("wait", 1e9), ("wait", 1e9)]:
        if what == "wait":
            account.clock.time += value
        elif what == "speed":
            account.service.configure({"speed": value})
        elif before["status"] not in TIME_FIELDS:
            account.service.cancel_batch(before["id"])
        now = account.service.get_batch(before["id"])
        assert RANKS[now["status"]] >= RANKS[before["status"]]
        assert before["status"] not in TIME_FIELDS or now["status"] == before["status"]
        counts, earlier = now["request_counts"], before["request_counts"]
        if counts is not None:
            assert counts["total"] == count
            assert counts["completed"] + counts["failed"] <= count
            assert earlier is None or all(counts[name] >= earlier[name] for name in counts)
        for status, name in TIME_FIELDS.items():
            assert (now[name] is not None) == (now["status"] == status)
        before = now

    output = account.ids(before, "output") if before["output_file_id"] else []
    assert bool(output) == (before["output_file_id"] is not None)
    failed = account.ids(before, "error") if before["error_file_id"] else []
    # A missing row counts as completed and is in neither file: that is what makes it missing.
    lost = {f"r{n}" for n, marker in marked.items() if n < count and marker.startswith("missing")}
    assert len(set(output + failed)) == len(output + failed)
    if before["request_counts"] is None:
        assert (before["status"], output) in [("cancelled", []), ("expired", [])]
        return
    counts = before["request_counts"]
    assert len(failed) == counts["failed"]
    assert not lost & set(output)
    if before["status"] == "completed":
        assert counts["completed"] == len(output) + len(lost)
        assert set(output + failed) | lost == {f"r{n}" for n in range(count)}
    else:
        assert 0 <= counts["completed"] - len(output) <= len(lost)


def test_new_speed_holds_for_what_is_left(account: Account) -> None:
    batch_id = account.create(account.upload(rows(100)))["id"]
    account.clock.time += 31
    account.service.configure({"speed": 0.1})
    assert account.service.get_batch(batch_id)["request_counts"]["completed"] == 50
    account.clock.time += 9
    assert account.service.get_batch(batch_id)["request_counts"]["completed"] == 95
    account.clock.time += 2
    assert account.service.get_batch(batch_id)["status"] == "finalizing"


def test_batch_can_expire_before_it_starts(tmp_path: Path) -> None:
    account = Account(tmp_path, queue_seconds=100_000)
    batch = account.create(account.upload(rows(3)))
    account.clock.time += 200_000
    batch = account.service.get_batch(batch["id"])
    assert (batch["status"], batch["in_progress_at"], batch["output_file_id"]) == ("expired", None, None)
    assert len(account.lines(batch, "error")) == 3


def test_expired_batch_has_its_finished_rows_and_names_the_others(tmp_path: Path) -> None:
    account = Account(tmp_path, rows_per_second=0.001)
    batch = account.create(account.upload(rows(100)))
    account.clock.time += 86_400
    batch = account.service.get_batch(batch["id"])
    assert (batch["status"], batch["expired_at"]) == ("expired", batch["expires_at"])
    done, late = account.ids(batch, "output"), account.lines(batch, "error")
    assert len(done) == 86
    assert set(done).isdisjoint(line["custom_id"] for line in late)
    assert {line["error"]["code"] for line in late} == {"batch_expired"}
    assert len(late) == 14


def test_cancelled_batch_keeps_the_rows_that_were_done(tmp_path: Path) -> None:
    account = Account(tmp_path, rows_per_second=1)
    batch_id = account.create(account.upload(rows(100)))["id"]
    account.clock.time += 70
    # As with the real service, the answer to the cancellation may still show the status before it.
    assert account.service.cancel_batch(batch_id)["status"] == "in_progress"
    assert account.service.get_batch(batch_id)["status"] == "cancelling"
    account.clock.time += 5
    batch = account.service.get_batch(batch_id)
    assert (batch["status"], batch["error_file_id"]) == ("cancelled", None)
    assert len(account.ids(batch, "output")) == 40
    with pytest.raises(ServiceError, match="cannot be cancelled"):
        account.service.cancel_batch(batch_id)


def test_batch_can_complete_while_it_is_cancelled(account: Account) -> None:
    batch_id = account.create(account.upload(rows(100)))["id"]
    account.clock.time += 33
    account.service.cancel_batch(batch_id)
    assert account.service.get_batch(batch_id)["status"] == "cancelling"
    account.clock.time += 10
    assert account.service.get_batch(batch_id)["status"] == "completed"


def test_answers_are_the_same_bytes_in_every_run(tmp_path: Path) -> None:
    written: list[bytes] = []
    for name, replace in (("one", None), ("two", {"model": "Qwen/QwQ-32B"}), ("three", None)):
        account = Account(tmp_path / name)
        account.clock.time += len(written) * 1000
        model = MODEL if replace else "Qwen/QwQ-32B"
        batch = account.run([row(f"r{n}", model=model) for n in range(50)], replace=replace)
        written.append(account.service.open_results(batch["id"], "output").read_bytes())
    assert written[0] == written[1] == written[2]
    ids = [json.loads(line)["custom_id"] for line in written[0].splitlines()]
    assert sorted(ids) == sorted(f"r{n}" for n in range(50))
    assert ids != [f"r{n}" for n in range(50)]


def test_markers_give_each_row_its_fate(account: Account) -> None:
    markers = [
        "error=400",
        "error=429",
        "once=503",
        "missing",
        "missing-once",
        "expire",
        "length",
        "empty",
        "duplicate",
        "wrong-model",
    ]
    lines = [row(marker, f"Tell me [[emulator:{marker}]] a story") for marker in markers]
    lines.append(row("none", "Tell me a story"))
    batch = account.run(lines)
    output = {line["custom_id"]: line["response"]["body"] for line in account.lines(batch, "output")}
    errors = {line["custom_id"]: line["error"]["code"] for line in account.lines(batch, "error")}
    assert errors == {
        "error=400": "20015",
        "error=429": "429",
        "once=503": "50505",
        "expire": "batch_expired",
    }
    assert set(output) == {"length", "empty", "duplicate", "wrong-model", "none"}
    assert output["length"]["choices"][0]["finish_reason"] == "length"
    assert output["empty"]["choices"][0]["message"]["content"] == ""
    assert output["wrong-model"]["model"] != output["none"]["model"] == MODEL
    assert Counter(account.ids(batch, "output"))["duplicate"] == 2

    again = account.run(lines)
    assert {"once=503", "missing-once"} <= set(account.ids(again, "output"))
    assert set(account.ids(again, "error")) == {"error=400", "error=429", "expire"}


def test_first_failure_goes_by_creation_not_by_download(account: Account) -> None:
    file_id = account.upload([row("a", "x [[emulator:once=429]]"), row("b")])
    first, second = account.create(file_id), account.create(file_id)
    other_model = account.create(file_id, replace={"model": "deepseek-ai/DeepSeek-V3"})
    account.clock.time += 1000
    assert sorted(account.ids(second, "output")) == ["a", "b"]
    assert account.ids(first, "error") == ["a"]
    assert account.ids(other_model, "error") == ["a"]


def test_rate_of_row_errors_is_kept_and_transient(tmp_path: Path) -> None:
    account = Account(tmp_path, row_error_rate=0.2)
    lines = rows(1000)
    first = account.run(lines)
    failed = set(account.ids(first, "error"))
    assert 150 < len(failed) < 250
    assert {line["error"]["code"] for line in account.lines(first, "error")} == {"429", "50505"}
    assert account.run(lines)["request_counts"] == {"total": 1000, "completed": 1000, "failed": 0}


def test_skill_is_the_share_of_right_answers(tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    known = {f"Which letter belongs to number {n}?": "ABCD"[n % 4] for n in range(400)}
    answers.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in known.items()))
    account = Account(tmp_path / "data", answers=answers, models={"good": 0.9, "poor": 0.3, "sure": 1.0})
    file_id = account.upload([row(q, f"Choose one.\n{q}\nA, B, C or D?") for q in known])
    shares = {}
    for model in ("good", "poor", "sure"):
        batch = account.create(file_id, replace={"model": model})
        account.clock.time += 1000
        texts = {
            line["custom_id"]: line["response"]["body"]["choices"][0]["message"]["content"]
            for line in account.lines(batch, "output")
        }
        assert all(re.search(r"Answer: [ABCD]$", text) for text in texts.values())
        shares[model] = sum(texts[q].endswith(f"Answer: {a}") for q, a in known.items()) / len(known)
    assert shares["sure"] == 1
    assert 0.85 < shares["good"] < 0.95
    assert 0.22 < shares["poor"] < 0.38


def test_reasoning_and_truncation_show_in_usage(account: Account) -> None:
    batch = account.run(
        [row("think", model="deepseek-ai/DeepSeek-R1"), row("short", "word " * 50, max_tokens=3)]
    )
    lines = {line["custom_id"]: line["response"]["body"] for line in account.lines(batch, "output")}
    think, short = lines["think"], lines["short"]
    assert think["choices"][0]["message"]["reasoning_content"]
    assert think["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    assert (short["choices"][0]["finish_reason"], short["usage"]["completion_tokens"]) == ("length", 3)
    assert "reasoning_content" not in short["choices"][0]["message"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"not json\n", "malformed"),
        (b"[]\n", "Expected `object`, got `array`"),
        (b"\n", "the line is empty"),
        (b"[" * 100_000 + b"\n", "nested too deeply"),
        ({"body": {"messages": [{"role": "user", "content": "x"}]}}, "missing required field `custom_id`"),
        ({**row("x"), "custom_id": ""}, "custom_id"),
        ({"custom_id": "x", "body": {"model": MODEL, "messages": []}}, "messages"),
        (row("x", messages=[{"role": "tool", "content": "x"}]), "Invalid enum value 'tool'"),
        (row("x", messages=[{"role": "assistant", "content": "x"}]), "last message must have the role user"),
        (row("x", messages=[{"role": "user", "content": None}]), "content must not be null"),
        (row("x", messages=[{"role": "user", "content": 5}]), "got `int`"),
        (row("x", messages=[{"role": "user"}]), "missing required field `content`"),
        (json.dumps(row("x", seed=1.5)).encode().replace(b"1.5", b"1e999") + b"\n", "out of range"),
        (row("first"), "not unique"),
        ({"custom_id": "x", "body": {"messages": [{"role": "user", "content": ""}]}}, "names a model"),
        ({**row("x"), "url": "/v1/embeddings"}, "url must be"),
        (row("x", "[[emulator:eror=400]]"), "unknown marker"),
    ],
)
def test_wrong_line_fails_the_batch_with_its_number(account: Account, line: Any, reason: str) -> None:
    batch = account.create(account.upload([row("first"), line]))
    assert batch["status"] == "failed"
    assert batch["failed_at"] == batch["created_at"]
    (error,) = batch["errors"]
    assert error.startswith("Line 2: ")
    assert reason in error
    assert account.service.get_batch(batch["id"])["output_file_id"] is None


def test_model_may_be_absent_when_replaced(account: Account) -> None:
    line = {"custom_id": "x", "body": {"messages": [{"role": "user", "content": "?"}]}}
    batch = account.run([line], replace={"model": "Qwen/Qwen3-8B"})
    assert account.lines(batch, "output")[0]["response"]["body"]["model"] == "Qwen/Qwen3-8B"


def test_file_over_a_limit_is_refused_at_upload(tmp_path: Path) -> None:
    account = Account(tmp_path, max_file_bytes=700_000)
    account.upload(rows(5000))
    for lines, reason in ((rows(5001), "more than 5000 lines"), ([row("x", "y" * 700_000)], "larger than")):
        with pytest.raises(ServiceError, match=reason) as refused:
            account.upload(lines)
        assert (refused.value.status, refused.value.body["code"]) == (400, 20015)
    # Nothing of a refused upload stays behind.
    assert list((tmp_path / "spool").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"endpoint": "/v1/embeddings"}, 400, 20015),
        ({"completion_window": "23h"}, 400, 20015),
        ({"completion_window": "337h"}, 400, 20015),
        ({"completion_window": 24}, 400, 20015),
        ({"input_file_id": None}, 400, 20015),
        ({"input_file_id": "file-nosuchfile"}, 404, 20015),
        ({"replace": "Qwen/Qwen3-32B"}, 400, 20015),
        ({"replace": {"model": "no/such-model"}}, 400, 20012),
        ({"metadata": {str(n): "" for n in range(17)}}, 400, 20015),
        ({"metadata": {"k" * 65: ""}}, 400, 20015),
        ({"metadata": {"k": "v" * 513}}, 400, 20015),
        ({"metadata": {"k": 1}}, 400, 20015),
    ],
)
def test_wrong_request_makes_no_batch(
    account: Account, change: dict[str, Any], status: int, code: int
) -> None:
    file_id = account.upload(rows(1))
    with pytest.raises(ServiceError) as refused:
        account.create(**{"file_id": file_id, **change})
    assert (refused.value.status, refused.value.body["code"]) == (status, code)
    assert account.service.list_batches()["data"] == []


def test_values_at_the_documented_limits_are_taken(account: Account) -> None:
    metadata = {f"{n:064}": "v" * 512 for n in range(16)}
    batch = account.create(account.upload(rows(1)), completion_window="336h", metadata=metadata)
    assert (batch["metadata"], batch["expires_at"] - batch["created_at"]) == (metadata, 336 * 3600)


def test_empty_balance_refuses_a_batch(account: Account) -> None:
    file_id = account.upload(rows(1))
    account.service.configure({"balance": 0})
    with pytest.raises(ServiceError) as refused:
        account.create(file_id)
    assert (refused.value.status, refused.value.body["code"]) == (402, 30001)
    assert account.service.user_info()["data"]["chargeBalance"] == "0.00"


def test_pages_hold_every_batch_once_newest_first(account: Account) -> None:
    file_id = account.upload(rows(1))
    created = [account.create(file_id)["id"] for _ in range(7)]
    account.service.seed_foreign_batches(3, age_seconds=3600)
    found: list[str] = []
    after = None
    while True:
        page = account.service.list_batches(4, after)
        found += [batch["id"] for batch in page["data"]]
        after = page["last_id"]
        if not page["has_more"]:
            break
    assert found[:7] == created[::-1]
    assert len(set(found)) == len(found) == 10
    assert page["data"][-1]["file_name"] == "foreign.jsonl"

    account.service.configure({"ignore_cursor": True})
    page = account.service.list_batches(4, after)
    assert (page["first_id"], page["has_more"]) == (created[-1], True)


def test_new_batch_is_found_by_id_before_the_list_shows_it(tmp_path: Path) -> None:
    account = Account(tmp_path, list_lag_seconds=60, speed=1000)
    batch_id = account.create(account.upload(rows(1)))["id"]
    account.clock.time += 59
    assert account.service.list_batches()["data"] == []
    assert account.service.get_batch(batch_id)["status"] == "completed"
    account.clock.time += 1
    assert account.service.list_batches()["first_id"] == batch_id


def test_output_can_come_later_than_completed(tmp_path: Path) -> None:
    account = Account(tmp_path, late_output_seconds=60)
    batch_id = account.create(account.upload(rows(1)))["id"]
    account.clock.time += 40
    batch = account.service.get_batch(batch_id)
    assert (batch["status"], batch["output_file_id"]) == ("completed", None)
    account.clock.time += 60
    assert account.service.get_batch(batch_id)["output_file_id"] is not None


def test_completed_with_every_row_failed_has_no_output(account: Account) -> None:
    batch = account.run([row("a", "[[emulator:error=400]]"), row("b", "[[emulator:error=429]]")])
    assert (batch["status"], batch["output_file_id"]) == ("completed", None)
    assert len(account.lines(batch, "error")) == 2


def test_forced_status_holds_until_it_is_cleared(account: Account) -> None:
    batch_id = account.create(account.upload(rows(2)))["id"]
    account.service.force_status(batch_id, "validating")
    account.clock.time += 1000
    batch = account.service.get_batch(batch_id)
    assert (batch["status"], batch["output_file_id"], batch["completed_at"]) == ("validating", None, None)
    assert account.service.force_status(batch_id, None)["status"] == "completed"
    # A terminal one replaces the end the batch had, with its files.
    assert len(account.ids(batch, "output")) == 2
    assert account.service.force_status(batch_id, "failed")["output_file_id"] is None


def test_forced_end_replaces_the_results_of_the_other(tmp_path: Path) -> None:
    account = Account(tmp_path, rows_per_second=0.01)
    batch = account.create(account.upload(rows(4)))
    account.clock.time += 30 + 200
    account.service.force_status(batch["id"], "expired")
    assert len(account.ids(batch, "output")) == 2
    finished = account.service.force_status(batch["id"], "completed")
    assert finished["request_counts"] == {"total": 4, "completed": 4, "failed": 0}
    assert len(account.ids(finished, "output")) == 4


def test_forced_completion_of_a_waiting_batch_is_whole(account: Account) -> None:
    batch = account.create(account.upload(rows(2)))
    batch = account.service.force_status(batch["id"], "completed")
    assert [batch[name] for name in ("in_progress_at", "finalizing_at", "completed_at")] == [1741685413] * 3
    assert len(account.ids(batch, "output")) == 2


def test_state_outlives_a_restart(tmp_path: Path) -> None:
    account = Account(tmp_path, persistent=True)
    file_id = account.upload([row("a", "x [[emulator:once=429]]"), row("b")])
    first = account.create(file_id, metadata={"k": "v"})
    account.service.advance(1000)
    written = account.service.open_results(first["id"], "error").read_bytes()
    seen = account.service.get_batch(first["id"])
    assert seen["status"] == "completed"

    restarted = Account(tmp_path, persistent=True)
    assert restarted.service.get_batch(first["id"]) == seen
    assert restarted.service.open_results(first["id"], "error").read_bytes() == written
    second = restarted.run([row("a", "x [[emulator:once=429]]"), row("b")])
    assert (second["error_file_id"], second["metadata"]) == (None, None)
    newest_first = [batch["id"] for batch in restarted.service.list_batches()["data"]]
    assert newest_first == [second["id"], first["id"]]
    assert restarted.create(file_id)["status"] == "in_queue"


def test_only_some_results_stay_on_disk_and_come_back_unchanged(tmp_path: Path) -> None:
    account = Account(tmp_path, kept_results=2)
    file_id = account.upload(rows(3))
    batches = [account.create(file_id) for _ in range(4)]
    account.clock.time += 1000
    path = account.service.open_results(batches[0]["id"], "output")
    before = (path.read_bytes(), path.stat().st_mtime_ns)
    for batch in batches[1:]:
        account.service.open_results(batch["id"], "output")
    assert len(list((tmp_path / "results").glob("*/output.jsonl"))) == 2
    assert not path.exists()
    account.service.open_results(batches[0]["id"], "output")
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_batch_goes_on_when_its_input_file_is_deleted(account: Account) -> None:
    file_id = account.upload(rows(2))
    batch = account.create(file_id)
    account.service.delete_file(file_id)
    account.clock.time += 1000
    assert len(account.ids(batch, "output")) == 2
    assert account.service.list_files("batch")["data"]["data"] == []
    with pytest.raises(ServiceError, match="does not exist"):
        account.create(file_id)
