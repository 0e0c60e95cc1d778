"""A progress bar for waits in a terminal or a notebook."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow_provider_siliconflow.jobs.waiting import BatchWait


class ProgressBar:
    """
    Shows the rows of a wait with ``rich``. Without a terminal, for example in a task, it shows nothing.

    :param wait: the wait.
    """

    def __init__(self, wait: BatchWait) -> None:
        self._wait = wait
        self._bar: Any = None

    def __enter__(self) -> ProgressBar:
        """Start the bar."""
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("rows"),
                TimeElapsedColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task("waiting", total=None)
        return self

    def show(self) -> None:
        """Update the bar."""
        if self._bar is None:
            return
        rows = self._wait.rows
        ended, batches = len(self._wait.ended), len(self._wait.batch_ids)
        text = f"{ended}/{batches} batches" if batches > 1 else self._wait.batch_ids[0]
        text += f", {rows.failed} rows failed" if rows.failed else ""
        self._bar.update(
            self._task, total=rows.total or None, completed=rows.completed + rows.failed, description=text
        )

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop updating the bar."""
        if self._bar is not None:
            self._bar.stop()
