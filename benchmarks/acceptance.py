"""
Judging answers while they are merged: CPU seconds, compared with the plain merge of the same files.

    python benchmarks/acceptance.py --rows 200000

All sides merge the same shards of 5,000 rows and their shuffled result files into input order. ``pydantic`` checks each
answer against a model of five fields, ``json schema`` against its schema, ``accept`` calls a function with each result;
``merge, then parse`` is what one would write without this: the plain merge, and then ``BatchResult.parse`` over the
results. The sides take turns, each run in a separate process; the best time of each side counts.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHARD_ROWS = 5000
FILLER = "The parcel came late and the box was torn, but the lamp itself works. "


def answer_of(row: int, chars: int) -> str:
    """Return an answer of five fields; one in fifty has a wrong one."""
    answer = {
        "product": f"lamp {row}",
        "stars": 9 if row % 50 == 7 else row % 5 + 1,
        "mood": ("good", "bad")[row % 2],
        "price": row % 1000 / 8,
        "summary": (FILLER * (chars // len(FILLER) + 1))[:chars],
    }
    return json.dumps(answer, ensure_ascii=False)


def write_input(folder: Path, rows: int, chars: int) -> None:
    shuffle = random.Random(7).shuffle
    for index, first in enumerate(range(0, rows, SHARD_ROWS)):
        shard, outputs = [], []
        for row in range(first, min(first + SHARD_ROWS, rows)):
            custom_id = f"request-{row}"
            body = {"model": "deepseek-ai/DeepSeek-V3", "messages": [{"role": "user", "content": f"{row}"}]}
            shard.append(
                {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}
            )
            completion = {
                "id": f"chatcmpl-{row}",
                "object": "chat.completion",
                "created": 1741685413,
                "model": "deepseek-ai/DeepSeek-V3",
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": answer_of(row, chars)},
                        "finish_reason": "stop",
                    }
                ],
                "usage": {"prompt_tokens": 200, "completion_tokens": 80, "total_tokens": 280},
            }
            outputs.append(
                {"id": f"r{row}", "custom_id": custom_id, "response": {"body": completion}, "error": None}
            )
        shuffle(outputs)
        for name, lines in (("shard", shard), ("output", outputs)):
            with (folder / f"{name}-{index:05d}.jsonl").open("w", encoding="utf-8") as out:
                out.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def review_model() -> Any:
    from typing import Literal

    from pydantic import BaseModel, Field

    class Review(BaseModel):
        product: str
        stars: int = Field(ge=1, le=5)
        mood: Literal["good", "bad"]
        price: float
        summary: str

    return Review


def acceptance(side: str) -> Any:
    from airflow_provider_siliconflow.jobs.acceptance import check_acceptance

    given: dict[str, Any] = {"output_type": None, "accept": None}
    if side == "pydantic":
        given["output_type"] = review_model()
    elif side == "json schema":
        given["output_type"] = review_model().model_json_schema()
    elif side == "accept":
        given["accept"] = lambda result: '"stars": 9' not in result.text
    return check_acceptance(structured_output=None, retry_params=None, **given)


def merged(side: str, folder: Path, out: Path) -> int:
    """Return how many rows are accepted."""
    from airflow_provider_siliconflow.batch_files.merge import BatchFiles, merge_shard
    from airflow_provider_siliconflow.batch_files.tally import ModelTally

    judge = acceptance(side).judge
    tally = ModelTally()
    with (out / "results.jsonl").open("wb") as results, (out / "errors.jsonl").open("wb") as errors:
        for shard in sorted(folder.glob("shard-*.jsonl")):
            batch = BatchFiles(folder / shard.name.replace("shard", "output"), None)
            tally.add(merge_shard(shard, [batch], results, errors, judge=judge).tally)
    return tally.ok


def merged_then_parsed(folder: Path, out: Path) -> int:
    import pydantic

    from airflow_provider_siliconflow.results import read_results

    merged("merge", folder, out)
    review = review_model()
    accepted = 0
    for row in read_results(out / "results.jsonl"):
        try:
            row.parse(review)
            accepted += 1
        except pydantic.ValidationError:
            pass
    return accepted


SIDES = ("merge", "pydantic", "json schema", "accept", "merge, then parse")


def run(side: str, folder: Path, out: Path) -> None:
    # The imports are no part of it.
    import airflow_provider_siliconflow.batch_files.merge  # noqa: F401

    for each in SIDES:
        acceptance(each)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu = time.perf_counter(), time.process_time()
    accepted = merged_then_parsed(folder, out) if side == SIDES[-1] else merged(side, folder, out)
    figures = {
        "seconds": time.perf_counter() - start,
        "cpu": time.process_time() - cpu,
        "rss": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
        "accepted": accepted,
    }
    print(json.dumps(figures))


def measure(side: str, folder: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=folder.parent) as out:
        command = [sys.executable, __file__, "--run", side, "--source", str(folder), "--out", out]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(result.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--chars", type=int, default=200, help="characters of the longest field")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--folder", help="folder for the files (default: the temporary folder)")
    parser.add_argument("--run", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run(options.run, options.source, options.out)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as parent:
        folder = Path(parent) / "files"
        folder.mkdir()
        write_input(folder, options.rows, options.chars)
        megabytes = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
        print(f"{options.rows:,} rows, {megabytes:,.0f} MB of shards and results")
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(options.repeat):
            for side, found in runs.items():
                found.append(measure(side, folder))
    best = {side: min(found, key=lambda each: each["cpu"]) for side, found in runs.items()}
    for side, figures in best.items():
        print(
            f"{side:18} {figures['cpu']:7.2f} CPU seconds, {figures['seconds']:7.2f} s wall time, "
            f"{figures['rss']:6.1f} MiB over the imports, {figures['cpu'] / best['merge']['cpu']:.2f}x the merge"
        )
    wrong = sum(row % 50 == 7 for row in range(options.rows))
    for side in SIDES[1:]:
        if best[side]["accepted"] != options.rows - wrong:
            raise SystemExit(f"{side} accepts {best[side]['accepted']} of {options.rows} rows")
    print(f"ratio by CPU {best['pydantic']['cpu'] / best['merge']['cpu']:.2f}x (goal 2x)")


if __name__ == "__main__":
    main()
