"""What a job keeps in its folder for the process that goes on with it."""

from __future__ import annotations

import contextlib
import json
import logging
from typing import Any

from airflow_provider_siliconflow.batch_files.atomic_files import local_path

log = logging.getLogger(__name__)


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
