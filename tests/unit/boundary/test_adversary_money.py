"""Odd answers that agree with each other well enough to be believed: nothing is paid twice, and no paid row is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_siliconflow.api.client import SiliconFlowClient
from airflow_provider_siliconflow.api.models import Batch
from airflow_provider_siliconflow.emulator.server import Emulator
from tests.unit.boundary.test_jobs_dead_batches import batches
from tests.unit.jobs.whole_job import MODELS, Job, rows

pytestmark = pytest.mark.emulator(speed=2000.0)

Rewrite = Callable[[bytes], bytes]


class OddJob(Job):
    """A job whose service answers as a test wants it."""

    def __init__(self, emulator: Emulator, folder: Path, requests: Any, **changes: Any) -> None:
        super().__init__(emulator, folder, requests, **({"models": MODELS[:1]} | changes))
        self.created: Callable[[Batch], Batch] = lambda batch: batch
        self.read: Callable[[Batch], Batch] = lambda batch: batch
        self.downloaded: Callable[[str, bytes], bytes] = lambda _, content: content

    def client(self) -> SiliconFlowClient:
        client = super().client()
        create, get, download = client.create_batch, client.get_batch, client.iter_file

        def iter_file(reference: str, refresh: Any, *, limit: int | None = None) -> Iterator[bytes]:
            yield self.downloaded(reference, b"".join(download(reference, refresh, limit=limit)))

        client.create_batch = lambda **request: self.created(create(**request))  # type: ignore[method-assign]
        client.get_batch = lambda batch_id, **how: self.read(get(batch_id, **how))  # type: ignore[method-assign]
        client.iter_file = iter_file  # type: ignore[method-assign]
        return client


def changed(batch: Batch, **fields: Any) -> Batch:
    return batch.model_copy(update=fields)


@pytest.mark.parametrize("with_metadata", [True, False])
def test_an_answer_that_names_the_batch_of_another_model_is_not_taken(
    emulator: Emulator, tmp_path: Path, with_metadata: bool
) -> None:
    """A gateway that caches by URL, say; both batches are over the same file."""
    job = OddJob(emulator, tmp_path, rows(4), models=MODELS)
    seen: list[Batch] = []

    def created(batch: Batch) -> Batch:
        seen.append(batch if with_metadata else changed(batch, metadata={}))
        return seen[0]

    job.created = created
    manifest = job.attempt()
    assert len(batches(emulator)) == 2
    assert len({batch["id"] for model in manifest["models"] for batch in model["batches"]}) == 2
    assert manifest["model_mismatches"] == 0
    assert manifest["rows"]["ok"] == 8
