"""The progress bar of a wait in a terminal."""

from __future__ import annotations

import io
import re
import sys

import pytest

from airflow_provider_siliconflow.api.models import Batch
from airflow_provider_siliconflow.jobs.progress import ProgressBar
from airflow_provider_siliconflow.jobs.waiting import BatchWait

START = 1_800_000_000.0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def open_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Return what stands in for stderr. Not a fixture: pytest puts its own there between set-up and test."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    return stream


def shown(terminal: Terminal) -> str:
    """Return what was drawn last, without the terminal's own codes."""
    drawn = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    return [line for line in re.split(r"[\r\n]+", drawn) if line.strip()][-1]


def observed(wait: BatchWait, batch_id: str, status: str, total: int, completed: int, failed: int) -> None:
    counts = {"total": total, "completed": completed, "failed": failed}
    wait.observe(batch_id, Batch(id=batch_id, status=status, request_counts=counts), START)


def test_rows_of_all_batches_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    wait = BatchWait(["batch_1", "batch_2"], START, 60.0)
    with ProgressBar(wait) as bar:
        observed(wait, "batch_1", "completed", 10, 8, 2)
        observed(wait, "batch_2", "in_progress", 10, 5, 0)
        bar.show()
    assert "1/2 batches, 2 rows failed" in shown(terminal)
    assert "15/20 rows" in shown(terminal)


def test_a_single_batch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    wait = BatchWait(["batch_1"], START, 60.0)
    with ProgressBar(wait) as bar:
        observed(wait, "batch_1", "in_progress", 4, 1, 0)
        bar.show()
    assert "batch_1" in shown(terminal)
    assert "1/4 rows" in shown(terminal)


def test_the_bar_stops_when_the_wait_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    wait = BatchWait(["batch_1"], START, 60.0)
    with pytest.raises(KeyboardInterrupt), ProgressBar(wait):
        raise KeyboardInterrupt
    # The last code of a bar that stopped shows the cursor again.
    assert terminal.getvalue().rstrip("\n").endswith("\x1b[?25h")


def test_without_a_terminal_nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    with ProgressBar(BatchWait(["batch_1"], START, 60.0)) as bar:
        bar.show()
    assert not stream.getvalue()
