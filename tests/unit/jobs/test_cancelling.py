"""Cancelling many batches, and none that is not ours."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest

from airflow_provider_siliconflow.api.exceptions import InvalidRequestError, NoAnswerError
from airflow_provider_siliconflow.api.models import Batch
from airflow_provider_siliconflow.jobs.cancelling import cancel, cancel_all


class Account:
    """Batches by id; one call of its own for each thread."""

    def __init__(self, **statuses: str) -> None:
        self.statuses = statuses
        self.cancelled: list[str] = []
        self.opened = 0
        self.broken: dict[str, Exception] = {}
        self.together = threading.Barrier(2, timeout=10)
        self.waits = False

    @contextlib.contextmanager
    def open(self) -> Iterator[Account]:
        self.opened += 1
        yield self

    def get_batch(self, batch_id: str) -> Batch:
        return Batch(id=batch_id, status=self.statuses[batch_id])

    def cancel_batch(self, batch_id: str) -> Batch:
        if self.waits:
            self.together.wait()
        if batch_id in self.broken:
            raise self.broken[batch_id]
        if self.statuses[batch_id] != "in_queue":
            raise InvalidRequestError("it has ended", status_code=400)
        self.cancelled.append(batch_id)
        return Batch(id=batch_id, status="in_queue")


def test_one_that_has_ended_is_returned_as_it_is() -> None:
    assert cancel(Account(a="completed"), "a").status == "completed"
    with pytest.raises(InvalidRequestError):
        cancel(Account(a="in_progress"), "a")


def test_one_that_fails_keeps_no_other_from_being_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    account = Account(**dict.fromkeys("abcdef", "in_queue"), g="completed")
    account.broken = {"b": NoAnswerError("reset"), "d": InvalidRequestError("no", status_code=400)}
    cancel_all(list("abcdefg"), account.open)
    assert sorted(account.cancelled) == ["a", "c", "e", "f"]
    for batch_id in "bd":
        assert f"Batch {batch_id} could not be cancelled; it may continue and be billed" in caplog.text


def test_they_are_cancelled_at_once() -> None:
    account = Account(a="in_queue", b="in_queue")
    account.waits = True
    cancel_all(["a", "b"], account.open)
    assert sorted(account.cancelled) == ["a", "b"]
    assert account.opened == 2


def test_nothing_to_cancel_opens_nothing() -> None:
    account = Account()
    cancel_all([], account.open)
    assert account.opened == 0


def test_what_is_not_ours_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    account = Account(a="in_queue", b="in_queue")
    cancel_all(["a", "b"], account.open, is_ours=lambda batch: batch.id == "a")
    assert account.cancelled == ["a"]
    assert "Batch b is in this task's record but belongs to other work; it is not cancelled" in caplog.text


def test_a_fault_of_another_kind_is_told(caplog: pytest.LogCaptureFixture) -> None:
    account = Account(a="in_queue", b="in_queue")
    account.broken = {"a": RuntimeError("out of memory")}
    cancel_all(["a", "b"], account.open)
    assert account.cancelled == ["b"]
    assert "Not all of a could be cancelled: RuntimeError: out of memory" in caplog.text
