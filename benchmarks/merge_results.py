"""
Merging results into input order: seconds and peak RSS, compared with one dict of rows read with ``json.loads``.

    python benchmarks/merge_results.py --rows 200000 --chars 600

Both sides read the same shards of 5,000 rows and their shuffled result files, write every result in input order and
return the same counts. The sides take turns, each run in a separate process; the best time of each side counts.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from pathlib import Path

from _sides import add_options, run_in_turns

SHARD_ROWS = 5000


def write_input(folder: Path, rows: int, chars: int, language: str) -> None:
    sentence = {
        "en": 'The quick brown fox jumps over the "lazy" dog.\n',
        "zh": "今天天气很好，我们去公园散步吧。\n",
    }
    text = (sentence[language] * (chars // len(sentence[language]) + 1))[:chars]
    shuffle = random.Random(7).shuffle
    for index, first in enumerate(range(0, rows, SHARD_ROWS)):
        shard, outputs, errors = [], [], []
        for row in range(first, min(first + SHARD_ROWS, rows)):
            custom_id = f"request-{row}"
            messages = [{"role": "user", "content": f"{row} {text}"}]
            body = {"model": "Qwen/Qwen3-8B", "messages": messages}
            shard.append(
                {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}
            )
            if row % 100 == 1:
                error = {"code": "500", "message": "Internal error"}
                errors.append({"id": f"r{row}", "custom_id": custom_id, "response": None, "error": error})
                continue
            message = {"role": "assistant", "content": f"{text} {row}", "reasoning_content": "hm"}
            completion = {
                "id": f"chatcmpl-{row}",
                "object": "chat.completion",
                "created": 1741685413,
                "model": "Qwen/Qwen3-8B",
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {
                    "prompt_tokens": 200,
                    "completion_tokens": 180,
                    "total_tokens": 380,
                    "completion_tokens_details": {"reasoning_tokens": 2},
                },
            }
            response = {"status_code": 200, "request_id": f"q{row}", "body": completion}
            outputs.append({"id": f"r{row}", "custom_id": custom_id, "response": response, "error": None})
        shuffle(outputs)
        for name, lines in (("shard", shard), ("output", outputs), ("error", errors)):
            with (folder / f"{name}-{index:05d}.jsonl").open("w", encoding="utf-8") as out:
                out.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def ours(folder: Path, out: Path) -> dict[str, int]:
    from airflow_provider_siliconflow.batch_files.merge import BatchFiles, merge_shard
    from airflow_provider_siliconflow.batch_files.tally import ModelTally

    tally = ModelTally()
    with (out / "results.jsonl").open("wb") as results, (out / "errors.jsonl").open("wb") as errors:
        for shard in sorted(folder.glob("shard-*.jsonl")):
            part = shard.name[len("shard") :]
            batch = BatchFiles(folder / f"output{part}", folder / f"error{part}")
            tally.add(merge_shard(shard, [batch], results, errors).tally)
    return {"ok": tally.ok, "tokens": tally.usage.total, **tally.finish_reasons}


def stdlib(folder: Path, out: Path) -> dict[str, int]:
    rows = {}
    for kind in ("output", "error"):
        for path in sorted(folder.glob(f"{kind}-*.jsonl")):
            with path.open(encoding="utf-8") as lines:
                for line in lines:
                    row = json.loads(line)
                    rows[row["custom_id"]] = row
    counts = {"ok": 0, "tokens": 0}
    with (
        (out / "results.jsonl").open("w", encoding="utf-8") as results,
        (out / "errors.jsonl").open("w", encoding="utf-8") as errors,
    ):
        for shard in sorted(folder.glob("shard-*.jsonl")):
            with shard.open(encoding="utf-8") as asked:
                for line in asked:
                    row = rows[json.loads(line)["custom_id"]]
                    text = json.dumps(row, ensure_ascii=False) + "\n"
                    results.write(text)
                    if row["error"]:
                        errors.write(text)
                        continue
                    body = row["response"]["body"]
                    counts["ok"] += 1
                    counts["tokens"] += body["usage"]["total_tokens"]
                    reason = body["choices"][0]["finish_reason"]
                    counts[reason] = counts.get(reason, 0) + 1
    return counts


def nothing(folder: Path, out: Path) -> dict[str, int]:
    """Only the imports: the baseline for memory."""
    import airflow_provider_siliconflow.batch_files.merge  # noqa: F401

    return {}


SIDES = {"ours": ours, "dict of rows": stdlib, "imports": nothing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--chars", type=int, default=600, help="characters of each prompt and each answer")
    parser.add_argument("--language", choices=["en", "zh"], default="en")
    add_options(parser, SIDES)
    options = parser.parse_args()
    if options.run:
        if options.run == "ours":
            nothing(options.source, options.out)
        start, cpu = time.perf_counter(), time.process_time()
        counts = SIDES[options.run](options.source, options.out)
        figures = {
            "seconds": time.perf_counter() - start,
            "cpu": time.process_time() - cpu,
            "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "counts": counts,
        }
        print(json.dumps(figures))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as parent:
        folder = Path(parent) / "files"
        folder.mkdir()
        write_input(folder, options.rows, options.chars, options.language)
        megabytes = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
        print(f"{options.rows:,} rows, {megabytes:,.0f} MB of shards and results, {options.language}")
        runs = run_in_turns(__file__, SIDES, folder, options.repeat)
    base = min(run["rss"] for run in runs["imports"])
    best = {}
    for side in ("ours", "dict of rows"):
        best[side] = min(runs[side], key=lambda run: run["cpu"])
        rss = max(run["rss"] for run in runs[side])
        wall = min(run["seconds"] for run in runs[side])
        print(
            f"{side:12} {best[side]['cpu']:7.2f} CPU seconds, {wall:7.2f} s wall time, peak RSS {rss:8.1f} MiB"
            f" ({rss - base:.1f} over the imports)"
        )
    if best["ours"]["counts"] != best["dict of rows"]["counts"]:
        raise SystemExit(f"the sides disagree: {best}")
    print(f"ratio by CPU {best['dict of rows']['cpu'] / best['ours']['cpu']:.2f}x (goal 5x)")


if __name__ == "__main__":
    main()
