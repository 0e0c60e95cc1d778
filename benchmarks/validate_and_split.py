"""
Validating and splitting a request file: MB/s and peak RSS, compared with the same checks on ``json.loads``.

    python benchmarks/validate_and_split.py --rows 300000 --chars 900

Both sides read the same file, check every line, remember custom ids to find duplicates, and hash and write shards of
5,000 lines. The sides take turns, each run in a separate process; the best time of each side counts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import tempfile
import time
from pathlib import Path

from _sides import add_options, run_in_turns


def write_input(path: Path, rows: int, chars: int, language: str) -> None:
    sentence = {
        "en": 'The quick brown fox jumps over the "lazy" dog.\n',
        "zh": "今天天气很好，我们去公园散步吧。\n",
    }
    text = (sentence[language] * (chars // len(sentence[language]) + 1))[:chars]
    with path.open("w", encoding="utf-8") as out:
        for row in range(rows):
            line = {
                "custom_id": f"request-{row}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {
                    "model": "Qwen/Qwen3-8B",
                    "messages": [
                        {"role": "system", "content": "You are a careful grader."},
                        {"role": "user", "content": f"{row} {text}"},
                    ],
                    "temperature": 0.2,
                    "max_tokens": 512,
                },
            }
            out.write(json.dumps(line, ensure_ascii=False) + "\n")


def ours(source: Path, work_dir: Path) -> None:
    from airflow_provider_siliconflow.batch_files.shards import split_requests

    split_requests(source, work_dir, name=source.name)


def stdlib(source: Path, work_dir: Path) -> None:
    work_dir.mkdir()
    seen: set[str] = set()
    models: set[str] = set()
    index = rows = tokens = 0
    digest = hashlib.sha256()
    out = (work_dir / f"shard-{index:05d}.jsonl").open("wb")
    with source.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            row = json.loads(line)
            custom_id = row["custom_id"]
            if not isinstance(custom_id, str) or not custom_id or custom_id in seen:
                raise ValueError(number)
            seen.add(custom_id)
            if row.get("method", "POST") != "POST" or row.get("url", "/v1/chat/completions")[:4] != "/v1/":
                raise ValueError(number)
            messages = row["body"]["messages"]
            for message in messages:
                content = message["content"]
                if message["role"] not in ("system", "user", "assistant") or not isinstance(
                    content, str | list
                ):
                    raise ValueError(number)
                tokens += len(content) // 4
            if messages[-1]["role"] != "user":
                raise ValueError(number)
            models.add(row["body"]["model"])
            if rows == 5000:
                out.close()
                index, rows, digest = index + 1, 0, hashlib.sha256()
                out = (work_dir / f"shard-{index:05d}.jsonl").open("wb")
            digest.update(line)
            out.write(line)
            rows += 1
    out.close()


def nothing(source: Path, work_dir: Path) -> None:
    """Only the imports: the baseline for memory."""
    import airflow_provider_siliconflow.batch_files.shards  # noqa: F401


SIDES = {"ours": ours, "stdlib json": stdlib, "imports": nothing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--chars", type=int, default=900, help="characters of each prompt")
    parser.add_argument("--language", choices=["en", "zh"], default="en")
    add_options(parser, SIDES, repeat=3)
    options = parser.parse_args()
    if options.run:
        nothing(options.source, options.out)
        start, cpu = time.perf_counter(), time.process_time()
        SIDES[options.run](options.source, options.out / "shards")
        figures = {
            "seconds": time.perf_counter() - start,
            "cpu": time.process_time() - cpu,
            "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        print(json.dumps(figures))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source = Path(folder) / "requests.jsonl"
        write_input(source, options.rows, options.chars, options.language)
        megabytes = source.stat().st_size / 1e6
        print(f"{options.rows:,} rows, {megabytes:,.0f} MB, {options.language}")
        runs = run_in_turns(__file__, SIDES, source, options.repeat)
    best = {side: min(found, key=lambda run: run["cpu"]) for side, found in runs.items()}
    for side in ("ours", "stdlib json"):
        run = best[side]
        wall = min(each["seconds"] for each in runs[side])
        print(
            f"{side:12} {megabytes / run['cpu']:7.0f} MB per CPU second, {megabytes / wall:7.0f} MB/s wall "
            f"time, peak RSS {max(each['rss'] for each in runs[side]):6.1f} MiB"
        )
    print(f"{'imports':12} peak RSS {best['imports']['rss']:.1f} MiB")
    print(f"ratio by CPU {best['stdlib json']['cpu'] / best['ours']['cpu']:.2f}x (goal 2x)")


if __name__ == "__main__":
    main()
