"""
One poll that is answered with 200 MB: how long the event loop stands still, and how much memory that takes.

    python benchmarks/hostile_answer.py --megabytes 200 --runs 5

A triggerer polls for every DAG in one loop: what one answer does to it, it does to all. "Ours" is the client of the
triggerer; "aiohttp" is what one would write without it, `await response.json()`. The answer is a batch whose `errors`
are that long, sent with its length, in pieces without one, or compressed (200 MB out of 0.2 MB). The stall is the
longest time that a task of the same loop, which wants to wake up every millisecond, was kept waiting; memory is the
peak of the process over what it had before the poll. Each figure is the median of the runs, each a process of its
own. "Idle" is a loop in which nothing else runs for two seconds, and tells what the machine adds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

MB = 1 << 20
KEY = "sk-benchmark-0123456789"
#: Seconds that a side may take for one poll.
LIMIT = 300

# The server -------------------------------------------------------------------------------------------------

HEAD = b'{"object":"batch","status":"in_progress","errors":['
ERROR = b'{"code":20015,"message":"the request of this line is not valid","line":1},'
BLOCK = ERROR * (MB // len(ERROR))
TAIL = b"null]}"


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    request = await reader.readuntil(b"\r\n\r\n")
    # The id of the batch says what is wanted, such as 200-chunked; a client may escape what is not a letter.
    size, _, form = request.split(b" ")[1].decode().rpartition("/")[2].partition("-")
    count = int(size)
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n")
    # The client may have had enough.
    with contextlib.suppress(ConnectionError), contextlib.closing(writer):
        if form == "small":
            body = HEAD + TAIL
            writer.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        elif form == "whole":
            writer.write(b"Content-Length: %d\r\n\r\n" % (len(HEAD) + count * len(BLOCK) + len(TAIL)))
            for piece in (HEAD, *[BLOCK] * count, TAIL):
                writer.write(piece)
                await writer.drain()
        elif form == "chunked":
            writer.write(b"Transfer-Encoding: chunked\r\n\r\n")
            for piece in (HEAD, *[BLOCK] * count, TAIL, b""):
                writer.write(b"%x\r\n" % len(piece) + piece + b"\r\n")
                await writer.drain()
        else:
            packer = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
            packed = (
                b"".join(packer.compress(piece) for piece in (HEAD, *[BLOCK] * count, TAIL)) + packer.flush()
            )
            writer.write(b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed) + packed)
        await writer.drain()


async def serve() -> None:
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


# The sides --------------------------------------------------------------------------------------------------


async def ours(url: str) -> str:
    from airflow_provider_siliconflow.api.async_client import AsyncSiliconFlowClient
    from airflow_provider_siliconflow.api.exceptions import SiliconFlowError
    from airflow_provider_siliconflow.api.settings import ClientSettings

    base, _, batch_id = url.rpartition("/batches/")
    async with AsyncSiliconFlowClient(ClientSettings(KEY, base, max_retries=0)) as client:
        try:
            batch = await client.get_batch(batch_id)
        except SiliconFlowError as exc:
            return f"refused: {type(exc).__name__}"
        return f"read: {len(batch.error_messages)} errors"


async def aiohttp(url: str) -> str:
    import aiohttp

    headers = {"Authorization": f"Bearer {KEY}"}
    async with aiohttp.ClientSession(headers=headers) as session, session.get(url) as response:
        data = await response.json()
        return f"read: {len(data['errors'])} errors"


async def idle(url: str) -> str:
    await asyncio.sleep(2)
    return ""


SIDES: dict[str, Callable[[str], Awaitable[str]]] = {"ours": ours, "aiohttp": aiohttp, "idle": idle}
FORMS = ("whole", "chunked", "gzip")


def memory(name: str) -> float:
    """Return a figure of this process's memory in MiB: ``VmRSS``, or ``VmHWM`` for its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def forget_peak() -> None:
    """Let the peak of this process's memory count from here on."""
    Path("/proc/self/clear_refs").write_text("5")


async def watch(stalls: list[float]) -> None:
    while True:
        began = time.perf_counter()
        await asyncio.sleep(0.001)
        stalls.append(time.perf_counter() - began - 0.001)


async def poll(name: str, host: str, megabytes: int, form: str) -> dict[str, Any]:
    side = SIDES[name]
    # Imports, and what is done once.
    await side(f"{host}/v1/batches/0-small")
    stalls: list[float] = []
    watcher = asyncio.ensure_future(watch(stalls))
    await asyncio.sleep(0.05)
    stalls.clear()
    forget_peak()
    before, began = memory("VmRSS"), time.perf_counter()
    what = await side(f"{host}/v1/batches/{megabytes}-{form}")
    took = time.perf_counter() - began
    watcher.cancel()
    return {
        "stall": max(stalls) * 1000,
        "memory": max(0.0, memory("VmHWM") - before),
        "took": took,
        "what": what,
    }


def measure(name: str, host: str, megabytes: int, form: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--side", name, "--host", host, "--form", form]
    command += ["--megabytes", str(megabytes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    if done.returncode:
        # Out of memory, as a rule.
        return {"stall": float("nan"), "memory": float("nan"), "took": float("nan"), "what": "died"}
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--runs", type=int, default=5)
    for hidden in ("--side", "--host", "--form", "--serve"):
        parser.add_argument(hidden, nargs="?", const="yes", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve())
        return
    if options.side:
        print(json.dumps(asyncio.run(poll(options.side, options.host, options.megabytes, options.form))))
        return
    server = subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        host = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        print(f"{'answer':10} {'side':10} {'stall (ms)':>12} {'memory (MiB)':>14} {'seconds':>9}  outcome")
        for form, name in [("-", "idle"), *((form, name) for form in FORMS for name in ("ours", "aiohttp"))]:
            runs = [measure(name, host, options.megabytes, form) for _ in range(options.runs)]
            stall, weight, took = (
                statistics.median(run[key] for run in runs) for key in ("stall", "memory", "took")
            )
            print(
                f"{form:10} {name:10} {stall:12.1f} {weight:14.1f} {took:9.2f}  {runs[0]['what']}", flush=True
            )
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
