"""The emulator's rules behind the calls of a client, faults and crashes by script, and a clock that costs no time."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from airflow_provider_siliconflow.api.exceptions import (
    APIError,
    InsufficientBalanceError,
    InvalidRequestError,
    NoAnswerError,
    NotFoundError,
    NotSentError,
    RateLimitedError,
    ServiceUnavailableError,
    UnexpectedAnswerError,
)
from airflow_provider_siliconflow.api.models import Account, Batch, UploadedFile
from airflow_provider_siliconflow.api.settings import ClientSettings
from airflow_provider_siliconflow.emulator.config import EmulatorConfig
from airflow_provider_siliconflow.emulator.service import EmulatedService, ServiceError
from airflow_provider_siliconflow.jobs.identity import WORK_KEY, BatchWork, Submitter, Upload
from airflow_provider_siliconflow.jobs.states import (
    Ended,
    Planned,
    Sent,
    State,
    UploadState,
    check_transition,
    decode,
    encode,
)

#: What may happen to one operation: a refusal, an answer lost before or after the work, or a crash.
FAULTS = (
    "none",
    "refused",
    "unsent",
    "lost-before",
    "lost-after",
    "odd-after",
    "crash-before",
    "crash-after",
)


class Crash(BaseException):
    """The process dies here."""


class FakeClock:
    """A clock that costs no time; ``jumps`` are what somebody sets its wall clock by, one for each pause."""

    def __init__(self, jumps: Iterable[float] = ()) -> None:
        self.now = 1_800_000_000.0
        self.wrong = 0.0
        self.jumps = iter(jumps)

    def true_time(self) -> float:
        """Return the time of the service."""
        return self.now

    def time(self) -> float:
        return self.now + self.wrong

    def monotonic(self) -> float:
        return self.now - 1_799_000_000.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if seconds >= 1.0:
            self.wrong += next(self.jumps, 0.0)


@dataclass(frozen=True)
class Oddities:
    """
    What the service's answers about batches are like.

    :param order: of the list: ``newest``, ``oldest`` or ``any``.
    :param without: fields that the list leaves out, or that are null in it.
    :param never_told: fields that no answer about a batch has.
    :param clock_off: seconds by which ``created_at`` of batches is off.
    :param readable: whether the content of input files can be read.
    """

    order: str = "newest"
    without: frozenset[str] = frozenset()
    never_told: frozenset[str] = frozenset()
    clock_off: float = 0.0
    readable: bool = True

    def of_id(self, view: dict[str, Any]) -> dict[str, Any]:
        """Return what the service answers to an id."""
        created = view["created_at"]
        view = {**view, "created_at": None if created is None else created + self.clock_off}
        return {name: value for name, value in view.items() if name not in self.never_told}

    def of_list(self, views: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return what the service lists."""
        views = [
            {name: value for name, value in self.of_id(view).items() if name not in self.without}
            for view in views
        ]
        if self.order == "oldest":
            views.reverse()
        if self.order == "any":
            random.Random(len(views)).shuffle(views)
        return views


class FakeListing:
    """Batches as :class:`~.jobs.account.Listing` hands them out."""

    def __init__(self, batches: Iterable[Batch], *, cut: bool = False, unreadable: int = 0) -> None:
        self._batches = iter(batches)
        self.cut = cut
        self.unreadable = unreadable

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._batches)


_ERRORS: dict[int, type[APIError]] = {
    400: InvalidRequestError,
    402: InsufficientBalanceError,
    404: NotFoundError,
    429: RateLimitedError,
}


