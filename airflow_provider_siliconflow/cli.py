"""
The command ``siliconflow-batches``: what a person does about batches and answers outside of a DAG.

Every command is a function that gets the parsed arguments and imports what it needs itself.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow_provider_siliconflow.batch_files.segments import Segment

Command = Callable[[argparse.Namespace], int]

_AGE = re.compile(r"(\d{1,6})([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the command; return its exit code: 0, or 1 for an error.

    :param arguments: by default those of the process.
    """
    from airflow_provider_siliconflow.api.exceptions import SiliconFlowError

    options = _parser().parse_args(arguments)
    run: Command = options.run
    try:
        return run(options)
    except (SiliconFlowError, OSError) as exc:
        print(f"siliconflow-batches: {exc}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="siliconflow-batches", description="SiliconFlow batches outside of a DAG."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_cache(commands)
    return parser


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2))


# cache ------------------------------------------------------------------------------------------------------


def _add_cache(commands: Any) -> None:
    cache = commands.add_parser("cache", help="list and remove cached answers (cache_dir)")
    actions = cache.add_subparsers(title="commands", required=True, metavar="COMMAND")
    listing = actions.add_parser("ls", help="list the answers by the jobs that were billed for them")
    prune = actions.add_parser("prune", help="remove old answers")
    prune.add_argument(
        "--older-than",
        type=_age,
        required=True,
        metavar="AGE",
        help="remove what is older: 30d, 12h, 8w (units s, m, h, d, w)",
    )
    for action, run in ((listing, list_cache), (prune, prune_cache)):
        action.add_argument("cache_dir", help="path or URI, as given to cache_dir")
        action.add_argument("--json", action="store_true", help="print JSON")
        action.set_defaults(run=run)


def _age(text: str) -> int:
    found = _AGE.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not an age such as 30d, 12h or 8w")
    return int(found[1]) * _SECONDS[found[2]]


def list_cache(options: argparse.Namespace) -> int:
    """List the segments of a cache, newest first."""
    segments, unreadable = _segments(options.cache_dir)
    if options.json:
        _print_json({"segments": list(map(_described, segments)), "unreadable": unreadable})
        return 0
    for segment in segments:
        print(_line(segment))
    total = sum(segment.answers for segment in segments)
    print(f"{len(segments)} segments, {total:,} answers, {_megabytes(segments)} MB")
    _print_unreadable(unreadable)
    return 0


def prune_cache(options: argparse.Namespace) -> int:
    """Remove the segments of a cache that are older than an age. Other files are left alone."""
    from airflow_provider_siliconflow.batch_files.segments import age, remove

    segments, unreadable = _segments(options.cache_dir)
    now = time.time()
    old = [segment for segment in segments if age(segment, now) > options.older_than]
    removed = []
    for segment in old:
        if remove(segment):
            removed.append(segment)
            if not options.json:
                print(f"removed {_line(segment)}")
    kept = len(segments) - len(old)
    if options.json:
        found = {"removed": list(map(_described, removed)), "kept": kept, "unreadable": unreadable}
        _print_json(found)
        return 0
    answers = sum(segment.answers for segment in removed)
    print(
        f"{len(removed)} segments removed ({answers:,} answers, {_megabytes(removed)} MB), {kept} segments kept"
    )
    _print_unreadable(unreadable)
    return 0


def _segments(cache_dir: str) -> tuple[list[Segment], dict[str, str]]:
    from airflow_provider_siliconflow.api.exceptions import InvalidInputError
    from airflow_provider_siliconflow.batch_files.segments import read_segments, segments_folder
    from airflow_provider_siliconflow.paths import open_folder

    folder = segments_folder(open_folder("cache_dir", cache_dir))
    try:
        return read_segments(folder)
    except FileNotFoundError:
        raise InvalidInputError(
            f"{cache_dir} has no cached answers: there is no {folder}. Give the folder that cache_dir names"
        ) from None


def _described(segment: Segment) -> dict[str, Any]:
    return {
        "name": segment.name,
        "created": _time(segment.created),
        "model": segment.model,
        "job": segment.job,
        "answers": segment.answers,
        "bytes": segment.size,
    }


def _line(segment: Segment) -> str:
    model = segment.model or "(models of the rows)"
    return (
        f"{_time(segment.created)}  {segment.answers:>9,} answers  {segment.size / 1e6:>9.1f} MB  {model}  "
        f"{segment.job}  {segment.name}"
    )


def _time(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return str(seconds)


def _megabytes(segments: Sequence[Segment]) -> str:
    return f"{sum(segment.size for segment in segments) / 1e6:,.1f}"


def _print_unreadable(unreadable: dict[str, str]) -> None:
    for name, reason in unreadable.items():
        print(f"not used, and left alone: {name}: {reason}")
