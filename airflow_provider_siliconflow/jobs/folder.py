"""What a job keeps in its folder for the process that goes on with it."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
from typing import Any, BinaryIO

from airflow_provider_siliconflow.batch_files.atomic_files import local_path

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
        with _open(path) as stream:
            content = stream.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise ValueError(f"it has more than {max_bytes} bytes")
        value = json.loads(content)
        if not isinstance(value, dict):
            raise TypeError("it holds no object")
    except FileNotFoundError:
        return None
    except OSError as exc:
        # Of a link, the system says that there are too many of them.
        if exc.errno != errno.ELOOP:
            raise
        log.warning("%s is a link, which is not followed; %s", path, or_cut)
        return None
    except (ValueError, TypeError, RecursionError) as exc:
        log.warning("%s is cut, or none of ours (%s); %s", path, exc, or_cut)
        return None
    return value


def _open(path: Any) -> BinaryIO:
    local = local_path(path)
    if local is None:
        stream: BinaryIO = path.open("rb")
        return stream
    return open(os.open(local, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")


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