class FaultyAPI:
    """The emulator's rules behind the calls of a client, with a script of faults."""

    def __init__(
        self,
        service: EmulatedService,
        script: Iterator[str],
        clock: FakeClock,
        oddities: Oddities = Oddities(),
    ) -> None:
        self.service, self.script, self.clock, self.oddities = service, script, clock, oddities
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

    def crashes(self, since: int = 0) -> list[tuple[int, str]]:
        """
        Return where a process can die since a boundary: at how many more, and before or after.

        All of it, or as many of these, evenly spread, as ``MAX_EXAMPLES`` allows.
        """
        found: list[tuple[int, str]] = [
            (point, crash)
            for point, possible in enumerate(self.possible[since:])
            for crash in ("crash-before", "crash-after")
            if crash in possible
        ]
        most = int(os.environ.get("MAX_EXAMPLES") or len(found))
        return found[:: -(-len(found) // most)]

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
            raise _ERRORS[exc.status](str(exc.body), status_code=exc.status) from exc
        if fault == "crash-after":
            raise Crash
        if fault == "lost-after":
            raise NoAnswerError("reset")
        if fault == "odd-after":
            raise UnexpectedAnswerError("<html>", accepted=True)
        return answer

    def create_batch(self, *, repeat: bool = True, **request: Any) -> Batch:
        return self._batch(self._run("create", lambda: self.service.create_batch(request)))

    def get_batch(self, batch_id: str) -> Batch:
        return self._batch(self._run("get", lambda: self.service.get_batch(batch_id)))

    def _batch(self, view: dict[str, Any]) -> Batch:
        return Batch.model_validate(self.oddities.of_id(view))

    def cancel_batch(self, batch_id: str) -> Batch:
        return self._batch(self._run("cancel", lambda: self.service.cancel_batch(batch_id)))

    def list_batches(self) -> FakeListing:
        page = self._run("list", lambda: self.service.list_batches(limit=100))
        return FakeListing(Batch.model_validate(item) for item in self.oddities.of_list(page["data"]))

    def get_account(self, *, repeat: bool = True) -> Account:
        return Account.model_validate(self.service.user_info()["data"])

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

    def iter_file(
        self, reference: str, refresh: Callable[[], str | None], *, limit: int | None = None
    ) -> Iterator[bytes]:
        if "/" not in reference:
            yield self._run("content", lambda: self._content(reference))
            return
        _, batch_id, name = reference.partition("?")[0].rsplit("/", 2)
        kind: Any = name.removesuffix(".jsonl")
        yield self._run("download", lambda: self.service.open_results(batch_id, kind).read_bytes())

    def _content(self, file_id: str) -> bytes:
        if not self.oddities.readable:
            raise ServiceError(404, "404 page not found")
        return self.service.open_content(file_id).read_bytes()


def make_service(folder: Path, clock: FakeClock, **config: Any) -> EmulatedService:
    return EmulatedService(EmulatorConfig(**config), folder, clock=clock.true_time)


ROW = {"custom_id": "a", "body": {"model": "Qwen/Qwen3-32B", "messages": [{"role": "user", "content": "hi"}]}}
CONTENT = json.dumps(ROW).encode() + b"\n"


class FaultyLedger:
    """A ledger that survives crashes, and in whose writes a process may die."""

    complete = True
    damaged = False

    def __init__(self, script: Iterator[str]) -> None:
        self.script = script
        self.states: dict[str, State] = {}
        self.uploads: dict[str, UploadState] = {}
        self.dead: dict[str, tuple[Any, ...]] = {}

    def _maybe_crash(self, when: str) -> None:
        if next(self.script, "none") == when:
            raise Crash

    def state(self, key: str) -> State:
        return self.states.get(key, Planned())

    def record(self, key: str, state: State) -> None:
        check_transition(key, self.state(key), state)
        self._maybe_crash("crash-before")
        self.states[key] = decode(encode(state))
        self._maybe_crash("crash-after")

    def retire(self, key: str) -> None:
        self.dead[key] = (*self.retired(key), self.states[key])
        self.record(key, Planned())

    def retired(self, key: str) -> tuple[Any, ...]:
        return self.dead.get(key, ())

    def recorded_batches(self) -> dict[str, int]:
        states = [*self.states.values(), *(each for dead in self.dead.values() for each in dead)]
        return {state.batch_id: state.number for state in states if isinstance(state, Sent | Ended)}

    def earlier_work(self, key: str) -> tuple[str, State] | None:
        others = [other for other in self.states if other != key]
        return (others[-1], self.states[others[-1]]) if others else None

    def next_number(self) -> int:
        return 1

    def upload(self, key: str) -> UploadState:
        return self.uploads.get(key, Planned())

    def record_upload(self, key: str, state: UploadState) -> None:
        self.uploads[key] = state


def make_work(service: EmulatedService, task_id: str = "create") -> BatchWork:
    answer = service.add_file("rows.jsonl", "batch", [CONTENT])
    file_id = answer.get("data", answer)["id"]
    return work_over(file_id, Submitter("dag", "run", task_id, -1, 3))


def work_over(file_id: str, submitter: Submitter) -> BatchWork:
    """Return work over a file that is at the service already."""
    return BatchWork(
        key=submitter.key(input=file_id),
        label=submitter.label,
        input_file_id=file_id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata={},
        replace=None,
        submitter=submitter,
    )


def make_upload_work(api: FaultyAPI, content: bytes = CONTENT, *, generation: int = 3) -> BatchWork:
    """Return work whose file is uploaded first."""
    submitter = Submitter("dag", "run", "create", -1, generation)
    digest = sha256(content).hexdigest()
    key = submitter.key(upload=digest)

    def send() -> UploadedFile:
        answer = api._run("upload", lambda: api.service.add_file(f"rows-{key}.jsonl", "batch", [content]))
        return UploadedFile.model_validate(answer["data"])

    return BatchWork(
        key=submitter.key(input=digest),
        label=submitter.label,
        input_file_id=None,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata={},
        replace=None,
        upload=Upload(key, f"rows-{key}.jsonl", len(content), digest, send),
        submitter=submitter,
    )


def batches_of(service: EmulatedService, work: BatchWork) -> list[dict[str, Any]]:
    found = service.state()["batches"]
    return [batch for batch in found if (batch.get("metadata") or {}).get(WORK_KEY) == work.key]
