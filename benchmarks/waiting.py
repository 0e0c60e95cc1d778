"""
Thousands of waits in one event loop: CPU per poll, loop lag and memory per wait, compared with other clients.

    python benchmarks/waiting.py --waits 2000 --polls 10000 --interval 5 --memory-waits 10000

Our side runs real `BatchTrigger`s, all started at the same moment, as a triggerer does after a restart. The other
sides are loops that poll a batch over one shared client; their first polls are spread over an interval. Every batch
is polled once per interval, with 20 % jitter. The server runs in another process and answers at once with a batch in
progress. "aiohttp" is the library that ours is built on: it parses the response as JSON and discards it, so it is the
lower bound. "To start" covers everything up to the first poll of each wait. The lag is measured by a task in the same
loop that sleeps for 10 ms at a time; "idle" is a loop without other work and shows the lag of the machine. A side that
cannot keep up is stopped after 90 s, and its work until then counts.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib.util
import json
import logging
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from typing import Any

BATCH = {
    "id": "ID",
    "object": "batch",
    "endpoint": "/v1/chat/completions",
    "errors": None,
    "input_file_id": "file-jkvytbjtow",
    "completion_window": "24h",
    "status": "in_progress",
    "output_file_id": None,
    "error_file_id": None,
    "created_at": 1741685413,
    "in_progress_at": 1741685413,
    "expires_at": 4102444800,
    "finalizing_at": None,
    "completed_at": None,
    "failed_at": None,
    "expired_at": None,
    "cancelling_at": None,
    "cancelled_at": None,
    "request_counts": {"total": 5000, "completed": 2500, "failed": 3},
    "metadata": {"airflow_identity": "0" * 64, "airflow_task": "dag/run/task"},
}
KEY = "sk-benchmark"
#: Seconds after which a side is stopped. Its polls until then count.
LIMIT = 90.0

# The server ------------------------------------------------------------------------------------------------


class Server(asyncio.Protocol):
    """Answers every GET with a batch of the requested id, with as little parsing as possible."""

    polls = 0
    before, after = json.dumps(BATCH).encode().split(b"ID", 1)

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.buffer = b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            path = self.buffer[: self.buffer.index(b"\r\n")].split()[1]
            self.buffer = self.buffer[end + 4 :]
            body = self.before + path.rpartition(b"/")[2] + self.after
            head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nx-siliconcloud-trace-id: ti_1\r\n"
            self.transport.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)


async def serve() -> None:
    server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


# The sides -------------------------------------------------------------------------------------------------

Wait = Callable[[int], Awaitable[None]]


class Counter:
    """Counts polls until the wanted number is reached."""

    def __init__(self, wanted: int) -> None:
        self.done, self.wanted = 0, wanted
        self.reached = asyncio.Event()
        #: Number of polls to CPU seconds of the process at that point.
        self.marks: dict[int, float] = {}

    def add(self) -> None:
        self.done += 1
        if self.done in self.marks:
            self.marks[self.done] = time.process_time()
        if self.done >= self.wanted:
            self.reached.set()


async def poll_forever(interval: float, poll: Callable[[], Awaitable[Any]], counter: Counter) -> None:
    await asyncio.sleep(random.uniform(0, interval))
    while True:
        await poll()
        counter.add()
        await asyncio.sleep(interval * random.uniform(0.8, 1.2))


def ours(url: str, interval: float, counter: Counter) -> Wait:
    connection = {"conn_type": "siliconflow", "password": KEY, "host": url}
    os.environ["AIRFLOW_CONN_SILICONFLOW_DEFAULT"] = json.dumps(connection)
    from airflow_provider_siliconflow.jobs.waiting import BatchWait
    from airflow_provider_siliconflow.triggers.batch import BatchTrigger

    class CountedWait(BatchWait):
        def observe(self, *arguments: Any) -> bool:
            counter.add()
            return super().observe(*arguments)

    # The trigger looks the class up here when it starts to wait.
    sys.modules[BatchWait.__module__].BatchWait = CountedWait  # type: ignore[attr-defined]
    logging.getLogger("airflow_provider_siliconflow").setLevel(logging.WARNING)

    async def wait(number: int) -> None:
        trigger = BatchTrigger(batch_ids=[f"batch_{number:010d}"], poll_interval=interval)
        async for event in trigger.run():
            raise SystemExit(f"a wait ended: {event}")

    return wait


def aiohttp(url: str, interval: float, counter: Counter) -> Wait:
    import aiohttp

    session = aiohttp.ClientSession(
        headers={"Authorization": f"Bearer {KEY}"}, connector=aiohttp.TCPConnector(limit=32)
    )

    async def wait(number: int) -> None:
        async def poll() -> None:
            async with session.get(f"{url}/batches/batch_{number:010d}") as answer:
                answer.raise_for_status()
                await answer.json()

        await poll_forever(interval, poll, counter)

    return wait


def httpx(url: str, interval: float, counter: Counter) -> Wait:
    import httpx

    client = httpx.AsyncClient(
        headers={"Authorization": f"Bearer {KEY}"}, timeout=httpx.Timeout(60, pool=None)
    )

    async def wait(number: int) -> None:
        async def poll() -> None:
            answer = await client.get(f"{url}/batches/batch_{number:010d}")
            answer.raise_for_status()
            answer.json()

        await poll_forever(interval, poll, counter)

    return wait


def threads(url: str, interval: float, counter: Counter) -> Wait:
    import threading

    import requests

    local = threading.local()

    def get(number: int) -> Any:
        if not hasattr(local, "session"):
            local.session = requests.Session()
        headers = {"Authorization": f"Bearer {KEY}"}
        answer = local.session.get(f"{url}/batches/batch_{number:010d}", headers=headers, timeout=60)
        answer.raise_for_status()
        return answer.json()

    async def wait(number: int) -> None:
        await poll_forever(interval, lambda: asyncio.to_thread(get, number), counter)

    return wait


def openai_shared(url: str, interval: float, counter: Counter) -> Wait:
    import openai  # type: ignore[import-not-found,unused-ignore]

    client = openai.AsyncOpenAI(api_key=KEY, base_url=url)

    async def wait(number: int) -> None:
        await poll_forever(interval, lambda: client.batches.retrieve(f"batch_{number:010d}"), counter)

    return wait


def openai_each(url: str, interval: float, counter: Counter) -> Wait:
    import openai  # type: ignore[import-not-found,unused-ignore]

    async def wait(number: int) -> None:
        client = openai.AsyncOpenAI(api_key=KEY, base_url=url)
        await poll_forever(
            min(interval, 5.0), lambda: client.batches.retrieve(f"batch_{number:010d}"), counter
        )

    return wait


def idle(url: str, interval: float, counter: Counter) -> Wait:
    async def wait(number: int) -> None:
        await asyncio.sleep(15)
        counter.reached.set()

    return wait


#: By name: the function that makes the waits, the module that it needs, and the most waits for the memory figure.
SIDES: dict[str, tuple[Callable[..., Wait], str, int]] = {
    "ours": (ours, "airflow", 10**9),
    "aiohttp": (aiohttp, "aiohttp", 10**9),
    "httpx": (httpx, "httpx", 10**9),
    "threads": (threads, "requests", 10**9),
    "openai": (openai_shared, "openai", 10**9),
    "openai, a client per wait": (openai_each, "openai", 200),
    "idle": (idle, "asyncio", 1),
}
TIMED = ("ours", "aiohttp", "httpx", "threads", "openai", "idle")
WEIGHED = ("ours", "openai, a client per wait")


def rss() -> float:
    """Return the resident memory of this process in KiB."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize() / 1024


