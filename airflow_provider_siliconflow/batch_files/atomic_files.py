"""
Files that appear under their name only when they are complete, and folders to which nobody else can write.

The files in a job's folder decide what is sent and paid for, so they are neither read nor written through links. Files
that a killed process left behind are recognized by their lock, which ends with the process, and removed by the next
one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import glob
import io
import json
import logging
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, Literal

from airflow_provider_siliconflow.api.exceptions import InvalidInputError

log = logging.getLogger(__name__)

#: Size of the write buffer. Data comes in larger blocks, which bypass it.
_BUFFER = 1 << 16

#: Stores without folders. Creating one there would turn a misspelt name into a bucket.
_WITHOUT_FOLDERS = frozenset(
    {"s3", "s3a", "s3n", "gs", "gcs", "abfs", "abfss", "adl", "az", "wasb", "oss", "r2"}
)

#: Size of the largest JSON file that is read, in bytes: a job of 10,000,000 rows over ten models needs about 10 MB.
LARGEST_JSON = 32 << 20

#: Prefix of temporary folders.
_TEMPORARY = "siliconflow-files-"

# Writing ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def write_whole(target: Any) -> Iterator[BinaryIO]:
    """
    Open ``target`` for writing; the file appears when the block ends, unless the block raises.

    A local file is written under another name in the same folder and renamed; it follows the umask, and survives a
    crash of the machine. Any other file is written to a temporary file and then uploaded, since closing a remote stream
    early would publish a partial file.

    :param target: a ``pathlib.Path`` or an fsspec-backed path such as Airflow's ``ObjectStoragePath``.
    """
    local = local_path(target)
    if local is not None:
        make_folder(local.parent)
        _remove_leftovers(local)
        part, stream = _create_part(local)
        try:
            with stream:
                yield stream
                sync(stream)
                part.replace(local)
            _sync_folder(local.parent)
        finally:
            part.unlink(missing_ok=True)
        return
    with temporary_folder() as folder:
        path = folder / "part"
        with create_file(path) as stream:
            yield stream
        make_folder(target.parent)
        target.fs.put_file(str(path), target.path)


def write_json(target: Any, value: Any) -> None:
    """Write ``value`` as readable JSON; the file appears only when it is complete."""
    with write_whole(target) as stream:
        text = json.dumps(value, ensure_ascii=False, indent=2)
        # A lone surrogate, which UTF-8 cannot encode, becomes a JSON escape.
        stream.write(text.encode("utf-8", "backslashreplace") + b"\n")


def create_file(target: Any) -> AbstractContextManager[BinaryIO]:
    """
    Open a new file for writing; an existing file or link of that name is removed first.

    :param target: as for :func:`write_whole`. A local file follows the umask.
    """
    local = local_path(target)
    if local is None:
        opened: AbstractContextManager[BinaryIO] = target.open("wb")
        return opened
    local.unlink(missing_ok=True)
    return _create(local)


def _create(path: Path) -> BinaryIO:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return open(os.open(path, flags, 0o666), "wb", buffering=_BUFFER)


def _create_part(local: Path) -> tuple[Path, BinaryIO]:
    while True:
        part = local.with_name(f".{local.name}.{uuid.uuid4().hex}.part")
        stream = _create(part)
        if _lock(stream.fileno(), part) is not False:
            return part, stream
        # Another process cleaned up between its creation and its lock.
        stream.close()


def _remove_leftovers(local: Path) -> None:
    """Remove the partial files of killed processes; those of running processes are locked."""
    for part in local.parent.glob(f".{glob.escape(local.name)}.*.part"):
        with contextlib.suppress(OSError):
            descriptor = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                if _lock(descriptor, part):
                    part.unlink()
                    log.info("Removed %s, which an earlier process left behind", part)
            finally:
                os.close(descriptor)


def _lock(descriptor: int, path: Path) -> bool | None:
    """
    Lock a file or folder for as long as it is open.

    :return: ``False`` if another process has it, or removed it; ``None`` if its file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        return False if exc.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    try:
        found = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(found, os.fstat(descriptor))


def sync(stream: Any) -> None:
    """Make a written local file survive a crash of the machine; other streams are only flushed."""
    stream.flush()
    try:
        descriptor = stream.fileno()
    except (AttributeError, io.UnsupportedOperation):
        return
    os.fsync(descriptor)


def _sync_folder(folder: Path) -> None:
    # Without this, a crash of the machine loses a new name, and with it an intent.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# Reading ----------------------------------------------------------------------------------------------------


