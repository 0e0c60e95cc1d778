"""Lines out of a stream, whatever the size of its reads."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from airflow_provider_siliconflow.batch_files.lines import ChunkReader, LineReader
from tests.unit.batch_files.samples import Bytes


@given(st.lists(st.binary(max_size=9).map(lambda b: b.replace(b"\n", b"")), max_size=6), st.integers(1, 7))
def test_lines_are_the_same_whatever_the_size_of_a_read(lines: Any, step: Any) -> None:
    data = b"".join(each + b"\n" for each in lines) + b"end"
    reader = LineReader(Bytes(data, step), longest=5)
    assert list(reader) == [each if len(each) <= 5 else None for each in [*lines, b"end"]]
    assert reader.bytes == len(data)
    assert not reader.ends_with_newline


@given(st.lists(st.binary(max_size=5), max_size=12), st.integers(1, 6))
def test_lines_are_the_same_whatever_the_size_of_a_chunk(chunks: list[bytes], longest: int) -> None:
    data = b"".join(chunks)
    expected = data.split(b"\n")
    if not expected[-1]:
        expected.pop()
    reader = LineReader(ChunkReader(chunks), longest=longest)
    assert list(reader) == [each if len(each) <= longest else None for each in expected]
    assert reader.skipped_bytes == sum(len(each) for each in expected if len(each) > longest)
