"""
Asking rows one by one: rows per second, CPU and peak RSS, compared with other clients, and behaviour at a rate limit.

    python benchmarks/live.py --rows 10000 --latency 0.2
    python benchmarks/live.py --limits

Every side asks the same rows, 64 at once, and writes the answers to a file. Our side is a whole job with
`live_after=0`: it checks the rows, writes each answer to a journal that is on the disk before the row counts, judges
it, and at the end writes results in input order and a manifest. "ours, asking" is the part of it that asks. The other
sides read the file, send the rows and write what comes: they lose everything in flight when they die, and know no
limits. "aiohttp" is the library that ours is built on, and parses each answer; "openai" is the SDK's asynchronous
client with a semaphore.

At 64 requests of 0.2 s at once no client can exceed 320 rows/s, so compare the CPU seconds, and the rows/s at
`--latency 0`. There the emulator, in another process, limits all sides; with `--thin` a server without any logic takes
its place. `--answer-bytes` makes its answers larger.

`--limits` asks an emulator that answers 429 above a rate, and reports the rate reached and the share of requests that
were refused.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import importlib.util
import json
import logging
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whole_job import emulator, make_run, write_input

MODEL = "benchmark/model-0"
KEY = "sk-emulator"
CONCURRENCY = 64

# The thin server --------------------------------------------------------------------------------------------


class Thin(asyncio.Protocol):
    """Answers every POST with the same completion, with as little parsing as possible; a GET with the models."""

    latency = 0.0
    answer = models = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.buffer = b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, end, rest = self.buffer.partition(b"\r\n\r\n")
        if not end:
            return
        if head.startswith(b"GET "):
            self.buffer = rest
            self.transport.write(self.models)
            return
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        if len(rest) < length:
            return
        self.buffer = rest[length:]
        if self.latency:
            asyncio.get_running_loop().call_later(self.latency, self.transport.write, self.answer)
        else:
            self.transport.write(self.answer)


def response(content: Any) -> bytes:
    body = json.dumps(content).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nx-siliconcloud-trace-id: ti_1\r\n"
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


async def serve(latency: float, size: int) -> None:
    message = {"role": "assistant", "content": ('"word" and another\n' * (size // 19 + 1))[:size]}
    usage = {"prompt_tokens": 80, "completion_tokens": 40, "total_tokens": 120}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    completion = {"id": "019b", "object": "chat.completion", "created": 1741685413, "model": MODEL}
    Thin.latency = latency
    Thin.answer = response({**completion, "choices": [choice], "usage": usage})
    Thin.models = response({"object": "list", "data": [{"id": MODEL, "object": "model"}]})
    server = await asyncio.get_running_loop().create_server(Thin, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextlib.contextmanager
def thin_server(latency: float, size: int) -> Iterator[str]:
    command = [sys.executable, __file__, "--serve", "--latency", str(latency), "--answer-bytes", str(size)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
    finally:
        process.terminate()
        process.wait()


# The sides --------------------------------------------------------------------------------------------------


class Timer:
    """Adds up wall time and CPU seconds."""

    def __init__(self) -> None:
        self.seconds, self.cpu = -time.perf_counter(), -time.process_time()

    def stop(self) -> dict[str, float]:
        self.seconds += time.perf_counter()
        self.cpu += time.process_time()
        return {"seconds": self.seconds, "cpu": self.cpu}


def ours(source: Path, out: Path, url: str, concurrency: int) -> dict[str, Any]:
    from airflow_provider_siliconflow.api.arguments import LiveAfter
    from airflow_provider_siliconflow.api.client import SiliconFlowClient
    from airflow_provider_siliconflow.api.settings import ClientSettings
    from airflow_provider_siliconflow.jobs import run as run_module
    from airflow_provider_siliconflow.jobs.live import LivePhase

    asking: dict[str, float] = {}

    class TimedPhase(LivePhase):
        def ask(self, *arguments: Any) -> None:
            timer = Timer()
            super().ask(*arguments)
            asking.update(timer.stop())

    # The job looks the class up here when it is opened.
    run_module.LivePhase = TimedPhase  # type: ignore[attr-defined]
    with SiliconFlowClient(ClientSettings(KEY, url)) as client:
        run = make_run(client, out, [MODEL], live_after=LiveAfter(seconds=0.0), live_concurrency=concurrency)
        if run.start(lambda: source, source.name, timeout=None) is not None:
            raise SystemExit("the job waits for batches")
        rows = run.finish()["rows"]
    return {"ok": rows["ok"], "asking": asking}


def bodies(source: Path) -> Iterator[dict[str, Any]]:
    with source.open(encoding="utf-8") as lines:
        for line in lines:
            yield {**json.loads(line)["body"], "model": MODEL}


def aiohttp(source: Path, out: Path, url: str, concurrency: int) -> dict[str, Any]:
    import aiohttp

    found = 0

    async def main() -> None:
        rows = bodies(source)
        connector = aiohttp.TCPConnector(limit=concurrency)
        headers = {"Authorization": f"Bearer {KEY}"}
        with (out / "results.jsonl").open("w", encoding="utf-8") as target:
            async with aiohttp.ClientSession(headers=headers, connector=connector) as session:

                async def work() -> None:
                    nonlocal found
                    for body in rows:
                        async with session.post(f"{url}/chat/completions", json=body) as response:
                            response.raise_for_status()
                            answer = await response.json()
                        found += bool(answer["choices"])
                        target.write(json.dumps(answer, ensure_ascii=False) + "\n")

                await asyncio.gather(*(work() for _ in range(concurrency)))

    asyncio.run(main())
    return {"ok": found}


def openai(source: Path, out: Path, url: str, concurrency: int) -> dict[str, Any]:
    import openai  # type: ignore[import-not-found,unused-ignore]

    found = 0

    async def main() -> None:
        semaphore = asyncio.Semaphore(concurrency)
        with (out / "results.jsonl").open("w", encoding="utf-8") as target:
            async with openai.AsyncOpenAI(api_key=KEY, base_url=url) as client:

                async def ask(body: dict[str, Any]) -> None:
                    nonlocal found
                    async with semaphore:
                        answer = await client.chat.completions.create(**body)
                    found += bool(answer.choices)
                    target.write(answer.model_dump_json() + "\n")

                await asyncio.gather(*(ask(body) for body in bodies(source)))

    asyncio.run(main())
    return {"ok": found}


SIDES = {"ours": ours, "aiohttp": aiohttp, "openai": openai}

# Measuring --------------------------------------------------------------------------------------------------


def run_side(name: str, source: Path, out: Path, url: str, concurrency: int) -> dict[str, Any]:
    if name == "ours":
        import airflow_provider_siliconflow.jobs.run  # noqa: F401

        # As in a task of Airflow, whose log gets the warnings at most.
        logging.getLogger("airflow_provider_siliconflow").setLevel(logging.WARNING)
    else:
        __import__(name)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    timer = Timer()
    found = SIDES[name](source, out, url, concurrency)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {**timer.stop(), "rss": (peak - base) / 1024, **found}


def measure(name: str, source: Path, folder: Path, url: str, concurrency: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=folder) as out:
        command = [sys.executable, __file__, "--run", name, "--url", url, "--source", str(source)]
        command += ["--out", out, "--concurrency", str(concurrency)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compare(source: Path, folder: Path, url: str, rows: int, concurrency: int, repeat: int) -> None:
    """Run the sides in turns against one server, and print the medians."""
    sides = [name for name in SIDES if name != "openai" or importlib.util.find_spec("openai")]
    if "openai" not in sides:
        print("openai: skipped, openai is not installed")
    runs: dict[str, list[dict[str, Any]]] = {"ours, asking": [], **{name: [] for name in sides}}
    for _ in range(repeat):
        for name in sides:
            run = measure(name, source, folder, url, concurrency)
            if run["ok"] != rows:
                raise SystemExit(f"{name}: {run['ok']} of {rows} rows are ok")
            runs[name].append(run)
            if asking := run.get("asking"):
                runs["ours, asking"].append({**run, **asking})
    print(
        f"{'':14} {'rows/s':>8} {'(each run)':>22} {'ratio':>6} {'CPU s / 1,000 rows':>19} {'ratio':>6} {'MiB':>6}"
    )
    base: tuple[float, float] | None = None
    for name, found in runs.items():
        rates = [rows / run["seconds"] for run in found]
        rate = statistics.median(rates)
        cpu = statistics.median(run["cpu"] for run in found) / rows * 1000
        base = base or (rate, cpu)
        each = " ".join(f"{one:.0f}" for one in rates)
        rss = max(run["rss"] for run in found)
        print(
            f"{name:14} {rate:8.1f} {each:>22} {base[0] / rate:5.2f}x {cpu:19.2f} {cpu / base[1]:5.2f}x {rss:6.1f}"
        )
    print("goals for ours: 2x the rows/s of openai, 0.9x those of aiohttp, 40 MiB over the imports")


# Limits -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limit:
    """
    A service with a limit, and what is asked of it.

    :param burst: seconds of the limit that can be used at once.
    :param retry_after: whether refusals state when to come back.
    """

    rpm: int
    burst: float
    retry_after: bool
    latency: float
    rows: int
    concurrency: int = CONCURRENCY


LIMITS = [
    # 64 at once would be fewer than the limit allows at 2 s.
    *(
        Limit(3000, burst, retry_after, latency, 3000, concurrency)
        for latency, concurrency in ((0.2, CONCURRENCY), (2.0, 256))
        for burst in (1.0, 0.1)
        for retry_after in (False, True)
    ),
    *(Limit(300, 1.0, retry_after, 0.2, 600) for retry_after in (False, True)),
]


def try_limit(limit: Limit, *, folder: Path) -> str:
    """Ask rows of a service with a limit; return a line of the table."""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        source = Path(own) / "requests.jsonl"
        write_input(source, limit.rows, 300)
        settings = {"rpm": limit.rpm, "burst": limit.burst, "latency": limit.latency}
        settings["retry-after"] = 1 if limit.retry_after else 0
        options = [text for name, value in settings.items() for text in (f"--live-{name}", str(value))]
        with emulator(Path(own), [MODEL], *options) as url:
            run = measure("ours", source, Path(own), url, limit.concurrency)
            with urllib.request.urlopen(f"{url.removesuffix('/v1')}/_emulator/live") as answer:
                seen = json.load(answer)
    if run["ok"] != limit.rows or seen["asked_again"]:
        raise SystemExit(f"{limit}: {run['ok']} rows are ok, {seen}")
    share = limit.rows / run["asking"]["seconds"] / (limit.rpm / 60)
    refused = seen["refused"] / (seen["refused"] + seen["answered"])
    return (
        f"{limit.rpm:6,} {limit.latency:7.1f} s {limit.burst:5.1f} s {'1 s' if limit.retry_after else '-':>12} "
        f"{limit.concurrency:8} {limit.rows:6,} {share:9.1%} {refused:8.1%}"
    )


def try_limits(folder: Path, at_once: int) -> None:
    print(
        f"{'RPM':>6} {'latency':>9} {'burst':>7} {'Retry-After':>12} {'at once':>8} {'rows':>6} "
        f"{'of limit':>9} {'refused':>8}"
    )
    with ThreadPoolExecutor(at_once) as threads:
        for line in threads.map(functools.partial(try_limit, folder=folder), LIMITS):
            print(line, flush=True)
    print("goals: at least 90 % of the limit, at most 5 % refused")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--chars", type=int, default=300, help="characters of each prompt")
    parser.add_argument("--latency", type=float, default=0.2, help="seconds that an answer takes")
    parser.add_argument("--concurrency", type=int, default=CONCURRENCY, help="requests at once")
    parser.add_argument("--thin", action="store_true", help="use a server without any logic")
    parser.add_argument("--answer-bytes", type=int, default=200, help="size of that server's answers")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", help="folder for the files (default: the temporary folder)")
    parser.add_argument("--limits", action="store_true", help="ask services with rate limits instead")
    parser.add_argument("--at-once", type=int, default=3, help="services with limits that are asked at once")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--run", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve(options.latency, options.answer_bytes))
        return
    if options.run:
        print(
            json.dumps(run_side(options.run, options.source, options.out, options.url, options.concurrency))
        )
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as parent:
        folder = Path(parent)
        if options.limits:
            try_limits(folder, options.at_once)
            return
        source = folder / "requests.jsonl"
        write_input(source, options.rows, options.chars)
        server = (
            thin_server(options.latency, options.answer_bytes)
            if options.thin
            else emulator(folder, [MODEL], "--live-latency", str(options.latency))
        )
        print(
            f"{options.rows:,} rows, {options.concurrency} at once, {options.latency:g} s latency, "
            f"{'thin server' if options.thin else 'emulator'}, {options.repeat} runs"
        )
        with server as url:
            compare(source, folder, url, options.rows, options.concurrency, options.repeat)


if __name__ == "__main__":
    main()
