"""`python -m scripts.mutation`: put faults into modules, and see whether the tests notice."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scripts.mutation.report import report, score

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / ".cache" / "mutation"


def modules(paths: list[str]) -> list[str]:
    """The Python files that paths name, relative to the project."""
    found = []
    for text in paths:
        path = (ROOT / text).resolve()
        if not path.exists() or not path.is_relative_to(ROOT):
            raise SystemExit(f"--paths: {text} is no file or folder of {ROOT}")
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        found += [str(file.relative_to(ROOT)) for file in files]
    return list(dict.fromkeys(found))


def copy_tree(target: Path) -> None:
    """The project without what is hidden or made: environments, caches, history."""
    skipped = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, target, ignore=skipped)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.mutation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    package = "airflow_provider_siliconflow"
    both = [path for path in (f"{package}/jobs", f"{package}/task") if (ROOT / path).exists()]
    parser.add_argument("--paths", nargs="+", default=both, help="files and folders (default: %(default)s)")
    parser.add_argument("--tests", nargs="+", default=["tests/unit"], help="(default: %(default)s)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)"
    )
    parser.add_argument(
        "--sample", type=int, metavar="N", help="so many mutants, chosen at random (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of --sample (default: %(default)s)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=20,
        help="of the processor for one mutant, the quickest tests first; 0 for all tests (default: %(default)s)",
    )
    parser.add_argument(
        "--examples", type=int, default=25, help="of one Hypothesis test (default: %(default)s)"
    )
    parser.add_argument(
        "--fail-under", type=float, default=0, metavar="PERCENT", help="exit 1 below this score"
    )
    arguments = parser.parse_args()
    started = time.monotonic()
    RESULTS.mkdir(parents=True, exist_ok=True)
    output = RESULTS / "results.json"
    output.unlink(missing_ok=True)
    options = {
        name: getattr(arguments, name) for name in ("tests", "jobs", "sample", "seed", "seconds", "examples")
    } | {"paths": modules(arguments.paths), "output": str(output)}
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        tree = Path(folder).resolve() / "tree"
        copy_tree(tree)
        environment = os.environ | {
            "PYTHONPATH": str(tree),
            "PYTHONDONTWRITEBYTECODE": "1",
            "MUTATION_FOLDER": folder,
            "TMPDIR": folder,
        }
        done = subprocess.run(
            [sys.executable, "-m", "scripts.mutation.session", json.dumps(options)],
            cwd=tree,
            env=environment,
            check=False,
        )
    if not output.exists():
        return done.returncode or 2
    outcomes = json.loads(output.read_text())
    text = report(outcomes, time.monotonic() - started)
    (RESULTS / "report.txt").write_text(text + "\n")
    print(text)
    reached = score(outcomes) * 100
    if reached < arguments.fail_under:
        print(f"{reached:.1f} % is below --fail-under {arguments.fail_under:g} %", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
