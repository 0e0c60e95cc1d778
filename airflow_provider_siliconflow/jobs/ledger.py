"""What outlives a try: the record of what was about to be sent, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any, Protocol

from airflow_provider_siliconflow.batch_files.atomic_files import write_json
from airflow_provider_siliconflow.jobs.folder import read_json


class Ledger(Protocol):
    """
    A record that outlives a try: what was about to be sent, and what came of it.

    ``complete`` says that a key without an entry was certainly never sent.
    """

    complete: bool

    def older_batches(self, key: str) -> Set[str]:
        """Return recorded batches that are certainly older than any batch of a key whose intent is recorded."""
        ...

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the entry of a key."""
        ...

    def set(self, key: str, entry: dict[str, Any]) -> None:
        """
        Write the entry of a key.

        When it returns, an intent survives a crash. What came of it may be written with the next intent: whoever
        finds the intent alone looks for what came of it.
        """
        ...

    def delete(self, key: str) -> None:
        """Forget a key."""
        ...


class NoLedger:
    """Where nothing outlives a try: every retry searches the account."""

    complete = False

    def older_batches(self, key: str) -> Set[str]:
        """Return none."""
        return frozenset()

    def get(self, key: str) -> dict[str, Any] | None:
        """Return nothing."""
        return None

    def set(self, key: str, entry: dict[str, Any]) -> None:
        """Keep nothing."""

    def delete(self, key: str) -> None:
        """Forget nothing."""


class FolderLedger:
    """
    A ledger in a file, written whole at each change.

    What came of an intent is written with the next intent or by :meth:`flush`: until then the intent alone leads to it.
    So one write serves each batch, and a crash leaves one intent open at most.

    :param path: the file.
    :param complete: whether a key without an entry was certainly never sent.
    """

    def __init__(self, path: Any, *, complete: bool) -> None:
        self._path = path
        self._unwritten = False
        stored = read_json(path, or_cut="the account is searched for what was sent")
        self.entries: dict[str, dict[str, Any]] = stored or {}
        # Without its file, cut or gone, the account is what is left to ask.
        self.complete = complete and stored is not None

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the entry of a key."""
        return self.entries.get(key)

    def older_batches(self, key: str) -> Set[str]:
        """Return batches whose intents came before that of a key."""
        number = self.entries.get(key, {}).get("number", 0)
        return {
            entry["batch_id"]
            for entry in self.entries.values()
            if "batch_id" in entry and entry.get("number", 0) < number
        }

    def set(self, key: str, entry: dict[str, Any]) -> None:
        """Take the entry of a key; an intent is written before this returns."""
        known = self.entries.get(key, {})
        if "intent" in entry:
            # An intent after an intent says nothing that was not known.
            if "intent" in known:
                return
            number = 1 + max((each.get("number", 0) for each in self.entries.values()), default=0)
            self.update({key: {**entry, "number": number}})
        else:
            self.entries[key] = {**entry, "number": known.get("number", 0)}
            self._unwritten = True

    def update(self, entries: Mapping[str, dict[str, Any]]) -> None:
        """Write several entries at once, and whatever is not written yet."""
        if entries or self._unwritten:
            self.entries.update(entries)
            write_json(self._path, self.entries)
            self._unwritten = False

    def flush(self) -> None:
        """Write what is not written yet."""
        self.update({})

    def replace(self, key: str, other: str, entry: dict[str, Any]) -> None:
        """Forget a key and write the entry of another, in one."""
        self.entries.pop(key, None)
        self.update({other: entry})

    def delete(self, key: str) -> None:
        """Forget a key."""
        if self.entries.pop(key, None) is not None:
            self._unwritten = True
            self.flush()
