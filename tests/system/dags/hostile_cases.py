"""What a hostile account answers to every poll; shared by the DAG `hostile` and its test."""

from __future__ import annotations

import os
from typing import Any

#: Honest waits beside the hostile ones.
WAITS = 50 if os.environ.get("EXHAUSTIVE") else 10

#: Answers that say nothing readable about the batch.
UNREADABLE: dict[str, dict[str, Any]] = {
    "huge": {"kind": "huge", "bytes": 500_000_000, "chunked": True},
    "huge-junk": {"kind": "huge", "bytes": 500_000_000, "fill": "junk"},
    "gzip-bomb": {"kind": "gzip-bomb", "bytes": 500_000_000},
    "drip": {"kind": "drip", "every": 0.3},
    "endless": {"kind": "endless", "seconds": 3600.0},
    "endless-continue": {"kind": "endless-continue", "seconds": 3600.0},
    "many-headers": {"kind": "many-headers", "count": 1_000_000},
    "another-batch": {"kind": "rewrite", "merge": {"id": "batch_of_somebody_else", "status": "completed"}},
    "deep": {"kind": "rewrite", "raw": '{"id":' + "[" * 200_000},
}

#: Answers that are odd or slow, and say that the batch has ended.
READABLE: dict[str, dict[str, Any]] = {
    "drip-headers": {"kind": "drip-headers", "every": 0.3},
    "long-error": {"kind": "rewrite", "merge": {"errors": {"$text": 1_000_000}}},
    "numbers": {
        "kind": "rewrite",
        "merge": {"created_at": {"$digits": 400}, "completed_at": {"$digits": 400}},
    },
    "texts": {
        "kind": "rewrite",
        "merge": {"metadata": {"a": "\x00\ud800", "b\x00": "\udfff"}, "endpoint": "\x00"},
    },
    "nested": {"kind": "rewrite", "merge": {"errors": {"$nested": 500}, "metadata": {"$nested": 500}}},
}

HOSTILE = UNREADABLE | READABLE
