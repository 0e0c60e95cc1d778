"""Whatever a result file holds, it costs its own rows alone, and what is made of it can be kept and handed on."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from airflow_provider_siliconflow.api.exceptions import IncompleteResultsError, SiliconFlowError
from airflow_provider_siliconflow.api.models import Outcome
from airflow_provider_siliconflow.batch_files.manifest import (
    BatchSummary,
    ModelRun,
    build_manifest,
    render_summary,
)
from airflow_provider_siliconflow.batch_files.merge import merge_batch
from airflow_provider_siliconflow.batch_files.result_lines import read_results
from airflow_provider_siliconflow.batch_files.tally import ModelTally
from tests.unit.batch_files.samples import Folder, answer, failure, ids

ROWS = ["a", "b", "c", "d"]


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


REAL = [
    answer("a", "yes", trace_id="t"),
    answer("b", "中文" * 50, finish="length", usage=(7, 3)),
    failure("c", "batch_expired", "the window ended"),
    failure("d", 50505, "Model service overloaded. Please try again later."),
    {
        "custom_id": "d",
        "response": {"status_code": 400, "body": {"code": 20015, "message": "no"}},
        "error": None,
    },
    answer("c", None, error={"code": 20000, "message": "Ok"}),
]
ODD_VALUES: list[Any] = [
    *(None, True, False, -1, 0, 10**30, -(10**400), 1e308, 0.5, "", "\0", "\ud800", "a\0\udfffb", "x" * 5000),
    # Made anew each time, since they may be changed themselves.
    *(list, dict, lambda: {"": {}}, lambda: nested(500), lambda: nested(800), lambda: ["x"] * 300),
    lambda: {"code": "\0", "message": nested(600)},
    *("batch_expired", "missing", "30001", "200", 200, 503, "http://h/p?Signature=secret"),
]
CUTS = [
    b"\xf0\x9f",
    b"\xed\xa0\xbd",
    b"\\",
    b"\\ud83d",
    b"\x00",
    b'"',
    b"}",
    b"9" * 5000,
    b"1e999",
    b"NaN",
    b"[",
]


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if len(path) > 6:
        return
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from paths_in(inner, (*path, key))


@st.composite
def result_lines(draw: st.DrawFn) -> bytes:
    """A line of a real file with some of it changed: a value, a field, or bytes."""
    value = json.loads(json.dumps(draw(st.sampled_from(REAL))))
    for _ in range(draw(st.integers(0, 2))):
        paths = list(paths_in(value))
        if not paths:
            break
        *way, last = draw(st.sampled_from(paths))
        holder = value
        for key in way:
            holder = holder[key]
        if draw(st.booleans()):
            odd = draw(st.sampled_from(ODD_VALUES))
            holder[last] = odd() if callable(odd) else odd
        elif isinstance(holder, dict) and draw(st.booleans()):
            holder[draw(st.sampled_from(["error", "custom_id", "choices", "usage", "\0", "new"]))] = holder[
                last
            ]
        else:
            del holder[last]
    # Numbers of more digits than Python writes are put in as text.
    line = json.dumps(value, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 3)) == 0:
        at, gone = draw(st.integers(0, len(line))), draw(st.integers(0, 3))
        line = line[:at] + draw(st.sampled_from(CUTS)) + line[at + gone :]
    return line.replace(b"\n", b"")


def check_encodes(value: Any) -> None:
    """As JSON, as MessagePack, and in Postgres."""
    text = json.dumps(value, allow_nan=False, ensure_ascii=False)
    assert len(text.encode()) < 1 << 16
    assert "\\u0000" not in text
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(value)) == value


files = st.lists(result_lines() | st.sampled_from([b"", b"\r", b"<html>", b"[]", b"[" * 3000]), max_size=7)


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(files, files, st.booleans())
def test_any_file_ends_as_one_line_per_row_and_a_manifest_that_encodes(
    tmp_path_factory: pytest.TempPathFactory, output: list[bytes], errors: list[bytes], known: bool
) -> None:
    folder = Folder(tmp_path_factory.mktemp("files"), ROWS)
    batch = folder.batch(output, errors, batch_id="batch_1")
    if known:
        merged, results, failed = folder.merge(batch, strict=False)
        tally, spoilt = merged.tally, merged.spoilt
        assert len(results) == 4
        for row, again in enumerate(merged.retry):
            assert not (again and results[row] not in failed), "an answer is not paid for again"
    else:
        to_results, to_errors = io.BytesIO(), io.BytesIO()
        whole = merge_batch(batch, to_results, to_errors, rows=4, strict=False)
        tally, spoilt = whole.tally, (whole.spoilt,) if whole.spoilt else ()
        results, failed = to_results.getvalue().splitlines(), to_errors.getvalue().splitlines()
    assert tally.ok + tally.error + tally.expired + tally.missing == tally.rows
    assert len(results) - len(failed) == tally.ok
    # A reader of the file sees what was counted.
    path = folder.path / "results.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in results))
    rows = list(read_results(path))
    assert not known or [row.custom_id for row in rows] == ROWS
    outcomes = Counter(row.outcome for row in rows)
    expected = {Outcome.OK: tally.ok, Outcome.ERROR: tally.error, Outcome.EXPIRED: tally.expired}
    assert outcomes - Counter({Outcome.MISSING: 99}) == Counter(expected)
    total = ModelTally()
    total.add(tally)
    summary = BatchSummary("b", "completed", 4, spoilt=spoilt[0].reason if spoilt else None)
    manifest = build_manifest(
        [ModelRun("m", total, [summary])], prices={"m": {"prompt": 1e6, "completion": 1}}
    )
    check_encodes(manifest)
    assert "Signature" not in json.dumps(manifest)
    assert render_summary(manifest).encode()
    # A strict caller gets all of that, or an error of this package.
    try:
        strict = folder.merge(batch)[0].tally
    except SiliconFlowError:
        assert spoilt
    else:
        assert not spoilt
        assert not known or strict == tally


def test_figures_without_end_are_held_within_64_bits() -> None:
    tally = ModelTally(rows=10**30, missing=10**30)
    tally.usage.total = tally.billed.prompt = 10**25
    counts = {"total": 10**30, "completed": -5, "failed": 0, "other": 10**40}
    manifest = build_manifest(
        [ModelRun("m", tally, [BatchSummary("b\0", "x" * 10**6, 5, counts=counts)])],
        prices={"m": {"prompt": 1e6, "completion": 1e6}},
    )
    check_encodes(manifest)
    assert manifest["models"][0]["batches"][0]["counts"] == {"total": 2**53, "completed": 0, "failed": 0}


def test_finish_reasons_and_messages_of_every_row_are_bounded(tmp_path: Path) -> None:
    names = [str(number) for number in range(600)]
    folder = Folder(tmp_path, names)
    lines = [answer(name, finish=f"{name}\0" + "y" * 999) for name in names[:300]]
    merged, _, _ = folder.merge(
        folder.batch(lines, [failure(name, name, name * 999) for name in names[300:]])
    )
    tally = merged.tally
    assert (len(tally.finish_reasons), sum(tally.finish_reasons.values())) == (21, 300)
    assert (len(tally.messages), sum(tally.messages.values())) == (201, 300)
    assert max(map(len, [*tally.finish_reasons, *tally.messages])) <= 300
    check_encodes(build_manifest([ModelRun(None, tally, [])]))


def test_an_error_that_says_success_is_none(tmp_path: Path) -> None:
    folder = Folder(tmp_path, ROWS)
    fine = answer("a", error={"code": 20000, "message": "Ok"})
    hollow = {"custom_id": "b", "response": {"body": {"code": 20000, "message": "Ok"}}, "error": {"code": 0}}
    merged, _, errors = folder.merge(folder.batch([fine, hollow]))
    assert (merged.tally.ok, merged.tally.error) == (1, 1)
    assert ids(errors) == ["b", "c", "d"]
    assert merged.tally.messages["the answer has no choice"] == 1


def test_rows_nested_beyond_reading_cost_themselves(tmp_path: Path) -> None:
    folder = Folder(tmp_path, ROWS)
    deep = [answer("b", extra=nested(500)), b'{"custom_id":"c","x":' + b"[" * 10**5 + b"]" * 10**5 + b"}"]
    merged, results, _ = folder.merge(folder.batch([answer("a"), *deep, answer("d")]), strict=False)
    assert (merged.tally.ok, merged.tally.missing, list(merged.retry)) == (3, 1, [0, 0, 0, 0])
    assert "line 3 of result-1.jsonl is nested too deeply" in merged.spoilt[0].reason
    assert json.loads(results[1])["extra"] == nested(500)


def test_answers_without_usage_are_counted_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [answer(each) for each in "abc"]
    del lines[0]["response"]["body"]["usage"]
    lines[1]["response"]["body"]["usage"] = {"prompt_tokens": 5}
    tally = Folder(tmp_path, ROWS).merge(Folder(tmp_path, ROWS).batch(lines, [failure("d")]))[0].tally
    manifest = build_manifest([ModelRun("m", tally, [])])
    assert manifest["without_usage"] == manifest["models"][0]["without_usage"] == 2
    assert "2 answers of m do not state their tokens" in caplog.text
    assert "2 answers do not state their tokens" in render_summary(manifest)


@pytest.mark.parametrize(
    ("line", "outcome"),
    [
        ("HEAD + b'\"' + b\"x\" * SIZE + b'\"' + TAIL", "ok"),
        ('HEAD + b"[" + b"[]," * (SIZE // 3) + b"[]]" + TAIL', "ok"),
        ('b\'{"custom_id":"a","x":[\' + b"[]," * (SIZE // 3) + b\'[]],"error":{"message":"no"}}\'', "error"),
        (
            'b\'{"custom_id":"a","response":{"body":{"choices":[\' + b\'{"message":{}},\' * (SIZE // 15) + '
            "b'{}]}},\"error\":null}'",
            "error",
        ),
        ('b"x" * SIZE', "missing"),
        ('b"x" * (129 << 20)', "missing"),
    ],
    ids=["text", "lists", "error", "choices", "no JSON", "too long"],
)
def test_a_line_of_any_size_takes_a_few_times_its_size(tmp_path: Path, line: str, outcome: str) -> None:
    """As Python objects some of these lines would take thirty times their size."""
    code = f"""
