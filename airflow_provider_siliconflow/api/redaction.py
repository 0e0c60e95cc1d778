"""
What may be shown of texts and URLs from outside: no key, no signature, no password, and only so much of it.

Every message, log line and value that leaves this package goes through here before it is cut. The secrets of all
connections that this process has read are known here, so it does not matter where a text comes from: an answer, a
result line, or an error of an HTTP library.
"""

from __future__ import annotations

import base64
import html
import json
import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.parse import quote, quote_plus, unquote, urlsplit, urlunsplit

#: Characters of a text from outside that are looked at: a row's error may repeat a whole prompt.
READ_CHARACTERS = 2000
#: Characters of it that are shown.
SHOWN_CHARACTERS = 1000

# Secrets ----------------------------------------------------------------------------------------------------

#: Characters of the shortest text that counts as a secret. Airflow does not mask shorter ones either.
_SHORTEST_SECRET = 5
#: Characters from which a secret is also removed from ids and URLs, which may contain a shorter one by chance.
_UNMISTAKABLE = 16
#: Secrets that are remembered.
_MOST_SECRETS = 1000

_HIDDEN = "***"
_BEARER = re.compile(r"(?i)bearer\s+[\w.~+/=-]+")


class _Secrets:
    """The secrets of this process, in every form in which an answer may echo them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, set[str]] = {}
        #: The longest first, since one may be part of another.
        self.forms: tuple[str, ...] = ()
        self.unmistakable: tuple[bytes, ...] = ()

    def add(self, secrets: Iterable[str]) -> None:
        new = [secret for secret in secrets if len(secret) >= _SHORTEST_SECRET]
        if all(secret in self._known for secret in new):
            return
        with self._lock:
            for secret in new:
                self._known[secret] = _forms_of(secret)
                if len(self._known) > _MOST_SECRETS:
                    del self._known[next(iter(self._known))]
            forms = set[str]().union(*self._known.values())
            rare = set[str]().union(*map(_rare_forms_of, self._known))
            self.forms = tuple(sorted(forms | rare, key=len, reverse=True))
            # Every answer is searched for these, so the rare ones are left to what is shown of it.
            self.unmistakable = tuple(
                form.encode("utf-8", "replace") for form in forms if len(form) >= _UNMISTAKABLE
            )


def _forms_of(secret: str) -> set[str]:
    """Return a secret as it is, and as JSON, URLs and HTML write it."""
    forms = {secret, secret.replace("/", "\\/"), html.escape(secret)}
    for ascii_only in (True, False):
        in_json = json.dumps(secret, ensure_ascii=ascii_only)[1:-1]
        # Go, in which the service seems to be written, escapes what has a meaning in HTML.
        in_go = in_json.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
        forms |= {in_json, in_json.replace("/", "\\/"), in_go}
    for in_url in (quote(secret, safe=""), quote(secret), quote_plus(secret)):
        forms |= {in_url, re.sub("%[0-9A-F]{2}", lambda found: found[0].lower(), in_url)}
    return forms


def _rare_forms_of(secret: str) -> set[str]:
    """Return a long secret in other cases and as base64. A shorter one may be a word, which is none in capitals."""
    if len(secret) < _UNMISTAKABLE:
        return set()
    return {secret.upper(), secret.lower(), *_in_base64(secret)}


def _in_base64(secret: str) -> Iterator[str]:
    """Yield what base64 makes of a secret wherever it begins in a longer text: each three bytes become four letters."""
    for before in range(3):
        data = bytes(before) + secret.encode()
        # Letters that depend on what is around it are left out.
        inner = slice(-(-before * 8 // 6), len(data) * 8 // 6)
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            yield encode(data).decode()[inner]


_SECRETS = _Secrets()


def remember_secrets(*secrets: str) -> None:
    """
    Remove texts from everything that is shown from now on.

    :param secrets: keys and header values; those of less than five characters are not secrets. The last word of a
        header such as ``Bearer abc`` is a secret by itself.
    """
    words = [secret.split()[-1] for secret in secrets if secret.strip() and " " in secret.strip()]
    _SECRETS.add([*secrets, *(word for word in words if len(word) >= 8)])


def remember_proxy(url: str) -> None:
    """
    Remove the password of a proxy from everything that is shown from now on.

    :param url: the proxy's URL, with or without ``user:password@``.
    """
    user, has_user, _ = (url.partition("://")[2] or url).rpartition("@")
    if not has_user:
        return
    name, _, password = user.partition(":")
    plain = f"{unquote(name)}:{unquote(password)}"
    basic = base64.b64encode(plain.encode()).decode()
    _SECRETS.add([password, unquote(password), basic, basic.rstrip("=")])


def hide_secrets(text: str, *, unmistakable: bool = False) -> str:
    """
    Return a text without the secrets of this process.

    :param unmistakable: whether to hide only secrets that are too long to be in the text by chance: for ids and URLs,
        which must keep working.
    """
    for form in _SECRETS.forms:
        if unmistakable and len(form) < _UNMISTAKABLE:
            break
        if form in text:
            text = text.replace(form, _HIDDEN)
    return text


def hide_in_answer(body: bytes) -> bytes:
    """Return the body of an answer without the secrets that it cannot contain by chance."""
    if any(form in body for form in _SECRETS.unmistakable):
        return hide_secrets(body.decode("utf-8", "surrogateescape"), unmistakable=True).encode(
            "utf-8", "surrogateescape"
        )
    return body


def _start_of(text: str, limit: int) -> str:
    """Return the start of a text; the start of a secret is not left at its end."""
    if len(text) <= limit:
        return text
    start = text[:limit]
    for form in _SECRETS.forms:
        for size in range(min(len(form) - 1, limit), 0, -1):
            if start.endswith(form[:size]) and text.startswith(form, limit - size):
                return start[: limit - size]
    return start


# URLs -------------------------------------------------------------------------------------------------------

# In JSON a slash may be escaped, and the "&" of a query often is (as \u0026); error texts of HTTP libraries
# name a path without its host.
_WORD = re.compile(r"[^\s\"'<>]+")
_ORIGIN = re.compile(r"https?:(?:\\?/){2}", re.IGNORECASE)
_MARK = re.compile(r"[?#]")
_USER_PART = re.compile(r"(:(?:\\?/){2})[^\s\"'<>/?#]*@")
# A password with a mark in it, or a query with an @: nobody can tell, so neither is shown.
_USER_OR_QUERY = re.compile(r"(:(?:\\?/){2})[^\s\"'<>/?#]*[?#][^\s\"'<>/]*@[^\s\"'<>]*")


def strip_query(url: str) -> str:
    """Return a URL without its query, fragment and user part: a signature must not be shown."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return re.split(r"[?#]", url, maxsplit=1)[0]
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def strip_queries(text: str) -> str:
    """Return a text in which no URL has a query or a user part any more."""
    if "@" in text:
        text = _USER_PART.sub(r"\1", _USER_OR_QUERY.sub(r"\1***", text))
    return _WORD.sub(_without_query, text) if "?" in text or "#" in text else text


def _without_query(found: re.Match[str]) -> str:
    """Return a word up to the query of the URL, or of the path, in it. Words may be long: one pass, no search."""
    word = found[0]
    origin = _ORIGIN.search(word)
    of_url = origin.end() if origin else len(word)
    last_value = word.rfind("=")
    begin = 0
    for mark in _MARK.finditer(word):
        at = mark.start()
        if at > of_url or (mark[0] == "?" and at < last_value and "/" in word[begin : at - 1]):
            return word[:at]
        begin = at + 1
    return word


# What is shown ----------------------------------------------------------------------------------------------


def valid_text(text: str) -> str:
    """Return a text that UTF-8 and Postgres can store: lone surrogates and NUL become U+FFFD."""
    if "\0" in text:
        text = text.replace("\0", "\ufffd")
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def redact(text: str) -> str:
    """Return a text without secrets, and without the queries of URLs, which may hold signatures."""
    return strip_queries(_BEARER.sub(f"Bearer {_HIDDEN}", hide_secrets(valid_text(text))))


def brief(text: str, limit: int = SHOWN_CHARACTERS) -> str:
    """
    Return the start of a text from outside as it may be shown and kept.

    :param limit: characters, well below ``READ_CHARACTERS``: a URL cut there could still show its user part.
    """
    return redact(_start_of(text, READ_CHARACTERS))[:limit]


def shown_word(text: str, limit: int = 64) -> str:
    """
    Return the start of an id or a word of the service's own: a status, a code, a reason.

    Code depends on such words, so only secrets that are too long to be there by chance are removed.
    """
    return hide_secrets(valid_text(_start_of(text, limit)), unmistakable=True)


def shown(value: Any) -> Any:
    """
    Return what may be shown of a bounded value: its texts without queries of URLs and without long secrets.

    Ids and statuses keep their meaning even if a header's value is a word such as "batch".
    """
    return _with_texts(value, lambda text: strip_queries(hide_secrets(valid_text(text), unmistakable=True)))


def without_secrets(value: Any) -> Any:
    """Return a bounded value without long secrets. The URLs in an author's own metadata keep their queries."""
    return _with_texts(value, lambda text: hide_secrets(text, unmistakable=True))


def redact_all(value: Any) -> Any:
    """Return a bounded value with each of its texts redacted."""
    return _with_texts(value, redact)


def _with_texts(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_with_texts(item, change) for item in value]
    if isinstance(value, dict):
        return {change(key): _with_texts(item, change) for key, item in value.items()}
    return value


def snippet(body: bytes, limit: int = 200) -> str:
    """
    Return the start of a body as a message may show it.

    :param body: the start of an answer.
    :param limit: characters.
    """
    # A character has up to four bytes, so this is more than is read below.
    text = brief(body[: 8 * READ_CHARACTERS].decode("utf-8", "replace"), READ_CHARACTERS)
    if "<html" in text.lower() or text.lower().startswith("<!doctype"):
        text = "an HTML page: " + re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", text)).strip()
    text = text.strip() or "an empty body"
    return text if len(text) <= limit else text[:limit] + "..."


class _NoQueries(logging.Filter):
    """Takes queries and secrets out of what ``urllib3`` logs: URLs at level DEBUG, and heads that it cannot parse."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(
                brief(str(arg)) if isinstance(arg, str | Exception) else arg for arg in record.args
            )
        # Of a head that cannot be parsed it logs the error with a traceback, whose text is the head.
        record.exc_info = record.exc_text = None
        return True


_NO_QUERIES = _NoQueries()


def keep_queries_out_of_logs() -> None:
    """Filter what ``urllib3`` logs of requests."""
    # Adding a filter twice is adding it once.
    for name in ("connectionpool", "connection"):
        logging.getLogger(f"urllib3.{name}").addFilter(_NO_QUERIES)
