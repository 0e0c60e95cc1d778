"""Both clients behind one face, and a second HTTP server that says what it was sent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from airflow_provider_siliconflow.api.settings import ClientSettings

KEY = "sk-test-0123456789abcdef"


@dataclass
class Seen:
    """A request as it arrived."""

    method: str
    target: str
    headers: dict[str, str]


@dataclass
class Answer:
    """What the server answers; ``announce`` is the Content-Length where it is not the body's."""

    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    announce: int | None = None


class Recorder:
    """A plain HTTP server (and proxy) on a free port; ``answer`` decides, by request, what it says."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.answer: Callable[[Seen], Answer] = lambda seen: Answer()
        self.Answer = Answer
        recorder = self

        class Handler(BaseHTTPRequestHandler):
            def handle_one(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                seen = Seen(self.command, self.path, {k.lower(): v for k, v in self.headers.items()})
                recorder.seen.append(seen)
                answer = recorder.answer(seen)
                self.send_response(answer.status)
                length = len(answer.body) if answer.announce is None else answer.announce
                known = {} if "Transfer-Encoding" in answer.headers else {"Content-Length": str(length)}
                for name, value in {**known, **answer.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer.body)
                self.close_connection = True

            do_GET = do_POST = handle_one  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        # A client that has seen enough closes the connection, which is no error here.
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def always(self, body: bytes, status: int = 200) -> None:
        self.answer = lambda seen: Answer(status, body)

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    recorder = Recorder()
    yield recorder
    recorder.close()


@pytest.fixture
def dead_url() -> Iterator[str]:
    """The address of a port that nobody listens on: bound, so that no one else can take it."""
    with contextlib.closing(socket.socket()) as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def make_settings() -> Callable[..., ClientSettings]:
    def make(base_url: str, **values: Any) -> ClientSettings:
        return ClientSettings(KEY, base_url=base_url, **({"backoff": 0.01} | values))

    return make


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest) -> Callable[[ClientSettings, Any], Any]:
    """Carries out one call, with either client."""

    def ask_sync(settings: ClientSettings, call: Any) -> Any:
        from airflow_provider_siliconflow.api.client import SiliconFlowClient

        with SiliconFlowClient(settings) as client:
            return client.call(call)

    def ask_async(settings: ClientSettings, call: Any) -> Any:
        from airflow_provider_siliconflow.api.async_client import AsyncSiliconFlowClient

        async def run() -> Any:
            async with AsyncSiliconFlowClient(settings) as client:
                return await client.call(call)

        return asyncio.run(run())

    return ask_sync if request.param == "sync" else ask_async


@pytest.fixture
def rows() -> Callable[..., bytes]:
    """A batch input file: one row per text."""

    def make(*texts: str) -> bytes:
        lines = [
            {
                "custom_id": f"r{number}",
                "body": {"model": "Qwen/Qwen3-32B", "messages": [{"role": "user", "content": text}]},
            }
            for number, text in enumerate(texts)
        ]
        return b"".join(json.dumps(line).encode() + b"\n" for line in lines)

    return make
