from __future__ import annotations


class LiveAirflowError(Exception):
    """Airflow did not start, or did not do in time what was asked of it."""


def tail(text: str, lines: int = 40) -> str:
    """The end of a log, for an error message."""
    return "\n".join(text.splitlines()[-lines:])
