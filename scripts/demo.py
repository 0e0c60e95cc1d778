"""`make demo`: a nightly evaluation on a real Airflow, against a local SiliconFlow.

Creates an environment below .demo/, starts the emulator and Airflow, runs `siliconflow_nightly_evaluation` for two
nights with progress output, prints the leaderboard and stops everything. In the second night the service answers only
one model in time, and the other one is asked live. Each further run adds nights to the same leaderboard. The exit
status is 0 only if every night succeeded.
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
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    from rich.console import Console

    from example_dags.evaluation.leaderboard import Night
    from scripts.live_airflow import LiveAirflow, ProcessFamily

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".demo"
EVALUATION = FOLDER / "evaluation"
QUESTIONS = ROOT / "example_dags" / "data" / "questions.jsonl"
JUDGE_ANSWERS = ROOT / "example_dags" / "data" / "judge_answers.jsonl"
DAG_ID = "siliconflow_nightly_evaluation"
KEY = "sk-demo"
NIGHTS = 2
FIRST_NIGHT = datetime(2026, 1, 1, tzinfo=UTC)
NIGHT_TIMEOUT = 180.0
#: Seconds until the results of the second night are wanted.
RESULTS_IN = 12

# The default models of the DAG, which has their prices, and the share of questions that each answers correctly.
SKILLS = {
    "deepseek-ai/DeepSeek-R1": 0.93,
    "deepseek-ai/DeepSeek-V3": 0.88,
}
# Judges the answers of the others; the share of verdicts that it gets right.
JUDGE, JUDGE_SKILL = "Qwen/Qwen3-235B-A22B", 0.85
JUDGE_PRICE = {"prompt": 1.25, "completion": 5.0, "live": {"prompt": 2.5, "completion": 10.0}}
NOTE = "Produced by a local emulator: the model names are real, the answers are made up."

# Set in the second process, which runs in the demo's own environment.
_INSIDE = "SILICONFLOW_DEMO_INSIDE"


class DemoError(Exception):
    """The demo cannot continue. The message is shown to the user."""


def prepare() -> None:
    """Create the environment and restart the demo in it. Does not return."""
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


@contextlib.contextmanager
def emulator(folder: Path, family: ProcessFamily) -> Iterator[str]:
    """Run the local SiliconFlow in a separate process and yield its base URL."""
    port_file, log_file = folder / "emulator.url", folder / "emulator.log"
    answers = folder / "answers.jsonl"
    answers.write_bytes(QUESTIONS.read_bytes() + JUDGE_ANSWERS.read_bytes())
    command = [sys.executable, "-m", "airflow_provider_siliconflow.emulator"]
    command += ["--port", "0", "--port-file", str(port_file), "--answers", str(answers)]
    for model, skill in (SKILLS | {JUDGE: JUDGE_SKILL}).items():
        command += ["--model", f"{model}={skill}"]
    # A batch takes a few seconds: long enough to watch, short enough to wait for.
    command += ["--queue-seconds", "1", "--rows-per-second", "120", "--finalizing-seconds", "0.5"]
    # Some rows fail at first, as on the real service. The DAG sends them again.
    command += ["--row-error-rate", "0.05"]
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


class Progress:
    """Shows the progress of a night: a line per change and, on a terminal, a bar over the rows of its batches."""

    # Other states are too short-lived to be worth a line.
    _SHOWN_STATES = frozenset({"deferred", "success", "failed", "skipped", "upstream_failed", "up_for_retry"})

    def __init__(self, console: Console, base_url: str) -> None:
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bars

        self._console = console
        self.base_url = base_url
        self._started = time.monotonic()
        self._shown: dict[str, str] = {}
        self._shown_done = 0
        self._before: frozenset[str] | None = None
        self._answered_live = 0
        columns = [
            TextColumn("           {task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f} of {task.total:.0f} rows"),
        ]
        self._bars = Bars(*columns, console=console, transient=True) if console.is_terminal else None
        self._bar: Any = None

    def __enter__(self) -> Progress:
        self._before = frozenset(batch["id"] for batch in self._batches())
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def show(self, text: str) -> None:
        self._console.print(
            f"  {time.monotonic() - self._started:5.1f} s  {text}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

    def tasks(self, states: dict[str, str | None]) -> None:
        for task, state in states.items():
            if state in self._SHOWN_STATES and self._shown.get(task) != state:
                self._shown[task] = state
                self.show(
                    f"task {task}: {state}{' (waits without a worker slot)' if state == 'deferred' else ''}"
                )

    def live(self) -> None:
        """Show the rows that were asked live, if any were."""
        figures = control(self.base_url, "live")
        answered = figures["answered"]
        # At the start, at the end, and now and then.
        if answered >= self._answered_live + 200 or (answered > self._answered_live and not figures["open"]):
            self._answered_live = answered
            self.show(f"{answered:,} rows answered live, one by one")

    def rows(self) -> None:
        """Show the row counts that the service reports for this night's batches."""
        batches = [batch for batch in self._batches() if batch["id"] not in (self._before or ())]
        counts = [batch.get("request_counts") or {} for batch in batches]
        total = sum(count.get("total", 0) for count in counts)
        done = sum(count.get("completed", 0) + count.get("failed", 0) for count in counts)
        if not total:
            return
        name = f"{len(batches)} batches"
        if self._bars is None:
            if done - self._shown_done >= total / 4 or (done == total and done > self._shown_done):
                self._shown_done = done
                self.show(f"{name}: {done:,} of {total:,} rows done")
        elif self._bar is None:
            self._bar = self._bars.add_task(name, total=total, completed=done)
        else:
            self._bars.update(self._bar, description=name, total=total, completed=done)

    def _batches(self) -> list[dict[str, Any]]:
        request = urllib.request.Request(
            f"{self.base_url}/batches?limit=100", headers={"Authorization": f"Bearer {KEY}"}
        )
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                found: list[dict[str, Any]] = json.load(answer)["data"]
        except OSError:
            return []
        return found


