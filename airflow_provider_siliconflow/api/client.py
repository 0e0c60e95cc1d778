"""The HTTP API over ``requests``, for workers and notebooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import tenacity

from airflow_provider_siliconflow.api import protocol
from airflow_provider_siliconflow.api.exceptions import InvalidInputError
from airflow_provider_siliconflow.api.models import Account, Batch, UploadedFile
from airflow_provider_siliconflow.api.protocol import CHUNK_SIZE, BatchListing, Call
from airflow_provider_siliconflow.api.result_files import read_result_file
from airflow_provider_siliconflow.api.settings import ClientSettings
from airflow_provider_siliconflow.api.transport import Transport

if TYPE_CHECKING:
    from airflow_provider_siliconflow.api.sources import Source

T = TypeVar("T")

#: Seconds to wait at least after a file was sent: the service processes it before it answers.
_UPLOAD_PATIENCE = 300.0


@dataclass(frozen=True, slots=True)
class _File:
    """A file to upload; the request's body is made of it anew for each send."""

    source: Source
    size: int
    filename: str


class _UploadBody:
    """A request body with a known length that is read while it is sent."""

    def __init__(self, upload: _File, frame: protocol.MultipartFrame) -> None:
        self._upload, self._frame = upload, frame

    def __len__(self) -> int:
        return self._frame.length(self._upload.size)

    def __iter__(self) -> Iterator[bytes]:
        yield self._frame.head
        source, left = self._upload.source, self._upload.size
        with source.open("rb") as stream:
            while left:
                chunk = stream.read(min(CHUNK_SIZE, left))
                if not chunk:
                    raise InvalidInputError(
                        f"{source} became {left} bytes shorter during its upload; nothing was created"
                    )
                left -= len(chunk)
                yield chunk
            if stream.read(1):
                raise InvalidInputError(f"{source} grew during its upload; nothing was created")
        yield self._frame.tail


class SiliconFlowClient:
    """
    Calls of the API, blocking. Not for use by several threads at once.

    :param settings: key, host, timeouts, retries.
    """

    def __init__(self, settings: ClientSettings) -> None:
        self.settings = settings
        self._transport = Transport(settings)

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    def __enter__(self) -> SiliconFlowClient:
        """Return the client itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connections."""
        self.close()

    def call(self, call: Call[T], *, repeat: bool = True, within: float | None = None) -> T:
        """
        Carry out a call, with the repetitions the protocol allows.

        :param repeat: whether to send it again after a transient fault.
        :param within: seconds that one send may take at most, if less than ``settings.call_limit``.
        """
        if not repeat:
            return self._send(call, within)
        return self._repeat(call, within)

    def _repeat(self, call: Call[T], how: _File | float | None) -> T:
        for attempt in tenacity.Retrying(**protocol.retry_options(call, self.settings)):
            with attempt:
                return self._send(call, how)
        raise AssertionError("unreachable")

    def _send(self, call: Call[T], how: _File | float | None) -> T:
        """Send once: a file, or a call that may take so many seconds."""
        headers = {"Content-Type": "application/json"}
        options: dict[str, Any]
        if isinstance(how, _File):
            frame = protocol.MultipartFrame(how.filename)
            headers = {"Content-Type": frame.content_type}
            options = {"data": _UploadBody(how, frame), "size": how.size, "patience": _UPLOAD_PATIENCE}
        else:
            limit = self.settings.call_limit
            options = {"data": call.body(), "limit": limit if how is None else min(how, limit)}
        url = call.url(self.settings)
        with self._transport.send(call.method, url, name=call.name, headers=headers, **options) as answer:
            body = answer.read(call.limit(answer.status))
            return call.answer(answer.status, answer.headers, body)

    # Calls ------------------------------------------------------------------------------------------------

    def create_batch(self, *, repeat: bool = True, **request: Any) -> Batch:
        """
        Create a batch; further arguments as :func:`protocol.create_batch`.

        :param repeat: whether to send it again after a refusal such as 429. It is never sent again while it is unknown
            whether the batch was created.
        :returns: the batch; after an odd answer, perhaps with no more than its id.
        :raises TransportError: no answer named a batch. If ``accepted`` is set, there may be one all the same.
        :raises APIError: the service refused.
        """
        return self.call(protocol.create_batch(**request), repeat=repeat)

    def get_batch(self, batch_id: str, *, repeat: bool = True, within: float | None = None) -> Batch:
        """
        Read a batch.

        :param batch_id: the batch.
        :param repeat: whether to send it again after a transient fault.
        :param within: seconds that one send may take at most.
        :raises UnexpectedAnswerError: the answer is about another batch, or not what the API documents.
        """
        return self.call(protocol.get_batch(batch_id), repeat=repeat, within=within)

    def cancel_batch(self, batch_id: str) -> Batch:
        """Ask for a batch to be cancelled; the answer may still show its old status."""
        return self.call(protocol.cancel_batch(batch_id))

    def list_batches(self) -> BatchListing:
        """Return the account's batches, usually the newest first. Pages are fetched as they are needed."""
        return BatchListing(self.call)

    def list_files(self) -> tuple[UploadedFile, ...]:
        """Return the account's batch input files."""
        return self.call(protocol.list_files()).items

    def get_account(self, *, repeat: bool = True) -> Account:
        """Read the account: name, status, balances. Costs nothing. ``repeat=False`` asks once."""
        return self.call(protocol.get_account(), repeat=repeat)

    def list_models(self, *, repeat: bool = True) -> list[str]:
        """Return ids of chat models. Costs nothing. ``repeat=False`` asks once."""
        return self.call(protocol.list_models(), repeat=repeat)

    def upload_file(self, source: Source, *, size: int, filename: str) -> UploadedFile:
        """
        Upload a batch input file, streaming it.

        :param source: opens for reading, anew for each attempt.
        :param size: its size in bytes.
        :param filename: its name at the service.
        """
        return self._repeat(protocol.upload_file(), _File(source, size, filename))

    def iter_file(
        self, reference: str, refresh: Callable[[], str | None], *, limit: int | None = None
    ) -> Iterator[bytes]:
        """
        Yield the bytes of a result file; a cut connection is resumed where it broke.

        :param reference: what the batch gives: a URL, which is fetched without the key, or a file id.
        :param refresh: returns the reference anew, for a signature that has aged.
        :param limit: bytes of the largest file that is read; ``None`` reads any.
        :raises IncompleteResultsError: the file changed under the download, stays cut, is larger than ``limit``, or is
            in a private network.
        :raises SiliconFlowError: it cannot be read.
        """
        return read_result_file(self._transport, reference, refresh, limit=limit)
