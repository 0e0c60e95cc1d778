"""The points at which tasks of the DAG `crashes` die. The DAG and its test share them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

#: Points at which the process kills itself in its first try, named after its last or next step.
UPLOAD_POINTS = ("before-upload", "after-upload", "upload-recorded")
BATCH_POINTS = ("before-post", "after-post", "recorded", "xcom-pushed")
DEFERRING_POINTS = ("before-defer", "resumed")
#: Requests that the emulator holds until the test has killed the process.
HELD = {
    "upload-held": ("POST /files", "hold"),
    "upload-answer-held": ("POST /files", "hold-after"),
    "post-held": ("POST /batches", "hold"),
    "post-answer-held": ("POST /batches", "hold-after"),
    "poll-held": ("GET /batches/*", "hold"),
    "machine-dies": ("GET /batches/*", "hold"),
}


@dataclass(frozen=True)
class CrashCase:
    """A create task: its input, how it waits, whether it uses the task state store, and where it dies."""

    source: str
    wait: str
    store: bool
    point: str

    @property
    def name(self) -> str:
        return f"{self.source}.{self.wait}.{'store' if self.store else 'nostore'}.{self.point}"


def _points(source: str, wait: str) -> Iterator[str]:
    if source == "path":
        yield from (*UPLOAD_POINTS, "upload-held", "upload-answer-held")
    yield from (*BATCH_POINTS, "post-held", "post-answer-held")
    if wait == "deferrable":
        yield from DEFERRING_POINTS
    if wait == "sync":
        yield from ("poll-held", "machine-dies")


ALL_CASES = [
    CrashCase(source, wait, store, point)
    for source in ("path", "id")
    for wait in ("none", "sync", "deferrable")
    for store in (True, False)
    for point in _points(source, wait)
]

#: Covers every point, and every combination of input, wait and store, at least once.
_ESSENTIAL = [
    "path.deferrable.store.before-upload",
    "path.none.nostore.after-upload",
    "path.sync.store.upload-recorded",
    "path.deferrable.nostore.upload-held",
    "path.none.store.upload-answer-held",
    "id.deferrable.store.before-post",
    "id.none.nostore.before-post",
    "path.sync.store.after-post",
    "path.deferrable.nostore.after-post",
    "id.none.store.recorded",
    "path.deferrable.store.recorded",
    "id.sync.nostore.xcom-pushed",
    "path.sync.nostore.post-held",
    "id.deferrable.store.post-held",
    "id.deferrable.nostore.post-answer-held",
    "path.deferrable.store.before-defer",
    "path.deferrable.store.resumed",
    "id.deferrable.nostore.resumed",
    "id.sync.store.poll-held",
    "path.sync.nostore.machine-dies",
]

CRASH_CASES = [case for case in ALL_CASES if os.environ.get("EXHAUSTIVE") or case.name in _ESSENTIAL]

#: Points at which the download task dies.
DOWNLOAD_POINTS = ("download-held", "before-manifest")