def next_nights() -> list[datetime]:
    """Return the nights to evaluate: those after the last one on the leaderboard."""
    from example_dags.evaluation.leaderboard import read_history

    kept = read_history(EVALUATION)
    first = datetime.fromisoformat(kept[-1].date) + timedelta(days=1) if kept else FIRST_NIGHT
    return [first + timedelta(days=number) for number in range(NIGHTS)]


def night_folder(night: datetime) -> Path:
    """Return the folder in which the DAG stores a night."""
    return EVALUATION / f"{night:%Y-%m-%dT%H%M%S}"


def demo_prices() -> dict[str, dict[str, Any]]:
    """Return the DAG's own prices, and that of the judge."""
    from example_dags.siliconflow_nightly_evaluation import PRICES

    return PRICES | {JUDGE: JUDGE_PRICE}


def control(base_url: str, call: str, **changes: Any) -> dict[str, Any]:
    """Make a control call to the emulator, and return its answer."""
    data = json.dumps(changes).encode() if changes else None
    request = urllib.request.Request(
        f"{base_url.removesuffix('/v1')}/_emulator/{call}",
        data=data,
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=5) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def keep_waiting(base_url: str) -> None:
    """Let the service be so busy from now on that no batch begins."""
    control(base_url, "config", queue_seconds=86_400)


def end_one_batch(base_url: str) -> bool:
    """Let one of the batches that are waiting end after all; return whether there was one for each model."""
    waiting = [each for each in control(base_url, "state")["batches"] if each["status"] == "in_queue"]
    if len(waiting) < len(SKILLS):
        return False
    control(base_url, f"batches/{waiting[0]['id']}/status", status="completed")
    return True


