"""What may be shown of texts and URLs from outside: no key, no signature, no password, and UTF-8 only."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

if TYPE_CHECKING:
    from airflow_provider_siliconflow.api.settings import ClientSettings


def strip_query(url: str) -> str:
    """Return a URL without its query, fragment and user part: a signature must not be shown."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return re.split(r"[?#]", url, maxsplit=1)[0]
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


#: Characters of a text from outside that are looked at: a row's error may repeat a whole prompt.
READ_CHARACTERS = 2000
#: Characters of it that are shown.
SHOWN_CHARACTERS = 1000

# In JSON a slash may be escaped, and the "&" of a query often is (as \u0026); error texts of HTTP libraries
# name a path without its host.
_WORD = re.compile(r"[^\s\"'<>]+")
_ORIGIN = re.compile(r"https?:(?:\\?/){2}", re.IGNORECASE)
_MARK = re.compile(r"[?#]")
_USER_PART = re.compile(r"(:(?:\\?/){2})[^\s\"'<>/?#]*@")
# A password with a mark in it, or a query with an @: nobody can tell, so neither is shown.
_USER_OR_QUERY = re.compile(r"(:(?:\\?/){2})[^\s\"'<>/?#]*[?#][^\s\"'<>/]*@[^\s\"'<>]*")


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


def strip_queries(text: str) -> str:
    """Return a text in which no URL has a query or a user part any more."""
    if "@" in text:
        text = _USER_PART.sub(r"\1", _USER_OR_QUERY.sub(r"\1***", text))
    return _WORD.sub(_without_query, text) if "?" in text or "#" in text else text


def valid_text(text: str) -> str:
    """Return a text that UTF-8 can hold: half of a surrogate pair, where a text was cut, becomes U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def brief(text: str, limit: int = SHOWN_CHARACTERS) -> str:
    """
    Return the start of a text from outside as it may be shown and kept.

    :param limit: characters, well below ``READ_CHARACTERS``: a URL that is cut there may still show its user part.
    """
    return strip_queries(valid_text(text[:READ_CHARACTERS]))[:limit]


def shown(value: Any) -> Any:
    """Return what may be shown of a value: its texts without the queries of URLs, as UTF-8 can hold them."""
    if isinstance(value, str):
        return strip_queries(valid_text(value))
    if isinstance(value, list):
        return [shown(item) for item in value]
    if isinstance(value, dict):
        return {key: shown(item) for key, item in value.items()}
    return value


# Errors and repetition --------------------------------------------------------------------------------------

_BEARER = re.compile(r"(?i)bearer\s+[\w.~+/=-]+")


def redact(text: str, settings: ClientSettings | None = None) -> str:
    """Return ``text`` without the key and without the queries of URLs, which may hold signatures."""
    if settings is not None:
        text = text.replace(settings.api_key, "***")
    return strip_queries(_BEARER.sub("Bearer ***", valid_text(text)))


def snippet(body: bytes, settings: ClientSettings | None, limit: int = 200) -> str:
    text = redact(body[:4096].decode("utf-8", "replace"), settings)
    if "<html" in text.lower() or text.lower().startswith("<!doctype"):
        text = "an HTML page: " + re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", text)).strip()
    text = text.strip() or "an empty body"
    return text if len(text) <= limit else text[:limit] + "..."


class _NoQueries(logging.Filter):
    """Takes the queries out of the URLs that ``urllib3`` logs, of every request at level DEBUG."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(strip_queries(arg) if isinstance(arg, str) else arg for arg in record.args)
        return True


_NO_QUERIES = _NoQueries()


def keep_queries_out_of_logs() -> None:
    # Adding a filter twice is adding it once.
    for name in ("connectionpool", "connection"):
        logging.getLogger(f"urllib3.{name}").addFilter(_NO_QUERIES)
