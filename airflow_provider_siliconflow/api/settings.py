"""What a client needs to know: key, host, timeouts, proxies; and which URLs are the API's own."""

from __future__ import annotations

import hashlib
import json
import re
import ssl
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from airflow_provider_siliconflow.api.exceptions import InvalidInputError
from airflow_provider_siliconflow.api.redaction import remember_proxy, remember_secrets

DEFAULT_BASE_URL = "https://api.siliconflow.cn/v1"

#: Seconds of the longest timeout: a year. Sockets take no more than some.
_LONGEST_TIMEOUT = 366 * 86400


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """
    What a client needs to know.

    :param api_key: the account's key; never shown by ``repr``.
    :param base_url: root of the API, with its version.
    :param timeout: seconds to wait for the next bytes of an answer. A whole call may take twice as long once it is
        connected, even if bytes keep coming; file transfers have a least throughput instead. In a triggerer the
        connection and the head of the answer must come within this time as well.
    :param connect_timeout: seconds to wait for a connection.
    :param max_retries: how often a call that may be repeated is sent again.
    :param proxies: ``http://`` or ``https://`` URL of a proxy, by what it is for: ``https``, ``all``,
        ``https://host`` or ``all://host``; the most exact one wins, and any of them over the environment's.
    :param verify: whether to check certificates, or the path of a CA bundle or of a folder of CA certificates.
    :param headers: further headers for calls of the API (never sent to the storage of result files).
    :param backoff: seconds before the first repetition; doubled each time, with jitter.
    :raises InvalidInputError: a value is not usable.
    """

    api_key: str = field(repr=False)
    base_url: str = DEFAULT_BASE_URL
    timeout: float = 60.0
    connect_timeout: float = 10.0
    max_retries: int = 7
    proxies: Mapping[str, str] | None = field(default=None, repr=False)
    verify: bool | str = True
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    backoff: float = 1.0

    def __post_init__(self) -> None:
        if not self.api_key or not self.api_key.strip():
            raise InvalidInputError("the connection has no API key; put it into the connection's password")
        if not self.api_key.isascii() or any(c.isspace() for c in self.api_key.strip()):
            raise InvalidInputError(
                "the connection's password is not an API key: it has spaces or non-ASCII characters"
            )
        object.__setattr__(self, "api_key", self.api_key.strip())
        # Neither this value nor that of a proxy is shown: it may contain a password.
        if "@" in self.base_url or "?" in self.base_url or "#" in self.base_url:
            raise InvalidInputError("the connection's host must be a URL without user, query and fragment")
        wrong = _url_problem(self.base_url) if is_url(self.base_url) else "it is no http:// or https:// URL"
        if wrong:
            raise InvalidInputError(
                f"the connection's host must be the API's base URL such as {DEFAULT_BASE_URL!r}: {wrong}"
            )
        object.__setattr__(self, "base_url", self.base_url.rstrip("/"))
        for name in ("timeout", "connect_timeout"):
            if not 0 < getattr(self, name) <= _LONGEST_TIMEOUT:
                raise InvalidInputError(
                    f"{name} must be a number of seconds above 0, and at most {_LONGEST_TIMEOUT}"
                )
        if self.max_retries < 0:
            raise InvalidInputError(f"max_retries must be 0 or more; got {self.max_retries}")
        for name, value in self.headers.items():
            # The value is not shown: it may be a secret.
            if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) or not re.fullmatch(
                r"([\x21-\x7e]([\x20-\x7e\t]*[\x21-\x7e])?)?", value
            ):
                raise InvalidInputError(f"headers: {name!r} or its value is not what a header may be")
        for scheme, proxy in (self.proxies or {}).items():
            # The triggerer cannot use others, and would find out when the batch is paid for.
            wrong = _url_problem(proxy) if is_url(proxy) else "it is no http:// or https:// URL"
            if not wrong and re.search(r"[/?#].", proxy.partition("://")[2]):
                wrong = "more follows its host and port; in a password, '/', '?' and '#' must be escaped"
            wrong = wrong or credentials_problem(proxy)
            if wrong:
                raise InvalidInputError(
                    f"proxies: {scheme!r} must be a URL such as 'http://proxy:3128': {wrong}"
                )
        remember_secrets(self.api_key, *self.headers.values())
        for proxy in (self.proxies or {}).values():
            remember_proxy(proxy)

    @property
    def request_headers(self) -> dict[str, str]:
        """Headers of every call of the API, with the key."""
        ours = {
            "Authorization": f"Bearer {self.api_key}",
            "Accept": "application/json",
            "User-Agent": "airflow-provider-siliconflow",
        }
        taken = {name.lower() for name in ours}
        return {name: value for name, value in self.headers.items() if name.lower() not in taken} | ours

    @property
    def call_limit(self) -> float:
        """Seconds that one call may take in total, from connecting to the last byte of its answer."""
        return self.connect_timeout + 2 * self.timeout

    @property
    def fingerprint(self) -> str:
        """A digest that is the same for equal settings."""
        values = json.dumps(asdict(self), sort_keys=True).encode()
        return hashlib.sha256(values).hexdigest()

    def owns(self, url: str) -> bool:
        """Whether a URL has the API's own origin, so that the key may go there."""
        return _origin(self.base_url) == _origin(url)

    def proxy_for(self, url: str) -> str | None:
        """Return the proxy that the connection names for a URL, chosen as ``requests`` does."""
        try:
            parts = urlsplit(url)
        except ValueError:
            return None
        for key in (f"{parts.scheme}://{parts.hostname}", parts.scheme, f"all://{parts.hostname}", "all"):
            if proxy := (self.proxies or {}).get(key):
                return proxy
        return None


