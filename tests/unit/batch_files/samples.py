"""Request and result lines for the tests, and files of them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from airflow_provider_siliconflow.batch_files.merge import BatchFiles, MergedShard, merge_shard

USER = [{"role": "user", "content": "hi"}]


def line(custom_id: Any = "a", **over: Any) -> bytes:
    return json.dumps({"custom_id": custom_id, "body": {"messages": USER}, **over}).encode() + b"\n"


class Bytes:
    def __init__(self, data: bytes, step: int = 1 << 20) -> None:
        self.data, self.step, self.at = data, step, 0

    def open(self, mode: str) -> Any:
        assert mode == "rb"
        return self

    def __enter__(self) -> Any:
        self.at = 0
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def read(self, size: int = -1) -> bytes:
        chunk = self.data[self.at : self.at + min(size, self.step)]
        self.at += len(chunk)
        return chunk


def prompts(count: int) -> list[dict[str, Any]]:
    return [
        {"custom_id": f"id-{n}", "messages": [{"role": "user", "content": "x" * n}]} for n in range(count)
    ]


def answer(
    custom_id: Any,
    text: str | None = "yes",
    *,
    finish: Any = "stop",
    model: Any = "m",
    usage: tuple[Any, Any] = (10, 2),
    **more: Any,
) -> dict[str, Any]:
    body = {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}],
        "model": model,
        "usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)},
    }
    return {"id": "x", "custom_id": custom_id, "response": {"body": body}, "error": None, **more}


def failure(custom_id: Any, code: Any = "500", message: Any = "Internal error") -> dict[str, Any]:
    return {"id": "x", "custom_id": custom_id, "response": None, "error": {"code": code, "message": message}}


class Folder:
    """A shard of some rows, and result files for it."""

    def __init__(self, path: Path, ids: list[str]) -> None:
        self.path = path
        self.shard = path / "shard.jsonl"
        rows = [{"custom_id": each, "body": {"messages": [], "model": "m"}} for each in ids]
        self.shard.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.count = 0

    def batch(self, output: Any = None, errors: Any = None, **more: Any) -> BatchFiles:
        return BatchFiles(self.file(output), self.file(errors), **more)

    def file(self, lines: Any) -> Any:
        if lines is None:
            return None
        self.count += 1
        path = self.path / f"result-{self.count}.jsonl"
        lines = [each if isinstance(each, bytes) else json.dumps(each).encode() for each in lines]
        path.write_bytes(b"".join(each + b"\n" for each in lines))
        return path

    def merge(self, *batches: BatchFiles, **options: Any) -> tuple[MergedShard, list[bytes], list[bytes]]:
        results, errors = io.BytesIO(), io.BytesIO()
        merged = merge_shard(self.shard, batches, results, errors, **options)
        return merged, results.getvalue().splitlines(), errors.getvalue().splitlines()


def ids(lines: list[bytes]) -> list[str]:
    return [json.loads(line)["custom_id"] for line in lines]
