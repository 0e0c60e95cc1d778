"""The service's folder: uploads, and the records that outlive a restart."""

from __future__ import annotations

import os
import secrets
import tempfile
from typing import TYPE_CHECKING, TypeVar

import msgspec

from airflow_provider_siliconflow.emulator.records import BatchRecord, FileRecord, SavedState

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    Record = TypeVar("Record", bound=msgspec.Struct)

_encode = msgspec.json.Encoder().encode


class Disk:
    """
    Files and records below one folder.

    :param folder: created if it is missing.
    :param persistent: write records; otherwise only uploads and results are on disk.
    """

    def __init__(self, folder: Path, *, persistent: bool) -> None:
        self.persistent = persistent
        self._folder = folder
        for name in ("files", "batches", "spool"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for leftover in (folder / "spool").iterdir():
            leftover.unlink()

    @property
    def results(self) -> Path:
        """Folder of the result files."""
        return self._folder / "results"

    def content_path(self, file_id: str) -> Path:
        """Return the path of an upload."""
        return self._folder / "files" / f"{file_id}.jsonl"

    def spool_path(self) -> Path:
        """Return a path on the same disk as the files, for an upload that is still arriving."""
        return self._folder / "spool" / secrets.token_hex(8)

    def spool(self, source: Path | Iterable[bytes]) -> Path:
        """Copy an upload, given as a path or in chunks."""
        path = self.spool_path()
        with path.open("wb") as spooled:
            if isinstance(source, os.PathLike):
                with open(source, "rb") as original:
                    while chunk := original.read(1 << 20):
                        spooled.write(chunk)
            else:
                spooled.writelines(source)
        return path

    def save_file(self, file: FileRecord) -> None:
        """Write the record of an upload."""
        self._save(self._folder / "files" / f"{file.id}.json", file)

    def save_batch(self, batch: BatchRecord) -> None:
        """Write the record of a batch, unless it is a seeded one."""
        if not batch.foreign:
            self._save(self._folder / "batches" / f"{batch.id}.json", batch)

    def save_state(self, state: SavedState) -> None:
        """Write the state other than files and batches."""
        self._save(self._folder / "state.json", state)

    def read_files(self) -> list[FileRecord]:
        """Return the uploads of earlier runs, oldest first."""
        return sorted(self._read("files", FileRecord), key=lambda file: file.created)

    def read_batches(self) -> list[BatchRecord]:
        """Return the batches of earlier runs."""
        return list(self._read("batches", BatchRecord))

    def read_state(self) -> SavedState | None:
        """Return the state of an earlier run other than files and batches."""
        path = self._folder / "state.json"
        return msgspec.json.decode(path.read_bytes(), type=SavedState) if path.exists() else None

    def _read(self, name: str, record: type[Record]) -> Iterator[Record]:
        for path in sorted((self._folder / name).glob("*.json")):
            yield msgspec.json.decode(path.read_bytes(), type=record)

    def _save(self, path: Path, record: msgspec.Struct) -> None:
        if not self.persistent:
            return
        with tempfile.NamedTemporaryFile("wb", dir=self._folder / "spool", delete=False) as part:
            part.write(_encode(record))
        os.replace(part.name, path)
