"""Makes the virtual environments of this project: this checkout, one version of Airflow, and development tools.

    python scripts/environment.py --airflow 3.3 --venv .test/airflow-3.3 --groups test,lint

The tools are the dependency groups of pyproject.toml. They are expanded here, so that a pip older than 25.1,
which does not know `--group`, can install them. Standard library only, because nothing is installed yet when
this runs. A second call with nothing changed returns at once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# The Pythons that both Airflow and this provider run on, the preferred one first.
PYTHONS = {
    "2.11": ("3.12", "3.11"),
    "3.0": ("3.12", "3.11"),
    "3.1": ("3.12", "3.13", "3.11"),
    "3.2": ("3.12", "3.13", "3.11"),
    "3.3": ("3.12", "3.13", "3.11"),
}
NEWEST = "3.3"


class EnvironmentMakingError(Exception):
    """The environment cannot be made; the text says why, for a person."""


def read_project() -> dict[str, Any]:
    """The tables of pyproject.toml that say what an environment holds."""
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return {name: tables.get(name, {}) for name in ("build-system", "project", "dependency-groups")}


def expand_group(groups: dict[str, list[Any]], name: str, including: tuple[str, ...] = ()) -> list[str]:
    """The requirements of a dependency group and of those that it includes."""
    if name not in groups:
        raise EnvironmentMakingError(f"pyproject.toml has the groups {', '.join(groups)}, not {name!r}")
    if name in including:
        raise EnvironmentMakingError(
            f"dependency groups include each other: {' -> '.join([*including, name])}"
        )
    found: list[str] = []
    for entry in groups[name]:
        if isinstance(entry, str):
            found.append(entry)
        else:
            found += expand_group(groups, entry["include-group"], (*including, name))
    return list(dict.fromkeys(found))


def _version_of(python: str) -> str | None:
    """`3.12` and so on, or None when it does not run (a version manager's stub, say)."""
    try:
        done = subprocess.run(
            [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _interpreters(versions: tuple[str, ...]) -> Iterator[str]:
    yield sys.executable
    yield from ("python3", "python")
    for version in versions:
        yield f"python{version}"
    # Version managers keep interpreters off the PATH until they are chosen for a folder.
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path("~/.pyenv").expanduser()) / "versions"
    for version in versions:
        yield from (str(path / "bin" / "python") for path in sorted(pyenv.glob(f"{version}.*"), reverse=True))


def find_python(airflow: str, wanted: str | None = None) -> str:
    """An interpreter that runs this version of Airflow."""
    minor = ".".join(airflow.split(".")[:2])
    if minor not in PYTHONS:
        raise EnvironmentMakingError(f"Airflow {airflow} is not one of the supported: {', '.join(PYTHONS)}")
    versions = PYTHONS[minor]
    seen = []
    for candidate in [wanted] if wanted else _interpreters(versions):
        path = shutil.which(candidate)
        version = _version_of(path) if path else None
        if path and version in versions:
            return path
        if version:
            seen.append(f"{candidate} ({version})")
    raise EnvironmentMakingError(
        f"Airflow {airflow} needs Python {' or '.join(sorted(versions))}, and none was found; "
        f"looked at: {', '.join(dict.fromkeys(seen)) or wanted or 'nothing that runs'}"
    )


def _run(command: list[str], environment: dict[str, str] | None = None) -> bool:
    print("+", " ".join(command), flush=True)
    return subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, check=False).returncode == 0


def _make_venv(base: str, venv: Path) -> None:
    shutil.rmtree(venv, ignore_errors=True)
    venv.parent.mkdir(parents=True, exist_ok=True)
    if _run([base, "-m", "venv", str(venv)]):
        return
    # Debian leaves out what `venv` needs; uv brings its own.
    uv = shutil.which("uv")
    shutil.rmtree(venv, ignore_errors=True)
    if uv and _run([uv, "venv", "--quiet", "--seed", "--python", base, str(venv)]):
        return
    raise EnvironmentMakingError(
        f"{base} cannot make a virtual environment. On Debian and Ubuntu: apt-get install python3-venv"
    )


def _uv_environment(python: str) -> dict[str, str]:
    """uv reads none of pip's settings, so hand over the package index that pip is told to use."""
    environment = dict(os.environ)
    if "UV_DEFAULT_INDEX" in environment or "UV_INDEX_URL" in environment:
        return environment
    for section in (":env:", "install", "global"):
        done = subprocess.run(
            [python, "-m", "pip", "config", "get", f"{section}.index-url"],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0 and done.stdout.strip():
            environment["UV_DEFAULT_INDEX"] = done.stdout.strip()
            break
    return environment


def _install(python: str, requirements: list[str]) -> None:
    if _run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv"]):
        command = [python, "-m", "uv", "pip", "install", "--quiet", "--python", python, *requirements]
        if _run(command, _uv_environment(python)):
            return
        print("uv could not install; trying pip, which takes some minutes", flush=True)
    if not _run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements]):
        raise EnvironmentMakingError("the packages could not be installed; the reason stands above")


def make_environment(
    airflow: str, venv: Path, *, groups: tuple[str, ...] = (), python: str | None = None
) -> str:
    """Make or complete `venv`; returns the path of its interpreter."""
    minor = ".".join(airflow.split(".")[:2])
    base = find_python(airflow, python)
    wanted = airflow if airflow.count(".") > 1 else f"{airflow}.*"
    requirements = ["--editable", str(ROOT), f"apache-airflow=={wanted}"]
    pins = ROOT / "scripts" / "constraints" / f"airflow-{minor}.txt"
    if pins.exists():
        requirements += ["--constraint", str(pins)]
    project = read_project()
    for group in groups:
        requirements += expand_group(project["dependency-groups"], group)

    digest = hashlib.sha256()
    for text in [*requirements, _version_of(base) or "", json.dumps(project)]:
        digest.update(text.encode() + b"\0")
    if pins.exists():
        digest.update(pins.read_bytes())
    stamp = venv / "made-from"
    inside = str(venv / ("Scripts" if os.name == "nt" else "bin") / "python")
    if stamp.exists() and stamp.read_text() == digest.hexdigest() and _version_of(inside):
        return inside

    print(f"Making {venv} with Airflow {airflow} ...", flush=True)
    stamp.unlink(missing_ok=True)
    if _version_of(inside) != _version_of(base):
        _make_venv(base, venv)
    _install(inside, requirements)
    stamp.write_text(digest.hexdigest())
    return inside


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--airflow", default=NEWEST, help="3.3 (its newest release) or 3.3.2 (default: %(default)s)"
    )
    parser.add_argument("--venv", type=Path, required=True, help="folder of the environment")
    parser.add_argument("--python", help="interpreter to use (default: the first fitting one)")
    parser.add_argument("--groups", default="", help="dependency groups of pyproject.toml, comma-separated")
    arguments = parser.parse_args()
    groups = tuple(filter(None, arguments.groups.split(",")))
    try:
        make_environment(arguments.airflow, arguments.venv.absolute(), groups=groups, python=arguments.python)
    except EnvironmentMakingError as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
