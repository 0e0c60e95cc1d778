"""What a job keeps in its folder for the process that goes on with it."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping, Set
from typing import Any

from airflow_provider_siliconflow.batch_files.whole_file import local_path, write_json

log = logging.getLogger(__name__)


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


def read_json(path: Any, *, or_cut: str) -> dict[str, Any] | None:
    """
    Return what a JSON file holds; ``None`` where there is none, or a part of one.

    A store without atomic writes may leave a part of a file. All that is needed to go on is written before anything is
    sent by it.

    :param or_cut: what becomes of it then, for the log.
    """
    try:
        with path.open("rb") as stream:
            value = json.load(stream)
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as exc:
        log.warning("%s is cut, or none of ours (%s); %s", path, exc, or_cut)
        return None
    return value if isinstance(value, dict) else None


def remove_tree(folder: Any) -> None:
    """Remove a job's folder, and the folder of all jobs when it was the last."""
    local = local_path(folder)
    if local is not None:
        import shutil

        try:
            shutil.rmtree(local)
        except OSError as exc:
            log.warning("The job's folder %s is left behind: %s", folder, exc)
        with contextlib.suppress(OSError):
            local.parent.rmdir()
        return
    try:
        folder.fs.rm(folder.path, recursive=True)
    # Stores raise errors of their own kinds; all is done and paid for, and none of them may undo that.
    except Exception as exc:  # noqa: BLE001
        log.warning("The job's folder %s is left behind: %s", folder, exc)
