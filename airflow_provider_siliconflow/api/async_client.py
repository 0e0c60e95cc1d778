"""The HTTP API over ``aiohttp``: what a wait needs in the triggerer, and asking row by row in a worker."""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

import aiohttp
import tenacity
from aiohttp.client_proto import ResponseHandler
from yarl import URL

from airflow_provider_siliconflow.api import protocol
from airflow_provider_siliconflow.api.answers import is_success, traced
from airflow_provider_siliconflow.api.exceptions import (
    InvalidInputError,
    NoAnswerError,
    NotSentError,
    UnexpectedAnswerError,
)
from airflow_provider_siliconflow.api.models import Batch
from airflow_provider_siliconflow.api.protocol import Call, Completion
from airflow_provider_siliconflow.api.redaction import brief, remember_proxy
from airflow_provider_siliconflow.api.settings import ClientSettings, credentials_problem, is_url, trusted

T = TypeVar("T")

#: Calls of one client that run at once; further calls wait.
MAX_CALLS = 32
#: Seconds after which a call no longer counts as one of these: stuck polls must not block the others.
_TURN = 5.0
#: Connections one client opens at most, stuck ones included.
MAX_CONNECTIONS = 512

#: Seconds that a model may take for an answer. It comes in one piece, so nothing is heard of it before.
COMPLETION_LIMIT = 1800.0

#: Bytes of the largest answer that is read within the event loop. Honest ones have one to five thousand. One made up
#: of what takes the longest to redact holds up the loop for a microsecond per byte.
_MAX_IN_LOOP = 8 << 10
#: Most bytes of the head of an answer, interim answers included.
_MAX_HEAD_BYTES = 64 << 10
#: Most lines in one read from the socket: the parser spends microseconds on each, and nothing else runs meanwhile.
_MAX_LINES = 1000


