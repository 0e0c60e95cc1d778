"""
Uploading and downloading a large file: this package's client, compared with common alternatives.

Each contender runs in a separate process against a bare socket server. Peak RSS is measured above the size of the
process before the transfer. Run with ``--megabytes 1000`` for the size of the largest batch file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

BLOCK = (b'{"custom_id":"row","body":{"messages":[{"role":"user","content":"' + b"x" * 900 + b'"}]}}\n') * 64
ANSWER = json.dumps({"code": 20000, "status": True, "data": {"id": "file-a", "bytes": 1}}).encode()


def serve(size: int) -> int:
    """Accept uploads, answer each GET with ``size`` bytes, and return the port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(connection: socket.socket) -> None:
        with connection:
            head = b""
            while b"\r\n\r\n" not in head:
                head += connection.recv(65536)
            head, _, body = head.partition(b"\r\n\r\n")
            if head.startswith(b"GET"):
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
                left = size
                block = BLOCK * 16
                while left:
                    left -= len(block[:left])
                    connection.sendall(block[: left + len(block)] if left else block)
                return
            fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
            left = int(fields[b"content-length"]) - len(body)
            buffer = bytearray(1 << 20)
            while left > 0:
                left -= connection.recv_into(buffer)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(ANSWER), ANSWER))

    def loop() -> None:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    threading.Thread(target=loop, daemon=True).start()
    return int(listener.getsockname()[1])


def upload_ours(url: str, path: Path, size: int) -> None:
    from airflow_provider_siliconflow.api.client import SiliconFlowClient
    from airflow_provider_siliconflow.api.settings import ClientSettings

    SiliconFlowClient(ClientSettings("sk-x", url)).upload_file(path, size=size, filename="a.jsonl")


def upload_requests(url: str, path: Path, size: int) -> None:
    import requests

    with path.open("rb") as file:
        requests.post(f"{url}/files", data={"purpose": "batch"}, files={"file": file}, timeout=600)


def upload_openai(url: str, path: Path, size: int) -> None:
    from openai import OpenAI  # type: ignore[import-not-found,unused-ignore]

    OpenAI(api_key="sk-x", base_url=url).files.create(file=path, purpose="batch")


def download_ours(url: str, path: Path, size: int) -> None:
    from airflow_provider_siliconflow.api.client import SiliconFlowClient
    from airflow_provider_siliconflow.api.settings import ClientSettings

    with path.open("wb") as file:
        for chunk in SiliconFlowClient(ClientSettings("sk-x", url)).iter_file(f"{url}/out", lambda: None):
            file.write(chunk)


def download_content(url: str, path: Path, size: int) -> None:
    import requests

    path.write_bytes(requests.get(f"{url}/out", timeout=600).content)


def download_lines(url: str, path: Path, size: int) -> None:
    import requests

    with requests.get(f"{url}/out", timeout=600, stream=True) as response, path.open("wb") as file:
        for line in response.iter_lines():
            file.write(line + b"\n")


CONTENDERS: dict[str, dict[str, Callable[[str, Path, int], None]]] = {
    "upload": {"ours": upload_ours, "requests files=": upload_requests, "openai": upload_openai},
    "download": {"ours": download_ours, ".content": download_content, "iter_lines": download_lines},
}


def measure(
    direction: str, name: str, url: str, path: Path, size: int, results: multiprocessing.Queue[object]
) -> None:
    """Run one contender in this process and report seconds, CPU seconds and MiB."""
    warm = path.with_suffix(".warm")
    warm.write_bytes(BLOCK)
    run = CONTENDERS[direction][name]
    try:
        if direction == "upload":
            run(url, warm, len(BLOCK))
        else:
            # Imports are not part of the transfer.
            __import__("requests")
            __import__("airflow_provider_siliconflow.api.client")
    except ImportError as exc:
        results.put(str(exc))
        return
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    run(url, path, size)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    results.put((wall, cpu, (after.ru_maxrss - before.ru_maxrss) / 1024))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=300)
    megabytes = parser.parse_args().megabytes
    blocks = megabytes * 1_000_000 // len(BLOCK)
    size = blocks * len(BLOCK)
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for direction, contenders in CONTENDERS.items():
            base = None
            for name in contenders:
                path = Path(folder) / "file.jsonl"
                with path.open("wb") as file:
                    for _ in range(blocks if direction == "upload" else 0):
                        file.write(BLOCK)
                url = f"http://127.0.0.1:{serve(size)}/v1"
                results = spawn.Queue()
                process = spawn.Process(target=measure, args=(direction, name, url, path, size, results))
                process.start()
                found = results.get()
                process.join()
                if isinstance(found, str):
                    print(f"{direction:9} {name:16} skipped: {found}")
                    continue
                wall, cpu, memory = found
                base = base or (wall, cpu)
                print(
                    f"{direction:9} {name:16} {size / 1e6 / wall:7.0f} MB/s  {cpu:6.2f} s CPU  +{memory:6.0f} MiB  "
                    f"ours is {wall / base[0]:4.1f}x as fast, {cpu / base[1]:4.1f}x by CPU"
                )


if __name__ == "__main__":
    main()
