"""Result files come whole or not at all, input files leave piece by piece."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from airflow_provider_siliconflow.api.client import SiliconFlowClient
from airflow_provider_siliconflow.api.exceptions import (
    AuthenticationError,
    IncompleteResultsError,
    InvalidInputError,
    NoAnswerError,
    ServiceUnavailableError,
)
from airflow_provider_siliconflow.api.protocol import CHUNK_SIZE
from airflow_provider_siliconflow.api.settings import ClientSettings

if TYPE_CHECKING:
    from airflow_provider_siliconflow.emulator import Emulator

MakeSettings = Callable[..., ClientSettings]
#: An API that is not the storage, and not on the internet either: then storage need not be.
ELSEWHERE = "http://127.0.0.1:9/v1"
#: Enough that a file does not fit into the buffers of a socket.
BIG = bytes(range(256)) * 4096 * 3


def no_refresh() -> None:
    return None


@pytest.fixture
def client(make_settings: MakeSettings, emulator: Emulator) -> SiliconFlowClient:
    return SiliconFlowClient(make_settings(emulator.base_url))


@pytest.fixture
def batch_id(emulator: Emulator, rows: Any) -> str:
    """A finished batch of 200 rows."""
    file = emulator.service.add_file("rows.jsonl", "batch", [rows(*["Hi"] * 200)])["data"]
    request = {"endpoint": "/v1/chat/completions", "completion_window": "24h", "input_file_id": file["id"]}
    batch = emulator.service.create_batch(request)
    emulator.service.advance(1000)
    return str(batch["id"])


def results_of(emulator: Emulator, batch_id: str) -> bytes:
    return emulator.service.open_results(batch_id, "output").read_bytes()


def output(client: SiliconFlowClient, batch_id: str) -> str:
    return client.get_batch(batch_id).output_file_id or ""


def test_a_cut_download_goes_on_where_it_broke(
    client: SiliconFlowClient, emulator: Emulator, batch_id: str
) -> None:
    # More cuts than retries: what counts is that each try gets further.
    client = SiliconFlowClient(ClientSettings("sk-1", emulator.base_url, backoff=0.01, max_retries=1))
    emulator.faults.add("GET storage:cut=5000,times=6")
    whole = b"".join(client.iter_file(output(client, batch_id), no_refresh))
    assert whole == results_of(emulator, batch_id)
    assert emulator.request_counts["GET storage"] == 7


def test_a_download_that_never_gets_further_ends(
    client: SiliconFlowClient, emulator: Emulator, batch_id: str
) -> None:
    emulator.faults.add("GET storage:cut=0,times=-1")
    client = SiliconFlowClient(ClientSettings("sk-1", emulator.base_url, backoff=0.01, max_retries=2))
    with pytest.raises(NoAnswerError):
        list(client.iter_file(output(client, batch_id), no_refresh))
    assert emulator.request_counts["GET storage"] == 3


@pytest.mark.parametrize("fault", ["status=503", "html=502", "reset", "status=429"])
def test_a_storage_that_fails_for_a_while(
    client: SiliconFlowClient, emulator: Emulator, batch_id: str, fault: str
) -> None:
    emulator.faults.add(f"GET storage:{fault},times=2")
    whole = b"".join(client.iter_file(output(client, batch_id), no_refresh))
    assert whole == results_of(emulator, batch_id)


def test_a_refusal_that_is_cut_is_still_a_refusal(make_settings: MakeSettings, recorder: Any) -> None:
    make = type(recorder.answer(None))
    recorder.answer = lambda seen: make(502, b"<html>", announce=500)
    client = SiliconFlowClient(make_settings(ELSEWHERE, max_retries=1))
    with pytest.raises(ServiceUnavailableError):
        list(client.iter_file(f"{recorder.url}/out", no_refresh))
    assert len(recorder.seen) == 2


def serve(recorder: Any, contents: list[bytes], *, ranges: bool, etags: list[str | None]) -> None:
    """Serve a file, of each answer but the last only the first half of what was asked for."""
    make = type(recorder.answer(None))

    def answer(seen: Any) -> Any:
        number = min(len(recorder.seen), len(contents)) - 1
        content, etag = contents[number], etags[min(number, len(etags) - 1)]
        asked = re.fullmatch(r"bytes=(\d+)-", seen.headers.get("range", "")) if ranges else None
        start = int(asked[1]) if asked else 0
        rest = content[start:]
        sent = rest if len(recorder.seen) >= len(contents) else rest[: len(rest) // 2]
        headers = {"ETag": etag} if etag else {}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return make(206 if asked else 200, sent, headers, announce=len(rest))

    recorder.answer = answer


@pytest.mark.parametrize("ranges", [True, False])
def test_a_storage_with_or_without_ranges(make_settings: MakeSettings, recorder: Any, ranges: bool) -> None:
    serve(recorder, [BIG] * 4, ranges=ranges, etags=[None])
    client = SiliconFlowClient(make_settings(ELSEWHERE))
    assert b"".join(client.iter_file(f"{recorder.url}/out", no_refresh)) == BIG
    asked = [seen.headers.get("range", "bytes=0-") for seen in recorder.seen]
    starts = [int(span.removeprefix("bytes=").removesuffix("-")) for span in asked]
    half = len(BIG) // 2
    assert starts == ([0, half, half * 3 // 2, half * 7 // 4] if ranges else [0, half, half, half])


@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_that_changes_under_the_download_is_not_patched_together(
    make_settings: MakeSettings, recorder: Any, ranges: bool
) -> None:
    serve(recorder, [BIG, BIG[::-1]], ranges=ranges, etags=['"one"', '"two"'])
    client = SiliconFlowClient(make_settings(ELSEWHERE))
    with pytest.raises(IncompleteResultsError, match="changed"):
        list(client.iter_file(f"{recorder.url}/out", no_refresh))
    assert recorder.seen[1].headers["if-range"] == '"one"'


def test_another_range_than_asked_for_is_not_taken(make_settings: MakeSettings, recorder: Any) -> None:
    make = type(recorder.answer(None))

    def answer(seen: Any) -> Any:
        if "range" not in seen.headers:
            return make(200, BIG[:1000], announce=len(BIG))
        return make(206, BIG[500:], {"Content-Range": f"bytes 500-{len(BIG) - 1}/{len(BIG)}"})

    recorder.answer = answer
    client = SiliconFlowClient(make_settings(ELSEWHERE, max_retries=1))
    with pytest.raises(NoAnswerError, match="range"):
        list(client.iter_file(f"{recorder.url}/out", no_refresh))


def test_a_storage_that_answers_less_than_asked_for(make_settings: MakeSettings, recorder: Any) -> None:
    make = type(recorder.answer(None))

    def answer(seen: Any) -> Any:
        start = int(seen.headers.get("range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        if not start:
            return make(200, BIG[:1000], announce=len(BIG))
        end = min(start + len(BIG) // 3, len(BIG))
        return make(206, BIG[start:end], {"Content-Range": f"bytes {start}-{end - 1}/{len(BIG)}"})

    recorder.answer = answer
    client = SiliconFlowClient(make_settings(ELSEWHERE, max_retries=1))
    assert b"".join(client.iter_file(f"{recorder.url}/out", no_refresh)) == BIG


def parts_of(content: bytes, length: int, *, first: Any, size: str) -> Callable[[Any], Any]:
    """Answers ``first``, then at most ``length`` bytes from where it is asked, of a file said to be of ``size``."""

    def answer(seen: Any) -> Any:
        if "range" not in seen.headers:
            return first
        start = int(seen.headers["range"].removeprefix("bytes=").removesuffix("-"))
        make = type(first)
        if start >= len(content):
            return make(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        end = min(start + length, len(content))
        return make(206, content[start:end], {"Content-Range": f"bytes {start}-{end - 1}/{size}"})

    return answer


@pytest.mark.parametrize("known", [True, False])
def test_a_storage_that_does_not_tell_the_size_with_a_range(
    make_settings: MakeSettings, recorder: Any, known: bool
) -> None:
    content = BIG[:5000]
    headers = {} if known else {"Transfer-Encoding": "chunked"}
    body = content[:1000] if known else b"3e8\r\n" + content[:1000] + b"\r\n"
    first = recorder.Answer(200, body, headers, announce=len(content))
    recorder.answer = parts_of(content, 1500, first=first, size="*")
    client = SiliconFlowClient(make_settings(ELSEWHERE, max_retries=1))
    assert b"".join(client.iter_file(f"{recorder.url}/out", no_refresh)) == content


def test_a_file_of_another_size_is_another_file(make_settings: MakeSettings, recorder: Any) -> None:
    first = recorder.Answer(200, BIG[:1000], announce=len(BIG))
    recorder.answer = parts_of(BIG * 2, len(BIG) * 2, first=first, size=str(len(BIG) * 2))
    client = SiliconFlowClient(make_settings(ELSEWHERE))
    with pytest.raises(IncompleteResultsError, match="changed"):
        list(client.iter_file(f"{recorder.url}/out", no_refresh))


def test_nothing_beyond_the_last_byte_is_the_end(make_settings: MakeSettings, recorder: Any) -> None:
    """All bytes came, but not the mark after the last piece that says so."""
    first = recorder.Answer(200, b"3e8\r\n" + BIG[:1000] + b"\r\n", {"Transfer-Encoding": "chunked"})
    recorder.answer = parts_of(BIG[:1000], 1, first=first, size="1000")
    client = SiliconFlowClient(make_settings(ELSEWHERE))
    assert b"".join(client.iter_file(f"{recorder.url}/out", no_refresh)) == BIG[:1000]


def test_a_range_refused_for_a_moment_is_asked_for_again(make_settings: MakeSettings, recorder: Any) -> None:
    first = recorder.Answer(200, BIG[:1000], announce=len(BIG))
    then = parts_of(BIG, len(BIG), first=first, size=str(len(BIG)))
    # A replica that does not have the whole file yet.
    recorder.answer = lambda seen: recorder.Answer(416) if len(recorder.seen) == 2 else then(seen)
    client = SiliconFlowClient(make_settings(ELSEWHERE))
    assert b"".join(client.iter_file(f"{recorder.url}/out", no_refresh)) == BIG


def test_a_storage_that_compresses_unasked(make_settings: MakeSettings, recorder: Any) -> None:
    packed = gzip.compress(BIG[::-1] + BIG)
    head = {"Content-Encoding": "gzip"}

    def answer(seen: Any) -> Any:
        sent = packed[: len(packed) // 2] if len(recorder.seen) < 3 else packed
        return recorder.Answer(200, sent, head, announce=len(packed))

    recorder.answer = answer
    client = SiliconFlowClient(make_settings(ELSEWHERE))
    assert b"".join(client.iter_file(f"{recorder.url}/out", no_refresh)) == BIG[::-1] + BIG
    # Bytes of a compressed file cannot be asked for from the middle.
    assert not any("range" in seen.headers for seen in recorder.seen)


def test_a_compression_nobody_knows_is_not_taken_for_results(
    make_settings: MakeSettings, recorder: Any
) -> None:
    recorder.answer = lambda seen: recorder.Answer(200, b"packed", {"Content-Encoding": "lzma"})
    client = SiliconFlowClient(make_settings(ELSEWHERE, max_retries=0))
    with pytest.raises(NoAnswerError, match="lzma"):
        list(client.iter_file(f"{recorder.url}/out", no_refresh))


def test_an_aged_signature_is_renewed(client: SiliconFlowClient, emulator: Emulator, batch_id: str) -> None:
    aged = output(client, batch_id)
    emulator.service.advance(31 * 86400)
    whole = b"".join(client.iter_file(aged, lambda: output(client, batch_id)))
    assert whole == results_of(emulator, batch_id)


def test_a_signature_that_ages_during_the_download_is_renewed(
    client: SiliconFlowClient, emulator: Emulator, batch_id: str
) -> None:
    emulator.faults.add("GET storage:cut=5000,times=1")
    pieces = client.iter_file(output(client, batch_id), lambda: output(client, batch_id))
    first = next(pieces)
    emulator.service.advance(31 * 86400)
    assert first + b"".join(pieces) == results_of(emulator, batch_id)


def test_a_storage_that_refuses_even_a_fresh_url_leaves_hope(
    client: SiliconFlowClient, emulator: Emulator, batch_id: str
) -> None:
    """The rows are paid for: the task's own retries must get their chance."""
    emulator.faults.add("GET storage:status=403,times=-1")
    with pytest.raises(IncompleteResultsError) as caught:
        list(client.iter_file(output(client, batch_id), lambda: output(client, batch_id)))
    assert caught.value.retryable
    assert emulator.request_counts["GET storage"] == 2


