"""Uploading once: which file of the account is used, and what is recorded of it."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import pytest

from airflow_provider_siliconflow.api.exceptions import NoAnswerError, NotFoundError, SiliconFlowError
from airflow_provider_siliconflow.api.models import UploadedFile
from airflow_provider_siliconflow.jobs.account import AccountFiles
from airflow_provider_siliconflow.jobs.identity import Upload
from airflow_provider_siliconflow.jobs.states import MAX_EARLIER_FILES, Planned, Uploaded, Uploading
from airflow_provider_siliconflow.jobs.uploads import Uploads
from tests.unit.jobs.faulty import FakeClock, FakeListing, FaultyLedger

CONTENT = b"rows\n"
NAME = "rows-k.jsonl"


def file(file_id: str, filename: str = NAME, size: int | None = len(CONTENT)) -> UploadedFile:
    return UploadedFile(id=file_id, filename=filename, bytes=size)


class World:
    """An account, a ledger, and one try."""

    def __init__(self, *files: UploadedFile) -> None:
        self.files = list(files)
        self.contents: dict[str, bytes] = {each.id: CONTENT for each in files}
        self.clock = FakeClock()
        self.ledger = FaultyLedger(iter(()))
        self.ledger.complete = False
        self.lists = self.sends = 0
        self.errors: list[SiliconFlowError] = []
        self.stopped = False
        self.open()

    def open(self, *, earlier_tries: bool = True) -> None:
        self.uploads = Uploads(
            AccountFiles(self, self.clock),
            self.ledger,
            earlier_tries=earlier_tries,
            clock=self.clock,
            check_not_stopped=self._check,
        )

    def _check(self, what: str) -> None:
        if self.stopped:
            raise SiliconFlowError(f"{what} is stopped")

    def list_batches(self) -> FakeListing:
        raise AssertionError("no batch is asked for")

    def list_files(self) -> list[UploadedFile]:
        self.lists += 1
        return list(self.files)

    def iter_file(self, reference: str, refresh: Any) -> Iterator[bytes]:
        if reference not in self.contents:
            raise NotFoundError("no such call", status_code=404)
        yield self.contents[reference]

    def _send(self) -> UploadedFile:
        self.sends += 1
        self.clock.sleep(0.1)
        assert isinstance(self.ledger.upload("k"), Uploading), "the intent comes first"
        made = file(f"new-{self.sends}")
        self.files.append(made)
        self.contents[made.id] = CONTENT
        if self.errors:
            raise self.errors.pop(0)
        return made

    @property
    def plan(self) -> Upload:
        return Upload("k", NAME, len(CONTENT), sha256(CONTENT).hexdigest(), self._send)

    def upload(self) -> str:
        return self.uploads.upload(self.plan).id


def test_a_first_try_and_one_with_a_complete_record_ask_for_nothing() -> None:
    world = World(file("theirs"))
    world.open(earlier_tries=False)
    assert world.upload() == "new-1"
    assert world.lists == 0
    world = World(file("theirs"))
    world.ledger.complete = True
    assert world.upload() == "new-1"
    assert world.ledger.upload("k") == Uploaded("new-1")


def test_what_this_try_has_uploaded_is_not_looked_up_again() -> None:
    world = World()
    assert [world.upload(), world.upload()] == ["new-1", "new-1"]
    assert (world.sends, world.lists) == (1, 1)


@pytest.mark.parametrize(
    ("there", "used"),
    [
        (file("there"), True),
        (file("there", size=None), False),
        (file("there", size=6), False),
        (file("there", "other.jsonl"), False),
    ],
)
def test_a_file_that_nobody_recorded_is_used_only_if_all_of_it_is_ours(
    there: UploadedFile, used: bool
) -> None:
    world = World(there)
    assert world.upload() == ("there" if used else "new-1")


@pytest.mark.parametrize("content", [b"other", None])
def test_a_file_whose_content_is_another_s_or_cannot_be_read_is_not_used(content: bytes | None) -> None:
    world = World(file("there"))
    if content is None:
        world.contents.clear()
    else:
        world.contents["there"] = content
    assert world.upload() == "new-1"


def test_two_files_of_our_name_are_one_too_many_for_either() -> None:
    assert World(file("one"), file("two")).upload() == "new-1"


@pytest.mark.parametrize(
    ("there", "used"),
    [
        (file("recorded"), True),
        (file("recorded", size=None), True),
        (file("recorded", size=6), False),
        (file("recorded", "other.jsonl"), False),
        (file("another"), False),
    ],
)
def test_a_file_that_is_recorded_is_used_as_long_as_the_account_lists_it_so(
    there: UploadedFile, used: bool
) -> None:
    world = World(there)
    world.ledger.uploads["k"] = Uploaded("recorded")
    assert world.upload() == ("recorded" if used else "new-1")
    # A batch over a file that is gone may be ours; over one that proves to be another's it is not.
    is_gone = there.id != "recorded"
    assert world.ledger.upload("k") == Uploaded(
        "recorded" if used else "new-1", ("recorded",) if is_gone else ()
    )


def test_an_intent_of_an_earlier_try_is_looked_for_even_if_the_record_is_complete() -> None:
    world = World(file("there"))
    world.ledger.complete = True
    world.ledger.uploads["k"] = Uploading(1.0)
    assert world.upload() == "there"


def test_an_answer_that_was_lost_is_searched_for() -> None:
    world = World()
    world.errors = [NoAnswerError("reset")]
    assert world.upload() == "new-1"
    assert (world.sends, world.lists) == (1, 2), "the list is read anew"


@pytest.mark.parametrize("earlier", [(), ("file-0",)])
def test_what_was_not_sent_leaves_no_intent(earlier: tuple[str, ...]) -> None:
    world = World()
    if earlier:
        world.ledger.uploads["k"] = Uploaded(earlier[0])
    world.stopped = True
    with pytest.raises(SiliconFlowError, match=rf"POST /files of {NAME} is stopped"):
        world.upload()
    left = world.ledger.upload("k")
    assert world.sends == 0
    if earlier:
        assert isinstance(left, Uploading)
        assert left.earlier == earlier, "a batch over it may be ours"
    else:
        assert left == Planned()


def test_a_file_that_the_service_no_longer_has_is_uploaded_again_and_stays_known() -> None:
    world = World()
    for number in range(1, MAX_EARLIER_FILES + 3):
        file_id = world.upload()
        assert file_id == f"new-{number}"
        world.files.clear()
        world.uploads.forget(world.plan, file_id)
    left = world.ledger.upload("k")
    assert isinstance(left, Uploading)
    assert left.at == world.clock.time()
    newest = range(3, MAX_EARLIER_FILES + 3)
    assert left.earlier == tuple(f"new-{number}" for number in newest)
