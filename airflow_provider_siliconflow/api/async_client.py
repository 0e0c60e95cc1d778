"""The HTTP API over ``aiohttp``, for the triggerer: what a wait needs, and nothing that costs money."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

import aiohttp
import tenacity
from yarl import URL

from airflow_provider_siliconflow.api import protocol
from airflow_provider_siliconflow.api.exceptions import InvalidInputError, NoAnswerError, NotSentError
from airflow_provider_siliconflow.api.models import Batch
from airflow_provider_siliconflow.api.protocol import Call
from airflow_provider_siliconflow.api.redaction import redact
from airflow_provider_siliconflow.api.settings import ClientSettings, is_url, trusted

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
        self._ssl = trusted(settings.verify)
        self._proxy = settings.proxy_for(settings.base_url) or _proxy_of_environment(settings.base_url)
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
        headers: Mapping[str, str] = {}
        try:
            async with self._open_session().request(
                call.method,
                URL(call.url(self.settings), encoded=True),
                data=data,
                headers={"Content-Type": "application/json"} if data is not None else None,
                proxy=self._proxy,
                allow_redirects=False,
            ) as response:
                headers = response.headers
                content = await response.read()
                return call.answer(response.status, headers, content, self.settings)
        # "from None": the text of the causes may hold the password of a proxy, and a traceback shows them.
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as exc:
            raise NotSentError(
                f"{call.name} did not reach {self.settings.base_url}: {self._why(exc)}"
            ) from None
        except (TimeoutError, aiohttp.ClientError, OSError) as exc:
            raise NoAnswerError(
                f"{call.name} got no whole answer from {self.settings.base_url}{protocol.traced(headers)}: "
                f"{self._why(exc)}"
            ) from None

    def _why(self, exc: BaseException) -> str:
        return f"{type(exc).__name__}: {redact(str(exc), self.settings)}"

    async def get_batch(self, batch_id: str) -> Batch:
        """Read a batch."""
        return await self.call(protocol.get_batch(batch_id))

    async def cancel_batch(self, batch_id: str) -> Batch:
        """Ask for a batch to be cancelled; the answer may still show its old status."""
        return await self.call(protocol.cancel_batch(batch_id))


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
    # Only here, as few triggerers need it; workers ask the same function.
    from requests.utils import should_bypass_proxies

    if should_bypass_proxies(url, no_proxy=None):
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    if not is_url(proxy):
        raise InvalidInputError(
            "the environment's proxy for the API must have an http:// or https:// URL in the triggerer"
        )
    return proxy
