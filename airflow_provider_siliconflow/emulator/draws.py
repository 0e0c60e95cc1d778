"""Choices that look random and are always the same for the same row."""

from __future__ import annotations

from hashlib import blake2b

_MASK = (1 << 64) - 1


class Draw:
    """
    A sequence of choices. Not :mod:`random`: its methods may choose differently on another Python.

    :param seed: decides all of them.
    """

    def __init__(self, seed: int) -> None:
        self._state = (seed ^ 0x9E3779B97F4A7C15) & _MASK

    def below(self, limit: int) -> int:
        """Return a number from 0 up to the limit, exclusive."""
        self._state = (self._state * 6364136223846793005 + 1442695040888963407) & _MASK
        return (self._state >> 11) % limit


def digest_of(custom_id: str, model: str, rest: bytes) -> bytes:
    """Return 16 bytes that stand for a row, a model and something else."""
    state = blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=16)
    state.update(b"\0" + model.encode("utf-8", "surrogatepass") + b"\0")
    state.update(rest)
    return state.digest()


def share_of(digest: bytes) -> float:
    """Return a digest as a number from 0 to 1, exclusive: below a rate, the row belongs to its share."""
    return int.from_bytes(digest[:8], "big") / (1 << 64)