async def watch_lag(lags: list[float]) -> None:
    while True:
        start = time.perf_counter()
        await asyncio.sleep(0.01)
        lags.append(time.perf_counter() - start - 0.01)


async def run_side(name: str, url: str, waits: int, polls: int, interval: float) -> dict[str, float]:
    make = SIDES[name][0]
    # Warm up imports, caches and connections.
    counter = Counter(5)
    wait = make(url, 0.01, counter)
    if name != "idle":
        warm = asyncio.ensure_future(wait(0))
        await asyncio.wait(
            [warm, asyncio.ensure_future(counter.reached.wait())], return_when="FIRST_COMPLETED"
        )
        warm.cancel()
        await asyncio.gather(warm, return_exceptions=True)
    counter.done, counter.wanted = 0, polls
    counter.reached.clear()
    wait = make(url, interval, counter)
    counter.marks = {waits: 0.0}
    gc.collect()
    before = rss()
    lags: list[float] = []
    watcher = asyncio.ensure_future(watch_lag(lags))
    cpu = time.process_time()
    tasks = [asyncio.ensure_future(wait(number)) for number in range(waits if name != "idle" else 1)]
    reached = asyncio.ensure_future(counter.reached.wait())
    await asyncio.wait([*tasks, reached], timeout=LIMIT, return_when="FIRST_COMPLETED")
    for task in tasks:
        if task.done() and name != "idle":
            task.result()
    end = time.process_time()
    first = counter.marks[waits]
    if first and counter.done > waits:
        figures = {"start": first - cpu, "cpu": end - first, "polls": counter.done - waits}
    else:
        # It did not reach one poll of each wait.
        figures = {"start": end - cpu, "cpu": end - cpu, "polls": counter.done}
    watcher.cancel()
    gc.collect()
    figures["per_wait"] = (rss() - before) / waits
    lags.sort()
    figures["p99"], figures["max"] = lags[int(len(lags) * 0.99)] * 1000, lags[-1] * 1000
    for task in tasks:
        task.cancel()
    return figures


