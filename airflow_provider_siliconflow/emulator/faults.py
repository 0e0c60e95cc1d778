"""Fault rules: which fault applies to which requests, and how often."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, get_type_hints

import msgspec

from airflow_provider_siliconflow.emulator.odd_json import encode_odd

#: By kind, the field that a value directly after it sets (``status=503``, ``slow=2``), and its default.
#: Without a default the field stays unset.
_NO_DEFAULT = object()
_KINDS: dict[str, tuple[str, Any]] = {
    "status": ("status", 503),
    "status-after": ("status", 502),
    "reset": ("", None),
    "reset-after": ("", None),
    "slow": ("seconds", 1.0),
    "cut": ("bytes", 100),
    "html": ("status", 502),
    "truncated-json": ("", None),
    "empty": ("", None),
    "hold": ("", None),
    "hold-after": ("", None),
    "redirect": ("location", None),
    "rewrite": ("status", _NO_DEFAULT),
    "huge": ("bytes", 100_000_000),
    "gzip-bomb": ("bytes", 500_000_000),
    "endless": ("seconds", 60.0),
    "drip": ("every", 0.3),
    "drip-headers": ("every", 0.3),
    "endless-continue": ("seconds", 60.0),
    "many-headers": ("count", 1_000_000),
}
#: The kinds under which a request is carried out and its answer does not arrive.
TAKES_THE_ANSWER = frozenset({"status-after", "reset-after", "cut", "truncated-json", "empty"})
#: How ``huge``, ``endless`` and ``gzip-bomb`` fill a body.
FILLS = ("spaces", "junk", "lines")
KINDS = tuple(_KINDS)


@dataclass
class Fault:
    """
    One rule.

    Kinds that do not carry out the request: ``status``, ``html``, ``redirect``, ``reset``;
    ``hold`` waits and then carries it out.
    All others carry it out first and then spoil the answer: ``status-after``, ``reset-after``, ``slow``, ``cut``,
    ``truncated-json``, ``empty``, ``hold-after``; ``rewrite`` changes the JSON answer; ``huge``, ``gzip-bomb``
    (an encoding that the client did not request) and ``endless`` fill it, ``drip`` and ``drip-headers`` send it byte
    by byte, ``endless-continue`` sends ``100 Continue`` before it, ``many-headers`` adds headers.

    ``rewrite`` applies ``rename``, ``merge``, ``remove`` and ``envelope``, in this order, to the correct answer, or
    sends ``body`` or ``raw`` instead. A path is a name, or several names separated by dots; a star stands for
    every item of a list: ``data.*.metadata``. In ``merge`` and ``body``, ``{"$text": N}`` is a text of N
    characters, ``{"$digits": N}`` an integer of N digits and ``{"$nested": N}`` N nested lists.

    :param match: method and path, as ``POST /batches``, ``GET /batches/*``, ``* /files`` or ``GET storage``;
        a star is one part of the path.
    :param kind: one of ``KINDS``.
    :param times: how many requests it hits; -1 is forever.
    :param skip: how many matching requests pass first.
    :param status: of ``status``, ``status-after``, ``html`` and ``rewrite``.
    :param body: of ``status``, ``status-after`` and ``rewrite``: JSON that replaces the service's own body.
    :param raw: of ``rewrite``: text that is sent unchanged.
    :param rename: of ``rewrite``: path to new name.
    :param merge: of ``rewrite``: path to new value.
    :param remove: of ``rewrite``: paths.
    :param envelope: of ``rewrite``: put the answer into ``{"code": 20000, ..., "data": ...}``.
    :param headers: added to the answer, for example ``{"Retry-After": "3"}``.
    :param seconds: of ``slow``, ``endless`` and ``endless-continue``: how long, in real seconds.
    :param every: of ``drip`` and ``drip-headers``: real seconds between two bytes.
    :param bytes: of ``cut``: how much of the body is sent before the connection ends; of ``huge`` and
        ``gzip-bomb``: size of the body, once it is decoded.
    :param count: of ``many-headers``.
    :param fill: of ``huge``, ``gzip-bomb`` and ``endless``: ``spaces`` inside the correct answer, which stays valid
        JSON; only ``junk``; or the ``lines`` of the result file repeatedly. Default: ``lines`` for a
        download, otherwise ``spaces``.
    :param chunked: of ``huge``: do not announce the length.
    :param location: of ``redirect``.
    :param hits: requests hit so far.
    """

    match: str
    kind: str
    times: int = 1
    skip: int = 0
    status: int | None = None
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    raw: str | None = None
    rename: dict[str, str] = field(default_factory=dict)
    merge: dict[str, Any] = field(default_factory=dict)
    remove: list[str] = field(default_factory=list)
    envelope: bool = False
    seconds: float | None = None
    every: float | None = None
    bytes: int | None = None
    count: int | None = None
    fill: str | None = None
    chunked: bool = False
    location: str | None = None
    hits: int = 0

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"there is no fault kind {self.kind!r}; known: {', '.join(KINDS)}")
        if not re.fullmatch(r"(\*|[A-Z]+) (/|storage).*", self.match):
            raise ValueError(
                f"a fault matches a method and a path like 'GET /files' or 'GET storage', not {self.match!r}",
            )
        # A path may be written as in a URL.
        self.match = self.match.replace(" /v1/", " /", 1)
        name, default = _KINDS[self.kind]
        if name and getattr(self, name) is None and default is not _NO_DEFAULT:
            if default is None:
                raise ValueError(f"fault kind {self.kind} needs {name}")
            setattr(self, name, default)
        for name in ("seconds", "every", "bytes", "count"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"fault {name} must be 0 or more, not {value}")
        if self.fill not in (None, *FILLS):
            raise ValueError(f"fault fill must be one of {', '.join(FILLS)}, not {self.fill!r}")
        for name in ("body", "merge"):
            try:
                encode_odd(getattr(self, name))
            except (TypeError, ValueError, RecursionError) as error:
                raise ValueError(f"fault {name} cannot be written as JSON: {error}") from None

    @classmethod
    def parse(cls, spec: str | dict[str, Any] | Fault) -> Fault:
        """
        Read a fault as given on the command line or to the control API.

        :param spec: ``MATCH:KIND[=VALUE][,NAME=VALUE...]``, a JSON object, or its fields.
        :raises ValueError: the fault is invalid; the message says why.
        """
        if isinstance(spec, Fault):
            return spec
        given = spec if isinstance(spec, dict) else _read_text(spec)
        types = get_type_hints(cls)
        values = {}
        for name, value in given.items():
            if name not in types:
                raise ValueError(f"a fault has no {name!r}; it has {', '.join(types)}")
            try:
                values[name] = msgspec.convert(value, types[name], strict=not isinstance(spec, str))
            except msgspec.ValidationError as error:
                raise ValueError(f"fault {name}: {error}") from None
        for name in ("match", "kind"):
            if name not in values:
                raise ValueError(f"a fault needs {name!r}")
        return cls(**values)

    def fits(self, method: str, target: str) -> bool:
        wanted, _, path = self.match.partition(" ")
        if wanted not in ("*", method):
            return False
        if path == "storage":
            return target.startswith("storage")
        return _pattern(path).fullmatch(target) is not None

    def as_dict(self) -> dict[str, Any]:
        # Not asdict(), which copies: a body may be nested too deeply for that.
        return {one.name: getattr(self, one.name) for one in fields(self)}


class Faults:
    """The rules in force, first match wins. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rules: list[Fault] = []

    def add(self, fault: Fault | dict[str, Any] | str | None = None, **values: Any) -> Fault:
        """
        Add a rule: a :class:`Fault`, its fields, or its command line form.

        :raises ValueError: with what is wrong.
        """
        rule = Fault.parse(values if fault is None else fault)
        with self._lock:
            self._rules = [*self._rules, rule]
        return rule

    def clear(self) -> None:
        with self._lock:
            self._rules = []

    @property
    def rules(self) -> list[Fault]:
        return list(self._rules)

    def take(self, method: str, target: str) -> Fault | None:
        """Return the rule that hits this request, and count the hit."""
        if not self._rules:
            return None
        with self._lock:
            for rule in self._rules:
                if rule.times == 0 or not rule.fits(method, target):
                    continue
                if rule.skip > 0:
                    rule.skip -= 1
                    continue
                if rule.times > 0:
                    rule.times -= 1
                rule.hits += 1
                return rule
        return None


def _read_text(text: str) -> dict[str, Any]:
    if text.lstrip().startswith("{"):
        try:
            read = json.loads(text)
        except ValueError as error:
            raise ValueError(f"fault {text!r} is not valid JSON: {error}") from None
        return dict(read)
    match, colon, rest = text.partition(":")
    if not colon:
        raise ValueError(f"a fault must be MATCH:KIND[=VALUE][,NAME=VALUE...], not {text!r}")
    values: dict[str, Any] = {"match": match.strip()}
    known = {one.name for one in fields(Fault)}
    for number, part in enumerate(rest.split(",")):
        name, equals, value = (one.strip() for one in part.partition("="))
        if number == 0:
            values["kind"] = name
            if equals and name in _KINDS:
                if not _KINDS[name][0]:
                    raise ValueError(f"fault kind {name} takes no value, as given in {text!r}")
                values[_KINDS[name][0]] = value
        elif name == "retry-after":
            values["headers"] = {"Retry-After": value}
        elif name == "remove" and equals:
            values.setdefault(name, []).append(value)
        elif not equals or name not in known:
            raise ValueError(f"{part!r} in fault {text!r} is not understood")
        else:
            values[name] = value
    return values


@lru_cache(maxsize=256)
def _pattern(path: str) -> re.Pattern[str]:
    return re.compile("[^/]+".join(map(re.escape, path.split("*"))))
