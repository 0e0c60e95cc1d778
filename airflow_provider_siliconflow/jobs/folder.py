"""Reading and removing the folder in which a job keeps its state for later processes."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Any

from airflow_provider_siliconflow.api.exceptions import InvalidInputError
from airflow_provider_siliconflow.batch_files.atomic_files import load_json, local_path

log = logging.getLogger(__name__)

#: Size of the largest file that is read as JSON, in bytes.
MAX_JSON_BYTES = 64 << 20
#: Most names of a folder that are read.
MOST_NAMES = 1000


def read_json(path: Any, *, otherwise: str, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any] | None:
    """
    Return the object in a JSON file; ``None`` if the file does not exist or is damaged.

    A store without atomic writes may leave a partial file. This is safe, since every file is written before anything is
    sent that depends on it. A local link is not followed; it counts as damaged.

    :param otherwise: what happens instead if the file is damaged, for the log.
    :param max_bytes: a larger file counts as damaged.
    """
    try:
        return read_object(path, otherwise=otherwise, max_bytes=max_bytes)
    except FileNotFoundError:
        return None


def read_object(path: Any, *, otherwise: str, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any] | None:
    """
    Return the object in a JSON file; ``None`` if it is damaged. Parameters as for :func:`read_json`.

    :raises FileNotFoundError: there is no file.
    """
    try:
        value = load_json(path, limit=max_bytes)
    except InvalidInputError as exc:
        log.warning("%s; %s", exc, otherwise)
        return None
    if not isinstance(value, dict):
        log.warning("%s is not a JSON object; %s", path, otherwise)
        return None
    return value


def names_in(folder: Any, *, most: int = MOST_NAMES) -> list[str]:
    """
    Return the names in a folder, in their order; none if it does not exist.

    :param most: how many of them, the first ones.
    """
    local = local_path(folder)
    try:
        if local is not None:
            return sorted(os.listdir(local))[:most]
        return sorted(
            str(path).rstrip("/").rpartition("/")[2] for path in folder.fs.ls(folder.path, detail=False)
        )[:most]
    except (FileNotFoundError, NotADirectoryError):
        return []


def remove_file(path: Any) -> None:
    """Remove a file, if it exists."""
    local = local_path(path)
    if local is not None:
        local.unlink(missing_ok=True)
        return
    with contextlib.suppress(FileNotFoundError):
        path.fs.rm_file(path.path)


def remove_tree(folder: Any) -> None:
    """Remove a job's folder, and the folder of all jobs if it was the last one."""
    local = local_path(folder)
    if local is not None:
        import shutil

        try:
            shutil.rmtree(local)
        except OSError as exc:
            log.warning("The job's folder %s cannot be removed: %s", folder, exc)
        with contextlib.suppress(OSError):
            local.parent.rmdir()
        return
    try:
        folder.fs.rm(folder.path, recursive=True)
    # Stores raise errors of their own. The work is done and paid for, so none of them may fail the task.
    except Exception as exc:  # noqa: BLE001
        log.warning("The job's folder %s cannot be removed: %s", folder, exc)
