"""Uploading a file exactly once: uploads are free, but sending a gigabyte twice takes time."""

from __future__ import annotations

import logging
from collections.abc import Callable

from airflow_provider_siliconflow.api.models import UploadedFile
from airflow_provider_siliconflow.jobs.account import AccountFiles
from airflow_provider_siliconflow.jobs.clock import Clock
from airflow_provider_siliconflow.jobs.identity import Upload
from airflow_provider_siliconflow.jobs.ledger import Ledger
from airflow_provider_siliconflow.jobs.posting import Request, send_once
from airflow_provider_siliconflow.jobs.states import (
    MAX_EARLIER_FILES,
    Planned,
    Uploaded,
    Uploading,
    UploadState,
    files_of,
)

log = logging.getLogger(__name__)


class Uploads:
    """
    Uploads for one try.

    :param files: the account's files.
    :param ledger: the record that outlives a try.
    :param earlier_tries: whether an earlier try may have uploaded a file that the ledger does not know.
    :param clock: time.
    :param check_not_stopped: raises if nothing may be sent any more.
    """

    def __init__(
        self,
        files: AccountFiles,
        ledger: Ledger,
        *,
        earlier_tries: bool,
        clock: Clock,
        check_not_stopped: Callable[[str], None],
    ) -> None:
        self._files = files
        self._ledger = ledger
        self._earlier_tries = earlier_tries
        self._clock = clock
        self._check_not_stopped = check_not_stopped
        self._checked: set[str] = set()

    def upload(self, upload: Upload) -> UploadedFile:
        """
        Return the uploaded file: the one an earlier try left, or a new one.

        A file that the ledger names is used only if the account lists it with our name and size. Any other file is used
        only if it is the only one of that name and has our content.

        :raises SiliconFlowError: the service refused it, or its files cannot be listed.
        """
        state = self._ledger.upload(upload.key)
        if isinstance(state, Uploaded) and upload.key in self._checked:
            return UploadedFile(id=state.file_id, filename=upload.filename, bytes=upload.size)
        file = self._find(upload, state)
        earlier = self._earlier(upload, state, but=file)
        if file is None:
            file = self._send(upload, Uploading(self._clock.time(), earlier))
        self._ledger.record_upload(upload.key, Uploaded(file.id, earlier))
        self._checked.add(upload.key)
        return file

    def forget(self, upload: Upload, file_id: str) -> None:
        """
        Treat a file as one that the service no longer has.

        :param file_id: its id; a batch over it stays ours.
        """
        state = self._ledger.upload(upload.key)
        self._checked.discard(upload.key)
        self._files.forget(file_id)
        self._ledger.record_upload(
            upload.key, Uploading(self._clock.time(), files_of(state)[-MAX_EARLIER_FILES:])
        )

    def _earlier(self, upload: Upload, state: UploadState, *, but: UploadedFile | None) -> tuple[str, ...]:
        """Return the recorded files that the current one replaces, without those that belong to other work."""
        found = []
        for file_id in files_of(state):
            listed = self._files.get(file_id)
            if (but is None or file_id != but.id) and (listed is None or upload.may_be(listed)):
                found.append(file_id)
        return tuple(found[-MAX_EARLIER_FILES:])

    def _find(self, upload: Upload, state: UploadState) -> UploadedFile | None:
        if isinstance(state, Uploaded):
            return self._recorded(upload, state.file_id)
        if isinstance(state, Planned) and (self._ledger.complete or not self._earlier_tries):
            return None
        self._files.read()
        return self._only_one(upload)

    def _recorded(self, upload: Upload, file_id: str) -> UploadedFile | None:
        self._files.read()
        file = self._files.get(file_id)
        if file is not None and upload.may_be(file):
            return file
        log.warning(
            "File %s is recorded for %s, but the account lists no file with that id, name and size; uploading it again",
            file_id,
            upload.filename,
        )
        return None

    def _only_one(self, upload: Upload) -> UploadedFile | None:
        """Return the account's file with our name, if it is the only one and has our content."""
        named = self._files.named(upload)
        if len(named) > 1:
            log.warning(
                "The account has %d files named %s; none of them is used", len(named), upload.filename
            )
            return None
        for file in named:
            if file.bytes == upload.size and self._files.has_content_of(file, upload):
                log.info("Using file %s, which was uploaded before", file.id)
                return file
            log.info(
                "File %s has the expected name, but its content is not proven; it is uploaded again", file.id
            )
        return None

    def _send(self, upload: Upload, intent: Uploading) -> UploadedFile:
        def send() -> UploadedFile:
            self._ledger.record_upload(upload.key, intent)
            return upload.send()

        def find() -> UploadedFile | None:
            self._files.read(self._clock.monotonic())
            return self._only_one(upload)

        def forget() -> None:
            self._ledger.record_upload(upload.key, intent if intent.earlier else Planned())

        request = Request(f"POST /files of {upload.filename}", send, find, forget)
        return send_once(request, self._clock, self._check_not_stopped)
