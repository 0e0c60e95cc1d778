"""The ``custom_id`` of a line; and whether all of an input are unique, in bounded memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import msgspec

from airflow_provider_siliconflow.batch_files.buckets import Spill
from airflow_provider_siliconflow.batch_files.rules import Problems

#: Hashes of custom ids, of 8 bytes each, that one of 256 buckets may have before all buckets are written to disk.
_BUCKET_HASHES = 512


class LineId(msgspec.Struct, gc=False):
    """What is read of a line if only its row is asked for."""

    custom_id: str


_decode = msgspec.json.Decoder(LineId).decode


def custom_id_of(line: bytes) -> str:
    """
    Return the ``custom_id`` of a request or result line.

    :raises msgspec.DecodeError: it is not JSON, or has none.
    """
    return _decode(line).custom_id


def numbered_id(line: int) -> str:
    """Return the ``custom_id`` of a row that has none, by its line."""
    return f"row-{line:07d}"


class CustomIdSet:
    """
    The custom ids of an input, in memory that does not grow with it.

    Only hashes are kept, most of them in a temporary file. Ids with the same hash are suspects;
    :meth:`name_duplicates` then compares the ids.
    """

    def __init__(self) -> None:
        # In buckets, so that one set of a 256th of the hashes finds the equal ones.
        self._buckets = tuple(array("q") for _ in range(256))
        self._spilled = Spill()

    def add(self, custom_id: str) -> None:
        """Add the ``custom_id`` of one row."""
        hashed = hash(custom_id)
        bucket = self._buckets[hashed & 255]
        bucket.append(hashed)
        if len(bucket) == _BUCKET_HASHES:
            self._spilled.write(self._buckets)

    def _hashes(self, number: int) -> array[int]:
        """Return all hashes of one bucket."""
        found = array("q", self._buckets[number])
        found.frombytes(self._spilled.read(number))
        return found

    def suspects(self) -> set[int]:
        """Return the hashes that occurred more than once."""
        found: set[int] = set()
        for number in range(len(self._buckets)):
            hashes = self._hashes(number)
            if len(hashes) == len(set(hashes)):
                continue
            seen: set[int] = set()
            for hashed in hashes:
                (found if hashed in seen else seen).add(hashed)
        return found

    @staticmethod
    def name_duplicates(suspects: set[int], rows: Iterable[tuple[int, str]], problems: Problems) -> None:
        """
        Add a problem for every row that has the same ``custom_id`` as an earlier one.

        :param suspects: from :meth:`suspects`.
        :param rows: line number and ``custom_id`` of all rows, in order.
        """
        first: dict[str, int] = {}
        for line, custom_id in rows:
            if hash(custom_id) in suspects:
                earlier = first.setdefault(custom_id, line)
                if earlier != line:
                    problems.add(
                        line, f"line {earlier} has the same custom_id; each must be unique", custom_id
                    )
