"""The account's uploaded files: ``POST /files`` and the calls that read, list and delete them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_provider_siliconflow.emulator.records import FileRecord, new_id
from airflow_provider_siliconflow.emulator.refusals import (
    ServiceError,
    invalid_parameter,
    positive_number,
    unknown_object,
)
from airflow_provider_siliconflow.emulator.rows import TooManyLinesError, line_offsets, scan_file
from airflow_provider_siliconflow.emulator.views import stated_time

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable, Iterable
    from contextlib import AbstractContextManager

    from airflow_provider_siliconflow.emulator.config import EmulatorConfig
    from airflow_provider_siliconflow.emulator.disk import Disk


class Uploads:
    """
    The uploaded files. Safe to use from any thread.

    :param disk: the folder.
    :param config: returns the current settings.
    :param now: the service's clock in epoch seconds.
    :param lock: guards the records; shared with the service.
    :param format_problem: returns what is wrong with a row's ``response_format``.
    """

    def __init__(
        self,
        disk: Disk,
        config: Callable[[], EmulatorConfig],
        now: Callable[[], float],
        lock: AbstractContextManager[Any],
        format_problem: Callable[[object], str | None] = lambda _: None,
    ) -> None:
        self._disk = disk
        self._config = config
        self._now = now
        self._lock = lock
        self._format_problem = format_problem
        self._offsets: dict[str, array[int]] = {}
        self._files: dict[str, FileRecord] = {}
        if disk.persistent:
            self._files = {file.id: file for file in disk.read_files()}

    def __len__(self) -> int:
        return len(self._files)

    def find(self, file_id: object, status: int = 404) -> FileRecord:
        """
        Return a file that is not deleted.

        :raises ServiceError: there is none, with the given status.
        """
        file = self._files.get(file_id) if isinstance(file_id, str) else None
        if file is None or file.deleted:
            raise unknown_object("File", file_id, status)
        return file

    def add(
        self, filename: str, purpose: str, source: str | Path | Iterable[bytes], *, take: bool
    ) -> dict[str, Any]:
        """Store an upload, as :meth:`EmulatedService.add_file` describes it."""
        if isinstance(source, str):
            source = Path(source)
        spooled = source if take and isinstance(source, Path) else self._disk.spool(source)
        try:
            if purpose != "batch":
                raise invalid_parameter(f"purpose must be batch, not {purpose!r}.")
            size = spooled.stat().st_size
            if size > self._config().max_file_bytes:
                raise self.too_large()
            try:
                scan, offsets = scan_file(spooled, self._config().max_file_lines, self._format_problem)
            except TooManyLinesError:
                limit = self._config().max_file_lines
                raise invalid_parameter(f"The file has more than {limit} lines.") from None
            with self._lock:
                file = FileRecord(
                    id=new_id("file-", self._files),
                    bytes=size,
                    created=self._now(),
                    filename=filename,
                    purpose=purpose,
                    scan=scan,
                )
                os.replace(spooled, self._disk.content_path(file.id))
                self._files[file.id] = file
                self._offsets[file.id] = offsets
                self._disk.save_file(file)
        finally:
            spooled.unlink(missing_ok=True)
        return self._enveloped(self._object(file))

    def too_large(self) -> ServiceError:
        """Return the refusal of an upload that is over the limit."""
        return invalid_parameter(f"The file is larger than {self._config().max_file_bytes} bytes.")

    def listing(self, purpose: str | None, limit: str | int | None) -> dict[str, Any]:
        """Return the answer of ``GET /files``, newest first. There is no cursor."""
        if purpose is None:
            raise invalid_parameter("purpose is required.")
        with self._lock:
            found = [file for file in self._files.values() if file.purpose == purpose and _shown(file)]
        found.reverse()
        if limit is not None:
            found = found[: positive_number(limit, "limit")]
        listed = [self._listed(file) for file in found]
        if self._config().flat_files:
            return {"object": "list", "data": listed}
        return self._enveloped({"data": listed, "object": "file"})

    def all_listed(self) -> list[dict[str, Any]]:
        """Return every file that the list shows, oldest first."""
        return [self._listed(file) for file in self._files.values() if _shown(file)]

    def get(self, file_id: str) -> dict[str, Any]:
        """Return one file, without its content."""
        with self._lock:
            return self._enveloped(self._object(self.find(file_id)))

    def delete(self, file_id: str) -> dict[str, Any]:
        """Delete a file for its owner; batches that were created over it continue."""
        with self._lock:
            file = self.find(file_id)
            file.deleted = True
            self._disk.save_file(file)
        return self._enveloped({"id": file_id, "object": "file", "deleted": True})

    def forget(self, file_id: str, *, still_listed: bool) -> None:
        """Lose a file, as :meth:`EmulatedService.forget_file` describes it."""
        with self._lock:
            file = self.find(file_id)
            file.deleted, file.still_listed = True, still_listed
            self._disk.save_file(file)

    def content_path(self, file_id: str) -> Path:
        """Return the path of a file's content, even of a deleted file."""
        return self._disk.content_path(file_id)

    def offsets(self, file_id: str) -> array[int]:
        """Return the offsets of the lines of a file, followed by its size."""
        offsets = self._offsets.get(file_id)
        if offsets is None:
            offsets = self._offsets[file_id] = line_offsets(self.content_path(file_id))
        return offsets

    def _enveloped(self, data: dict[str, Any]) -> dict[str, Any]:
        if self._config().flat_files:
            return data
        return {"code": 20000, "message": "Ok", "status": True, "data": data}

    def _object(self, file: FileRecord) -> dict[str, Any]:
        created = "created_at" if self._config().flat_files else "createdAt"
        return {
            "id": file.id,
            "object": "file",
            "bytes": file.bytes,
            created: stated_time(file.created, self._config()),
            "filename": file.filename,
            "purpose": file.purpose,
        }

    def _listed(self, file: FileRecord) -> dict[str, Any]:
        return {
            "id": file.id,
            "object": "file",
            "bytes": file.bytes,
            "created_at": stated_time(file.created, self._config()),
            "filename": file.filename,
            "purpose": file.purpose,
            "line_count": file.scan.line_count,
        }


def _shown(file: FileRecord) -> bool:
    return file.still_listed or not file.deleted
