"""Where tasks of the DAG `crashes` die, for the DAG and for the test that runs it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

#: The process kills itself here, in its first try. Named after what it has just done, or is about to do.
UPLOAD_POINTS = ("before-upload", "after-upload", "upload-recorded")
BATCH_POINTS = ("before-post", "after-post", "recorded", "xcom-pushed")
DEFERRING_POINTS = ("before-defer", "resumed")
#: The emulator holds this request; the test kills the process, and only then lets the emulator go on.
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
    """A create task: what it is given, how it waits, with or without the task state store, where it dies."""

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

#: Every point once at least, every combination of input, wait and store once at least.
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

#: Points of the download task.
DOWNLOAD_POINTS = ("download-held", "before-manifest")
