"""
The account's lists of files and batches, read only as far as a search needs and trusted only as far as they are proven.

A list may come in any order, with or without pages, with or without metadata, and the service's clock may be off by any
amount. So a search stops early only if the list itself shows that it is sorted newest first, and that it has reached
batches older than the input file of the work, by the service's own clock.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any, Protocol

from airflow_provider_siliconflow.api import protocol
from airflow_provider_siliconflow.api.exceptions import SiliconFlowError
from airflow_provider_siliconflow.api.models import Batch, UploadedFile
from airflow_provider_siliconflow.jobs.clock import Clock
from airflow_provider_siliconflow.jobs.identity import (
    WORK_DEPLOYMENT,
    WORK_KEY,
    WORK_LABEL,
    WORK_SUBMITTER,
    BatchWork,
    Upload,
)

log = logging.getLogger(__name__)

#: How far before the creation of its work's input file a search goes back, in seconds: the service's clocks for files
#: and for batches may differ.
ANCHOR_MARGIN = 86400.0
#: Seconds by which a batch may seem older than its own input file before the two clocks count as different.
_CLOCKS_AGREE = 3600.0
#: Seconds within which batches may be listed in either order.
_ORDER_TOLERANCE = 300.0


class Listing(Protocol):
    """The batches of an account, in the order of the service; the attributes are final at the end."""

    #: Whether the account has, or may have, batches that were not listed.
    cut: bool
    #: Entries that could not be read at all.
    unreadable: int

    def __iter__(self) -> Iterator[Batch]:
        """Return the iterator itself."""
        ...

    def __next__(self) -> Batch:
        """Return the next batch."""
        ...


class AccountAPI(Protocol):
    """The calls that reading the account needs; ``SiliconFlowClient`` has them."""

    def list_batches(self) -> Listing:
        """Return the account's batches; pages are read as they are needed."""
        ...

    def list_files(self) -> Iterable[UploadedFile]:
        """Return the account's files."""
        ...

    def iter_file(self, reference: str, refresh: Any) -> Iterator[bytes]:
        """Yield the content of a file."""
        ...


class AccountFiles:
    """
    The account's input files.

    :param api: the calls.
    :param clock: time.
    """

    def __init__(self, api: AccountAPI, clock: Clock) -> None:
        self._api = api
        self._clock = clock
        self._by_id: dict[str, UploadedFile] = {}
        self._contents: dict[str, bool] = {}
        self._contents_readable = True
        self._read_at = float("-inf")

    def read(self, not_before: float = float("-inf")) -> None:
        """
        Read the list, unless it was read already.

        :param not_before: monotonic time; a list that was read earlier is read again.
        """
        if self._read_at < not_before or self._read_at == float("-inf"):
            began = self._clock.monotonic()
            self._by_id.update((file.id, file) for file in self._api.list_files())
            self._read_at = began

    def get(self, file_id: str) -> UploadedFile | None:
        """Return a file that was listed."""
        return self._by_id.get(file_id)

    def forget(self, file_id: str) -> None:
        """Treat a file as one that the service no longer has."""
        self._by_id.pop(file_id, None)

    def named(self, upload: Upload) -> list[UploadedFile]:
        """Return the listed files with the name of an upload, whatever their size."""
        return [file for file in self._by_id.values() if file.filename == upload.filename]

    def has_content_of(self, file: UploadedFile, upload: Upload) -> bool | None:
        """
        Whether a file has exactly the content of an upload; ``None`` if the service does not let it be read.

        Each file is read once, and only until it exceeds the size of the upload.
        """
        if file.id in self._contents:
            return self._contents[file.id]
        if not self._contents_readable:
            return None
        try:
            same = _hash_of(self._api.iter_file(file.id, lambda: None), upload.size) == upload.sha256
        except SiliconFlowError as exc:
            # Reading an input file is not documented. If the service has no such call, it is only tried once.
            self._contents_readable = protocol.is_transient(exc)
            log.info("The content of file %s cannot be compared: %s", file.id, exc)
            return None
        self._contents[file.id] = same
        if not same:
            log.warning(
                "File %s has the expected name %s but different content; it is not used",
                file.id,
                file.filename,
            )
        return same


