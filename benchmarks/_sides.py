"""Running the sides of a benchmark in turns, each run in a process of its own."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def add_options(parser: argparse.ArgumentParser, sides: Iterable[str], *, repeat: int = 2) -> None:
    """Add the options for the sides, and those with which :func:`run_in_turns` runs one of them."""
    parser.add_argument("--repeat", type=int, default=repeat)
    parser.add_argument("--folder", help="folder for the files (default: the temporary folder)")
    parser.add_argument("--run", choices=list(sides), help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)


def run_in_turns(script: str, sides: Iterable[str], source: Path, repeat: int) -> dict[str, list[Any]]:
    """
    Return the figures of all runs by side.

    :param script: the benchmark, which prints the figures of one run as JSON.
    :param source: the input. Each run gets an empty folder beside it.
    """
    runs: dict[str, list[Any]] = {side: [] for side in sides}
    for _ in range(repeat):
        for side, found in runs.items():
            with tempfile.TemporaryDirectory(dir=source.parent) as out:
                command = [sys.executable, script, "--run", side, "--source", str(source), "--out", out]
                result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found.append(json.loads(result.stdout))
    return runs
