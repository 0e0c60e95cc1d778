"""Every custom_id is unique, or the rows that share one are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_provider_siliconflow.api.exceptions import InvalidRequestFileError
from airflow_provider_siliconflow.batch_files import custom_ids
from airflow_provider_siliconflow.batch_files.shards import split_requests
from tests.unit.batch_files.samples import prompts


def test_a_custom_id_is_unique_over_all_shards_numbered_ones_included(tmp_path: Path) -> None:
    rows = [
        *prompts(3),
        {"custom_id": "row-0000006", "messages": prompts(1)[0]["messages"]},
        b"bad",
        "numbered",
    ]
    rows += prompts(2)
    with pytest.raises(InvalidRequestFileError) as caught:
        split_requests(iter(rows), tmp_path, name="rows", max_rows=2)
    assert [(p.line, p.custom_id, p.reason[:7]) for p in caught.value.problems] == [
        (5, None, "the row"),
        (6, "row-0000006", "line 4 "),
        (7, "id-0", "line 1 "),
        (8, "id-1", "line 2 "),
    ]


@given(st.lists(st.integers(0, 25), min_size=1, max_size=19), st.integers(1, 4))
def test_repeated_custom_ids_are_named_whether_their_hashes_are_in_memory_or_on_disk(
    tmp_path_factory: pytest.TempPathFactory, numbers: Any, held: Any
) -> None:
    rows = [{"custom_id": str(number), "messages": prompts(1)[0]["messages"]} for number in numbers]
    repeated = [line for line, number in enumerate(numbers, 1) if number in numbers[: line - 1]]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(custom_ids, "_BUCKET_HASHES", held)
        found = []
        try:
            split_requests(rows, tmp_path_factory.mktemp("ids"), name="rows")
        except InvalidRequestFileError as refused:
            found = [problem.line for problem in refused.problems]
    assert found == repeated
