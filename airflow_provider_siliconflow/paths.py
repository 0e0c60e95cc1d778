"""Files and folders given as a path, a URI of any scheme that Airflow knows, or a path object."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import ObjectStoragePath

#: The package to install for a scheme, for messages.
_PROVIDERS = {
    "s3": "apache-airflow-providers-amazon[s3fs]",
    "gs": "apache-airflow-providers-google",
    "abfs": "apache-airflow-providers-microsoft-azure",
    "abfss": "apache-airflow-providers-microsoft-azure",
    "adl": "apache-airflow-providers-microsoft-azure",
}


def resolve_path(name: str, path: Any) -> Any:
    """
    Return a path object for a path, a URI or a path object.

    :param name: the argument, for messages.
    :raises InvalidInputError: it has another type, has characters that no store takes, or is a URI of an
        unknown scheme.
    """
    from airflow_provider_siliconflow.api.exceptions import InvalidInputError
    from airflow_provider_siliconflow.api.redaction import valid_text

    if not isinstance(path, str) and not callable(getattr(path, "open", None)):
        raise InvalidInputError(f"{name} must be a path, a URI or a path object; got {type(path).__name__}")
    text = str(path)
    # The path goes into XCom, which can store neither.
    if valid_text(text) != text:
        raise InvalidInputError(f"{name} must not contain NUL or lone surrogates; got {text!r}")
    # Airflow 2.11 resolves a relative path against the root.
    if isinstance(path, str) and "://" not in path:
        return Path(path)
    try:
        if isinstance(path, str):
            from airflow.providers.common.compat.sdk import ObjectStoragePath

            path = ObjectStoragePath(path)
        # fsspec finds this out when the path is used; fail before a batch is paid for.
        getattr(path, "fs", None)
    except (ValueError, ImportError) as exc:
        scheme = str(path).partition("://")[0] if isinstance(path, str) else str(path.protocol)
        provider = _PROVIDERS.get(scheme)
        raise InvalidInputError(
            f"{name}: {scheme}:// needs a provider that registers this scheme on every worker"
            f"{f', such as {provider}' if provider else ''}: {exc}"
        ) from exc
    return path


def open_source(source: str | Path | ObjectStoragePath | bytes, name: str = "the path of the input") -> Any:
    """
    Return an object that opens for reading.

    :param source: path, URI of any scheme Airflow's ``ObjectStoragePath`` takes, such a path, or bytes.
    :param name: the argument, for messages.
    :raises InvalidInputError: it is empty, or of a scheme that nothing here knows.
    """
    from airflow_provider_siliconflow.api.exceptions import InvalidInputError

    if isinstance(source, bytes):
        return _Content(source)
    if isinstance(source, str) and not source.strip():
        raise InvalidInputError(f"{name} is empty; give a path or URI of a JSONL file")
    return resolve_path(name, source)


def open_folder(name: str, folder: Any) -> Any:
    """
    Return a folder to write to.

    :param name: the argument, for messages.
    :param folder: path, URI of any scheme Airflow's ``ObjectStoragePath`` takes, or such a path.
    :raises InvalidInputError: it is empty, or of a scheme that nothing here knows.
    """
    from airflow_provider_siliconflow.api.exceptions import InvalidInputError

    if isinstance(folder, str) and not folder.strip():
        raise InvalidInputError(f"{name} is empty; give a path or URI of a folder for the results")
    return resolve_path(name, folder)


class _Content:
    """Bytes that open like a file."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def __str__(self) -> str:
        return "the given bytes"

    def open(self, mode: str = "rb") -> Any:
        """Open for reading."""
        return io.BytesIO(self._content)
