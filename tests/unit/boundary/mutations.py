"""Answers of the service, changed in type, size, order, number, time, text and depth."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from airflow_provider_siliconflow.api import protocol

SIGNED = "https://bucket.example/o.jsonl?X-Signature=SECRETSIGNATURE"
HEADER = "header-value-9876543210"
#: Secrets that must not come out again.
SECRETS = ("sk-test-0123456789abcdef", HEADER, "SECRETSIGNATURE")

BATCH = {
    "id": "batch_1",
    "object": "batch",
    "endpoint": "/v1/chat/completions",
    "errors": None,
    "input_file_id": "file-jkvytbjtow",
    "completion_window": "24h",
    "status": "completed",
    "output_file_id": SIGNED,
    "error_file_id": None,
    "created_at": 1741685413,
    "in_progress_at": 1741685414,
    "expires_at": 1741771813,
    "completed_at": 1741685500,
    "request_counts": {"total": 12, "completed": 11, "failed": 1},
    "metadata": {"description": "nightly eval job", "airflow_identity": "0123456789abcdef"},
}
FILE = {
    "id": "file-1",
    "object": "file",
    "bytes": 8509,
    "createdAt": 1741685396,
    "filename": "requests.jsonl",
    "purpose": "batch",
    "line_count": 2,
}
ACCOUNT = {
    "id": "userid",
    "name": "",
    "balance": "0.88",
    "status": "normal",
    "chargeBalance": "88.00",
    "totalBalance": "88.88",
}
PAGE = {"object": "list", "data": [BATCH, BATCH | {"id": "batch_2"}], "has_more": False}


def envelope(data: Any) -> dict[str, Any]:
    return {"code": 20000, "message": "Ok", "status": True, "data": data}


def creation() -> protocol.Call[Any]:
    return protocol.create_batch(
        input_file_id="file-1",
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata=None,
        replace=None,
    )


#: Every call, by name, with a documented answer to it.
CALLS: dict[str, tuple[protocol.Call[Any], Any]] = {
    "create": (creation(), BATCH),
    "get": (protocol.get_batch("batch_1"), BATCH),
    "cancel": (protocol.cancel_batch("batch_1"), BATCH),
    "list": (protocol.list_batches(), PAGE),
    "upload": (protocol.upload_file(), envelope(FILE)),
    "files": (protocol.list_files(), envelope({"data": [FILE], "object": "file"})),
    "account": (protocol.get_account(), envelope(ACCOUNT)),
    "models": (protocol.list_models(), {"object": "list", "data": [{"id": "a/b", "object": "model"}]}),
}

texts = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        [
            "",
            "\0",
            "a\0b",
            "\ud800",
            "cut \ud83d",
            "batch_1",
            "completed",
            "x" * 100_000,
            "\u4f60" * 3000,
            "9" * 400,
            "{",
            '{"a": 1}',
            "2025-03-11T00:00:00Z",
            f"Authorization: Bearer {SECRETS[0]}",
            f"key={SECRETS[0]}&x=1",
            SECRETS[0],
            f"{'x' * 995}{HEADER}",
            HEADER,
            SIGNED,
        ]
    ),
)
numbers = st.one_of(
    st.integers(-10, 10**6),
    st.sampled_from([0, -1, 2**63, -(2**63) - 1, 2**64, 10**30, 10**400, -(10**400), 1741685413000]),
    st.floats(),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)


@st.composite
def deep(draw: st.DrawFn) -> Any:
    value: Any = draw(scalars)
    kind = draw(st.integers(1, 3))
    for level in range(draw(st.sampled_from([5, 60, 500, 800]))):
        value = [value] if level % kind else {"a": value}
    return value


@st.composite
def wide(draw: st.DrawFn) -> Any:
    item = draw(scalars)
    number = draw(st.sampled_from([100, 3000]))
    return [item] * number if draw(st.booleans()) else {f"k{n}": item for n in range(number)}


odd = st.one_of(values, values, values, deep(), wide())


@st.composite
def mutated(draw: st.DrawFn, value: Any) -> Any:
    """Return a value with some of its parts changed, gone, or new."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(odd)
    if isinstance(value, dict):
        changed: dict[Any, Any] = {}
        for name, item in value.items():
            fate = draw(st.integers(0, 11))
            if fate == 0:
                continue
            changed[name] = draw(odd) if fate == 1 else draw(mutated(item)) if fate == 2 else item
        for _ in range(draw(st.integers(0, 2))):
            changed[
                draw(st.one_of(texts, st.sampled_from(["data", "error", "code", "message", "batch_id"])))
            ] = draw(odd)
        return changed
    if isinstance(value, list):
        items = [draw(mutated(item)) for item in value] + draw(st.lists(odd, max_size=2))
        return draw(st.permutations(items))
    return value if kind < 7 else draw(odd)


@st.composite
def answers(draw: st.DrawFn) -> tuple[str, int, dict[str, str], bytes]:
    """Return the name of a call, and the status, headers and body of an answer to it."""
    name = draw(st.sampled_from(sorted(CALLS)))
    data = draw(mutated(CALLS[name][1]))
    wrapped = draw(
        st.sampled_from([lambda x: x, lambda x: x, envelope, lambda x: [x], lambda x: {"data": {"data": x}}])
    )
    body = json.dumps(wrapped(data), ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 9)) == 0:
        body = body[: draw(st.integers(0, len(body)))]
    status = draw(
        st.sampled_from(
            [200, 200, 200, 200, 201, 202, 204, 302, 400, 401, 402, 403, 404, 409, 429, 500, 502, 503]
        )
    )
    headers = {}
    for header in ("x-siliconcloud-trace-id", "Retry-After", "Location", "X-Other"):
        if draw(st.integers(0, 3)) == 0:
            printable = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=300)
            headers[header] = draw(
                st.one_of(printable, st.sampled_from(["9" * 300, "nan", HEADER, SIGNED, SECRETS[0]]))
            )
    return name, status, headers, body
