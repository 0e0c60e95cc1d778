"""What the account lists: how far it is read, and what is believed of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import pytest

from airflow_provider_siliconflow.api.exceptions import (
    NotFoundError,
    ServiceUnavailableError,
    SiliconFlowError,
)
from airflow_provider_siliconflow.api.models import Batch, UploadedFile
from airflow_provider_siliconflow.api.protocol import PAGE_SIZE
from airflow_provider_siliconflow.jobs.account import ANCHOR_MARGIN, AccountBatches, AccountFiles, Listed
from airflow_provider_siliconflow.jobs.identity import WORK_KEY, BatchWork, Submitter, Upload
from tests.unit.jobs.faulty import FakeClock, FakeListing, work_over

NOW = 1_800_000_000.0
#: Older than any batch of the work can be.
OLD = NOW - 2 * ANCHOR_MARGIN


def make_work(deployment_id: str | None = None) -> BatchWork:
    return work_over("file-1", Submitter("dag", "run", "task", -1, 0, deployment_id))


WORK = make_work()


def batch(batch_id: str, created_at: float | None = NOW, **fields: Any) -> Batch:
    return Batch(**{"id": batch_id, "status": "in_progress", "created_at": created_at} | fields)


def olds(count: int, created_at: float = OLD) -> list[Batch]:
    """Batches that are too old, a second apart, the newest first."""
    return [batch(f"old-{n}", created_at - n) for n in range(count)]


class Account:
    """The calls, and how much of the list was read."""

    def __init__(self, batches: list[Batch], files: list[UploadedFile] | None = None, **listing: Any) -> None:
        self.batches, self.files, self.listing = batches, files or [], listing
        self.handed_out: list[str] = []
        self.calls: list[str] = []
        self.contents: dict[str, list[bytes] | SiliconFlowError] = {}

    def list_batches(self) -> FakeListing:
        self.calls.append("batches")

        def hand_out() -> Iterator[Batch]:
            for each in self.batches:
                self.handed_out.append(each.id)
                yield each

        return FakeListing(hand_out(), **self.listing)

    def list_files(self) -> list[UploadedFile]:
        self.calls.append("files")
        return self.files

    def iter_file(self, reference: str, refresh: Any) -> Iterator[bytes]:
        self.calls.append(reference)
        content = self.contents[reference]
        if isinstance(content, SiliconFlowError):
            raise content
        yield from content


def opened(account: Account) -> tuple[AccountFiles, AccountBatches, FakeClock]:
    clock = FakeClock()
    files = AccountFiles(account, clock)
    return files, AccountBatches(account, files, clock), clock


def read(account: Account, *, anchor: float | None = NOW, recorded: dict[str, int] | None = None) -> Any:
    """The batches after one reading."""
    _, batches, clock = opened(account)
    batches.read(WORK, anchor, clock.monotonic(), recorded or {})
    return batches


# How far the list is read -------------------------------------------------------------------------------------


def test_a_list_that_is_sorted_is_read_until_a_page_of_it_is_too_old() -> None:
    account = Account([batch("new-1", NOW), batch("new-2", NOW - 1), *olds(3 * PAGE_SIZE)])
    found = read(account)
    assert len(account.handed_out) == 2 + PAGE_SIZE
    assert len(found) == 2 + PAGE_SIZE
    assert not found.cut


@pytest.mark.parametrize(
    "batches",
    [
        pytest.param([*olds(50), batch("late", NOW), *olds(250, OLD - 50)], id="mixed"),
        pytest.param([batch(f"b-{n}", OLD) for n in range(300)], id="all of one time"),
        pytest.param([batch(f"b-{n}", None) for n in range(300)], id="no times"),
        pytest.param(
            [batch("new"), *[batch(f"b-{n}", NOW - ANCHOR_MARGIN) for n in range(300)]], id="just new enough"
        ),
        pytest.param(list(reversed(olds(300))), id="the oldest first"),
    ],
)
def test_a_list_that_does_not_show_its_order_is_read_to_its_end(batches: list[Batch]) -> None:
    account = Account(batches)
    read(account)
    assert len(account.handed_out) == len(batches)


def test_old_batches_count_only_in_a_row() -> None:
    some = olds(2 * PAGE_SIZE - 2)
    account = Account([*some[: PAGE_SIZE - 1], batch("timeless", None), *some[PAGE_SIZE - 1 :]])
    read(account)
    assert len(account.handed_out) == 2 * PAGE_SIZE - 1


def test_batches_of_a_few_minutes_may_be_listed_in_either_order() -> None:
    swapped = [batch("a", NOW - 300), batch("b", NOW), *olds(300)]
    account = Account(swapped)
    read(account)
    assert len(account.handed_out) == 2 + PAGE_SIZE
    account = Account([batch("a", NOW - 301), batch("b", NOW), *olds(300)])
    read(account)
    assert len(account.handed_out) == 302


def test_numbers_of_the_ledger_show_the_order_where_times_do_not() -> None:
    batches = [batch("n-2", OLD), batch("n-1", OLD), *[batch(f"b-{n}", OLD) for n in range(300)]]
    account = Account(batches)
    read(account, recorded={"n-1": 1, "n-2": 2})
    assert len(account.handed_out) == PAGE_SIZE
    account = Account(batches)
    read(account, recorded={"n-1": 2, "n-2": 1})
    assert len(account.handed_out) == 302


@pytest.mark.parametrize(("gap", "stops"), [(3600.0, True), (3601.0, False)])
def test_a_batch_that_is_older_than_its_own_file_shows_that_clocks_disagree(gap: float, stops: bool) -> None:
    file = UploadedFile(id="file-1", filename="x", bytes=1, created_at=NOW + gap)
    account = Account([batch("a", NOW, input_file_id="file-1"), *olds(300)], [file])
    files, batches, clock = opened(account)
    files.read()
    batches.read(WORK, NOW, clock.monotonic(), {})
    assert (len(account.handed_out) == 1 + PAGE_SIZE) == stops


def test_what_was_read_is_read_again_only_if_it_is_too_old_or_not_deep_enough() -> None:
    account = Account([batch("new", NOW), *olds(350)])
    _, batches, clock = opened(account)
    first = clock.monotonic()
    batches.read(WORK, NOW, first, {})
    assert batches.read_at == first
    batches.read(WORK, NOW, first, {})
    batches.read(WORK, NOW + 1000, first, {})
    assert account.calls == ["batches"]
    clock.sleep(10)
    batches.read(WORK, NOW, clock.monotonic(), {})
    assert account.calls == ["batches"] * 2
    # Further back.
    batches.read(WORK, OLD + ANCHOR_MARGIN - 200, first, {})
    assert account.calls == ["batches"] * 3
    assert len(batches) == 1 + 201 + PAGE_SIZE
    batches.read(WORK, None, first, {})
    assert len(batches) == 351
    batches.read(WORK, None, first, {})
    assert account.calls == ["batches"] * 4


def test_a_new_reading_stops_where_the_last_one_began() -> None:
    account = Account([batch(f"new-{n}", NOW - n) for n in range(300)])
    _, batches, clock = opened(account)
    batches.read(WORK, NOW, clock.monotonic(), {})
    assert len(account.handed_out) == 300
    clock.sleep(10)
    account.batches.insert(0, batch("newest", NOW + 10))
    account.handed_out.clear()
    batches.read(WORK, NOW, clock.monotonic(), {})
    assert len(account.handed_out) == 1 + PAGE_SIZE


@pytest.mark.parametrize("cut", [True, False])
def test_what_a_list_leaves_out_is_remembered(cut: bool) -> None:
    found = read(Account([batch("a")], cut=cut, unreadable=2))
    assert (found.cut, found.unreadable) == (cut, 2)


# Whether all is shown -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batches", "cut", "older", "shown"),
    [
        ([batch("a")], False, set(), True),
        # It says that it is complete, and lacks what was created.
        ([batch("a")], False, {"known"}, False),
        ([batch("known")], False, {"known"}, True),
        ([batch("known", NOW), batch("b", NOW - 1)], True, {"known"}, True),
        ([batch("b", NOW - 1), batch("known", NOW + 1000)], True, {"known"}, False),
        ([batch("a", NOW), batch("b", NOW - 1)], True, set(), False),
        # Far enough back.
        ([batch("a", NOW), batch("b", NOW - ANCHOR_MARGIN - 1)], True, set(), True),
        ([batch("a", NOW), batch("b", NOW - ANCHOR_MARGIN)], True, set(), False),
    ],
)
def test_whether_a_list_surely_shows_all_batches_of_a_work(
    batches: list[Batch], cut: bool, older: set[str], shown: bool
) -> None:
    found = read(Account(batches, cut=cut), recorded=dict.fromkeys(older, 0))
    assert found.shows_all_of(NOW, older) == shown


def test_without_an_anchor_the_depth_of_a_cut_list_shows_nothing() -> None:
    found = read(Account([batch("a", NOW), *olds(5)], cut=True))
    assert found.shows_all_of(NOW, set())
    assert not found.shows_all_of(None, set())


def test_a_batch_that_was_recorded_only_after_the_list_was_read_need_not_be_in_it() -> None:
    found = read(Account([batch("a")]))
    assert found.shows_all_of(NOW, {"since"})


# Marks --------------------------------------------------------------------------------------------------------


def marked(batch_id: str, created_at: float | None = NOW, **metadata: str) -> Batch:
    return batch(batch_id, created_at, metadata={WORK_KEY: WORK.key} | metadata)


def test_batches_are_told_apart_by_their_marks() -> None:
    assert WORK.submitter is not None
    ours = {name: value for name, value in WORK.tagged_metadata.items() if name != WORK_KEY}
    batches = [
        marked("late", NOW),
        batch("plain-1"),
        marked("early", NOW - 5, **ours),
        marked("timeless", None),
        batch("plain-2"),
    ]
    found = read(Account(batches))
    assert [each.id for each in found.marked(WORK.key)] == ["timeless", "early", "late"]
    assert found.marked("other") == []
    assert [each.id for each in found.unmarked()] == ["plain-1", "plain-2"]
    assert found.of_submitter(WORK.submitter.mark) == {"early": WORK.key}
    assert found.of_submitter("other") == {}
    assert found.shows_marks
    assert not read(Account([batch("plain")])).shows_marks


def test_what_a_batch_told_by_its_id_counts_more_than_the_list() -> None:
    account = Account([batch("a"), batch("b")])
    _, batches, clock = opened(account)
    batches.read(WORK, NOW, clock.monotonic(), {})
    batches.add_read(marked("a"))
    assert [batches.was_read("a"), batches.was_read("b")] == [True, False]
    clock.sleep(1)
    batches.read(WORK, NOW, clock.monotonic(), {})
    assert [each.id for each in batches.unmarked()] == ["b"]
    assert [each.id for each in batches.marked(WORK.key)] == ["a"]


def test_what_is_kept_of_a_batch_is_what_proves_it() -> None:
    whole = batch(
        "a",
        input_file_id="file-1",
        file_name="x.jsonl",
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata={WORK_KEY: WORK.key},
    )
    assert Listed.of(whole).batch() == whole
    plain = batch("b")
    assert Listed.of(plain).batch() == plain


@pytest.mark.parametrize(
    ("ours", "metadata", "warned"),
    [
        (None, {"deployment_id": "other"}, True),
        ("ours", {"deployment_id": "other"}, True),
        ("ours", {"deployment_id": "ours"}, False),
        (None, {}, False),
        (None, {"deployment_id": "other", "label": "another task"}, False),
    ],
)
def test_another_airflow_on_the_account_is_told_of_once(
    caplog: pytest.LogCaptureFixture, ours: str | None, metadata: dict[str, str], warned: bool
) -> None:
    theirs = dict(make_work(metadata.get("deployment_id")).tagged_metadata)
    if "label" in metadata:
        theirs = {name: metadata["label"] if value == WORK.label else value for name, value in theirs.items()}
    account = Account([batch("a", metadata=theirs), batch("b", metadata=theirs)])
    _, batches, clock = opened(account)
    with caplog.at_level(logging.WARNING):
        batches.read(make_work(ours), NOW, clock.monotonic(), {})
    assert [text.split()[1] for text in caplog.messages] == (["a"] if warned else [])


# Files --------------------------------------------------------------------------------------------------------


def test_files_are_listed_once_unless_the_list_is_too_old() -> None:
    account = Account([], [UploadedFile(id="file-1", filename="x", bytes=1)])
    files, _, clock = opened(account)
    began = clock.monotonic()
    files.read()
    files.read()
    files.read(began)
    assert account.calls == ["files"]
    clock.sleep(5)
    files.read(began + 1)
    assert account.calls == ["files"] * 2
    files.read(began + 5)
    assert account.calls == ["files"] * 2
    assert files.get("file-1") is not None
    files.forget("file-1")
    assert files.get("file-1") is None


CONTENT = b"0123456789"
UPLOAD = Upload("k", "x.jsonl", len(CONTENT), sha256(CONTENT).hexdigest(), lambda: pytest.fail("not sent"))


@pytest.mark.parametrize(
    ("chunks", "same"),
    [
        ([CONTENT], True),
        ([CONTENT[:4], b"", CONTENT[4:]], True),
        ([CONTENT[:9]], False),
        ([CONTENT, b"x"], False),
        ([b"x" * 10], False),
    ],
)
def test_a_file_is_ours_if_it_holds_what_we_upload_and_is_read_once(chunks: list[bytes], same: bool) -> None:
    account = Account([])
    files, _, _ = opened(account)
    file = UploadedFile(id="file-1", filename="x.jsonl", bytes=10)
    account.contents["file-1"] = chunks
    assert files.has_content_of(file, UPLOAD) is same
    assert files.has_content_of(file, UPLOAD) is same
    assert account.calls == ["file-1"]


@pytest.mark.parametrize(
    ("error", "calls"),
    [
        (NotFoundError("no such call", status_code=404), ["file-1"]),
        (ServiceUnavailableError("busy", status_code=503), ["file-1", "file-2"]),
    ],
)
def test_a_service_that_knows_no_such_call_is_asked_for_contents_once(
    error: SiliconFlowError, calls: list[str]
) -> None:
    account = Account([])
    files, _, _ = opened(account)
    account.contents = {"file-1": error, "file-2": [CONTENT]}
    one, two = (UploadedFile(id=f"file-{n}", filename="x.jsonl", bytes=10) for n in (1, 2))
    assert files.has_content_of(one, UPLOAD) is None
    assert files.has_content_of(two, UPLOAD) is (None if len(calls) == 1 else True)
    assert account.calls == calls