class AsyncSiliconFlowClient:
    """
    Calls of the API within an event loop. Many waits may share one client.

    :param settings: key, host, timeouts, retries.
    :param max_calls: calls that run at once; further calls wait.
    """

    def __init__(self, settings: ClientSettings, *, max_calls: int = MAX_CALLS) -> None:
        self.settings = settings
        self._session: aiohttp.ClientSession | None = None
        self._ssl = trusted(settings.verify)
        self._proxy = settings.proxy_for(settings.base_url) or _proxy_of_environment(settings.base_url)
        self._timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=settings.connect_timeout, sock_read=settings.timeout
        )
        self._turns = _Turns(max_calls)
        self._reader: ThreadPoolExecutor | None = None

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None or self._session.closed:
            self._session = aiohttp.ClientSession(
                headers=self.settings.request_headers | {"Accept-Encoding": "identity"},
                connector=_Connector(limit=MAX_CONNECTIONS, ssl=self._ssl),
                timeout=self._timeout,
                # With it aiohttp would look into a netrc file, for each request and in a thread, and refuse the
                # request when it finds credentials there beside the key.
                trust_env=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                # Compressed bodies may expand to any size.
                auto_decompress=False,
            )
        return self._session

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None
        if self._reader is not None:
            self._reader.shutdown(wait=False)
            self._reader = None

    async def __aenter__(self) -> AsyncSiliconFlowClient:
        """Return the client itself."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the connections."""
        await self.close()

    async def call(self, call: Call[T], *, repeat: bool = True, within: float | None = None) -> T:
        """
        Carry out a call, with the repetitions the protocol allows.

        :param repeat: whether to send it again after a transient fault.
        :param within: seconds that one send may take at most, if less than ``settings.call_limit``.
        """
        if not repeat or self.settings.max_retries == 0:
            return await self._send(call, within)
        async for attempt in tenacity.AsyncRetrying(**protocol.retry_options(call, self.settings)):
            with attempt:
                return await self._send(call, within)
        raise AssertionError("unreachable")

    async def complete_chat(self, content: bytes) -> Completion:
        """
        Ask for one chat completion, once, and wait for it as long as a model may take.

        :param content: the body of a request line, as JSON.
        :raises SiliconFlowError: there is none; :func:`~.protocol.leaves_effect_open` says whether it may be billed.
        """
        return await self._send(protocol.complete_chat(content), None, limit=COMPLETION_LIMIT)

    async def _send(self, call: Call[T], within: float | None, *, limit: float | None = None) -> T:
        timeout = self._timeout
        if limit is None:
            limit = min(self.settings.call_limit, within or self.settings.call_limit)
        else:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=self.settings.connect_timeout)
        progress = _Progress(2 * call.limit(200))
        _PROGRESS.set(progress)
        failure: NotSentError | NoAnswerError | None = None
        try:
            turn = await self._turns.take()
            try:
                async with asyncio.timeout(limit), self._request(call, timeout) as response:
                    progress.response = response
                    body = await _read(call, response)
            finally:
                self._turns.give_back(turn)
        except (TimeoutError, aiohttp.ClientError, OSError) as exc:
            failure = self._failure(call, exc, progress, limit)
        if failure is not None:
            # Raised out here, without its cause, which may hold the password of a proxy.
            raise failure
        answer = functools.partial(call.answer, response.status, response.headers, body)
        if len(body) <= _MAX_IN_LOOP and "Content-Encoding" not in response.headers:
            return answer()
        if self._reader is None:
            # The triggerer's own executor has only a few threads, and other triggers use them.
            self._reader = ThreadPoolExecutor(1, thread_name_prefix="siliconflow-reader")
        return await asyncio.get_running_loop().run_in_executor(self._reader, answer)

    def _request(self, call: Call[Any], timeout: aiohttp.ClientTimeout) -> Any:
        data = call.body()
        return self._open_session().request(
            call.method,
            URL(call.url(self.settings), encoded=True),
            data=data,
            headers={"Content-Type": "application/json"} if data is not None else None,
            proxy=self._proxy,
            allow_redirects=False,
            timeout=timeout,
        )

    def _failure(
        self, call: Call[Any], exc: BaseException, progress: _Progress, limit: float
    ) -> NotSentError | NoAnswerError:
        why = f"{type(exc).__name__}: {brief(str(exc))}".rstrip(": ")
        if type(exc) is TimeoutError:
            why = f"it took longer than {limit:.0f} s"
        if not progress.connected:
            return NotSentError(f"{call.name} did not reach {self.settings.base_url}: {why}")
        response = progress.response
        trace = traced(response.headers) if response else ""
        return NoAnswerError(
            f"{call.name} got no whole answer from {self.settings.base_url}{trace}: {why}",
            accepted=response is not None and is_success(response.status),
        )

    async def get_batch(self, batch_id: str, *, repeat: bool = True, within: float | None = None) -> Batch:
        """
        Read a batch.

        :param batch_id: the batch.
        :param repeat: whether to send it again after a transient fault.
        :param within: seconds that one send may take at most.
        :raises UnexpectedAnswerError: the answer is about another batch, or not what the API documents.
        """
        return await self.call(protocol.get_batch(batch_id), repeat=repeat, within=within)

    async def cancel_batch(self, batch_id: str) -> Batch:
        """Ask for a batch to be cancelled; the answer may still show its old status."""
        return await self.call(protocol.cancel_batch(batch_id))


async def _read(call: Call[Any], response: aiohttp.ClientResponse) -> bytes:
    """
    Read a body within the call's limit; of an error its start.

    :raises UnexpectedAnswerError: it has more.
    """
    limit = call.limit(response.status)
    success = is_success(response.status)
    too_long = success and (response.content_length or 0) > limit
    pieces: list[bytes] = []
    size = 0
    while size <= limit and not too_long:
        piece = await response.content.readany()
        if not piece:
            return b"".join(pieces)
        pieces.append(piece)
        size += len(piece)
    # Otherwise the rest might be read in order to reuse the connection.
    response.close()
    if success:
        raise UnexpectedAnswerError(
            f"{call.name} answered HTTP {response.status}{traced(response.headers)} with more than {limit} bytes; the "
            "rest was not read",
            accepted=True,
        )
    return b"".join(pieces)[:limit]


