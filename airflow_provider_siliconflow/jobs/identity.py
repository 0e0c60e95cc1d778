"""
What makes a piece of work the same piece of work.

A batch carries its identity in its ``metadata`` and an uploaded file carries it in its name, so that a later
try finds what an earlier one paid for without any state of its own.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from airflow_provider_siliconflow.api import arguments
from airflow_provider_siliconflow.api.arguments import WORK_KEY, WORK_LABEL
from airflow_provider_siliconflow.api.models import Batch


@dataclass(frozen=True, slots=True)
class Submitter:
    """
    Who submits: one task instance, in one generation of its tries.

    :param generation: grows when a person clears the task and stays the same over automatic retries
        (Airflow's ``max_tries``), so that a retry finds the work and a clear starts afresh.
    """

    dag_id: str
    run_id: str
    task_id: str
    map_index: int
    generation: int

    @property
    def label(self) -> str:
        """``dag/task/run`` for people who look at the account's batches."""
        mapped = f"[{self.map_index}]" if self.map_index >= 0 else ""
        return f"{self.dag_id}/{self.task_id}{mapped}/{self.run_id}"[: arguments.MAX_METADATA_VALUE]

    def key(self, **content: Any) -> str:
        """
        Return the identity of one piece of this submitter's work.

        :param content: all that makes it a different piece when it changes, as JSON values.
        """
        who = [self.dag_id, self.run_id, self.task_id, self.map_index, self.generation]
        text = json.dumps([who, content], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class BatchWork:
    """A batch to be created exactly once: its identity, and the request as the service takes it."""

    key: str
    label: str
    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: Mapping[str, str]
    replace: Mapping[str, Any] | None

    @property
    def tagged_metadata(self) -> dict[str, str]:
        """The author's metadata with the identity, and with the readable name where there is room."""
        tagged = {**self.metadata, WORK_KEY: self.key}
        if len(tagged) < arguments.MAX_METADATA_PAIRS:
            tagged[WORK_LABEL] = self.label
        return tagged

    def request(self) -> dict[str, Any]:
        """Return the arguments of :func:`protocol.create_batch`."""
        return {
            "input_file_id": self.input_file_id,
            "endpoint": self.endpoint,
            "completion_window": self.completion_window,
            "metadata": self.tagged_metadata,
            "replace": self.replace,
        }

    def is_in(self, batch: Batch) -> bool:
        """Whether a batch is this work."""
        return batch.metadata.get(WORK_KEY) == self.key


def upload_name(path: str, key: str) -> str:
    """
    Return the name a file gets at the service: readable, and with its identity.

    :param path: path or URI of the file.
    :param key: identity of the upload.
    """
    stem = (
        re.sub(r"[^A-Za-z0-9_.-]+", "-", PurePosixPath(path).name.removesuffix(".jsonl"))[:80] or "requests"
    )
    return f"{stem}-{key}.jsonl"
