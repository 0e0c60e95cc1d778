"""Files that appear under their name only when they are whole."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

#: What is written comes in larger blocks, and those pass a small buffer by.
_BUFFER = 1 << 16

#: Stores without folders. Where the others make one, these would make a bucket out of a misspelt name.
_WITHOUT_FOLDERS = frozenset(
    {"s3", "s3a", "s3n", "gs", "gcs", "abfs", "abfss", "adl", "az", "wasb", "oss", "r2"}
)


@contextlib.contextmanager
def write_whole(target: Any) -> Iterator[BinaryIO]:
    """
    Open ``target`` for writing; it gets its name when the block ends, and nothing when the block raises.

    A local file is written beside its place and renamed. Anything else is written to a temporary file and
    uploaded in one go, since closing a remote stream half-way would publish what was written so far.

    :param target: a ``pathlib.Path`` or an fsspec-backed path such as Airflow's ``ObjectStoragePath``.
    """
    local = local_path(target)
    if local is not None:
        make_folder(local.parent)
        part = local.with_name(f".{local.name}.{uuid.uuid4().hex}.part")
        try:
            with part.open("wb", buffering=_BUFFER) as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            part.replace(local)
        finally:
            part.unlink(missing_ok=True)
        return
    with tempfile.NamedTemporaryFile(prefix="siliconflow-", buffering=_BUFFER) as temporary:
        yield temporary  # type: ignore[misc]
        temporary.flush()
        make_folder(target.parent)
        target.fs.put_file(temporary.name, target.path)


def settle(stream: Any) -> None:
    """Make a local file that was written survive the end of the machine; what is not local is none of ours."""
    stream.flush()
    with contextlib.suppress(AttributeError, OSError):
        os.fsync(stream.fileno())


def write_json(target: Any, value: Any) -> None:
    """Write ``value`` as readable JSON; the file appears only when it is whole."""
    with write_whole(target) as stream:
        text = json.dumps(value, ensure_ascii=False, indent=2)
        # What UTF-8 cannot hold, half of a surrogate pair, becomes the escape that JSON has for it.
        stream.write(text.encode("utf-8", "backslashreplace") + b"\n")


def make_folder(folder: Any) -> None:
    """
    Create a folder, and those above it, where there are folders.

    :param folder: a ``pathlib.Path`` or an fsspec-backed path. Its own ``mkdir`` is no use: in Airflow 3 that of
        an ``ObjectStoragePath`` goes past the connection, and so without its credentials.
    """
    local = local_path(folder)
    if local is not None:
        local.mkdir(parents=True, exist_ok=True)
    elif folder.protocol not in _WITHOUT_FOLDERS:
        folder.fs.makedirs(folder.path, exist_ok=True)


def local_path(target: Any) -> Path | None:
    """Return the local path behind ``target``, or ``None`` where it is not local."""
    # The protocol first: on Airflow 2.11 a path into a remote store is a pathlib.Path as well.
    protocol = getattr(target, "protocol", None)
    if protocol is not None:
        return Path(target.path) if protocol in ("file", "local", "") else None
    return target if isinstance(target, Path) else None