def measure(name: str, url: str, waits: int, polls: int, interval: float) -> dict[str, float]:
    command = [sys.executable, __file__, "--run", name, "--url", url]
    command += ["--waits", str(waits), "--polls", str(polls), "--interval", str(interval)]
    with tempfile.TemporaryDirectory() as home:
        environment = {
            **os.environ,
            "AIRFLOW_HOME": home,
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home}/airflow.db",
            "PYTHONWARNINGS": "ignore",
        }
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--waits", type=int, default=2000)
    parser.add_argument("--polls", type=int, default=8000)
    parser.add_argument("--interval", type=float, default=5.0, help="seconds between two polls of one batch")
    parser.add_argument(
        "--memory-waits", type=int, default=10_000, help="number of waits for the memory figure; 0 skips it"
    )
    parser.add_argument("--only", choices=SIDES, action="append", help="measure only these")
    parser.add_argument("--run", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve())
        return
    if options.run:
        figures = asyncio.run(
            run_side(options.run, options.url, options.waits, options.polls, options.interval)
        )
        print(json.dumps(figures))
        return
    server = subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True)
    assert server.stdout
    url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
    wanted = [name for name in SIDES if not options.only or name in options.only]
    for name in list(wanted):
        if importlib.util.find_spec(SIDES[name][1]) is None:
            print(f"{name}: skipped, {SIDES[name][1]} is not installed")
            wanted.remove(name)
    try:
        print(
            f"{options.waits:,} waits in one loop, one poll per {options.interval:g} s each, {options.polls:,} polls"
        )
        print(
            f"{'':10} {'CPU s / 10,000 polls':>20} {'ratio':>6} {'CPU s to start':>14} {'lag p99':>10} {'max':>10}"
        )
        ours_cpu = None
        for name in filter(wanted.__contains__, TIMED):
            run = measure(name, url, options.waits, options.polls, options.interval)
            if name == "idle":
                print(f"{name:10} {'':>20} {'':>6} {'':>14} {run['p99']:7.1f} ms {run['max']:7.1f} ms")
                continue
            cpu = run["cpu"] / run["polls"] * 10_000
            ours_cpu = cpu if name == "ours" else ours_cpu
            ratio = f"{cpu / ours_cpu:5.1f}x" if ours_cpu else ""
            print(
                f"{name:10} {cpu:20.2f} {ratio:>6} {run['start']:14.2f} {run['p99']:7.1f} ms {run['max']:7.1f} ms"
            )
        print("goals for ours: 3 CPU seconds per 10,000 polls, lag p99 20 ms")
        if not options.memory_waits:
            return
        print(f"\n{'':26} {'waits':>8} {'KiB each':>9}")
        for name in filter(wanted.__contains__, WEIGHED):
            waits = min(options.memory_waits, SIDES[name][2])
            run = measure(name, url, waits, waits, 3600.0)
            print(f"{name:26} {waits:8,} {run['per_wait']:9.1f}")
        print("goal for ours: 10 KiB")
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
