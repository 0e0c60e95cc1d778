"""What a job keeps in its folder for the process that goes on with it."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

from airflow_provider_siliconflow.api.exceptions import InvalidInputError
from airflow_provider_siliconflow.batch_files.atomic_files import load_json, local_path

log = logging.getLogger(__name__)

#: Largest file of a job's folder that is read as JSON, in bytes.
MAX_JSON_BYTES = 64 << 20


def read_json(path: Any, *, or_cut: str, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any] | None:
    """
    Return the object in a JSON file; ``None`` if there is no file, or one that is damaged.

    A store without atomic writes may leave a part of a file. All that is needed to go on is written before anything is
    sent by it. A local link is not followed: it counts as damaged.

    :param or_cut: what becomes of a damaged one, for the log.
    :param max_bytes: a larger one counts as damaged.
    """
    try:
        return read_object(path, or_cut=or_cut, max_bytes=max_bytes)
    except FileNotFoundError:
        return None


def read_object(path: Any, *, or_cut: str, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any] | None:
    """
    Return the object in a JSON file; ``None`` if it is damaged. Parameters as for :func:`read_json`.

    :raises FileNotFoundError: there is no file.
    """
    try:
        value = load_json(path, limit=max_bytes)
    except InvalidInputError as exc:
        log.warning("%s; %s", exc, or_cut)
        return None
    if not isinstance(value, dict):
        log.warning("%s is not a JSON object; %s", path, or_cut)
        return None
    return value


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
