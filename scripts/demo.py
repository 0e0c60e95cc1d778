"""`make demo`: the example DAG on a real Airflow, against a local SiliconFlow.

Makes an environment below .demo/, starts the emulator and Airflow, runs `siliconflow_batch_quickstart`, tells what
happens while it runs, prints the results and stops everything. Ends with 0 only when the run was successful.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scripts.live_airflow import LiveAirflow, ProcessFamily

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".demo"
DAG_ID = "siliconflow_batch_quickstart"
MODEL = "Qwen/Qwen3-32B"
RUN_TIMEOUT = 180.0

# Set in the second process, which runs inside the demo's own environment.
_INSIDE = "SILICONFLOW_DEMO_INSIDE"

CAPITALS = {
    "Argentina": "Buenos Aires",
    "Australia": "Canberra",
    "Bhutan": "Thimphu",
    "Bolivia": "Sucre",
    "Brazil": "Brasília",
    "Burundi": "Gitega",
    "Canada": "Ottawa",
    "Chile": "Santiago",
    "China": "Beijing",
    "Ecuador": "Quito",
    "Egypt": "Cairo",
    "Ethiopia": "Addis Ababa",
    "Fiji": "Suva",
    "Georgia": "Tbilisi",
    "Ghana": "Accra",
    "Iceland": "Reykjavík",
    "Indonesia": "Jakarta",
    "Japan": "Tokyo",
    "Jordan": "Amman",
    "Kazakhstan": "Astana",
    "Kenya": "Nairobi",
    "Laos": "Vientiane",
    "Madagascar": "Antananarivo",
    "Malta": "Valletta",
    "Mongolia": "Ulaanbaatar",
    "Morocco": "Rabat",
    "Namibia": "Windhoek",
    "Nepal": "Kathmandu",
    "Nigeria": "Abuja",
    "Norway": "Oslo",
    "Oman": "Muscat",
    "Peru": "Lima",
    "Senegal": "Dakar",
    "Slovenia": "Ljubljana",
    "Tanzania": "Dodoma",
    "Thailand": "Bangkok",
    "Turkey": "Ankara",
    "Uruguay": "Montevideo",
    "Vietnam": "Hanoi",
    "Zambia": "Lusaka",
}


class DemoError(Exception):
    """The demo cannot go on; the text is for the person who started it."""


def question(country: str) -> str:
    return f"What is the capital of {country}? Answer with the name only."


def prepare() -> None:
    """Make the environment and go on inside it; does not return."""
    from scripts.environment import NEWEST, EnvironmentMakingError, make_environment

    started = time.monotonic()
    try:
        python = make_environment(NEWEST, FOLDER / "venv")
    except EnvironmentMakingError as error:
        raise DemoError(str(error)) from None
    print(f"Environment ready ({time.monotonic() - started:.0f} s).", flush=True)
    os.chdir(ROOT)
    os.environ[_INSIDE] = "1"
    os.execv(python, [python, "-m", "scripts.demo"])


def write_input(folder: Path) -> tuple[Path, Path]:
    """A request file as SiliconFlow takes it, and the answers that the emulated models know."""
    requests, answers = folder / "questions.jsonl", folder / "answers.jsonl"
    with requests.open("w") as file:
        for country in CAPITALS:
            line = {
                "custom_id": country,
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {
                    "model": MODEL,
                    "messages": [{"role": "user", "content": question(country)}],
                    "max_tokens": 64,
                },
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    with answers.open("w") as file:
        for country, capital in CAPITALS.items():
            file.write(
                json.dumps({"question": question(country), "answer": capital}, ensure_ascii=False) + "\n"
            )
    return requests, answers


@contextlib.contextmanager
def emulator(folder: Path, answers: Path, family: ProcessFamily) -> Iterator[str]:
    """The local SiliconFlow as a process of its own; its base URL."""
    port_file, log_file = folder / "emulator.url", folder / "emulator.log"
    command = [sys.executable, "-m", "airflow_provider_siliconflow.emulator"]
    command += ["--port", "0", "--port-file", str(port_file), "--answers", str(answers)]
    # About ten seconds for the forty rows: long enough to watch, short enough to wait for.
    command += ["--queue-seconds", "2", "--rows-per-second", "6", "--finalizing-seconds", "1"]
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            command,
            env=os.environ | family.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 30
        while not port_file.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise DemoError(f"the emulator did not start:\n{tail(log_file.read_text())}")
            time.sleep(0.1)
        yield port_file.read_text().strip()
    finally:
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def tail(text: str, lines: int = 30) -> str:
    return "\n".join(text.splitlines()[-lines:])


def batch_line(base_url: str, key: str, batch_id: str) -> str | None:
    """One line on how far the batch is, as the service tells it."""
    request = urllib.request.Request(
        f"{base_url}/batches/{batch_id}", headers={"Authorization": f"Bearer {key}"}
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            batch: Mapping[str, Any] = json.load(answer)
    except OSError:
        return None
    counts = batch.get("request_counts") or {}
    line = f"batch {batch_id}: {batch.get('status')}"
    if counts.get("total"):
        line += f", {counts.get('completed', 0)} of {counts['total']} rows done"
    return line


def follow(airflow: LiveAirflow, run_id: str, base_url: str, key: str) -> str:
    """Print what changes until the run has ended; its final state."""
    started = time.monotonic()
    shown: dict[str, str | None] = {}

    def say(text: str) -> None:
        print(f"  {time.monotonic() - started:5.1f} s  {text}", flush=True)

    while True:
        # Before the tasks, so that the last change of a task is still shown.
        state = airflow.run_state(DAG_ID, run_id)
        for task, task_state in airflow.task_states(DAG_ID, run_id).items():
            if task_state and shown.get(task) != task_state:
                shown[task] = task_state
                waits = " (no worker in use)" if task_state == "deferred" else ""
                say(f"task {task}: {task_state}{waits}")
        batch_id = airflow.xcom(DAG_ID, run_id, "create")
        if batch_id and shown.get("batch") != (line := batch_line(base_url, key, batch_id)) and line:
            shown["batch"] = line
            say(line)
        if state in ("success", "failed"):
            return state
        if dead := [part for part in airflow.components.values() if part.died]:
            raise DemoError(f"{dead[0].name} died; the end of its log:\n{dead[0].tail()}")
        if time.monotonic() - started > RUN_TIMEOUT:
            raise DemoError(f"the run has not ended after {RUN_TIMEOUT:.0f} s: {shown}")
        time.sleep(0.5)


def explain_failure(airflow: LiveAirflow, run_id: str) -> None:
    from scripts.live_airflow import readable_log

    for task in airflow.tasks(DAG_ID, run_id):
        if task.state == "failed":
            log = readable_log(airflow.task_log(DAG_ID, run_id, task.task_id, task.map_index))
            print(f"\nTask {task.task_id} failed; the end of its log:\n{tail(log)}", file=sys.stderr)


def show_results(results: Path) -> None:
    """A table of the first rows and a line of totals."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    rows = [json.loads(line) for line in (results / "results.jsonl").read_text().splitlines()]
    table = Table("row", "answer", "expected", "tokens", box=box.SIMPLE)
    right = tokens = 0
    for number, row in enumerate(rows):
        body = ((row.get("response") or {}).get("body")) or {}
        choices = body.get("choices") or [{}]
        answer = str((choices[0].get("message") or {}).get("content") or row.get("error") or "")
        used = int((body.get("usage") or {}).get("total_tokens") or 0)
        expected = CAPITALS.get(str(row.get("custom_id")), "")
        right += expected.lower() in answer.lower()
        tokens += used
        if number < 10:
            # The models think aloud first; what they answer stands last.
            shown = " ".join(answer.split())
            shown = shown if len(shown) <= 36 else f"... {shown[-32:]}"
            table.add_row(str(row.get("custom_id")), shown, expected, str(used))
    # Without a terminal rich guesses 80 columns, which is enough for this table.
    Console().print(table)
    if len(rows) > 10:
        print(f"  ... and {len(rows) - 10} more")
    print(
        f"{len(rows)} of {len(CAPITALS)} rows answered, {right} correctly (the model is made up), {tokens} tokens."
    )


