"""Temporary folders for downloads, and the removal of those that a killed process left."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

_PREFIX = "siliconflow"
#: Prefix, owner, process and a random part.
_NAME = re.compile(rf"{_PREFIX}-([0-9a-f]{{1,32}})-(\d{{1,10}})-\w+")
#: Entries of the temporary folder that are looked at.
_MOST_ENTRIES = 100_000


@contextlib.contextmanager
def scratch_folder(owner: str = "") -> Iterator[Path]:
    """
    Make a temporary folder, readable by this user alone, and remove it with all it holds at the end of the block.

    :param owner: hex digits of the job it is for, by which :func:`remove_leftovers` finds it.
    """
    prefix = f"{_PREFIX}-{owner}-{os.getpid()}-" if owner else f"{_PREFIX}-"
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def remove_leftovers(owner: str) -> None:
    """
    Remove the temporary folders that processes of a job left on this machine when they were killed.

    :param owner: as for :func:`scratch_folder`.
    """
    with contextlib.suppress(OSError), os.scandir(tempfile.gettempdir()) as entries:
        for entry, _ in zip(entries, range(_MOST_ENTRIES), strict=False):
            found = _NAME.fullmatch(entry.name)
            if found and found[1] == owner and not _lives(int(found[2])) and _is_ours(entry):
                log.info("Removing %s, which a process that was killed left behind", entry.path)
                shutil.rmtree(entry.path, ignore_errors=True)


def free_bytes(folder: Path) -> int:
    """Return the bytes that may be written to the disk of a folder."""
    return shutil.disk_usage(folder).free


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        # Another user's process has the number now; when in doubt the folder stays.
        return True
    return True


def _is_ours(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_uid == os.geteuid()
