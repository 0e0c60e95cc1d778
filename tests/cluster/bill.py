"""What an account was asked for and what it charges, by the emulator's own books."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from airflow_provider_siliconflow.emulator.service import ServiceError

if TYPE_CHECKING:
    from airflow_provider_siliconflow.emulator.server import Emulator

ENDED = frozenset({"completed", "failed", "expired", "cancelled"})

#: The input file's content (its SHA-256) and the model: what is to be paid for once.
Piece = tuple[str, str]


@dataclass(frozen=True)
class Bill:
    """
    :param batches: ids of the batches by piece.
    :param answers: how often each row (custom id, model) was answered, which is how often it is billed.
    :param cancelled: batches that were asked to be cancelled.
    :param unended: batches that have not ended.
    """

    batches: Mapping[Piece, tuple[str, ...]]
    answers: Counter[tuple[str, str]]
    cancelled: tuple[str, ...]
    unended: tuple[str, ...]

    @property
    def paid_again(self) -> int:
        """Answers that are billed beyond the first of their row."""
        return sum(count - 1 for count in self.answers.values())

    @property
    def created_again(self) -> int:
        """Batches beyond the first of their piece."""
        return sum(len(ids) - 1 for ids in self.batches.values())

    def as_dict(self) -> dict[str, int]:
        return {
            "pieces": len(self.batches),
            "batches": sum(map(len, self.batches.values())),
            "rows": len(self.answers),
            "batches_cancelled": len(self.cancelled),
            "batches_created_again": self.created_again,
            "rows_paid_again": self.paid_again,
        }

    @property
    def is_clean(self) -> bool:
        """Whether nothing was cancelled, and nothing sent or answered more than once."""
        return not self.cancelled and not self.unended and self.paid_again == self.created_again == 0

    def __str__(self) -> str:
        return ", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in self.as_dict().items())


def bill_of(emulator: Emulator) -> Bill:
    """Read the books; complete once every batch has ended."""
    service = emulator.service
    batches: defaultdict[Piece, list[str]] = defaultdict(list)
    answers: Counter[tuple[str, str]] = Counter()
    contents: dict[str, str] = {}
    state = service.state()["batches"]
    for batch in state:
        file_id, model = batch["input_file_id"], model_of(batch)
        if file_id not in contents:
            contents[file_id] = hashlib.sha256(service.open_content(file_id).read_bytes()).hexdigest()
        batches[contents[file_id], model].append(batch["id"])
        # Not one row of it was answered where there is no such file.
        with suppress(ServiceError), service.open_results(batch["id"], "output").open("rb") as lines:
            answers.update((json.loads(line)["custom_id"], model) for line in lines)
    return Bill(
        {piece: tuple(ids) for piece, ids in batches.items()},
        answers,
        tuple(batch["id"] for batch in state if batch["cancelling_at"] or batch["status"] == "cancelled"),
        tuple(batch["id"] for batch in state if batch["status"] not in ENDED),
    )


def model_of(batch: Mapping[str, Any]) -> str:
    return str((batch["request"].get("replace") or {}).get("model", ""))