def _hash_of(chunks: Iterable[bytes], size: int) -> str:
    """Return the sha256 of a content, or ``""`` if it does not have ``size`` bytes."""
    found, left = hashlib.sha256(), size
    for chunk in chunks:
        left -= len(chunk)
        if left < 0:
            return ""
        found.update(chunk)
    return found.hexdigest() if left == 0 else ""


@dataclass(frozen=True, slots=True)
class Listed:
    """The fields of a listed batch that a search keeps; an account may list a hundred thousand batches."""

    id: str
    key: str | None
    status: str
    file_id: str | None
    file_name: str | None
    endpoint: str | None
    window: str | int | None
    created_at: float | None

    @classmethod
    def of(cls, batch: Batch) -> Listed:
        """Return the fields of a batch."""
        return cls(
            batch.id,
            batch.metadata.get(WORK_KEY),
            batch.status,
            batch.input_file_id,
            batch.file_name,
            batch.endpoint,
            batch.completion_window,
            batch.created_at,
        )

    def batch(self) -> Batch:
        """Return a batch with these fields."""
        return Batch(
            id=self.id,
            status=self.status,
            input_file_id=self.file_id,
            file_name=self.file_name,
            endpoint=self.endpoint,
            completion_window=self.window,
            created_at=self.created_at,
            metadata={} if self.key is None else {WORK_KEY: self.key},
        )


class _Order:
    """
    Whether a list is sorted newest first, as far as it was read.

    The times of its batches show it, and so do batches whose order the ledger knows.
    """

    def __init__(self) -> None:
        self._times = _Falling(_ORDER_TOLERANCE)
        self._numbers = _Falling(0.0)

    def add(self, created_at: float | None, number: int | None) -> None:
        """
        Add the next batch.

        :param created_at: its creation time.
        :param number: its number in the ledger, if it has one.
        """
        if created_at is not None:
            self._times.add(created_at)
        if number:
            self._numbers.add(number)

    @property
    def newest_first(self) -> bool:
        """Whether it certainly is; batches that were all created in one second do not show it."""
        if self._times.is_broken or self._numbers.is_broken:
            return False
        return self._times.falls or self._numbers.falls


class _Falling:
    """
    Whether a sequence of numbers decreases.

    :param tolerance: by how much a number may exceed the smallest one before it.
    """

    def __init__(self, tolerance: float) -> None:
        self._tolerance = tolerance
        self._first: float | None = None
        self._lowest = float("inf")
        self.is_broken = False

    def add(self, value: float) -> None:
        """Add the next number."""
        if self._first is None:
            self._first = value
        self.is_broken |= value > self._lowest + self._tolerance
        self._lowest = min(self._lowest, value)

    @property
    def falls(self) -> bool:
        """Whether they decreased, as opposed to being all the same."""
        return not self.is_broken and self._first is not None and self._lowest < self._first


