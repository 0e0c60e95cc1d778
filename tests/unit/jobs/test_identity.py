"""What makes a piece of work the same piece of work, and what proves that a batch is it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from airflow_provider_siliconflow.api import arguments
from airflow_provider_siliconflow.api.models import Batch, UploadedFile
from airflow_provider_siliconflow.jobs.identity import (
    WORK_DEPLOYMENT,
    WORK_KEY,
    WORK_LABEL,
    WORK_RUN,
    WORK_SUBMITTER,
    BatchWork,
    Proof,
    Submitter,
    Upload,
    prove,
    upload_name,
)

SUBMITTER = Submitter("dag", "run", "task", -1, 3)


def never() -> UploadedFile:
    raise AssertionError("nothing is uploaded")


UPLOAD = Upload("k", "rows-k.jsonl", 10, "0" * 64, never)


def work(**changes: Any) -> BatchWork:
    made = BatchWork(
        key=SUBMITTER.key(input="x"),
        label=SUBMITTER.label,
        input_file_id=None,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata={},
        replace=None,
        upload=UPLOAD,
        submitter=SUBMITTER,
    )
    return replace(made, **changes)


def test_an_identity_is_that_of_its_submitter_and_content_and_of_nothing_else() -> None:
    others = [
        replace(SUBMITTER, dag_id="dag2"),
        replace(SUBMITTER, run_id="run2"),
        replace(SUBMITTER, task_id="task2"),
        replace(SUBMITTER, map_index=0),
        replace(SUBMITTER, generation=4),
        replace(SUBMITTER, deployment_id="prod"),
        replace(SUBMITTER, deployment_id="staging"),
    ]
    keys = {each.key(input="x") for each in [SUBMITTER, *others]}
    assert len(keys | {SUBMITTER.key(input="y"), SUBMITTER.key(output="x")}) == len(others) + 3
    # The mark says what a task submitted since its last clear.
    others.append(replace(SUBMITTER, epoch=4))
    assert len({each.mark for each in [SUBMITTER, *others]}) == len(others)
    assert replace(SUBMITTER, epoch=4).key(input="x") == SUBMITTER.key(input="x")
    assert SUBMITTER.key(a=1, b="ü") == SUBMITTER.key(b="ü", a=1)
    # A lone surrogate may be in a run id; it has a key as well.
    assert replace(SUBMITTER, run_id="\ud800").key() != SUBMITTER.key()


def test_an_identity_stays_what_it_is_over_upgrades() -> None:
    """Batches run for two weeks, and the next version has to find them."""
    assert SUBMITTER.key(input="x", conn_id="c") == "22392e210f06c1c0f2f9ae2dbd9042c0"
    there = replace(SUBMITTER, deployment_id="prod")
    assert there.key(input="x", conn_id="c") == "938c8c89bbd59aaf77304e66143b3d2d"


@pytest.mark.parametrize("pairs", range(arguments.MAX_METADATA_PAIRS))
def test_marks_go_into_the_room_that_the_author_leaves(pairs: int) -> None:
    metadata = {f"key-{number}": "x" for number in range(pairs)}
    submitter = replace(SUBMITTER, deployment_id="p" * 600, run_start="2026-01-01T00:00:00+00:00")
    tagged = work(metadata=metadata, submitter=submitter).tagged_metadata
    assert tagged.items() >= metadata.items()
    room = arguments.MAX_METADATA_PAIRS - pairs
    marks = [WORK_KEY, WORK_LABEL, WORK_SUBMITTER, WORK_DEPLOYMENT, WORK_RUN][:room]
    assert [name for name in tagged if name not in metadata] == marks
    assert all(len(value) <= arguments.MAX_METADATA_VALUE for value in tagged.values())


def test_without_a_deployment_there_is_no_mark_of_one() -> None:
    assert WORK_DEPLOYMENT not in work().tagged_metadata
    assert {WORK_SUBMITTER, WORK_DEPLOYMENT}.isdisjoint(work(submitter=None).tagged_metadata)


def batch(**changes: Any) -> Batch:
    fields = {
        "id": "batch_a",
        "status": "in_queue",
        "endpoint": "/v1/chat/completions",
        "input_file_id": "file-ours",
        "completion_window": "24h",
        "metadata": {WORK_KEY: work().key},
    }
    return Batch.model_validate(fields | changes)


CASES: list[tuple[dict[str, Any], Proof]] = [
    ({}, Proof.OURS),
    ({"endpoint": None, "completion_window": None}, Proof.OURS),
    ({"completion_window": 24}, Proof.OURS),
    ({"completion_window": " 24 "}, Proof.OURS),
    ({"completion_window": "a day"}, Proof.OURS),
    ({"completion_window": "48h"}, Proof.FOREIGN),
    ({"completion_window": 48}, Proof.FOREIGN),
    ({"endpoint": "/v1/embeddings"}, Proof.FOREIGN),
    ({"metadata": {WORK_KEY: "another"}}, Proof.FOREIGN),
    ({"metadata": {}}, Proof.UNPROVEN),
    ({"metadata": {}, "input_file_id": "file-theirs"}, Proof.UNPROVEN),
    ({"input_file_id": None}, Proof.UNPROVEN),
    ({"input_file_id": "file-gone"}, Proof.UNPROVEN),
    ({"input_file_id": "file-gone", "file_name": UPLOAD.filename}, Proof.UNPROVEN),
    ({"input_file_id": "file-gone", "file_name": "theirs.jsonl"}, Proof.FOREIGN),
]


@pytest.mark.parametrize(("changes", "proof"), CASES)
def test_proof(changes: dict[str, Any], proof: Proof) -> None:
    assert prove(work(), batch(**changes), our_files={"file-ours"}, file_is_anothers=False) is proof


def test_a_file_that_is_anothers_is_proof_of_the_contrary() -> None:
    other = batch(input_file_id="file-theirs")
    assert prove(work(), other, our_files={"file-ours"}, file_is_anothers=True) is Proof.FOREIGN
    given = work(upload=None, input_file_id="file-ours")
    assert prove(given, other, our_files={"file-ours"}, file_is_anothers=False) is Proof.FOREIGN


@pytest.mark.parametrize(
    ("name", "size", "may_be"),
    [
        ("rows-k.jsonl", 10, True),
        ("rows-k.jsonl", None, True),
        ("rows-k.jsonl", 11, False),
        ("rows.jsonl", 10, False),
    ],
)
def test_a_file_has_the_name_and_the_size(name: str, size: int | None, may_be: bool) -> None:
    assert UPLOAD.may_be(UploadedFile(id="file-a", filename=name, bytes=size)) is may_be


def test_a_file_is_named_after_its_source_and_its_key() -> None:
    assert upload_name("s3://bucket/a b/rows?.jsonl", "k") == "rows--k.jsonl"
    assert upload_name("", "k") == "requests-k.jsonl"
    assert len(upload_name("x" * 500, "k" * 32)) < 128
