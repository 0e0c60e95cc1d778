"""Forked processes with a time limit, whose answers are collected."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import selectors
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

T = TypeVar("T")

#: What a faulty program may take: bytes of memory over what it starts with, bytes of one file.
MEMORY, FILE_SIZE = 4 << 30, 1 << 30


class Reporter:
    """What a child says to its parent: lines of JSON."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def begin(self, seconds: float, cpu_seconds: float) -> None:
        """
        The next step takes at most so many seconds, and so many of the processor.

        The second limit ends an endless loop soon, and does not depend on what else the machine does; the first,
        which has to be generous, is for a step that sleeps.
        """
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = math.ceil(used.ru_utime + used.ru_stime + cpu_seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        self._say({"begin": seconds})

    def end(self, **result: Any) -> None:
        self._say({"end": result})

    def _say(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(self._descriptor, data) :]


@dataclass(frozen=True, slots=True)
class Task(Generic[T]):
    """What a child does, and what its answer belongs to."""

    subject: T
    work: Callable[[Reporter], None]


@dataclass(frozen=True, slots=True)
class Answer(Generic[T]):
    """
    What became of a child.

    :param result: what it handed to :meth:`Reporter.end`; None when it did not come to that.
    :param ending: "ended", "timeout", or "died".
    :param cpu_seconds: what it and its own children used of the processor.
    """

    subject: T
    result: dict[str, Any] | None
    ending: str
    cpu_seconds: float


@dataclass(slots=True)
class _Child(Generic[T]):
    subject: T
    pid: int
    pipe: int
    folder: Path
    deadline: float
    buffer: bytes = b""
    result: dict[str, Any] | None = None


def run_all(tasks: Iterable[Task[T]], count: int) -> Iterator[Answer[T]]:
    """Run tasks in forked children, `count` at a time. `tasks` is drawn from as children end."""
    waiting = iter(tasks)
    selector = selectors.DefaultSelector()
    running: dict[int, _Child[T]] = {}
    try:
        while True:
            while len(running) < count and (task := next(waiting, None)) is not None:
                child = _start(task)
                running[child.pipe] = child
                selector.register(child.pipe, selectors.EVENT_READ)
            if not running:
                return
            pause = min(child.deadline for child in running.values()) - time.monotonic()
            ready = [key.fd for key, _ in selector.select(max(pause, 0))]
            for child in list(running.values()):
                ending = _step(child, readable=child.pipe in ready)
                if ending is not None:
                    selector.unregister(child.pipe)
                    del running[child.pipe]
                    status, cpu_seconds = _finish(child)
                    if ending == "died" and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
                        ending = "timeout"
                    yield Answer(child.subject, child.result, ending, cpu_seconds)
    finally:
        for child in running.values():
            _finish(child)
        selector.close()


def _start(task: Task[T]) -> _Child[T]:
    folder = Path(tempfile.mkdtemp(prefix="mutant-"))
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _live(task, Reporter(writing), folder)
    os.close(writing)
    # Until it says how long its first step may take.
    return _Child(task.subject, pid, reading, folder, time.monotonic() + 60)


def _live(task: Task[T], reporter: Reporter, folder: Path) -> NoReturn:
    """The whole life of a child."""
    try:
        # A group of its own, so that what it starts can be ended with it.
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        for kind, limit in (
            (resource.RLIMIT_AS, _address_space() + MEMORY),
            (resource.RLIMIT_FSIZE, FILE_SIZE),
        ):
            resource.setrlimit(kind, (limit, resource.getrlimit(kind)[1]))
        os.environ["TMPDIR"] = os.environ["PYTEST_DEBUG_TEMPROOT"] = str(folder)
        tempfile.tempdir = None
        task.work(reporter)
    except BaseException:  # noqa: BLE001 - not the fault's doing; the parent stops at it
        reporter.end(broken=traceback.format_exc())
    finally:
        os._exit(0)


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def _step(child: _Child[T], *, readable: bool) -> str | None:
    """Read what a child said; how it ended, if it did."""
    if readable:
        data = os.read(child.pipe, 1 << 16)
        if not data:
            return "ended" if child.result is not None else "died"
        *lines, child.buffer = (child.buffer + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "begin" in message:
                child.deadline = time.monotonic() + message["begin"]
            else:
                child.result = message["end"]
                return "ended"
    return "timeout" if time.monotonic() > child.deadline else None


def _finish(child: _Child[T]) -> tuple[int, float]:
    """Leave nothing behind of a child that has ended, or has to; its exit status and processor seconds."""
    os.close(child.pipe)
    for end in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            end(child.pid, signal.SIGKILL)
    _, status, usage = os.wait4(child.pid, 0)
    shutil.rmtree(child.folder, ignore_errors=True)
    return status, usage.ru_utime + usage.ru_stime
