"""The emulator's rules behind the calls of a client, faults and crashes by script, and a clock that costs no time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from airflow_provider_siliconflow.api.exceptions import (
    InsufficientBalanceError,
    NoAnswerError,
    NotFoundError,
    NotSentError,
    RateLimitedError,
    ServiceUnavailableError,
)
from airflow_provider_siliconflow.api.models import Batch, UploadedFile
from airflow_provider_siliconflow.api.settings import ClientSettings
from airflow_provider_siliconflow.emulator.config import EmulatorConfig
from airflow_provider_siliconflow.emulator.service import EmulatedService, ServiceError

#: What may happen to one operation: a refusal, an answer lost before or after the work, or a crash.
FAULTS = ("none", "refused", "unsent", "lost-before", "lost-after", "crash-before", "crash-after")


class Crash(BaseException):
    """The process dies here."""


class FakeClock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class FaultyAPI:
    """The emulator's rules behind the calls of a client, with a script of faults."""

    def __init__(self, service: EmulatedService, script: Iterator[str], clock: FakeClock) -> None:
        self.service, self.script, self.clock = service, script, clock
        self.settings = ClientSettings("sk-test", "http://emulator.invalid/v1")
        self.calls: list[str] = []
        self.possible: list[tuple[str, ...]] = []

    def meet(self, possible: tuple[str, ...]) -> str:
        """Return what the script has for the next boundary, if that is possible there; die of a crash at once."""
        self.possible.append(possible)
        fault = next(self.script, "none")
        if fault not in possible:
            return "none"
        if fault == "crash-before" or possible == ("crash-after",) == (fault,):
            raise Crash
        return fault

    @property
    def met(self) -> int:
        """Boundaries so far."""
        return len(self.possible)

    def _run(self, name: str, work: Any) -> Any:
        self.calls.append(name)
        self.clock.sleep(0.1)
        fault = self.meet(FAULTS)
        if fault == "refused":
            raise RateLimitedError("rate limit", status_code=429)
        if fault == "unsent":
            raise NotSentError("no connection")
        if fault == "lost-before":
            raise ServiceUnavailableError("bad gateway", status_code=502)
        try:
            answer = work()
        except ServiceError as exc:
            error = NotFoundError if exc.status == 404 else InsufficientBalanceError
            raise error(str(exc.body), status_code=exc.status) from exc
        if fault == "crash-after":
            raise Crash
        if fault == "lost-after":
            raise NoAnswerError("reset")
        return answer

    def create_batch(self, **request: Any) -> Batch:
        return Batch.model_validate(self._run("create", lambda: self.service.create_batch(request)))

    def get_batch(self, batch_id: str) -> Batch:
        return Batch.model_validate(self._run("get", lambda: self.service.get_batch(batch_id)))

    def list_batches(self) -> Iterator[Batch]:
        page = self._run("list", lambda: self.service.list_batches(limit=100))
        yield from (Batch.model_validate(item) for item in page["data"])

    def list_models(self, *, repeat: bool = True) -> list[str]:
        return [item["id"] for item in self.service.models("chat")["data"]]

    def list_files(self) -> list[UploadedFile]:
        page = self._run("list files", lambda: self.service.list_files(purpose="batch"))
        return [UploadedFile.model_validate(item) for item in page["data"]["data"]]

    def upload_file(self, source: Any, *, size: int, filename: str) -> UploadedFile:
        def work() -> Any:
            with source.open("rb") as stream:
                return self.service.add_file(filename, "batch", [stream.read()])

        return UploadedFile.model_validate(self._run("upload", work)["data"])

    def iter_file(self, reference: str, refresh: Callable[[], str | None]) -> Iterator[bytes]:
        _, batch_id, name = reference.partition("?")[0].rsplit("/", 2)
        kind: Any = name.removesuffix(".jsonl")
        yield self._run("download", lambda: self.service.open_results(batch_id, kind).read_bytes())


def make_service(folder: Path, clock: FakeClock, **config: Any) -> EmulatedService:
    return EmulatedService(EmulatorConfig(**config), folder, clock=clock.time)
