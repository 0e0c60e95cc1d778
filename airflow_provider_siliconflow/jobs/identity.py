"""
The identity of a piece of work, and the proof that a batch belongs to it.

A batch carries its identity in its ``metadata``, an uploaded file in its name, so that a later try finds what an
earlier one paid for without any state of its own. Anybody with access to the account can copy both, so neither is proof
by itself: see :func:`prove`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import PurePosixPath
from typing import Any

from airflow_provider_siliconflow.api import arguments
from airflow_provider_siliconflow.api.models import Batch, UploadedFile

#: Metadata keys of the identity, of the readable name, of the task instance since its last manual clear, of the
#: deployment, and of the start of the run.
WORK_KEY, WORK_LABEL, WORK_SUBMITTER, WORK_DEPLOYMENT, WORK_RUN = arguments.IDENTITY_KEYS

#: How to get a new batch although an earlier one may exist; for messages.
SUBMIT_ANEW = "a manual clear of the task with on_clear='resubmit' submits a new batch"


@dataclass(frozen=True, slots=True)
class Submitter:
    """
    Who submits: one task instance, in one generation of its tries.

    :param generation: part of the identity of all work. It increases if a manual clear is to submit again, and stays
        the same over automatic retries, and over clears that reuse the work.
    :param deployment_id: ``[siliconflow] deployment_id``. Without it, two Airflow deployments that run the same DAG and
        run id on one account share their work.
    :param epoch: increases with every manual clear, and stays the same over automatic retries. Not part of the
        identity. By default the generation.
    :param run_start: when Airflow started the run, in ISO format; ``""`` if it does not say. Not part of the identity.
    :param run_was_cleared: whether that start may have moved since the run was created.
    """

    dag_id: str
    run_id: str
    task_id: str
    map_index: int
    generation: int
    deployment_id: str | None = None
    epoch: int = field(default=-1, compare=False)
    run_start: str = field(default="", compare=False)
    run_was_cleared: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        """Take the epoch from the generation if it is not given."""
        if self.epoch < 0:
            object.__setattr__(self, "epoch", self.generation)

    def is_of_deleted_run(self, run_start: str | None) -> bool:
        """
        Whether a record was certainly made by another run of the same id, which was deleted.

        Only a clear moves the start of a run, and Airflow counts the clears of a run.

        :param run_start: the start of the run that made the record; ``None`` or ``""`` if unknown.
        """
        known = bool(run_start and self.run_start) and not self.run_was_cleared
        return known and run_start != self.run_start

    @property
    def label(self) -> str:
        """``dag/task/run``, to be read in the account's list of batches."""
        mapped = f"[{self.map_index}]" if self.map_index >= 0 else ""
        return f"{self.dag_id}/{self.task_id}{mapped}/{self.run_id}"[: arguments.MAX_METADATA_VALUE]

    @property
    def mark(self) -> str:
        """16 hexadecimal digits that identify this task instance since its last manual clear."""
        return replace(self, generation=self.epoch).key()[:16]

    def key(self, **content: Any) -> str:
        """
        Return the identity of one piece of this submitter's work.

        :param content: everything whose change makes it a different piece, as JSON values.
        """
        who = [self.dag_id, self.run_id, self.task_id, self.map_index, self.generation]
        if self.deployment_id:
            who.append(self.deployment_id)
        text = json.dumps([who, content], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Upload:
    """
    A file that must be uploaded exactly once.

    :param key: its identity.
    :param filename: its name at the service, which contains the identity; see :func:`upload_name`.
    :param size: its size in bytes.
    :param sha256: of its content, in hexadecimal.
    :param send: uploads it.
    """

    key: str
    filename: str
    size: int
    sha256: str
    send: Callable[[], UploadedFile]

    def may_be(self, file: UploadedFile) -> bool:
        """Whether a file of the account has the same name and, if the service states it, the same size."""
        return file.filename == self.filename and file.bytes in (None, self.size)


@dataclass(frozen=True, slots=True)
class BatchWork:
    """
    A batch that must be created exactly once: its identity, and the arguments of the request.

    :param input_file_id: the input file if the service has it already; otherwise ``upload`` sends it.
    :param submitter: adds the marks of the task instance and of the deployment to the metadata if there is room.
    :param only_one: whether the submitter creates only this batch, so that a batch of the same submitter under another
        key was made from another input.
    """

    key: str
    label: str
    input_file_id: str | None
    endpoint: str
    completion_window: str
    metadata: Mapping[str, str]
    replace: Mapping[str, Any] | None
    upload: Upload | None = None
    submitter: Submitter | None = None
    only_one: bool = False

    @property
    def tagged_metadata(self) -> dict[str, str]:
        """The author's metadata with the identity, and with as many of the other marks as there is room for."""
        tagged = {**self.metadata, WORK_KEY: self.key}
        marks = {WORK_LABEL: self.label}
        if self.submitter is not None:
            marks[WORK_SUBMITTER] = self.submitter.mark
            if self.submitter.deployment_id:
                marks[WORK_DEPLOYMENT] = self.submitter.deployment_id[: arguments.MAX_METADATA_VALUE]
            if self.submitter.run_start:
                marks[WORK_RUN] = self.submitter.run_start
        for name, mark in marks.items():
            if len(tagged) < arguments.MAX_METADATA_PAIRS:
                tagged[name] = mark
        return tagged

    def is_of_deleted_run(self, batch: Batch) -> bool:
        """Whether a batch was certainly submitted by another run of the same id, which was deleted."""
        return self.submitter is not None and self.submitter.is_of_deleted_run(batch.metadata.get(WORK_RUN))

    def request(self, input_file_id: str) -> dict[str, Any]:
        """
        Return the arguments of :func:`protocol.create_batch`.

        :param input_file_id: the input file at the service.
        """
        return {
            "input_file_id": input_file_id,
            "endpoint": self.endpoint,
            "completion_window": self.completion_window,
            "metadata": self.tagged_metadata,
            "replace": self.replace,
        }


class Proof(Enum):
    """How certain it is that a batch of the account belongs to a piece of work."""

    #: Its mark, its input file and everything else that the service states match the work.
    OURS = "ours"
    #: Something that the service states about it does not match.
    FOREIGN = "foreign"
    #: Nothing contradicts it, but the service states too little: we may have paid for it.
    UNPROVEN = "unproven"


def prove(work: BatchWork, batch: Batch, *, our_files: Set[str], file_is_anothers: bool) -> Proof:
    """
    Say whether a batch belongs to a piece of work.

    :param our_files: ids of input files that certainly belong to the work.
    :param file_is_anothers: whether an input file that is not among them certainly does not belong to the work.
    """
    mark, file_id = batch.metadata.get(WORK_KEY), batch.input_file_id
    if mark is not None and mark != work.key:
        return Proof.FOREIGN
    if batch.endpoint and batch.endpoint != work.endpoint:
        return Proof.FOREIGN
    if _hours(batch.completion_window) not in (None, _hours(work.completion_window)):
        return Proof.FOREIGN
    if file_id in our_files:
        return Proof.UNPROVEN if mark is None else Proof.OURS
    if file_id is None:
        return Proof.UNPROVEN
    if work.upload is not None and batch.file_name not in (None, work.upload.filename):
        return Proof.FOREIGN
    return Proof.FOREIGN if work.upload is None or file_is_anothers else Proof.UNPROVEN


def _hours(window: Any) -> int | None:
    """Return a completion window in hours, however it is written; ``None`` if it cannot be read."""
    match = re.fullmatch(r"\s*(\d{1,6})\s*h?\s*", str(window))
    return int(match[1]) if match else None


def upload_name(path: str, key: str) -> str:
    """
    Return the name of a file at the service: readable, and with its identity.

    :param path: path or URI of the file.
    :param key: identity of the upload.
    """
    stem = (
        re.sub(r"[^A-Za-z0-9_.-]+", "-", PurePosixPath(path).name.removesuffix(".jsonl"))[:80] or "requests"
    )
    return f"{stem}-{key}.jsonl"
