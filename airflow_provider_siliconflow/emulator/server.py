"""
The lifetime of an emulator: listening, and stopping.

:class:`EmulatorServer` runs in an event loop of the caller, :class:`Emulator` in a thread of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from aiohttp import web

from airflow_provider_siliconflow.emulator.config import EmulatorConfig
from airflow_provider_siliconflow.emulator.control import PREFIX
from airflow_provider_siliconflow.emulator.faults import Fault, Faults
from airflow_provider_siliconflow.emulator.journal import Journal, RecordedRequest
from airflow_provider_siliconflow.emulator.service import EmulatedService
from airflow_provider_siliconflow.emulator.wire import API, Wire

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from airflow_provider_siliconflow.emulator.bill import Bill
    from airflow_provider_siliconflow.emulator.live import LiveFigures


class EmulatorServer:
    """
    Serves an :class:`EmulatedService` on two ports, that of the API and that of the result storage.

    :param service: state and rules.
    :param faults: rules for faults; shared, they may change at any time.
    """

    def __init__(self, service: EmulatedService, faults: Faults) -> None:
        self.service = service
        self.faults = faults
        self.journal = Journal()
        self.base_url = ""
        self.storage_url = ""
        self._wire = Wire(service, faults, self.journal)
        self._runners: list[web.AppRunner] = []

    async def start(
        self, host: str = "127.0.0.1", port: int = 0, storage_port: int = 0, storage_host: str = "localhost"
    ) -> None:
        """
        Listen.

        :param host: address both ports are bound to.
        :param port: port of the API; 0 takes a free one.
        :param storage_port: port of the result storage; 0 takes a free one.
        :param storage_host: host name inside result URLs, other than the API's so that the origins differ.
        :raises OSError: a port is taken.
        :raises OverflowError: a port is not a valid port number.
        """
        bound = await self._listen(self._wire.storage_app(), host, storage_port)
        self.storage_url = f"http://{storage_host}:{bound}"
        self.service.storage_origin = self.storage_url
        bound = await self._listen(self._wire.api_app(), host, port)
        shown = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host
        self.base_url = f"http://{f'[{shown}]' if ':' in shown else shown}:{bound}{API}"

    async def stop(self) -> None:
        """Close both ports and every open connection."""
        self.journal.release()
        for runner in self._runners:
            await runner.cleanup()
        self._runners.clear()
        self._wire.close()

    async def _listen(self, app: web.Application, host: str, port: int) -> int:
        # A client that keeps its connection open must not delay the end.
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        self._runners.append(runner)
        await web.TCPSite(runner, host, port, backlog=4096).start()
        bound: int = runner.addresses[0][1]
        return bound


class Emulator:
    """A running emulator, in a thread and an event loop of its own. Made by :func:`running_emulator`."""

    def __init__(
        self,
        config: EmulatorConfig,
        data_dir: str | Path | None,
        faults: Iterable[Fault | dict[str, Any] | str],
        host: str,
        port: int,
        storage_port: int,
        storage_host: str,
    ) -> None:
        self.faults = Faults()
        for fault in faults:
            self.faults.add(fault)
        self._temporary = (
            None
            if data_dir is not None
            else tempfile.TemporaryDirectory(prefix="siliconflow-", ignore_cleanup_errors=True)
        )
        folder = data_dir if self._temporary is None else self._temporary.name
        assert folder is not None
        self.service = EmulatedService(config, folder, persistent=data_dir is not None)
        self.server = EmulatorServer(self.service, self.faults)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped: asyncio.Event | None = None
        started: Future[None] = Future()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(started, host, port, storage_port, storage_host)),
            name="siliconflow-emulator",
            daemon=True,
        )
        self._thread.start()
        try:
            started.result(timeout=30)
        except BaseException:
            self.close()
            raise

    async def _serve(
        self, started: Future[None], host: str, port: int, storage_port: int, storage_host: str
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        try:
            await self.server.start(host, port, storage_port, storage_host)
        except (OSError, OverflowError) as error:
            await self.server.stop()
            started.set_exception(error)
            return
        started.set_result(None)
        await self._stopped.wait()
        await self.server.stop()

    @property
    def base_url(self) -> str:
        """The host of a connection to it: ``http://127.0.0.1:PORT/v1``."""
        return self.server.base_url

    @property
    def storage_url(self) -> str:
        """Origin of the result URLs."""
        return self.server.storage_url

    @property
    def control_url(self) -> str:
        """Base URL of the control calls: ``http://127.0.0.1:PORT/_emulator``."""
        return self.base_url.removesuffix(API) + PREFIX.rstrip("/")

    @property
    def requests(self) -> list[RecordedRequest]:
        """The recent requests, oldest first."""
        return list(self.server.journal.requests)

    @property
    def request_counts(self) -> dict[str, int]:
        """All requests so far by ``METHOD /route``, for example ``GET /batches/*``."""
        return dict(self.server.journal.counts)

    @property
    def held(self) -> list[str]:
        """The requests that a fault holds at the moment, as ``METHOD /path``."""
        return self.server.journal.held

    @property
    def bill(self) -> Bill:
        """What the rows that are done by now cost, by model and route."""
        return self.service.bill()

    @property
    def live(self) -> LiveFigures:
        """How many requests came to ``/chat/completions``, and how often bodies were answered again."""
        return self.service.live.figures()

    @property
    def airflow_connection(self) -> str:
        """An Airflow connection to this emulator, as JSON for ``AIRFLOW_CONN_SILICONFLOW_DEFAULT``."""
        return connection_json(self.base_url, self.service.config)

    def release(self) -> None:
        """Let the requests that a fault holds continue."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.server.journal.release)

    def close(self) -> None:
        """Stop serving, and remove the temporary files. May be called twice."""
        if self._loop is not None and self._stopped is not None and self._thread.is_alive():
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()
        if self._temporary is not None:
            self._temporary.cleanup()


@contextlib.contextmanager
def running_emulator(
    config: EmulatorConfig | None = None,
    *,
    data_dir: str | Path | None = None,
    faults: Iterable[Fault | dict[str, Any] | str] = (),
    host: str = "127.0.0.1",
    port: int = 0,
    storage_port: int = 0,
    storage_host: str = "localhost",
    **settings: Any,
) -> Iterator[Emulator]:
    """
    Run an emulator in a background thread, for tests.

    :param config: behaviour; or give its fields by name, as in ``running_emulator(speed=1000)``.
    :param data_dir: keep state here across restarts; by default a temporary folder is used.
    :param faults: as for :meth:`Faults.add`.
    :param host: address to listen on.
    :param port: port of the API; 0 takes a free one.
    :param storage_port: port of the result storage; 0 takes a free one.
    :param storage_host: host name in result URLs.
    :param settings: fields of :class:`EmulatorConfig`.
    :raises TypeError: both ``config`` and its fields were given, or an unknown field.
    :raises OSError: a port is taken.
    """
    if config is None:
        config = EmulatorConfig(**settings)
    elif settings:
        raise TypeError(f"give either config or its fields, not both: {', '.join(settings)}")
    emulator = Emulator(config, data_dir, faults, host, port, storage_port, storage_host)
    try:
        yield emulator
    finally:
        emulator.close()


def connection_json(base_url: str, config: EmulatorConfig) -> str:
    """Return an Airflow connection to an emulator as JSON."""
    password = config.keys[0] if config.keys else "sk-emulator"
    connection = {"conn_type": "siliconflow", "password": password, "host": base_url}
    return json.dumps(connection, separators=(",", ":"))
