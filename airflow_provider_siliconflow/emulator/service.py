"""
State and rules of the emulated service: no HTTP and no event loop.

Every method may be called from any thread. Reading a batch costs the same whatever its size and however many
there are: its state is computed from the clock. Uploads, result files and creations under ``row_error_rate``
read a whole file.
"""

from __future__ import annotations

import calendar
import hmac
import logging
import os
import random
import re
import secrets
import tempfile
import threading
import time
from bisect import bisect_left, insort
from hashlib import blake2b, sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import msgspec

from airflow_provider_siliconflow.emulator.answers import (
    AnswerBook,
    Answerer,
    transient_status,
)
from airflow_provider_siliconflow.emulator.records import BatchRecord, FileRecord, ResultKind
from airflow_provider_siliconflow.emulator.results import ResultStore, write_results
from airflow_provider_siliconflow.emulator.rows import (
    ENDPOINT,
    TooManyLinesError,
    decode_row_name,
    line_offsets,
    scan_file,
)
from airflow_provider_siliconflow.emulator.timeline import FinishOrder, Timeline, counts

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from airflow_provider_siliconflow.emulator.config import EmulatorConfig

log = logging.getLogger(__name__)

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_WINDOW = re.compile(r"(\d{1,4})h")
_DEFAULT_PAGE, _LARGEST_PAGE = 20, 100
_encode = msgspec.json.Encoder().encode
# Not the module's own generator: tests seed that one, and ids must differ between emulators all the same.
_random = random.SystemRandom()


class ServiceError(Exception):
    """
    A refusal of the service.

    :param status: HTTP status.
    :param body: JSON body, an object or a bare string.
    """

    def __init__(self, status: int, body: Any) -> None:
        super().__init__(f"{status} {body}")
        self.status = status
        self.body = body


class _Saved(msgspec.Struct):
    """What outlives a restart beside files and batches."""

    secret: str
    clock_offset: float = 0.0