class _Progress:
    """
    How far a request got.

    :param most: most bytes of its answer on the wire.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        #: Whether there was a connection to send it over.
        self.connected = False
        self.response: aiohttp.ClientResponse | None = None


#: Of the request that is under way in this task. A trace of aiohttp would tell, too, and cost a tenth of a poll.
_PROGRESS: ContextVar[_Progress] = ContextVar("_PROGRESS")


class _Turns:
    """
    Lets so many calls run at once, not counting those that have run for a while.

    Calls that get stuck must not keep the others waiting for longer than that.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        #: When each call began that counts, the oldest first.
        self._running: dict[object, float] = {}
        self._waiting: deque[asyncio.Future[object]] = deque()
        # One for all that wait: thousands may.
        self._timer: asyncio.TimerHandle | None = None

    async def take(self) -> object:
        """Wait for a turn, and return what gives it back."""
        loop = asyncio.get_running_loop()
        if not self._waiting and self._has_room(loop.time()):
            return self._begin(loop.time())
        waiting = loop.create_future()
        self._waiting.append(waiting)
        self._offer(loop)
        try:
            return await waiting
        except asyncio.CancelledError:
            if waiting.done() and not waiting.cancelled():
                self.give_back(waiting.result())
            raise

    def give_back(self, turn: object) -> None:
        """Let the next call run."""
        self._running.pop(turn, None)
        if self._waiting:
            self._offer(asyncio.get_running_loop())

    def _has_room(self, now: float) -> bool:
        while self._running and next(iter(self._running.values())) <= now - _TURN:
            del self._running[next(iter(self._running))]
        return len(self._running) < self._most

    def _begin(self, now: float) -> object:
        turn = object()
        self._running[turn] = now
        return turn

    def _offer(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        while self._waiting and self._has_room(now):
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_result(self._begin(now))
        if self._waiting and self._timer is None:
            oldest = next(iter(self._running.values()))
            self._timer = loop.call_at(oldest + _TURN, self._wake, loop)

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        self._offer(loop)


class _Connector(aiohttp.TCPConnector):
    """Makes connections whose answers are parsed within limits."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._factory: Any = functools.partial(_BoundedHandler, loop=asyncio.get_running_loop())

    async def connect(self, *args: Any, **options: Any) -> Any:
        """Return a connection to the API, through a tunnel if need be, or to a proxy that forwards requests."""
        connection = await super().connect(*args, **options)
        _PROGRESS.get().connected = True
        return connection


class _BoundedHandler(ResponseHandler):
    """
    Refuses what would keep the parser, and so the loop, busy: endless interim answers, headers or chunks.

    ``aiohttp`` itself limits the length of a line and, in recent versions, the number of headers.
    """

    _bytes = _head_bytes = _most = 0

    def set_response_params(self, **params: Any) -> None:
        """Prepare for the next answer."""
        self._bytes = self._head_bytes = 0
        self._most = _PROGRESS.get().most
        super().set_response_params(**params)

    def data_received(self, data: bytes) -> None:
        """Parse what came, or close the connection."""
        self._bytes += len(data)
        payload = self._payload
        if payload is None or payload.is_eof():
            end = data.find(b"\r\n\r\n")
            self._head_bytes += len(data) if end < 0 else end
        if self._bytes > self._most or self._head_bytes > _MAX_HEAD_BYTES or data.count(b"\r\n") > _MAX_LINES:
            error = aiohttp.ClientPayloadError("the answer's head, or the number of its pieces, has no end")
            if payload is not None:
                payload.set_exception(error)
            self.set_exception(error)
            if self.transport is not None:
                self.transport.abort()
            return
        super().data_received(data)


def _proxy_of_environment(url: str) -> str | None:
    """
    Return the proxy that the environment names for a URL.

    :raises InvalidInputError: it is of a kind that is not supported.
    """
    parts = urlsplit(url)
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy:
        return None
    remember_proxy(proxy if "://" in proxy else f"http://{proxy}")
    # Only here, as few triggerers need it; workers ask the same function.
    from requests.utils import should_bypass_proxies

    if should_bypass_proxies(url, no_proxy=None):
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    if not is_url(proxy):
        raise InvalidInputError(
            "the environment's proxy for the API must have an http:// or https:// URL in the triggerer"
        )
    if wrong := credentials_problem(proxy):
        raise InvalidInputError(f"the environment's proxy for the API cannot be used: {wrong}")
    return proxy