def run() -> int:
    from scripts.live_airflow import LiveAirflow, LiveAirflowError, ProcessFamily

    started = time.monotonic()
    work, results = FOLDER / "run", FOLDER / "results"
    for folder in (work, results):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    requests, answers = write_input(work)
    try:
        with contextlib.ExitStack() as stack:
            family = stack.enter_context(ProcessFamily())
            base_url = stack.enter_context(emulator(work, answers, family))
            print(f"Local SiliconFlow listens on {base_url}.", flush=True)
            key = "sk-demo"
            connection = {"conn_type": "siliconflow", "password": key, "host": base_url}
            print("Starting Airflow: api-server, scheduler, dag-processor, triggerer ...", flush=True)
            airflow = stack.enter_context(
                LiveAirflow(
                    work / "airflow",
                    ROOT / "example_dags",
                    env={"AIRFLOW_CONN_SILICONFLOW_DEFAULT": json.dumps(connection)},
                )
            )
            print(
                f"Airflow {airflow.version} is up ({time.monotonic() - started:.0f} s): {airflow.url}",
                flush=True,
            )
            conf = {
                "input_path": str(requests),
                "output_dir": str(results),
                "model": MODEL,
                "poll_interval": 1,
            }
            run_id = airflow.trigger(DAG_ID, conf=conf)
            print(f"Running {DAG_ID} on {len(CAPITALS)} questions with {MODEL}:", flush=True)
            state = follow(airflow, run_id, base_url, key)
            if state != "success":
                explain_failure(airflow, run_id)
                print(f"\nThe run ended as {state}. Everything is logged below {work}.", file=sys.stderr)
                return 1
            manifest = airflow.xcom(DAG_ID, run_id, "download")
    except LiveAirflowError as error:
        raise DemoError(str(error)) from None
    show_results(results)
    print("\nEverything is stopped. What the DAG wrote:")
    for path in sorted(results.rglob("*")):
        if path.is_file():
            print(f"  {path.relative_to(ROOT)}  ({path.stat().st_size:,} bytes)")
    if manifest is None:
        print("  (the download task returned no manifest)")
    print(f"Logs: {work.relative_to(ROOT)}/airflow. Took {time.monotonic() - started:.0f} s.")
    return 0


def main() -> int:
    # A `kill` must clean up like a Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if not os.environ.get(_INSIDE):
            prepare()
        return run()
    except DemoError as error:
        print(f"\nThe demo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped; nothing is left running.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