from pathlib import Path
from airflow_provider_siliconflow.batch_files.merge import BatchFiles, merge_shard
from airflow_provider_siliconflow.batch_files.result_lines import read_results

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) >> 10

SIZE = 24 << 20
HEAD = b'{{"custom_id":"a","response":{{"body":{{"choices":[{{"message":{{"content":'
TAIL = b'}}}}],"usage":{{"prompt_tokens":1,"completion_tokens":1}}}}}},"error":null}}'
folder = Path({str(tmp_path)!r})
with (folder / "output.jsonl").open("wb") as file:
    file.write({line})
    file.write(b"\\n")
    size = file.tell() >> 20
(folder / "shard.jsonl").write_text('{{"custom_id":"a"}}\\n')
import gc; gc.collect()
before = peak()
with (folder / "results.jsonl").open("wb") as results:
    tally = merge_shard(folder / "shard.jsonl", [BatchFiles(folder / "output.jsonl", None)], results, model="m",
                        strict=False).tally
read = [row.outcome.value for row in read_results(folder / "results.jsonl")]
print([name for name in ("ok", "error", "missing") if getattr(tally, name)][0], read[0], (peak() - before) / size)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    counted, read, times = done.stdout.split()
    assert (counted, read) == (outcome, outcome)
    assert float(times) < 6


@pytest.mark.parametrize(
    ("line", "limit"),
    # A million blank lines take half a minute, and differ from a thousand only in that.
    [(b"{}\n", None), (b"\n", 1000), (b" \n", 1000)],
)
def test_lines_that_are_no_results_come_to_an_end(
    tmp_path: Path, line: bytes, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result file may have gigabytes, and of these each byte or two would be a line."""
    if limit is not None:
        monkeypatch.setattr(f"{read_results.__module__}._MOST_IDLE_LINES", limit)
    most = limit or 1_000_000
    path = tmp_path / "output.jsonl"
    path.write_bytes(json.dumps(answer("a", "yes")).encode() + b"\n" + line * (most + 1))
    with pytest.raises(IncompleteResultsError, match=f"has {most} lines"):
        list(read_results(path))
