"""The HTTP API over ``aiohttp``, for the triggerer: what a wait needs, and nothing that costs money."""

from __future__ import annotations

import ssl
from typing import TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import tenacity
from yarl import URL

from airflow_provider_siliconflow.api import protocol
from airflow_provider_siliconflow.api.exceptions import InvalidInputError, NoAnswerError, NotSentError
from airflow_provider_siliconflow.api.models import Batch, is_url
from airflow_provider_siliconflow.api.protocol import Call, ClientSettings

T = TypeVar("T")

#: Connections one client opens at most; further polls wait their turn.
MAX_CONNECTIONS = 32


class AsyncSiliconFlowClient:
    """
    Calls of the API within an event loop. Many waits may share one client.

    :param settings: key, host, timeouts, retries.
    """

    def __init__(self, settings: ClientSettings) -> None:
        self.settings = settings
        self._session: aiohttp.ClientSession | None = None
        self._ssl = _ssl_argument(settings.verify)
        self._proxy = _proxy(settings)
        if self._proxy and not is_url(self._proxy):
            raise InvalidInputError("a proxy in the triggerer must have an http:// or https:// URL")
        self._timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=settings.connect_timeout, sock_read=settings.timeout
        )

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None or self._session.closed:
            self._session = aiohttp.ClientSession(
                headers=self.settings.request_headers,
                connector=aiohttp.TCPConnector(limit=MAX_CONNECTIONS, ssl=self._ssl),
                timeout=self._timeout,
                # With it aiohttp would look into a netrc file, for each request and in a thread, and refuse the
                # request when it finds credentials there beside the key.
                trust_env=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=True,
            )
        return self._session

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def __aenter__(self) -> AsyncSiliconFlowClient:
        """Return the client itself."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the connections."""
        await self.close()

    async def call(self, call: Call[T]) -> T:
        """Carry out a call, with the repetitions the protocol allows."""
        if self.settings.max_retries == 0:
            return await self._send(call)
        async for attempt in tenacity.AsyncRetrying(**protocol.retry_options(call, self.settings)):
            with attempt:
                return await self._send(call)
        raise AssertionError("unreachable")

    async def _send(self, call: Call[T]) -> T:
        data = call.body()
        try:
            async with self._open_session().request(
                call.method,
                URL(call.url(self.settings), encoded=True),
                data=data,
                headers={"Content-Type": "application/json"} if data is not None else None,
                proxy=self._proxy,
                allow_redirects=False,
            ) as response:
                content = await response.read()
                return call.answer(response.status, response.headers, content, self.settings)
        except (aiohttp.ClientConnectorError, aiohttp.ClientProxyConnectionError) as exc:
            raise NotSentError(
                f"{call.name} did not reach {self.settings.base_url}: {self._why(exc)}"
            ) from exc
        except aiohttp.ConnectionTimeoutError as exc:
            raise NotSentError(
                f"{call.name} did not reach {self.settings.base_url}: {self._why(exc)}"
            ) from exc
        except (TimeoutError, aiohttp.ClientError, OSError) as exc:
            raise NoAnswerError(
                f"{call.name} got no whole answer from {self.settings.base_url}: {self._why(exc)}"
            ) from exc

    def _why(self, exc: BaseException) -> str:
        return f"{type(exc).__name__}: {protocol.redact(str(exc), self.settings)}"

    async def get_batch(self, batch_id: str) -> Batch:
        """Read a batch."""
        return await self.call(protocol.get_batch(batch_id))

    async def cancel_batch(self, batch_id: str) -> Batch:
        """Ask for a batch to be cancelled; the answer may still show its old status."""
        return await self.call(protocol.cancel_batch(batch_id))


def _proxy(settings: ClientSettings) -> str | None:
    """Return the proxy the connection names or, as ``requests`` does, the one the environment names."""
    parts = urlsplit(settings.base_url)
    host = parts.netloc.rpartition("@")[2]
    from_environment = {} if proxy_bypass(host) else getproxies()
    for proxies in (settings.proxies or {}, from_environment):
        if proxy := proxies.get(parts.scheme) or proxies.get("all"):
            return proxy if "://" in proxy else f"http://{proxy}"
    return None


def _ssl_argument(verify: bool | str) -> ssl.SSLContext | bool:
    if isinstance(verify, bool):
        return verify
    try:
        return ssl.create_default_context(cafile=verify)
    except OSError as exc:
        raise InvalidInputError(f"verify must be true, false or the path of a CA bundle: {exc}") from exc