def start_night(airflow: LiveAirflow, night: datetime, *, is_late: bool) -> str:
    """
    Start the DAG for a night and return the run id.

    :param is_late: whether the results are wanted before the batches are done.
    """
    deadline = time.monotonic() + 60
    while not airflow.query("select 1 from serialized_dag where dag_id = ?", (DAG_ID,)):
        if time.monotonic() > deadline:
            errors = airflow.query("select filename, stacktrace from import_error")
            reasons = "; ".join(f"{name}: {tail(trace or '', 10)}" for name, trace in errors)
            raise DemoError(f"Airflow did not find the DAG {DAG_ID}: {reasons or 'no import errors'}")
        time.sleep(0.5)
    # Few enough tokens that the longest answers are cut: the leaderboard shows how many.
    conf = {
        "max_tokens": 16,
        "models": list(SKILLS),
        # Once is enough to see it, and each time takes a batch.
        "judge_model": JUDGE if is_late else None,
        "note": NOTE,
        # Another seed makes the emulated models answer differently, by chance.
        "seed": (night - FIRST_NIGHT).days,
        # Chance may look like a drop now and then. That would show the gate, and must not end the demo.
        "gate": "skip",
        "prices": demo_prices(),
    }
    if is_late:
        conf["results_by"] = (datetime.now(UTC) + timedelta(seconds=RESULTS_IN)).isoformat()
    run_id = f"night-{night:%Y-%m-%d}"
    body = {"dag_run_id": run_id, "logical_date": night.isoformat(), "conf": conf}
    airflow.api("POST", f"/dags/{quote(DAG_ID)}/dagRuns", body)
    return run_id


def follow(airflow: LiveAirflow, run_id: str, progress: Progress, *, is_late: bool) -> str:
    """Show changes until the run has ended and return its final state."""
    started = time.monotonic()
    while True:
        if is_late and end_one_batch(progress.base_url):
            is_late = False
            progress.show(
                f"the service ends one batch and lets the other wait; results are wanted after {RESULTS_IN} s"
            )
        # Read before the tasks, so that the last change of a task is still shown.
        state = airflow.run_state(DAG_ID, run_id)
        tasks = airflow.task_states(DAG_ID, run_id)
        progress.tasks(tasks)
        progress.rows()
        progress.live()
        if state in ("success", "failed"):
            return state
        if "up_for_retry" in tasks.values():
            # Nothing here is transient: a retry would only delay the error.
            return "failed"
        if dead := [part for part in airflow.components.values() if part.died]:
            raise DemoError(f"{dead[0].name} died. The end of its log:\n{dead[0].tail()}")
        if time.monotonic() - started > NIGHT_TIMEOUT:
            raise DemoError(f"the run did not end within {NIGHT_TIMEOUT:.0f} s: {tasks}")
        time.sleep(0.4)


def explain_failure(airflow: LiveAirflow, run_id: str) -> None:
    from scripts.live_airflow import readable_log

    for task in airflow.tasks(DAG_ID, run_id):
        if task.state in ("failed", "up_for_retry"):
            log = readable_log(airflow.task_log(DAG_ID, run_id, task.task_id, task.map_index))
            print(f"\nTask {task.task_id} failed. The end of its log:\n{tail(log)}", file=sys.stderr)


def show_leaderboard(console: Console, night: Night) -> None:
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE,
        collapse_padding=True,
        pad_edge=False,
        title=f"Leaderboard, night of {night.date[:10]}",
        title_justify="left",
    )
    table.add_column("")
    table.add_column("model")
    for name in ("accuracy", "95 %", "changed", "judge", "CNY", "tokens", "resent"):
        table.add_column(name, justify="right")
    for rank, each in enumerate(night.ranked, 1):
        low, high = each.score.interval
        change = night.comparison(each.model)
        judged = night.judge.score(each.model) if night.judge else None
        table.add_row(
            str(rank),
            each.model.rpartition("/")[2],
            f"{each.score.accuracy:.1%}",
            f"{low * 100:.0f}–{high:.0%}",
            "" if change is None or change.why_not else f"+{change.better_count} −{change.worse_count}",
            "" if judged is None or judged.agreement is None else f"{judged.agreement:.1%}",
            "" if each.cost is None else f"{each.cost:.4f}",
            f"{each.tokens:,}",
            str(each.resent),
        )
    console.print(table)
    console.print(
        "changed: questions that became better and worse since the last night; judge: agrees with the key.",
        highlight=False,
        soft_wrap=True,
    )