class EmulatedService:
    """
    An emulated SiliconFlow account.

    :param config: behaviour; replaced as a whole by :meth:`configure`.
    :param storage: folder for files, batches and results.
    :param clock: wall clock in epoch seconds.
    :param persistent: write state beside the files, and read what an earlier run left.
    """

    def __init__(
        self,
        config: EmulatorConfig,
        storage: str | Path,
        clock: Callable[[], float] = time.time,
        *,
        persistent: bool = False,
    ) -> None:
        self.config = config
        #: Origin of the signed result URLs, known once the storage port is bound.
        self.storage_origin = "http://localhost"
        self.authorization_leaks = 0
        book = AnswerBook.read(config.answers) if config.answers is not None else AnswerBook(())
        self._answerer = Answerer(book, config.models)
        self._book = book
        self._clock = clock
        self._persistent = persistent
        self._storage = Path(storage)
        self._lock = threading.RLock()
        self._files: dict[str, FileRecord] = {}
        self._offsets: dict[str, array[int]] = {}
        self._batches: dict[str, BatchRecord] = {}
        self._order: list[tuple[float, int, str]] = []
        self._seq = 0
        self._failed_once: set[tuple[str, str]] = set()
        self._result_ids: dict[str, tuple[str, ResultKind]] = {}
        self._results = ResultStore(self._storage / "results", config.kept_results)
        self._saved = _Saved(secret=secrets.token_hex(16))
        for folder in ("files", "batches", "spool"):
            (self._storage / folder).mkdir(parents=True, exist_ok=True)
        self._clear_leftovers()
        if persistent:
            self._load()

    # -- clock and control ------------------------------------------------------------------------------

    def now(self) -> float:
        """Return the service's wall clock in epoch seconds."""
        return self._clock() + self._saved.clock_offset

    def advance(self, seconds: float) -> None:
        """
        Move the service's clock forward.

        :raises ValueError: the number of seconds is negative.
        """
        if not seconds >= 0:
            raise ValueError(f"the clock can only be moved forward, not by {seconds} seconds")
        with self._lock:
            self._saved.clock_offset += seconds
            self._save_state()

    def configure(self, changes: dict[str, object]) -> None:
        """
        Change settings of the running service; a new speed holds for what is left of every batch.

        :raises ValueError: an unknown setting or a wrong value.
        """
        with self._lock:
            old, self.config = self.config, self.config.changed(changes)
            if "models" in changes:
                self._answerer = Answerer(self._book, self.config.models)
            self._results.kept = self.config.kept_results
            if old.speed != self.config.speed:
                now = self.now()
                for batch in self._batches.values():
                    if not batch.timeline.ended(now):
                        batch.timeline.stretch(old.speed / self.config.speed, now)
                        self._save_batch(batch)

    def force_status(self, batch_id: str, status: str | None) -> dict[str, Any]:
        """
        Show any status; a terminal one also ends the batch. None shows the true status again.

        :raises ServiceError: 404, no such batch.
        """
        with self._lock:
            batch = self._batch(batch_id)
            batch.timeline.show(status, self.now())
            # They were written for another end.
            self._results.forget(batch_id)
            self._save_batch(batch)
            return self._view(batch)

    def seed_foreign_batches(self, count: int, age_seconds: float = 0.0) -> None:
        """Add completed batches of someone else, without results, created ``age_seconds`` ago."""
        with self._lock:
            now = self.now()
            for _ in range(count):
                created = now - age_seconds
                timeline = Timeline.plan(
                    created=created, window=86400.0, queue=0.0, processing=0.0, finalizing=0.0, total=1
                )
                self._seq += 1
                batch = BatchRecord(
                    id=self._new_id("batch_", self._batches),
                    seq=self._seq,
                    request={
                        "input_file_id": "file-foreignxyz",
                        "endpoint": ENDPOINT,
                        "completion_window": "24h",
                    },
                    file_name="foreign.jsonl",
                    window="24h",
                    timeline=timeline,
                    missing_positions=[0],
                    foreign=True,
                )
                self._batches[batch.id] = batch
                insort(self._order, batch.sort_key())

    def state(self, *, batches: bool = True) -> dict[str, Any]:
        """Return files and batches, each batch with the request that created it."""
        with self._lock:
            state: dict[str, Any] = {
                "now": self.now(),
                "authorization_leaks": self.authorization_leaks,
                "files": [self._listed_file(file) for file in self._files.values() if not file.deleted],
                "batch_count": len(self._batches),
            }
            if batches:
                state["batches"] = [
                    {**self._view(self._batches[key[2]]), "request": self._batches[key[2]].request}
                    for key in self._order
                ]
            return state

    # -- files ------------------------------------------------------------------------------------------

    def spool_path(self) -> Path:
        """Return a path on the same disk as the files, for an upload that is still arriving."""
        return self._storage / "spool" / secrets.token_hex(8)

    def add_file(
        self, filename: str, purpose: str, source: str | Path | Iterable[bytes], *, take: bool = False
    ) -> dict[str, Any]:
        """
        Store an upload and check its lines.

        :param source: a path, or the content in chunks.
        :param take: move the file at ``source`` in place of copying it.
        :return: the answer of ``POST /files``.
        :raises ServiceError: 400 for a wrong purpose or a file over a limit. Wrong lines are no error here:
            they fail the batch.
        """
        spooled = Path(source) if take and isinstance(source, (str, Path)) else self._spool(source)
        try:
            if purpose != "batch":
                raise invalid_parameter(f"purpose must be batch, not {purpose!r}.")
            size = spooled.stat().st_size
            if size > self.config.max_file_bytes:
                raise self.file_too_large()
            try:
                scan, offsets = scan_file(spooled, self.config.max_file_lines)
            except TooManyLinesError:
                limit = self.config.max_file_lines
                raise invalid_parameter(f"The file has more than {limit} lines.") from None
            with self._lock:
                file = FileRecord(
                    id=self._new_id("file-", self._files),
                    bytes=size,
                    created=self.now(),
                    filename=filename,
                    purpose=purpose,
                    scan=scan,
                )
                os.replace(spooled, self._content_path(file.id))
                self._files[file.id] = file
                self._offsets[file.id] = offsets
                self._save(self._storage / "files" / f"{file.id}.json", file)
        finally:
            spooled.unlink(missing_ok=True)
        return self._enveloped(self._file_object(file))

    def file_too_large(self) -> ServiceError:
        """Return the refusal of an upload that is over the limit."""
        return invalid_parameter(f"The file is larger than {self.config.max_file_bytes} bytes.")

    def list_files(self, purpose: str | None = None, limit: str | int | None = None) -> dict[str, Any]:
        """Return the answer of ``GET /files``, newest first. There is no cursor."""
        if purpose is None:
            raise invalid_parameter("purpose is required.")
        with self._lock:
            found = [file for file in self._files.values() if file.purpose == purpose and not file.deleted]
        found.reverse()
        if limit is not None:
            found = found[: _integer(limit, "limit")]
        listed = [self._listed_file(file) for file in found]
        if self.config.flat_files:
            return {"object": "list", "data": listed}
        return self._enveloped({"data": listed, "object": "file"})

    def get_file(self, file_id: str) -> dict[str, Any]:
        """Return one file, without its content."""
        with self._lock:
            return self._enveloped(self._file_object(self._file(file_id)))

    def delete_file(self, file_id: str) -> dict[str, Any]:
        """Delete a file for its owner; batches that were created over it go on."""
        with self._lock:
            file = self._file(file_id)
            file.deleted = True
            self._save(self._storage / "files" / f"{file.id}.json", file)
        return self._enveloped({"id": file_id, "object": "file", "deleted": True})

    def open_content(self, file_id: str) -> Path:
        """Return the path behind ``GET /files/{id}/content``: an input file, or results kept as a file."""
        with self._lock:
            result = self._result_ids.get(file_id)
            if result is None:
                return self._content_path(self._file(file_id).id)
        return self.open_results(*result)

    # -- batches ----------------------------------------------------------------------------------------

    def creation_is_slow(self, request: object) -> bool:
        """Return whether :meth:`create_batch` reads a file, so that no event loop should wait for it."""
        return self.config.row_error_rate > 0 and isinstance(request, dict)

    def create_batch(self, request: object) -> dict[str, Any]:
        """
        Create a batch.

        :param request: the JSON body of ``POST /batches``.
        :return: the batch object.
        :raises ServiceError: 400, 402 or 404, as the real service refuses.
        """
        hours, replace = _check_creation(request)
        assert isinstance(request, dict)
        with self._lock:
            file = self._file(request["input_file_id"])
        model = replace.get("model")
        for name in [model] if model is not None else file.scan.models:
            if name not in self.config.models:
                raise ServiceError(
                    400,
                    {
                        "code": 20012,
                        "message": "Model does not exist. Please check it carefully.",
                        "data": None,
                    },
                )
        if self.config.balance <= 0:
            raise ServiceError(402, {"code": 30001, "message": "Sorry, your account balance is insufficient"})
        errors = list(file.scan.errors)
        if model is None and file.scan.line_without_model is not None:
            errors.append(
                f"Line {file.scan.line_without_model}: no model, neither in the line nor in replace."
            )
        transient = [] if errors else list(self._transient_failures(file, model))

        config = self.config
        with self._lock:
            now = self.now()
            self._seq += 1
            total = file.scan.line_count
            batch = BatchRecord(
                id=self._new_id("batch_", self._batches),
                seq=self._seq,
                request=request,
                file_name=file.filename,
                window=request["completion_window"],
                timeline=Timeline.plan(
                    created=now,
                    window=hours * 3600 / config.speed,
                    queue=config.queue_seconds / config.speed,
                    processing=total / config.rows_per_second / config.speed,
                    finalizing=config.finalizing_seconds / config.speed,
                    total=total,
                ),
                outcomes={},
                first_failures=[],
            )
            if errors:
                batch.errors = errors
                batch.timeline.show("failed", now)
            else:
                self._decide_outcomes(batch, file, model, transient)
            self._batches[batch.id] = batch
            insort(self._order, batch.sort_key())
            self._save_batch(batch)
            return self._view(batch)

    def get_batch(self, batch_id: str) -> dict[str, Any]:
        """Return a batch as it is now, with freshly signed result URLs."""
        with self._lock:
            return self._view(self._batch(batch_id))

    def list_batches(self, limit: str | int | None = None, after: str | None = None) -> dict[str, Any]:
        """Return one page of batches, newest first."""
        size = _DEFAULT_PAGE if limit is None else min(_integer(limit, "limit"), _LARGEST_PAGE)
        with self._lock:
            config, now = self.config, self.now()
            place = len(self._order)
            if after and not config.ignore_cursor:
                place = bisect_left(self._order, self._batch(after).sort_key())
            page: list[BatchRecord] = []
            more = False
            while place > 0:
                place -= 1
                batch = self._batches[self._order[place][2]]
                if now - batch.timeline.created < config.list_lag_seconds:
                    continue
                if len(page) == size:
                    more = True
                    break
                page.append(batch)
            data = [{**self._view(batch), "file_name": batch.file_name} for batch in page]
        return {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": more or (config.ignore_cursor and bool(data)),
        }

    def cancel_batch(self, batch_id: str) -> dict[str, Any]:
        """
        Ask for a cancellation.

        :return: the batch, still with its old status, as the real service may answer.
        :raises ServiceError: 400 when the batch has ended.
        """
        with self._lock:
            batch, now = self._batch(batch_id), self.now()
            timeline = batch.timeline
            if timeline.ended(now):
                raise invalid_parameter(f"Batch {batch_id} can not be cancelled: it is {timeline.fate}.")
            before = self._view(batch)
            if timeline.cancel_at is None:
                timeline.cancel(now, self.config.cancelling_seconds / self.config.speed)
                self._save_batch(batch)
            return before

    # -- results ----------------------------------------------------------------------------------------

    def open_results(self, batch_id: str, kind: ResultKind) -> Path:
        """
        Return the path of a result file, writing it if it is not on disk.

        The bytes and the time of modification are always the same for a batch, so a download can be resumed
        even after the file was dropped and written again.

        :raises ServiceError: 404 when the batch has no such file.
        """
        with self._lock:
            batch = self._batch(batch_id)
            if kind not in self._result_kinds(batch, self.now()):
                raise not_found()
        # Storage makes the entity tag from size and time: the same, then, when the file is written again.
        modified = int(batch.timeline.fate_at)
        return self._results.get(
            batch_id, kind, lambda output, error: self._write_results(batch, output, error), modified
        )

    def signed_url(self, batch_id: str, kind: ResultKind) -> str:
        """Return a storage URL that works for ``url_ttl_seconds`` from now."""
        path = f"/results/{batch_id}/{kind}.jsonl"
        query = {
            "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
            # Rounded up, so that a URL lives at least as long as it says.
            "X-Amz-Date": time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(-(-self.now() // 1))),
            "X-Amz-Expires": str(int(-(-self.config.url_ttl_seconds // 1))),
        }
        query["X-Amz-Signature"] = self._signature(path, query["X-Amz-Date"], query["X-Amz-Expires"])
        return f"{self.storage_origin}{path}?{urlencode(query)}"

    def check_signature(self, path: str, query: Mapping[str, str]) -> None:
        """
        Check a storage request.

        :raises ServiceError: 403, its body ``ExpiredToken`` or ``SignatureDoesNotMatch``.
        """
        date, expires = query.get("X-Amz-Date", ""), query.get("X-Amz-Expires", "")
        given = query.get("X-Amz-Signature", "")
        if not hmac.compare_digest(given.encode(), self._signature(path, date, expires).encode()):
            raise ServiceError(403, "SignatureDoesNotMatch")
        signed = time.strptime(date + "+0000", "%Y%m%dT%H%M%SZ%z")
        if self.now() > _epoch(signed) + float(expires):
            raise ServiceError(403, "ExpiredToken")

    # -- account ----------------------------------------------------------------------------------------

    def check_key(self, key: str | None) -> None:
        """
        Check an API key; None stands for a request without one.

        :raises ServiceError: 401.
        """
        if not key:
            raise ServiceError(401, "Invalid token")
        accepted = key in self.config.keys if self.config.keys else not key.startswith("sk-invalid")
        if not accepted:
            raise ServiceError(401, "Api key is invalid")

    def user_info(self) -> dict[str, Any]:
        """Return the answer of ``GET /user/info``."""
        charge = self.config.balance
        data = {
            "id": "emulated-user",
            "name": "emulator",
            "image": "",
            "email": "",
            "isAdmin": False,
            "balance": "0.00",
            "status": "normal",
            "introduction": "",
            "role": "",
            "chargeBalance": f"{charge:.2f}",
            "totalBalance": f"{charge:.2f}",
        }
        return {"code": 20000, "message": "OK", "status": True, "data": data}

    def models(self, sub_type: str | None = None) -> dict[str, Any]:
        """Return the answer of ``GET /models``; the account has chat models only."""
        names = self.config.models if sub_type in (None, "", "chat") else ()
        return {
            "object": "list",
            "data": [{"id": name, "object": "model", "created": 0, "owned_by": ""} for name in names],
        }

    # -- inside -----------------------------------------------------------------------------------------

    def _file(self, file_id: object) -> FileRecord:
        file = self._files.get(file_id) if isinstance(file_id, str) else None
        if file is None or file.deleted:
            raise ServiceError(
                404, {"code": 20015, "message": f"File {file_id} does not exist.", "data": None}
            )
        return file

    def _batch(self, batch_id: str) -> BatchRecord:
        batch = self._batches.get(batch_id)
        if batch is None:
            raise ServiceError(
                404, {"code": 20015, "message": f"Batch {batch_id} does not exist.", "data": None}
            )
        return batch

    def _view(self, batch: BatchRecord) -> dict[str, Any]:
        now = self.now()
        timeline = batch.timeline
        request = batch.request
        results: dict[str, str | None] = {"output": None, "error": None}
        if now >= timeline.fate_at + self.config.late_output_seconds:
            for kind in self._result_kinds(batch, now):
                results[kind] = self._result_reference(batch.id, kind)
        return {
            "id": batch.id,
            "object": "batch",
            "endpoint": ENDPOINT,
            "errors": batch.errors,
            "input_file_id": request["input_file_id"],
            "completion_window": batch.window,
            "status": timeline.status(now),
            "output_file_id": results["output"],
            "error_file_id": results["error"],
            **timeline.timestamps(now),
            "request_counts": counts(timeline, batch.failed_positions, now),
            "metadata": request.get("metadata"),
        }

    def _result_kinds(self, batch: BatchRecord, now: float) -> list[ResultKind]:
        timeline = batch.timeline
        if not timeline.ended(now) or timeline.fate == "failed":
            return []
        done = timeline.rows_done(now)
        failed = bisect_left(batch.failed_positions, done)
        missing = bisect_left(batch.missing_positions, done)
        kinds: list[ResultKind] = []
        if done > failed + missing:
            kinds.append("output")
        if failed or (timeline.fate == "expired" and done < timeline.total):
            kinds.append("error")
        return kinds

    def _result_reference(self, batch_id: str, kind: ResultKind) -> str:
        if not self.config.results_as_file_ids:
            return self.signed_url(batch_id, kind)
        digest = blake2b(f"{batch_id}/{kind}".encode(), digest_size=10).digest()
        file_id = "file-" + "".join(_LETTERS[byte % 26] for byte in digest)
        self._result_ids[file_id] = (batch_id, kind)
        return file_id

    def _signature(self, path: str, date: str, expires: str) -> str:
        return hmac.new(
            self._saved.secret.encode(), f"{path}\n{date}\n{expires}".encode(), sha256
        ).hexdigest()

    def _transient_failures(self, file: FileRecord, model: str | None) -> Iterator[tuple[int, str, str, str]]:
        rate = self.config.row_error_rate
        if rate <= 0:
            return
        with self._content_path(file.id).open("rb", buffering=1 << 20) as lines:
            for row, line in enumerate(lines):
                name = decode_row_name(line)
                used = model or name.body.model or ""
                status = transient_status(name.custom_id, used, rate)
                if status is not None:
                    yield row, name.custom_id, used, str(status)

    def _decide_outcomes(
        self,
        batch: BatchRecord,
        file: FileRecord,
        model: str | None,
        transient: list[tuple[int, str, str, str]],
    ) -> None:
        """Choose the fate of special rows now, since "the first time" goes by the order of creation."""
        candidates = list(transient)
        for marked in file.scan.marked:
            for marker in marked.markers:
                name, _, value = marker.partition("=")
                if name == "error" or marker in ("missing", "expire"):
                    batch.outcomes.setdefault(marked.row, value or marker)
                elif name == "once" or marker == "missing-once":
                    candidates.append(
                        (marked.row, marked.custom_id, model or marked.model or "", value or "missing")
                    )
        for row, custom_id, used, outcome in candidates:
            if (custom_id, used) not in self._failed_once:
                batch.outcomes.setdefault(row, outcome)
                batch.first_failures.append((custom_id, used))
        self._failed_once.update(batch.first_failures)
        order = FinishOrder(batch.timeline.total)
        for row, outcome in batch.outcomes.items():
            positions = batch.missing_positions if outcome == "missing" else batch.failed_positions
            positions.append(order.position_of(row))
        batch.failed_positions.sort()
        batch.missing_positions.sort()

    def _write_results(self, batch: BatchRecord, output: Path, error: Path) -> None:
        file_id = batch.request["input_file_id"]
        content = self._content_path(file_id)
        offsets = self._offsets.get(file_id)
        if offsets is None:
            offsets = self._offsets[file_id] = line_offsets(content)
        write_results(batch, content, offsets, self._answerer, output, error)

    def _enveloped(self, data: dict[str, Any]) -> dict[str, Any]:
        if self.config.flat_files:
            return data
        return {"code": 20000, "message": "Ok", "status": True, "data": data}

    def _file_object(self, file: FileRecord) -> dict[str, Any]:
        created = "created_at" if self.config.flat_files else "createdAt"
        return {
            "id": file.id,
            "object": "file",
            "bytes": file.bytes,
            created: int(file.created),
            "filename": file.filename,
            "purpose": file.purpose,
        }

    def _listed_file(self, file: FileRecord) -> dict[str, Any]:
        return {
            "id": file.id,
            "object": "file",
            "bytes": file.bytes,
            "created_at": int(file.created),
            "filename": file.filename,
            "purpose": file.purpose,
            "line_count": file.scan.line_count,
        }

    def _content_path(self, file_id: str) -> Path:
        return self._storage / "files" / f"{file_id}.jsonl"

    @staticmethod
    def _new_id(prefix: str, taken: Mapping[str, object]) -> str:
        while True:
            new = prefix + "".join(_random.choices(_LETTERS, k=10))
            if new not in taken:
                return new

    def _spool(self, source: str | Path | Iterable[bytes]) -> Path:
        path = self.spool_path()
        with path.open("wb") as spooled:
            if isinstance(source, (str, Path)):
                with open(source, "rb") as original:
                    while chunk := original.read(1 << 20):
                        spooled.write(chunk)
            else:
                spooled.writelines(source)
        return path

    # -- on disk ----------------------------------------------------------------------------------------

    def _clear_leftovers(self) -> None:
        for path in (self._storage / "spool").iterdir():
            path.unlink()

    def _save_batch(self, batch: BatchRecord) -> None:
        if not batch.foreign:
            self._save(self._storage / "batches" / f"{batch.id}.json", batch)

    def _save_state(self) -> None:
        self._save(self._storage / "state.json", self._saved)

    def _save(self, path: Path, record: msgspec.Struct) -> None:
        if not self._persistent:
            return
        with tempfile.NamedTemporaryFile("wb", dir=self._storage / "spool", delete=False) as part:
            part.write(_encode(record))
        os.replace(part.name, path)

    def _load(self) -> None:
        state = self._storage / "state.json"
        if state.exists():
            self._saved = msgspec.json.decode(state.read_bytes(), type=_Saved)
        self._save_state()
        for path in sorted((self._storage / "files").glob("*.json")):
            file = msgspec.json.decode(path.read_bytes(), type=FileRecord)
            self._files[file.id] = file
        self._files = dict(sorted(self._files.items(), key=lambda item: item[1].created))
        for path in (self._storage / "batches").glob("*.json"):
            batch = msgspec.json.decode(path.read_bytes(), type=BatchRecord)
            self._batches[batch.id] = batch
            insort(self._order, batch.sort_key())
            self._seq = max(self._seq, batch.seq)
            self._failed_once.update(batch.first_failures)
        if self._files or self._batches:
            log.info("Found %d files and %d batches of an earlier run", len(self._files), len(self._batches))


def invalid_parameter(message: str) -> ServiceError:
    """Return the refusal of a request with a wrong parameter."""
    return ServiceError(400, {"code": 20015, "message": message, "data": None})


def not_found() -> ServiceError:
    """Return the refusal of a path that does not exist."""
    return ServiceError(404, "404 page not found")


def _check_creation(request: object) -> tuple[int, dict[str, Any]]:
    """Return the completion window in hours and the ``replace`` object of a valid request."""
    if not isinstance(request, dict):
        raise invalid_parameter("The body must be a JSON object.")
    for name in ("input_file_id", "endpoint", "completion_window"):
        if not isinstance(request.get(name), str) or not request[name]:
            raise invalid_parameter(f"{name} is required and must be a string.")
    if request["endpoint"] != ENDPOINT:
        raise invalid_parameter(f"endpoint must be {ENDPOINT}.")
    window = _WINDOW.fullmatch(request["completion_window"])
    if window is None or not 24 <= int(window[1]) <= 336:
        raise invalid_parameter("completion_window must lie between 24h and 336h.")
    _check_metadata(request.get("metadata"))
    replace = request.get("replace")
    if replace is None:
        return int(window[1]), {}
    if not isinstance(replace, dict):
        raise invalid_parameter("replace must be an object.")
    if not isinstance(replace.get("model", ""), str):
        raise invalid_parameter("replace.model must be a string.")
    return int(window[1]), replace


def _check_metadata(metadata: object) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict):
        raise invalid_parameter("metadata must be an object.")
    if len(metadata) > 16:
        raise invalid_parameter("metadata can have at most 16 pairs.")
    for key, value in metadata.items():
        if len(key) > 64:
            raise invalid_parameter("A key of metadata can have at most 64 characters.")
        if not isinstance(value, str) or len(value) > 512:
            raise invalid_parameter("A value of metadata must be a string of at most 512 characters.")


def _integer(value: str | int, name: str) -> int:
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise invalid_parameter(f"{name} must be a number above 0.")
    return number


def _epoch(moment: time.struct_time) -> float:
    return calendar.timegm(moment)
