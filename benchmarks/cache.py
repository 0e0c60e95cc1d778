"""
Looking up rows in a cache of answers: seconds and peak RSS, compared with one dict of all answers in memory.

    python benchmarks/cache.py --rows 1000000 --answers 5000000

Both sides find the cached answers of the same rows, and write each with its new custom id into one file per shard. Ours
finds out which rows are cached as a job does when it is planned: it checks every answer as the merge does, and reads
segments as jobs wrote them. The peer computes the same keys, reads all answers into one dict, and takes from it; its
figures are given with and without the reading. The sides take turns, each run in a separate process; the best time of
each side counts.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

from _sides import add_options, run_in_turns

SHARD_ROWS = 5000
MODEL = "Qwen/Qwen3-8B"


def text(row: int, chars: int) -> str:
    sentence = "The quick brown fox jumps over the lazy dog. "
    return f"{row} {sentence * (chars // len(sentence) + 1)}"[:chars]


def request(row: int, chars: int, night: int) -> bytes:
    body = {"messages": [{"role": "user", "content": text(row, chars)}], "temperature": 0, "max_tokens": 512}
    line = {"custom_id": f"{night}-{row}", "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps(line).encode()


def result(row: int, chars: int) -> bytes:
    message = {"role": "assistant", "content": text(row, chars)}
    completion = {
        "id": f"chatcmpl-{row}",
        "object": "chat.completion",
        "model": MODEL,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 200, "completion_tokens": 180, "total_tokens": 380},
    }
    line = {"id": f"r{row}", "custom_id": f"0-{row}", "response": {"body": completion}, "error": None}
    return json.dumps(line).encode()


def write_input(folder: Path, options: argparse.Namespace) -> None:
    """Write a cache, the same answers with their keys for the peer, and the rows; 95 % of them are cached."""
    from airflow_provider_siliconflow.batch_files.answer_keys import answer_key, read_request
    from airflow_provider_siliconflow.batch_files.segments import (
        SegmentWriter,
        segment_name,
        segments_folder,
        without_custom_id,
    )

    per_segment = -(-options.answers // options.segments)
    cache = segments_folder(folder / "cache")
    with (folder / "answers.tsv").open("wb") as peer:
        for number in range(options.segments):
            path = cache / segment_name(f"{number:032x}", 0)
            with SegmentWriter(path, created=float(number), model=MODEL, label="nightly") as writer:
                first = number * per_segment
                for row in range(first, min(first + per_segment, options.answers)):
                    found = read_request(request(row, options.chars, 0))
                    line = without_custom_id(result(row, options.chars))
                    assert found is not None
                    assert line is not None
                    key = answer_key(found[0], MODEL)
                    writer.add(key, *line)
                    peer.write(key.hex().encode() + b"\t" + line[0] + b"\n")
    rows = folder / "rows"
    rows.mkdir()
    with (folder / "requests.jsonl").open("wb") as out:
        for at in range(options.rows):
            # Spread over all segments, in another order than there.
            row = at * 7_919_993 % options.answers if at % 20 else options.answers + at
            out.write(request(row, options.chars, 1) + b"\n")


def ours(folder: Path, out: Path) -> dict[str, float]:
    from airflow_provider_siliconflow.jobs.cache import find_answers
    from airflow_provider_siliconflow.jobs.identity import Submitter
    from airflow_provider_siliconflow.jobs.options import RunOptions
    from airflow_provider_siliconflow.jobs.plan import Plan, PlanFolder, plan

    options = RunOptions(models=(MODEL,))
    split = plan(folder / "requests.jsonl", out / "round-0", name="requests", options=options)
    submitter = Submitter("dag", "run", "task", -1, 0)
    limits = options.max_rows, options.max_bytes
    made = Plan(split, "24h", {}, submitter, "c", options.models, *limits, "", None, complete=True)
    start, cpu = time.perf_counter(), time.process_time()
    reuse = find_answers(folder / "cache", PlanFolder(out), made, options)
    found = sum(reuse.cached[0]) if reuse else 0
    return {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu, "found": found}


def dict_of_answers(folder: Path, out: Path) -> dict[str, float]:
    from airflow_provider_siliconflow.batch_files.answer_keys import answer_key, read_request
    from airflow_provider_siliconflow.jobs.options import RunOptions
    from airflow_provider_siliconflow.jobs.plan import plan

    split = plan(
        folder / "requests.jsonl", out / "round-0", name="requests", options=RunOptions(models=(MODEL,))
    )
    start, cpu = time.perf_counter(), time.process_time()
    answers = {}
    with (folder / "answers.tsv").open("rb") as stream:
        for line in stream:
            key, _, answer = line.rstrip(b"\n").partition(b"\t")
            answers[bytes.fromhex(key.decode())] = answer
    loaded, cpu_loaded = time.perf_counter(), time.process_time()
    found = 0
    for shard in split.shards:
        with (
            (out / "round-0" / shard.name).open("rb") as requests,
            (out / f"cached-{shard.name}").open("wb") as target,
            (out / f"missing-{shard.name}").open("wb") as missing,
        ):
            for request_line in requests:
                asked = read_request(request_line)
                cached = asked and answers.get(answer_key(asked[0], MODEL))
                if not cached:
                    missing.write(request_line)
                    continue
                row = json.loads(cached)
                row["custom_id"] = json.loads(request_line)["custom_id"]
                target.write(json.dumps(row).encode() + b"\n")
                found += 1
    return {
        "seconds": time.perf_counter() - start,
        "cpu": time.process_time() - cpu,
        "lookup": time.perf_counter() - loaded,
        "lookup_cpu": time.process_time() - cpu_loaded,
        "found": found,
    }


def nothing(folder: Path, out: Path) -> dict[str, float]:
    """Only the imports and the split, which is not measured: the baseline for memory."""
    from airflow_provider_siliconflow.jobs.cache import find_answers  # noqa: F401
    from airflow_provider_siliconflow.jobs.options import RunOptions
    from airflow_provider_siliconflow.jobs.plan import plan

    plan(folder / "requests.jsonl", out / "round-0", name="requests", options=RunOptions(models=(MODEL,)))
    return {"seconds": 0.0, "cpu": 0.0, "found": 0}


SIDES = {"ours": ours, "one dict": dict_of_answers, "imports": nothing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--answers", type=int, default=1_000_000)
    parser.add_argument("--segments", type=int, default=20, help="how many jobs wrote the cache")
    parser.add_argument("--chars", type=int, default=300, help="characters of each prompt and each answer")
    add_options(parser, SIDES)
    options = parser.parse_args()
    if options.run:
        figures = SIDES[options.run](options.source, options.out)
        figures["rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(figures))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as parent:
        folder = Path(parent) / "files"
        folder.mkdir()
        write_input(folder, options)
        size = sum(path.stat().st_size for path in folder.rglob("*.answers")) / 1e6
        print(
            f"{options.rows:,} rows, {options.answers:,} answers in {options.segments} segments, {size:,.0f} MB"
        )
        runs = run_in_turns(__file__, SIDES, folder, options.repeat)
    base = min(run["rss"] for run in runs["imports"])
    best = {side: min(found, key=lambda run: run["cpu"]) for side, found in runs.items()}
    for side in ("ours", "one dict"):
        rss = max(run["rss"] for run in runs[side])
        print(
            f"{side:9} {best[side]['cpu']:7.2f} CPU seconds, {best[side]['seconds']:7.2f} s wall time, peak RSS "
            f"{rss:8.1f} MiB ({max(rss - base, 0):.1f} over imports and split), {best[side]['found']:,.0f} found"
        )
    if best["ours"]["found"] != best["one dict"]["found"]:
        raise SystemExit(f"the sides disagree: {best}")
    peer = best["one dict"]
    print(f"the dict without reading it: {peer['lookup_cpu']:.2f} CPU seconds, {peer['lookup']:.2f} s")
    print(
        f"ratio by CPU {peer['cpu'] / best['ours']['cpu']:.2f}x (goal 1x), "
        f"{peer['lookup_cpu'] / best['ours']['cpu']:.2f}x if the dict were there already"
    )


if __name__ == "__main__":
    main()
