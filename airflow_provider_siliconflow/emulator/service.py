"""
The emulated account, without HTTP or an event loop.

Every method may be called from any thread. The cost of reading a batch depends neither on its size nor on the number of
batches, since its state is computed from the clock. Uploads, result files and creations under ``row_error_rate`` read a
whole file.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from bisect import insort
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_provider_siliconflow.emulator import account
from airflow_provider_siliconflow.emulator.answer_book import AnswerBook
from airflow_provider_siliconflow.emulator.answers import Answerer
from airflow_provider_siliconflow.emulator.bill import BatchMeter, Bill, make_bill
from airflow_provider_siliconflow.emulator.creation import (
    RowFates,
    Special,
    check_creation,
    check_models,
    needs_rows,
    special_rows,
)
from airflow_provider_siliconflow.emulator.disk import Disk
from airflow_provider_siliconflow.emulator.listing import list_page
from airflow_provider_siliconflow.emulator.live import LiveDesk
from airflow_provider_siliconflow.emulator.records import (
    LETTERS,
    BatchRecord,
    ResultKind,
    SavedState,
    new_id,
)
from airflow_provider_siliconflow.emulator.refusals import (
    ServiceError,
    default_refusal,
    invalid_parameter,
    not_found,
    positive_number,
    unknown_object,
)
from airflow_provider_siliconflow.emulator.response_format import SchemaBook
from airflow_provider_siliconflow.emulator.results import ResultStore, write_results
from airflow_provider_siliconflow.emulator.signing import check_query, signed_query
from airflow_provider_siliconflow.emulator.timeline import Timeline
from airflow_provider_siliconflow.emulator.uploads import Uploads
from airflow_provider_siliconflow.emulator.views import batch_view, result_kinds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from airflow_provider_siliconflow.emulator.answers import Usage
    from airflow_provider_siliconflow.emulator.config import EmulatorConfig, MetadataForm

__all__ = ["EmulatedService", "ServiceError"]

log = logging.getLogger(__name__)

_DEFAULT_PAGE, _LARGEST_PAGE = 20, 100


class EmulatedService:
    """
    An emulated SiliconFlow account.

    :param config: behaviour; replaced as a whole by :meth:`configure`.
    :param storage: folder for files, batches and results.
    :param clock: wall clock in epoch seconds.
    :param persistent: write state to the folder, and read that of an earlier run.
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
        self._book = AnswerBook.read(config.answers) if config.answers is not None else AnswerBook()
        self._schemas = SchemaBook()
        self._answerer = Answerer(self._book, config.models, self._schemas)
        self._clock = clock
        self._lock = threading.RLock()
        self._disk = Disk(Path(storage), persistent=persistent)
        self._uploads = Uploads(self._disk, lambda: self.config, self.now, self._lock, self._schemas.problem)
        self._results = ResultStore(self._disk.results, config.kept_results)
        self._batches: dict[str, BatchRecord] = {}
        self._order: list[tuple[float, int, str]] = []
        self._seq = 0
        #: The rows that are asked live. Not kept across restarts.
        self.live = LiveDesk(lambda: self.config, lambda: self._answerer, self._schemas.problem, self.now)
        self._fates = RowFates()
        self._meters: dict[str, BatchMeter] = {}
        self._result_ids: dict[str, tuple[str, ResultKind]] = {}
        self._saved = SavedState(secret=secrets.token_hex(16))
        if persistent:
            self._load()

    # -- clock and control ------------------------------------------------------------------------------

    def now(self) -> float:
        """Return the service's wall clock in epoch seconds."""
        return self._clock() + self._saved.clock_offset

    def stated_now(self) -> float:
        """Return the current time as the service states it, with ``clock_offset_seconds``."""
        return self.now() + self.config.clock_offset_seconds

    def advance(self, seconds: float) -> None:
        """
        Move the service's clock forward.

        :raises ValueError: the number of seconds is negative.
        """
        if not seconds >= 0:
            raise ValueError(f"the clock can only be moved forward, not by {seconds} seconds")
        with self._lock:
            self._saved.clock_offset += seconds
            self._disk.save_state(self._saved)

    def configure(self, changes: Mapping[str, object]) -> None:
        """
        Change settings of the running service; a new speed applies to the rest of every batch.

        :raises ValueError: an unknown setting or a wrong value.
        """
        with self._lock:
            old, self.config = self.config, self.config.changed(changes)
            if "models" in changes:
                self._answerer = Answerer(self._book, self.config.models, self._schemas)
            self._results.kept = self.config.kept_results
            if old.speed != self.config.speed:
                now = self.now()
                for batch in self._batches.values():
                    if not batch.timeline.ended(now):
                        batch.timeline.stretch(old.speed / self.config.speed, now)
                        self._disk.save_batch(batch)

    def force_status(self, batch_id: str, status: str | None) -> dict[str, Any]:
        """
        Show any status; a terminal one also ends the batch. None shows the real status again.

        :raises ServiceError: 404, no such batch.
        """
        with self._lock:
            batch = self._batch(batch_id)
            batch.timeline.show(status, self.now())
            # They were written for another end.
            self._results.forget(batch_id)
            self._disk.save_batch(batch)
            return self._view(batch)

    def seed_foreign_batches(self, count: int, age_seconds: float = 0.0) -> None:
        """
        Add completed batches of another user of the account, without results, one second apart.

        :param count: how many.
        :param age_seconds: age of the newest one.
        """
        with self._lock:
            newest = self.now() - age_seconds
            for younger in reversed(range(count)):
                batch_id = new_id("batch_", self._batches)
                self._add(BatchRecord.of_another_user(batch_id, self._next_seq(), newest - younger))

    def cancel_on_console(self, batch_id: str, *, at_once: bool = False) -> dict[str, Any]:
        """
        Cancel a batch as a user does on the console: no API call, and the rows that are done are kept.

        :param at_once: skip ``cancelling``; otherwise it takes ``cancelling_seconds``, as by an API call.
        :return: the batch after that.
        :raises ServiceError: 404 no such batch, 400 it has ended.
        """
        with self._lock:
            batch = self._batch(batch_id)
            self._cancel(batch, 0.0 if at_once else self.config.cancelling_seconds / self.config.speed)
            return self._view(batch)

    def forget_file(self, file_id: str, *, still_listed: bool = False) -> None:
        """
        Lose an upload: its id is unknown from now on. Batches that were created over it continue.

        :param still_listed: ``GET /files`` shows it nevertheless.
        :raises ServiceError: 404, no such file.
        """
        self._uploads.forget(file_id, still_listed=still_listed)

    def state(self, *, batches: bool = True) -> dict[str, Any]:
        """Return files and batches, each batch with the request that created it."""
        with self._lock:
            state: dict[str, Any] = {
                "now": self.now(),
                "authorization_leaks": self.authorization_leaks,
                "files": self._uploads.all_listed(),
                "batch_count": len(self._batches),
            }
            if batches:
                state["batches"] = [
                    {**self._view(self._batches[key[2]], "object"), "request": self._batches[key[2]].request}
                    for key in self._order
                ]
            return state

    # -- files ------------------------------------------------------------------------------------------

    def spool_path(self) -> Path:
        """Return a path on the same disk as the files, for an upload that is still arriving."""
        return self._disk.spool_path()

    def add_file(
        self, filename: str, purpose: str, source: str | Path | Iterable[bytes], *, take: bool = False
    ) -> dict[str, Any]:
        """
        Store an upload and check its lines.

        :param source: a path, or the content in chunks.
        :param take: move the file at ``source`` instead of copying it.
        :return: the answer of ``POST /files``.
        :raises ServiceError: 400 for a wrong purpose or a file over a limit. Invalid lines are not an error here;
            they fail the batch.
        """
        return self._uploads.add(filename, purpose, source, take=take)

    def file_too_large(self) -> ServiceError:
        """Return the refusal of an upload that is over the limit."""
        return self._uploads.too_large()

    def list_files(self, purpose: str | None = None, limit: str | int | None = None) -> dict[str, Any]:
        """Return the answer of ``GET /files``, newest first. There is no cursor."""
        return self._uploads.listing(purpose, limit)

    def get_file(self, file_id: str) -> dict[str, Any]:
        """Return one file, without its content."""
        return self._uploads.get(file_id)

    def delete_file(self, file_id: str) -> dict[str, Any]:
        """Delete a file for its owner; batches that were created over it continue."""
        return self._uploads.delete(file_id)

    def open_content(self, file_id: str) -> Path:
        """Return the path for ``GET /files/{id}/content``: an input file, or results kept as a file."""
        with self._lock:
            result = self._result_ids.get(file_id)
            if result is None:
                return self._uploads.content_path(self._uploads.find(file_id).id)
        return self.open_results(*result)

    # -- batches ----------------------------------------------------------------------------------------

    def creation_is_slow(self, request: object) -> bool:
        """Return whether :meth:`create_batch` reads a file, so that an event loop should not wait for it."""
        if not isinstance(request, dict):
            return False
        try:
            file = self._uploads.find(request.get("input_file_id"))
        except ServiceError:
            return False
        replace = request.get("replace")
        return needs_rows(file.scan, replace if isinstance(replace, dict) else {}, self.config)

    def create_batch(self, request: object) -> dict[str, Any]:
        """
        Create a batch.

        :param request: the JSON body of ``POST /batches``.
        :return: the batch object.
        :raises ServiceError: 400, 402, 404 or 429, as by the real service.
        """
        hours, replace = check_creation(request)
        assert isinstance(request, dict)
        with self._lock:
            file = self._uploads.find(request["input_file_id"], self.config.missing_file_status)
        model = replace.get("model")
        check_models(file.scan, model, self.config)
        problem = self._schemas.problem(replace.get("response_format"))
        if problem is not None:
            raise invalid_parameter(f"replace.{problem}")
        if self.config.balance <= 0:
            raise default_refusal(402)
        errors = list(file.scan.errors)
        if model is None and file.scan.line_without_model is not None:
            errors.append(f"Line {file.scan.line_without_model}: neither the line nor replace names a model.")
        config = self.config
        special: list[Special] = []
        if not errors and needs_rows(file.scan, replace, config):
            special = list(special_rows(self._uploads.content_path(file.id), replace, config))

        with self._lock:
            now = self.now()
            self._check_room(now)
            total = file.scan.line_count
            batch = BatchRecord(
                id=new_id("batch_", self._batches),
                seq=self._next_seq(),
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
                flaws={},
                first_flaws=[],
                cached_share=config.cached_share,
                thinking_tokens=config.thinking_tokens,
            )
            if errors:
                batch.errors = errors
                batch.timeline.show("failed", now)
            else:
                self._fates.decide(batch, file, model, special, config)
            self._add(batch)
            self._disk.save_batch(batch)
            return self._view(batch)

    def get_batch(self, batch_id: str) -> dict[str, Any]:
        """Return a batch as it is now, with freshly signed result URLs."""
        with self._lock:
            return self._view(self._batch(batch_id))

    def list_batches(self, limit: str | int | None = None, after: str | None = None) -> dict[str, Any]:
        """Return one page of batches, newest first."""
        size = _DEFAULT_PAGE if limit is None else min(positive_number(limit, "limit"), _LARGEST_PAGE)
        with self._lock:
            config = self.config
            page, more = list_page(self._order, self._batches, config, now=self.now(), size=size, after=after)
            data = [
                {**self._view(batch, config.list_metadata), "file_name": batch.file_name} for batch in page
            ]
        return {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": more,
        }

    def cancel_batch(self, batch_id: str) -> dict[str, Any]:
        """
        Request a cancellation.

        :return: the batch, still with its old status, as the real service may answer.
        :raises ServiceError: 400 if the batch has ended.
        """
        with self._lock:
            batch = self._batch(batch_id)
            before = self._view(batch)
            self._cancel(batch, self.config.cancelling_seconds / self.config.speed)
            return before

    # -- results ----------------------------------------------------------------------------------------

    def open_results(self, batch_id: str, kind: ResultKind) -> Path:
        """
        Return the path of a result file, writing it if it is not on disk.

        The bytes and modification time of a complete file are always the same for a batch, so a download can be resumed
        even after the file was dropped and written again.

        :raises ServiceError: 404 if the batch has no such file.
        """
        with self._lock:
            batch = self._batch(batch_id)
            now = self.now()
            if kind not in result_kinds(batch, now):
                raise not_found()
            partial = kind == "output" and now < batch.timeline.fate_at + self.config.partial_output_seconds
        # The storage computes the entity tag from size and time, so it is the same if the file is written again.
        modified = int(batch.timeline.fate_at)
        get = self._results.get_half if partial else self._results.get
        return get(batch_id, kind, lambda output, error: self._write_results(batch, output, error), modified)

    def signed_url(self, batch_id: str, kind: ResultKind) -> str:
        """Return a storage URL that works for ``url_ttl_seconds`` from now."""
        path = f"/results/{batch_id}/{kind}.jsonl"
        query = signed_query(self._saved.secret, path, self.stated_now(), self.config.url_ttl_seconds)
        return f"{self.storage_origin}{path}?{query}"

    def check_signature(self, path: str, query: Mapping[str, str]) -> None:
        """
        Check a storage request.

        :raises ServiceError: 403, its body ``ExpiredToken`` or ``SignatureDoesNotMatch``.
        """
        check_query(self._saved.secret, path, query, self.stated_now())

    # -- account ----------------------------------------------------------------------------------------

    def check_key(self, key: str | None) -> None:
        """
        Check an API key; None stands for a request without one.

        :raises ServiceError: 401.
        """
        account.check_key(key, self.config)

    def user_info(self) -> dict[str, Any]:
        """Return the answer of ``GET /user/info``."""
        return account.user_info(self.config)

    def models(self, sub_type: str | None = None) -> dict[str, Any]:
        """Return the answer of ``GET /models``; the account has chat models only."""
        return account.models(self.config, sub_type)

    def bill(self) -> Bill:
        """
        Return what the rows that are done by now cost, in batches and live, at the prices in force.

        A row that fails, expires or is in neither file costs nothing; one that comes twice is paid once. The first
        call makes every answer again, so no event loop should wait for it.
        """
        with self._lock:
            now, answerer = self.now(), self._answerer
            running = [
                (batch, batch.timeline.rows_done(now))
                for batch in self._batches.values()
                if not batch.foreign
            ]
        used: dict[str, Usage] = {}
        for batch, done in running:
            file_id = batch.request["input_file_id"]
            with self._lock:
                meter = self._meters.get(batch.id)
                if meter is None:
                    meter = self._meters[batch.id] = BatchMeter(batch, self._uploads.content_path(file_id))
            if done == 0:
                continue
            for model, usage in meter.read(done, self._uploads.offsets(file_id), answerer).items():
                used[model] = used[model] + usage if model in used else usage
        return make_bill(used, self.live.counts(), self.config.prices)

    # -- inside -----------------------------------------------------------------------------------------

    def _batch(self, batch_id: str) -> BatchRecord:
        batch = self._batches.get(batch_id)
        if batch is None:
            raise unknown_object("Batch", batch_id)
        return batch

    def _check_room(self, now: float) -> None:
        limit = self.config.max_open_batches
        if limit and sum(not batch.timeline.ended(now) for batch in self._batches.values()) >= limit:
            raise default_refusal(429)

    def _cancel(self, batch: BatchRecord, seconds: float) -> None:
        timeline, now = batch.timeline, self.now()
        if timeline.ended(now):
            raise invalid_parameter(f"Batch {batch.id} cannot be cancelled: it is {timeline.fate}.")
        if timeline.cancel_at is None:
            timeline.cancel(now, seconds)
            self._disk.save_batch(batch)

    def _next_seq(self) -> int:
        self._seq += 1
        return self._seq

    def _add(self, batch: BatchRecord) -> None:
        self._batches[batch.id] = batch
        insort(self._order, batch.sort_key())

    def _view(self, batch: BatchRecord, metadata: MetadataForm | None = None) -> dict[str, Any]:
        form = metadata or self.config.batch_metadata
        return batch_view(batch, self.now(), self.config, self._result_reference, form)

    def _result_reference(self, batch_id: str, kind: ResultKind) -> str:
        if not self.config.results_as_file_ids:
            return self.signed_url(batch_id, kind)
        digest = blake2b(f"{batch_id}/{kind}".encode(), digest_size=10).digest()
        file_id = "file-" + "".join(LETTERS[byte % 26] for byte in digest)
        self._result_ids[file_id] = (batch_id, kind)
        return file_id

    def _write_results(self, batch: BatchRecord, output: Path, error: Path) -> None:
        file_id = batch.request["input_file_id"]
        content, offsets = self._uploads.content_path(file_id), self._uploads.offsets(file_id)
        write_results(batch, content, offsets, self._answerer, output, error)

    def _load(self) -> None:
        self._saved = self._disk.read_state() or self._saved
        self._disk.save_state(self._saved)
        for batch in self._disk.read_batches():
            self._add(batch)
            self._seq = max(self._seq, batch.seq)
            self._fates.remember(batch)
        if self._uploads or self._batches:
            log.info(
                "Found %d files and %d batches of an earlier run", len(self._uploads), len(self._batches)
            )
