"""Size, time, number and depth of whatever is answered: each has a limit, in the worker and in the triggerer."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gzip
import itertools
import json
import os
import resource
import socket
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from typing import Any

import pytest

from airflow_provider_siliconflow.api import answers, protocol
from airflow_provider_siliconflow.api.async_client import AsyncSiliconFlowClient, _Turns
from airflow_provider_siliconflow.api.client import SiliconFlowClient
from airflow_provider_siliconflow.api.exceptions import (
    APIError,
    InsufficientBalanceError,
    NoAnswerError,
    ServiceUnavailableError,
    SiliconFlowError,
    UnexpectedAnswerError,
)
from airflow_provider_siliconflow.api.exchanges import Exchange, watchdog
from airflow_provider_siliconflow.api.models import Batch
from tests.unit.boundary.hostile import (
    BATCH,
    KEY,
    Ask,
    Server,
    answer,
    ask_sync,
    creation,
    make_settings,
    read_request,
    serving,
)

pytestmark = pytest.mark.usefixtures("no_proxies")

MB = 1 << 20
#: What is on its way when a connection is closed: buffers of both sides.
IN_FLIGHT = 16 * MB
GET = protocol.get_batch("batch_1")


# Size -------------------------------------------------------------------------------------------------------


def whole(size: int) -> Iterator[bytes]:
    yield answer(b"", Content_Length=str(size))
    yield from itertools.repeat(b" " * MB, size // MB)


def chunked(size: int) -> Iterator[bytes]:
    yield answer(b"", Transfer_Encoding="chunked")
    yield from itertools.repeat(b"%x\r\n" % MB + b" " * MB + b"\r\n", size // MB)


def unannounced(size: int) -> Iterator[bytes]:
    yield b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
    yield from itertools.repeat(b" " * MB, size // MB)


@functools.cache
def packed(size: int) -> bytes:
    packer = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    return b"".join(packer.compress(b" " * MB) for _ in range(size // MB)) + packer.flush()


def bomb(size: int) -> Iterator[bytes]:
    yield answer(packed(size), Content_Encoding="gzip")


@pytest.mark.parametrize("form", [whole, chunked, unannounced, bomb])
def test_an_answer_beyond_its_limit_is_not_read(ask: Ask, form: Any) -> None:
    with serving(b"") as server:
        server.serve = lambda connection, request: server.flood(connection, form(200 * MB))
        with pytest.raises(UnexpectedAnswerError, match="more than 4194304 bytes") as caught:
            ask(make_settings(server.url), GET)
    assert server.sent < answers.MAX_ANSWER_BYTES + IN_FLIGHT
    assert protocol.is_transient(caught.value)


@pytest.mark.parametrize("form", [chunked, bomb])
def test_a_creation_whose_answer_is_too_large_may_have_been_accepted(ask: Ask, form: Any) -> None:
    with serving(b"") as server:
        server.serve = lambda connection, request: server.flood(connection, form(200 * MB))
        with pytest.raises(UnexpectedAnswerError) as caught:
            ask(make_settings(server.url, max_retries=3), creation())
    assert caught.value.accepted
    assert len(server.requests) == 1


def test_a_list_may_be_longer_and_has_a_limit_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    body = json.dumps({"data": [BATCH], "has_more": False}).encode()
    with serving(answer(body + b" " * 6 * MB)) as server:
        assert len(ask_sync(make_settings(server.url), protocol.list_batches()).items) == 1
        monkeypatch.setattr(answers, "MAX_LIST_BYTES", 5 * MB)
        with pytest.raises(UnexpectedAnswerError):
            ask_sync(make_settings(server.url), protocol.list_batches())


def negative_chunk(size: int) -> Iterator[bytes]:
    yield answer(b"", Transfer_Encoding="chunked") + b"-1\r\n"
    yield from itertools.repeat(b" " * MB, size // MB)


def test_a_negative_length_is_not_the_length_of_everything(ask: Ask) -> None:
    with serving(b"") as server:
        server.serve = lambda connection, request: server.flood(connection, negative_chunk(200 * MB))
        with pytest.raises(NoAnswerError):
            ask(make_settings(server.url), GET)
        with SiliconFlowClient(make_settings(server.url)) as client, pytest.raises(NoAnswerError):
            list(client.iter_file(f"{server.url}/out", lambda: None, limit=MB))
    assert server.sent < 2 * IN_FLIGHT


@pytest.mark.parametrize("form", [whole, chunked, bomb])
def test_the_body_of_a_redirect_is_not_read(ask: Ask, form: Any) -> None:
    def redirect(size: int) -> Iterator[bytes]:
        for number, piece in enumerate(form(size)):
            yield piece if number else piece.replace(b"200 X", b"302 X\r\nLocation: http://127.0.0.1/", 1)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with serving(b"") as server:
        server.serve = lambda connection, request: server.flood(connection, redirect(200 * MB))
        with pytest.raises(UnexpectedAnswerError):
            ask(make_settings(server.url), GET)
    assert server.sent < IN_FLIGHT
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < 100 * MB


@pytest.mark.parametrize("ask_all", ["sync", "async"])
def test_cookies_are_not_collected(ask_all: str) -> None:
    cookies = b"".join(b"Set-Cookie: c%d=%s; Path=/\r\n" % (number, b"v" * 1000) for number in range(50))

    async def poll(url: str) -> None:
        async with AsyncSiliconFlowClient(make_settings(url)) as client:
            for _ in range(2):
                await client.get_batch("batch_1")

    with serving(answer(BATCH).replace(b"\r\n", b"\r\n" + cookies, 1)) as server:
        if ask_all == "async":
            asyncio.run(poll(server.url))
        else:
            with SiliconFlowClient(make_settings(server.url)) as client:
                for _ in range(2):
                    client.get_batch("batch_1")
    assert b"Cookie" not in server.requests[1]


@pytest.mark.parametrize("form", [whole, chunked, unannounced])
def test_of_an_error_only_the_start_is_read(ask: Ask, form: Any) -> None:
    def error(size: int) -> Iterator[bytes]:
        for number, piece in enumerate(form(size)):
            yield piece if number else piece.replace(b"200", b"402", 1)

    with serving(b"") as server:
        server.serve = lambda connection, request: server.flood(connection, error(200 * MB))
        with pytest.raises(InsufficientBalanceError) as caught:
            ask(make_settings(server.url), GET)
    assert server.sent < IN_FLIGHT
    assert len(str(caught.value)) < 3000


def test_an_error_of_a_megabyte_is_told_in_brief(ask: Ask) -> None:
    body = {"code": 20015, "message": "x" * MB}
    with serving(answer(body, 400)) as server, pytest.raises(APIError) as caught:
        ask(make_settings(server.url), GET)
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "x-gzip"])
def test_a_compression_nobody_asked_for_is_taken_off(ask: Ask, encoding: str) -> None:
    body = json.dumps(BATCH).encode()
    sent = zlib.compress(body) if encoding == "deflate" else gzip.compress(body)
    with serving(answer(sent, Content_Encoding=encoding)) as server:
        assert ask(make_settings(server.url), GET).id == "batch_1"
    assert b"accept-encoding: identity" in server.requests[0].lower()


@pytest.mark.parametrize(
    ("encoding", "body"), [("br", b"..."), ("gzip, gzip", b"..."), ("gzip", b"not gzip"), ("x" * 500, b"")]
)
def test_a_compression_that_cannot_be_taken_off(ask: Ask, encoding: str, body: bytes) -> None:
    with (
        serving(answer(body, Content_Encoding=encoding)) as server,
        pytest.raises(UnexpectedAnswerError) as caught,
    ):
        ask(make_settings(server.url), GET)
    assert len(str(caught.value)) < 1000


# Heads ------------------------------------------------------------------------------------------------------


def interim() -> Iterator[bytes]:
    return itertools.repeat(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)


def headers() -> Iterator[bytes]:
    yield b"HTTP/1.1 200 OK\r\n"
    yield from (b"X-%d: y\r\n" % number for number in itertools.count())


def long_header() -> Iterator[bytes]:
    yield b"HTTP/1.1 200 OK\r\nX-Long: "
    yield from itertools.repeat(b"y" * 65536)


def tiny_chunks() -> Iterator[bytes]:
    yield answer(b"", Transfer_Encoding="chunked")
    yield from itertools.repeat(b"1\r\n \r\n" * 10_000)


def long_chunk_size() -> Iterator[bytes]:
    yield answer(b"", Transfer_Encoding="chunked")
    yield from itertools.repeat(b"0" * 65536)


def trailers() -> Iterator[bytes]:
    yield answer(b"", Transfer_Encoding="chunked") + b"0\r\n"
    yield from itertools.repeat(b"X-Trailer: y\r\n" * 1000)


@pytest.mark.parametrize("form", [interim, headers, long_header, tiny_chunks, long_chunk_size, trailers])
def test_lines_without_end(ask: Ask, form: Any) -> None:
    with serving(b"") as server:
        server.serve = lambda connection, request: server.flood(connection, form())
        began = time.monotonic()
        with pytest.raises((NoAnswerError, UnexpectedAnswerError)):
            ask(make_settings(server.url, timeout=30), GET)
    assert time.monotonic() - began < 20
    assert server.sent < answers.MAX_ANSWER_BYTES * 8 + IN_FLIGHT


@pytest.mark.parametrize("ask_all", ["sync", "async"])
def test_an_honest_connection_is_used_for_any_number_of_polls(ask_all: str) -> None:
    """The limits are those of one answer, and begin anew with the next."""
    head = b"HTTP/1.1 200 OK\r\nX-Fill: " + b"x" * 500 + b"\r\n"
    body = json.dumps(BATCH).encode()
    connections: list[socket.socket] = []

    def serve(connection: socket.socket, request: bytes) -> None:
        connections.append(connection)
        while request:
            connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            request = read_request(connection)

    async def poll(server: Server) -> None:
        async with AsyncSiliconFlowClient(make_settings(server.url)) as client:
            for _ in range(1000):
                await client.get_batch("batch_1")

    with serving(serve) as server:
        if ask_all == "async":
            asyncio.run(poll(server))
        else:
            with SiliconFlowClient(make_settings(server.url)) as client:
                for _ in range(1000):
                    client.get_batch("batch_1")
    assert len(connections) == 1


# Time -------------------------------------------------------------------------------------------------------


DRIPS = {
    "the status": answer(BATCH) * 9,
    "a header": b"HTTP/1.1 200 OK\r\nX-Long: " + b"y" * 999,
    "interim answers": b"HTTP/1.1 100 Continue\r\n\r\n" * 99,
    "the body": answer(b"{" + b" " * 999),
    "pieces": answer(b"", Transfer_Encoding="chunked") + b"1\r\n \r\n" * 99,
    "a length": answer(b"", Transfer_Encoding="chunked") + b"0" * 999,
}


@pytest.mark.parametrize("what", DRIPS)
def test_a_byte_now_and_then_holds_no_call_for_ever(ask: Ask, what: str) -> None:
    data = DRIPS[what]
    at = 0 if what in ("the status", "interim answers") else data.index(b"\r\n") + 2
    with serving(b"") as server:

        def serve(connection: socket.socket, request: bytes) -> None:
            connection.sendall(data[:at])
            server.drip(connection, data[at:])

        server.serve = serve
        settings = make_settings(server.url, timeout=0.4, connect_timeout=0.2)
        began = time.monotonic()
        with pytest.raises(NoAnswerError):
            ask(settings, GET)
    # A byte comes every 50 ms: the wait for the next one alone never ends it.
    assert settings.call_limit <= time.monotonic() - began < settings.call_limit + 3


def test_head_and_body_may_each_take_nearly_the_timeout(ask: Ask) -> None:
    head, blank, body = answer(BATCH).partition(b"\r\n\r\n")
    with serving(b"") as server:

        def serve(connection: socket.socket, request: bytes) -> None:
            for part in (head + blank, body):
                server.closed.wait(0.6)
                connection.sendall(part)

        server.serve = serve
        ask(make_settings(server.url, timeout=1.0, connect_timeout=0.5), GET)


def test_a_tunnel_that_drips_holds_no_call_for_ever(ask: Ask) -> None:
    with serving(b"") as proxy:
        proxy.serve = lambda connection, request: proxy.drip(
            connection, b"HTTP/1.1 200 OK\r\nX: " + b"y" * 999
        )
        settings = make_settings(
            "https://api.invalid", proxies={"https": proxy.url}, timeout=0.4, connect_timeout=0.4
        )
        began = time.monotonic()
        with pytest.raises(SiliconFlowError) as caught:
            ask(settings, creation())
    assert time.monotonic() - began < settings.call_limit + 3
    assert protocol.had_no_effect(caught.value)


@pytest.mark.parametrize("status", [200, 500])
def test_a_caller_may_ask_for_less_time(status: int) -> None:
    with serving(b"") as server:
        server.serve = lambda connection, request: server.drip(connection, answer(b" " * 999, status))
        began = time.monotonic()
        with SiliconFlowClient(make_settings(server.url)) as client, pytest.raises(NoAnswerError):
            client.get_batch("batch_1", repeat=False, within=0.3)

        async def ask() -> None:
            async with AsyncSiliconFlowClient(make_settings(server.url)) as client:
                await client.get_batch("batch_1", within=0.3)

        with pytest.raises(NoAnswerError):
            asyncio.run(ask())
    assert time.monotonic() - began < 5


def test_the_limit_of_time_holds_in_a_child_process() -> None:
    """Airflow runs a task in a fork, and the thread that watches stays behind."""
    with serving(b"") as server:
        server.serve = lambda connection, request: server.drip(connection, answer(b" " * 999))
        client = SiliconFlowClient(make_settings(server.url, timeout=0.3, connect_timeout=0.2))
        with pytest.raises(NoAnswerError):
            client.get_batch("batch_1")
        child = os.fork()
        if not child:
            try:
                client.get_batch("batch_1")
            except NoAnswerError:
                os._exit(7)
            finally:
                os._exit(1)
        began = time.monotonic()
        while time.monotonic() - began < 10:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            time.sleep(0.05)
        else:
            os.kill(child, 9)
        assert os.waitstatus_to_exitcode(status) == 7


def test_a_call_whose_time_runs_out_as_it_ends_does_not_end_the_next_one_on_its_connection() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        exchange = Exchange(0.0, lambda: True)
        exchange.attach(ours)
        watchdog().remove(exchange)
        # The watchdog found it due before it was removed, and comes to shut it down only now.
        exchange.expire()
        ours.sendall(b"the next request")
        assert theirs.recv(99) == b"the next request"


def test_stuck_polls_do_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("airflow_provider_siliconflow.api.async_client._TURN", 0.2)

    def serve(connection: socket.socket, request: bytes) -> None:
        if b"batch_1 " in request:
            connection.sendall(answer(BATCH))
        else:
            time.sleep(20)

    async def poll(server: Server) -> float:
        async with AsyncSiliconFlowClient(make_settings(server.url, timeout=30)) as client:
            stuck = [asyncio.ensure_future(client.get_batch(f"stuck_{n}")) for n in range(100)]
            await asyncio.sleep(0.1)
            began = time.monotonic()
            await client.get_batch("batch_1")
            took = time.monotonic() - began
            for each in stuck:
                each.cancel()
            await asyncio.gather(*stuck, return_exceptions=True)
            return took

    with serving(serve) as server:
        assert asyncio.run(poll(server)) < 3


@pytest.mark.parametrize("when", ["waiting", "offered"])
def test_a_poll_that_is_given_up_passes_its_turn_on(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    async def run() -> float:
        turns = _Turns(1)
        first = await turns.take()
        second, third = (asyncio.ensure_future(turns.take()) for _ in range(2))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if when == "offered":
            turns.give_back(first)
            second.cancel()
        else:
            second.cancel()
            await asyncio.sleep(0)
            turns.give_back(first)
        began = time.monotonic()
        await third
        return time.monotonic() - began

    assert asyncio.run(run()) < 1


# Number and depth -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [100, 500, 900, 5000, 1_000_000])
@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_nesting_does_not_crash(ask: Ask, depth: int, opening: bytes) -> None:
    closing = {b"[": b"]", b'{"a":': b"}"}[opening]
    nested = opening * depth + b"1" + closing * depth
    body = json.dumps(BATCH).encode()[:-1] + b', "errors": ' + nested + b', "odd": ' + nested + b"}"
    with serving(answer(body)) as server:
        try:
            batch = ask(make_settings(server.url), GET)
        except UnexpectedAnswerError:
            assert depth >= 900
        else:
            # The field is cut, and does not hide the batch.
            assert len(json.dumps(batch.to_json_dict())) < 10_000


@pytest.mark.parametrize("entry", [b'{"id":"b%d"}', b'{"x":%d}'])
def test_a_list_of_tiny_entries_does_not_fill_the_memory(entry: bytes) -> None:
    body = b'{"data":[' + b",".join(entry % number for number in range(120_000)) + b'],"has_more":false}'
    tracemalloc.start()
    page = protocol.list_batches().answer(200, {}, body)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(page.items) + page.unreadable == 120_000
    assert len(page.items) <= protocol.MAX_ENTRIES
    assert peak < 150 * MB


def test_metadata_of_one_key_over_and_over_is_read_in_no_time() -> None:
    body = b'{"id":"batch_1","metadata":[' + b",".join([b'{"a":1}'] * 24_000) + b"]}"
    began = time.process_time()
    Batch.model_validate(json.loads(body))
    assert time.process_time() - began < 0.04


@pytest.mark.parametrize("item", [b"{}", b"[]", b"1", b'{"a":1}'])
def test_items_without_number(ask: Ask, item: bytes) -> None:
    body = b'{"id":"batch_1","status":"failed","errors":[' + b",".join([item] * 500_000) + b"]}"
    with serving(answer(body)) as server, pytest.raises(UnexpectedAnswerError, match="items"):
        ask(make_settings(server.url), GET)


@pytest.mark.parametrize("field", ["errors", "odd", "endpoint", "metadata"])
def test_a_field_of_megabytes_does_not_hide_the_batch(ask: Ask, field: str) -> None:
    with serving(answer(BATCH | {"status": "completed", field: "x" * 3 * MB})) as server:
        batch = ask(make_settings(server.url), GET)
    assert batch.is_terminal
    assert len(json.dumps(batch.to_json_dict())) < 30_000


# The triggerer's loop ---------------------------------------------------------------------------------------


class Lag:
    """The longest time that a loop kept a task waiting that wants to run every millisecond."""

    longest = 0.0

    async def watch(self) -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(0.001)
            self.longest = max(self.longest, time.perf_counter() - began)


def million_escapes(size: int) -> Iterator[bytes]:
    text = b"\\u4f60" * (4 * MB // 6 - 40)
    yield answer(b'{"id":"batch_1","errors":"' + text + b'"}')


def million_numbers(size: int) -> Iterator[bytes]:
    yield answer(b'{"id":"batch_1","errors":[' + b",".join([b"1" * 400] * 10_000) + b"]}")


def words_that_might_be_urls(size: int) -> Iterator[bytes]:
    many = {f"x{number}": ["a?/=b " * 160] * 4 for number in range(32)}
    yield answer({"id": "batch_1", "errors": ["a?/=b " * 160] * 20, "request_counts": many} | many)


@pytest.mark.parametrize(
    "form",
    [whole, chunked, bomb, million_escapes, million_numbers, words_that_might_be_urls]
    + [lambda size, form=form: form() for form in (interim, headers, tiny_chunks, trailers)],
    ids=[
        "whole",
        "chunked",
        "bomb",
        "escapes",
        "numbers",
        "words",
        "interim",
        "headers",
        "tiny chunks",
        "trailers",
    ],
)
def test_no_answer_keeps_the_loop_busy(form: Any) -> None:
    """The goal is 20 ms, see benchmarks/hostile_answer.py; here a busy machine must not fail the test."""

    async def run(url: str) -> float:
        async with AsyncSiliconFlowClient(make_settings(url)) as client:
            lag = Lag()
            await asyncio.sleep(0.05)
            watch = asyncio.ensure_future(lag.watch())
            await asyncio.sleep(0.01)
            with contextlib.suppress(SiliconFlowError):
                await client.get_batch("batch_1")
            watch.cancel()
            return lag.longest

    lags = []
    for _ in range(3):
        with serving(b"") as server:
            server.serve = lambda connection, request, server=server: server.flood(  # type: ignore[misc]
                connection, form(50 * MB)
            )
            lags.append(asyncio.run(run(server.url)))
    assert min(lags) < 0.1, lags


def test_a_server_error_is_still_one_when_its_body_is_cut(ask: Ask) -> None:
    with serving(answer(b"<html>", 502, Content_Length="500")) as server:
        with pytest.raises((ServiceUnavailableError, NoAnswerError)) as caught:
            ask(make_settings(server.url), creation())
        assert protocol.leaves_effect_open(caught.value)
    assert KEY not in str(caught.value)