def credentials_problem(proxy: str) -> str | None:
    """
    Say what is wrong with user and password of a proxy, without repeating them.

    :param proxy: its URL.
    """
    user = unquote(urlsplit(proxy).netloc.rpartition("@")[0])
    try:
        user.encode("latin-1")
    except UnicodeEncodeError:
        return "its user or password has characters beyond Latin-1, which cannot be sent to a proxy"
    return None


def is_url(value: str) -> bool:
    """Whether a result-file value is a URL rather than a file id."""
    return value[:8].lower().startswith(("http://", "https://"))


def trusted(verify: bool | str) -> ssl.SSLContext | bool:
    """
    Return what checks certificates: whether to, or what the CA certificates at a path make of it.

    :raises InvalidInputError: there are none at that path.
    """
    if isinstance(verify, bool):
        return verify
    try:
        # The same as requests does with a path.
        if Path(verify).is_dir():
            return ssl.create_default_context(capath=verify)
        return ssl.create_default_context(cafile=verify)
    except (OSError, ValueError) as exc:
        raise InvalidInputError(
            f"verify must be true, false or the path of a CA bundle or of a folder of certificates: {exc}"
        ) from exc


# What urlsplit passes over or takes for a part of the user, and the libraries that connect take otherwise.
_AMBIGUOUS = re.compile(r"[\\\s\x00-\x20\x7f]")


def _origin(url: str) -> tuple[str, str, int | None] | None:
    """Return scheme, host and port of a URL; ``None`` where it is none, or not the same to every parser."""
    return None if _url_problem(url) else _parts(url)


def _url_problem(url: str) -> str | None:
    """Say what is wrong with a URL, without repeating any of it."""
    if _AMBIGUOUS.search(url):
        return "it has a space, a control character or a backslash"
    try:
        _, host, _ = _parts(url)
    except UnicodeError:
        return "its host is not one: a part between dots is empty or too long"
    except ValueError:
        return "its host or port is not one; in a password, '/', '?' and '#' must be escaped"
    return None if host else "it has no host"


def _parts(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url)
    host = parts.hostname or ""
    host.encode("idna")
    return parts.scheme, host, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
