"""
CPU time of a DAG file's imports: this provider and Airflow's own LLM providers, compared with a bare DAG file.

    python benchmarks/parse_time.py --runs 15

Every run is a separate process. It imports what any DAG file with a deferrable task needs, then one provider's
operators, sensor and decorator. The sides take turns, and the median of each counts. Airflow parses every DAG file
every 30 seconds in a new process and pays this cost each time.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile

BASELINE = "from airflow.sdk import DAG, BaseOperator, BaseSensorOperator, task\n" + (
    "from airflow.triggers.base import BaseTrigger\n"
)
OURS = "airflow_provider_siliconflow"
PACKAGES = {
    "ours": [
        f"{OURS}.operators.batch",
        f"{OURS}.sensors.batch",
        f"{OURS}.decorators.batch",
    ],
    "openai": ["airflow.providers.openai.operators.openai"],
    "anthropic": ["airflow.providers.anthropic.operators.batch", "airflow.providers.anthropic.sensors.batch"],
    "common-ai": [
        "airflow.providers.common.ai.operators.llm_batch",
        "airflow.providers.common.ai.decorators.llm_batch",
    ],
}
#: Modules that this provider must not load when a DAG file is parsed.
HEAVY = ("requests", "aiohttp", "tenacity", f"{OURS}.api", f"{OURS}.jobs", f"{OURS}.batch_files")
LIGHT = (f"{OURS}.api", f"{OURS}.api.arguments", f"{OURS}.api.exceptions")


def is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def environment(home: str) -> dict[str, str]:
    return {
        **os.environ,
        "AIRFLOW_HOME": home,
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home}/airflow.db",
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "PYTHONWARNINGS": "ignore",
    }


def run(code: str, home: str) -> list[str]:
    """Run code after the baseline imports in a new process and return the lines that it printed."""
    done = subprocess.run(
        [sys.executable, "-c", BASELINE + code],
        check=True,
        env=environment(home),
        cwd=home,
        capture_output=True,
        text=True,
    )
    return done.stdout.splitlines()


def measure(imports: str, home: str) -> tuple[float, float]:
    """Return the CPU seconds of a process for the baseline, and for the imports after it."""
    code = f"import time\nbefore = time.process_time()\n{imports}print(before, time.process_time() - before)"
    base, more = run(code, home)[-1].split()
    return float(base), float(more)


def loaded(imports: str, home: str) -> list[str]:
    """Return the modules that the imports load in addition to those of a bare DAG file."""
    code = f"import sys\nbefore = set(sys.modules)\n{imports}print(*sorted(set(sys.modules) - before), sep='\\n')"
    return run(code, home)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--runs", type=int, default=9, help="processes per side")
    parser.add_argument("--list", action="store_true", help="list the additional modules that ours loads")
    options = parser.parse_args()
    if not is_installed("airflow.sdk"):
        raise SystemExit("skipped: this needs Airflow 3 (airflow.sdk)")
    sides = {}
    for name, modules in PACKAGES.items():
        if is_installed(modules[0]):
            sides[name] = "".join(f"import {module}\n" for module in modules)
        else:
            print(f"{name}: skipped, not installed (apache-airflow-providers-{name})")
    with tempfile.TemporaryDirectory() as home:
        if options.list:
            print(*loaded(sides["ours"], home), sep="\n")
            return
        for imports in sides.values():
            measure(imports, home)  # the first run writes the bytecode and Airflow's configuration
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for _ in range(options.runs):
            for name, imports in sides.items():
                found[name].append(measure(imports, home))
        heavy = [
            module
            for module in loaded(sides["ours"], home)
            if module.startswith(HEAVY) and module not in LIGHT
        ]
    base = statistics.median(base for runs in found.values() for base, _ in runs)
    print(f"a bare DAG file takes {base:.2f} CPU seconds; medians over {options.runs} processes each")
    print(f"{'':12} {'added CPU':>10} {'ratio':>7}")
    for name, runs in found.items():
        more = statistics.median(more for _, more in runs)
        print(f"{name:12} {more * 1000:7.0f} ms {1 + more / base:7.3f}")
    print(f"heavy modules that ours loads: {', '.join(heavy) or 'none'}")
    print("goal for ours: a ratio of at most 1.01")


if __name__ == "__main__":
    main()