def run() -> int:
    from rich.console import Console

    from example_dags.evaluation.leaderboard import PAGE_FILE, read_history
    from scripts.live_airflow import LiveAirflow, LiveAirflowError, ProcessFamily

    started = time.monotonic()
    console = Console()
    work = FOLDER / "run"
    shutil.rmtree(work, ignore_errors=True)
    for folder in (work, EVALUATION):
        folder.mkdir(parents=True, exist_ok=True)
    nights = next_nights()
    for night in nights:
        # Files of a failed demo refer to batches of an emulator that no longer exists.
        shutil.rmtree(night_folder(night), ignore_errors=True)
    try:
        with contextlib.ExitStack() as stack:
            family = stack.enter_context(ProcessFamily())
            base_url = stack.enter_context(emulator(work, family))
            print(f"The local SiliconFlow listens on {base_url}.", flush=True)
            connection = {"conn_type": "siliconflow", "password": KEY, "host": base_url}
            print("Starting Airflow: api-server, scheduler, dag-processor, triggerer ...", flush=True)
            airflow = stack.enter_context(
                LiveAirflow(
                    work / "airflow",
                    ROOT / "example_dags",
                    env={
                        "AIRFLOW_CONN_SILICONFLOW_DEFAULT": json.dumps(connection),
                        "AIRFLOW_VAR_SILICONFLOW_EVALUATION_DIR": str(EVALUATION),
                        "SILICONFLOW_POLL_SECONDS": "1",
                        # Run only the nights that are started here, not the DAG's own schedule.
                        "AIRFLOW__SCHEDULER__USE_JOB_SCHEDULE": "False",
                    },
                )
            )
            print(
                f"Airflow {airflow.version} is up ({time.monotonic() - started:.0f} s): {airflow.url}",
                flush=True,
            )
            questions = sum(1 for line in QUESTIONS.read_text().splitlines() if line.strip())
            for night in nights:
                is_late = night == nights[-1]
                print(
                    f"Night of {night:%Y-%m-%d}: {questions} questions for {len(SKILLS)} models, one upload"
                    + (", finished live since the batches are slow" if is_late else ""),
                    flush=True,
                )
                if is_late:
                    keep_waiting(base_url)
                with Progress(console, base_url) as progress:
                    run_id = start_night(airflow, night, is_late=is_late)
                    state = follow(airflow, run_id, progress, is_late=is_late)
                if state != "success":
                    explain_failure(airflow, run_id)
                    print(f"\nThe run failed. The logs are in {work}.", file=sys.stderr)
                    return 1
    except LiveAirflowError as error:
        raise DemoError(str(error)) from None
    kept = read_history(EVALUATION)
    print()
    show_leaderboard(console, kept[-1])
    print(NOTE)
    print(f"\nOpen the leaderboard ({len(kept)} nights so far): {(EVALUATION / PAGE_FILE).as_uri()}")
    print(f"Requests, results and manifests are in {EVALUATION.relative_to(ROOT)}/<night>/:")
    for path in sorted(night_folder(nights[-1]).rglob("*")):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(EVALUATION).parts):
            print(f"  {path.relative_to(EVALUATION)}  ({path.stat().st_size:,} bytes)")
    print(
        f"Everything is stopped. The logs are in {work.relative_to(ROOT)}/airflow. "
        f"Took {time.monotonic() - started:.0f} s."
    )
    return 0


def main() -> int:
    # A `kill` must clean up like Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if not os.environ.get(_INSIDE):
            prepare()
        return run()
    except DemoError as error:
        print(f"\nThe demo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. Nothing is left running.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