@pytest.mark.emulator(results_as_file_ids=True)
def test_results_named_by_a_file_id(client: SiliconFlowClient, emulator: Emulator, batch_id: str) -> None:
    reference = output(client, batch_id)
    assert "://" not in reference
    assert b"".join(client.iter_file(reference, no_refresh)) == results_of(emulator, batch_id)
    emulator.faults.add("GET /files/*/content:status=401,times=-1")
    with pytest.raises(AuthenticationError):
        list(client.iter_file(reference, no_refresh))


# Uploads ----------------------------------------------------------------------------------------------------


class Source:
    """A file that is made while it is read, and says how."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.opened = 0
        self.largest_read = 0

    def open(self, mode: str = "rb") -> Any:
        import io

        self.opened += 1
        source = self

        class Stream(io.BytesIO):
            def read(self, size: int | None = -1, /) -> bytes:
                data = super().read(size)
                source.largest_read = max(source.largest_read, len(data))
                return data

        return Stream(self.content)


def stored(emulator: Emulator, file_id: str) -> bytes:
    return emulator.service.open_content(file_id).read_bytes()


@pytest.mark.parametrize("flat", [False, True])
def test_an_upload_is_streamed_and_arrives_as_it_is(
    client: SiliconFlowClient, emulator: Emulator, rows: Any, flat: bool
) -> None:
    emulator.service.configure({"flat_files": flat})
    source = Source(rows("x" * (5 << 20), "\u4f60\u597d\r\n--boundary--"))
    file = client.upload_file(source, size=len(source.content), filename="rows.jsonl")
    assert stored(emulator, file.id) == source.content
    assert (file.filename, file.bytes) == ("rows.jsonl", len(source.content))
    assert source.largest_read <= CHUNK_SIZE


def test_an_upload_that_was_refused_is_sent_again_from_its_beginning(
    client: SiliconFlowClient, emulator: Emulator, rows: Any
) -> None:
    emulator.faults.add("POST /files:status=429,times=2")
    source = Source(rows("Hi"))
    file = client.upload_file(source, size=len(source.content), filename="rows.jsonl")
    assert stored(emulator, file.id) == source.content
    assert source.opened == 3


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_that_changes_its_size_during_the_upload_is_not_stored(
    client: SiliconFlowClient, emulator: Emulator, rows: Any, change: int
) -> None:
    content = rows("Hi", "there")
    source = Source(content if change < 0 else content + content)
    size = len(content) + 1 if change < 0 else len(content)
    with pytest.raises(InvalidInputError, match="nothing was created"):
        client.upload_file(source, size=size, filename="rows.jsonl")
    assert emulator.service.state()["files"] == []


def test_a_file_name_cannot_break_out_of_its_header(
    client: SiliconFlowClient, emulator: Emulator, rows: Any
) -> None:
    content = rows("Hi")
    name = 'a"; name="purpose"\r\n\r\nX\u00e9.jsonl'
    file = client.upload_file(Source(content), size=len(content), filename=name)
    (listed,) = emulator.service.state()["files"]
    assert listed["purpose"] == "batch"
    assert stored(emulator, file.id) == content


def test_an_upload_without_an_answer_is_not_sent_again(
    client: SiliconFlowClient, emulator: Emulator, rows: Any
) -> None:
    emulator.faults.add("POST /files:reset-after")
    content = rows("Hi")
    with pytest.raises(NoAnswerError):
        client.upload_file(Source(content), size=len(content), filename="rows.jsonl")
    assert emulator.request_counts["POST /files"] == 1