class AccountBatches:
    """
    The account's batches, as far as they were read.

    :param api: the calls.
    :param files: the account's files.
    :param clock: time.
    """

    def __init__(self, api: AccountAPI, files: AccountFiles, clock: Clock) -> None:
        self._api = api
        self._files = files
        self._clock = clock
        self._marked: dict[str, dict[str, Listed]] = {}
        self._unmarked: dict[str, Listed] = {}
        self._by_submitter: dict[str, dict[str, str]] = {}
        self._seen: set[str] = set()
        self._read_by_id: set[str] = set()
        self._expected: frozenset[str] = frozenset()
        self._warned: set[str] = set()
        self._clocks_agree = True
        self._order = _Order()
        self._oldest = float("inf")
        self._read_to: float = float("inf")
        #: When the list was last read, by the monotonic clock.
        self.read_at = float("-inf")
        #: Whether the account may have batches that the service did not list.
        self.cut = False
        #: Entries of the list that were not batches.
        self.unreadable = 0

    def __len__(self) -> int:
        """Return how many batches were seen."""
        return len(self._seen)

    def read(
        self, work: BatchWork, anchor: float | None, not_before: float, recorded: Mapping[str, int]
    ) -> None:
        """
        Read the list as far as a piece of work needs it.

        :param anchor: time before which no batch of the work was created, by the service's clock; ``None`` reads all.
        :param not_before: monotonic time; a list that was read earlier is read again.
        :param recorded: the batches that the ledger knows, with numbers that show their order.
        """
        depth = float("-inf") if anchor is None else anchor - ANCHOR_MARGIN
        if self.read_at >= not_before and self._read_to <= depth:
            return
        began = self._clock.monotonic()
        self._expected = frozenset(recorded)
        order, streak = _Order(), 0
        listing = self._api.list_batches()
        for batch in listing:
            order.add(batch.created_at, recorded.get(batch.id))
            is_old = batch.created_at is not None and batch.created_at < depth
            is_known = batch.id in self._seen and self._read_to <= depth
            self._take(batch, work)
            streak = streak + 1 if is_old or is_known else 0
            if streak >= protocol.PAGE_SIZE and order.newest_first and self._clocks_agree:
                self._read_to = min(self._read_to, depth)
                break
        else:
            self._read_to = float("-inf")
            self.cut = listing.cut
        self._order, self.read_at, self.unreadable = order, began, listing.unreadable

    def _take(self, batch: Batch, work: BatchWork) -> None:
        self._seen.add(batch.id)
        listed = Listed.of(batch)
        if listed.created_at is not None:
            self._oldest = min(self._oldest, listed.created_at)
            file = self._files.get(listed.file_id or "")
            if (
                file is not None
                and file.created_at is not None
                and listed.created_at < file.created_at - _CLOCKS_AGREE
            ):
                self._clocks_agree = False
        if listed.id not in self._read_by_id:
            self._keep(listed)
        if listed.key is None:
            return
        if submitter := batch.metadata.get(WORK_SUBMITTER):
            self._by_submitter.setdefault(submitter, {})[batch.id] = listed.key
        self._warn_of_other_deployment(batch, work)

    def add_read(self, batch: Batch) -> None:
        """Add a batch that was read by its id since the list shows it without a mark; its own answer counts now."""
        self._read_by_id.add(batch.id)
        self._unmarked.pop(batch.id, None)
        self._keep(Listed.of(batch))

    def was_read(self, batch_id: str) -> bool:
        """Whether a batch was read by its id."""
        return batch_id in self._read_by_id

    def _keep(self, listed: Listed) -> None:
        if listed.key is not None:
            self._marked.setdefault(listed.key, {})[listed.id] = listed
        else:
            self._unmarked[listed.id] = listed

    def _warn_of_other_deployment(self, batch: Batch, work: BatchWork) -> None:
        ours = work.submitter.deployment_id if work.submitter is not None else None
        theirs = batch.metadata.get(WORK_DEPLOYMENT)
        if not theirs or theirs == ours or batch.metadata.get(WORK_LABEL) != work.label:
            return
        if theirs not in self._warned:
            self._warned.add(theirs)
            log.warning(
                "Batch %s belongs to the same DAG, task and run (%s), but to deployment %r; this one is %r",
                batch.id,
                work.label,
                theirs,
                ours,
            )

    def marked(self, key: str) -> list[Listed]:
        """Return the batches that carry the mark of a piece of work, oldest first."""
        return sorted(self._marked.get(key, {}).values(), key=lambda listed: listed.created_at or 0)

    def unmarked(self) -> list[Listed]:
        """Return the batches without a mark of ours, in the order of the list."""
        return list(self._unmarked.values())

    def of_submitter(self, mark: str) -> dict[str, str]:
        """Return the batches that carry the mark of a submitter: id to key of the work."""
        return dict(self._by_submitter.get(mark, {}))

    @property
    def shows_marks(self) -> bool:
        """Whether the service is known to return metadata."""
        return bool(self._marked)

    def shows_all_of(self, anchor: float | None, older: Set[str]) -> bool:
        """
        Whether the list, as far as it was read, certainly shows all batches of a piece of work.

        :param anchor: as in :meth:`read`.
        :param older: batches that are certainly older than any batch of the work.
        """
        # A list that claims to be complete but lacks batches that existed when it was read is not complete.
        expected = older & self._expected
        if not self.cut and (not expected or not self._seen.isdisjoint(expected)):
            return True
        if not self._order.newest_first:
            return False
        by_time = anchor is not None and self._clocks_agree and self._oldest < anchor - ANCHOR_MARGIN
        return by_time or not self._seen.isdisjoint(older)