def open_own(target: Any) -> AbstractContextManager[BinaryIO]:
    """
    Open a file that this package wrote, for reading.

    :param target: as for :func:`write_whole`.
    :raises FileNotFoundError: it does not exist.
    :raises InvalidInputError: it is a link, or not a file.
    """
    local = local_path(target)
    if local is None:
        opened: AbstractContextManager[BinaryIO] = target.open("rb")
        return opened
    try:
        # Without O_NONBLOCK, opening a pipe would block.
        descriptor = os.open(local, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        if exc.errno == errno.ELOOP:
            raise InvalidInputError(f"{local} is a link, and is not followed; remove it") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InvalidInputError(f"{local} is not a file; remove it")
    return open(descriptor, "rb", buffering=_BUFFER)


class OwnFile:
    """
    A file that this package wrote, as a source: see :func:`open_own`.

    :param target: its path.
    """

    def __init__(self, target: Any) -> None:
        self._target = target
        self.name: str = target.name

    def __str__(self) -> str:
        return str(self._target)

    def open(self, mode: Literal["rb"] = "rb", /) -> AbstractContextManager[BinaryIO]:
        """Open for reading."""
        return open_own(self._target)


def load_json(target: Any, *, limit: int = LARGEST_JSON) -> Any:
    """
    Return the content of a JSON file that this package wrote.

    :param target: as for :func:`write_whole`.
    :param limit: size of the largest file that is read, in bytes.
    :raises FileNotFoundError: it does not exist.
    :raises InvalidInputError: it is cut off, not JSON, too large, a link, or not a file.
    """
    with open_own(target) as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise InvalidInputError(f"{target} has more than {limit} bytes, so it is not a file of this provider")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as exc:
        raise InvalidInputError(f"{target} is cut off, or not JSON: {exc}") from None


# Folders ----------------------------------------------------------------------------------------------------


def make_folder(folder: Any) -> None:
    """
    Create a folder and its parents, in a store that has folders.

    :param folder: a ``pathlib.Path`` or an fsspec-backed path. Its own ``mkdir`` is not used, since that of an
        ``ObjectStoragePath`` ignores the connection in Airflow 3, and with it the credentials.
    """
    local = local_path(folder)
    if local is not None:
        local.mkdir(parents=True, exist_ok=True)
    elif folder.protocol not in _WITHOUT_FOLDERS:
        folder.fs.makedirs(folder.path, exist_ok=True)


def make_private_folder(folder: Any) -> None:
    """
    Create a folder that nobody else can read or write (0700); an existing folder gets these permissions.

    Its parents are created as by :func:`make_folder`, and so is the folder itself in a store that is not local.

    :param folder: as for :func:`make_folder`.
    :raises InvalidInputError: the existing one is a link, not a folder, or belongs to another user.
    """
    local = local_path(folder)
    if local is None:
        make_folder(folder)
        return
    make_folder(local.parent)
    with contextlib.suppress(FileExistsError):
        local.mkdir(mode=0o700)
    try:
        descriptor = os.open(local, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as exc:
        if exc.errno in (errno.ELOOP, errno.ENOTDIR):
            raise InvalidInputError(f"{local} is a link or not a folder; remove it") from None
        raise
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid() and found.st_uid != _owner_of_new_files(descriptor):
            raise InvalidInputError(
                f"{local} belongs to user {found.st_uid}, but this task runs as {os.geteuid()}: another user could "
                "change what is sent and paid for. Remove it, or give another folder"
            )
        if found.st_mode & 0o077:
            try:
                os.fchmod(descriptor, 0o700)
            except OSError as exc:
                log.warning(
                    "%s can be read or written by others, and its mode cannot be changed: %s", local, exc
                )
    finally:
        os.close(descriptor)


def _owner_of_new_files(folder: int) -> int | None:
    """Return the owner of files that this process creates in a folder: some file systems map all users to one."""
    name = f".{uuid.uuid4().hex}.part"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(name, flags, 0o600, dir_fd=folder)
    except OSError:
        return None
    try:
        return os.fstat(descriptor).st_uid
    finally:
        os.close(descriptor)
        os.unlink(name, dir_fd=folder)


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """
    Create a local folder (0700) that lasts as long as the block.

    The first call in a process removes the folders that killed processes left.
    """
    _remove_abandoned(tempfile.gettempdir())
    descriptor = None
    while descriptor is None:
        folder = Path(tempfile.mkdtemp(prefix=_TEMPORARY))
        # Another process may clean up between its creation and its lock.
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if _lock(descriptor, folder) is False:
                os.close(descriptor)
                descriptor = None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


@functools.cache
def _remove_abandoned(parent: str) -> None:
    with contextlib.suppress(OSError):
        for entry in Path(parent).glob(f"{_TEMPORARY}*"):
            with contextlib.suppress(OSError):
                descriptor = os.open(entry, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    if os.fstat(descriptor).st_uid == os.geteuid() and _lock(descriptor, entry):
                        shutil.rmtree(entry, ignore_errors=True)
                        log.info("Removed %s, which an earlier process left behind", entry)
                finally:
                    os.close(descriptor)


def local_path(target: Any) -> Path | None:
    """Return the local path of ``target``; ``None`` if it is not local."""
    # Check the protocol first: on Airflow 2.11 a path in a remote store is a pathlib.Path too.
    protocol = getattr(target, "protocol", None)
    if protocol is not None:
        return Path(target.path) if protocol in ("file", "local", "") else None
    return target if isinstance(target, Path) else None
