"""
A whole job, from rows to results: wall time, CPU and peak RSS, compared with the same job in stdlib json and a dict.

    python benchmarks/whole_job.py --rows 100000 --models 2 --live

Both sides read the same file, split it into shards of 5,000 rows, upload each shard once, run it over every model,
wait, download the results and write those of each model in input order. Our side also checks every row, survives a
crash at any point and reports the outcome of every row. The service is the package's emulator in a separate process
with an accelerated clock. Waiting takes almost no time, and the emulator takes most of the wall time of both sides, so
compare the CPU seconds.

`--live` also runs the job as a `RunBatchOperator` on a live Airflow (scheduler, worker, triggerer) and reports the peak
RSS of its worker next to that of an empty task, which is Airflow's own share.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SHARD_ROWS = 5000


def write_input(path: Path, rows: int, chars: int) -> None:
    text = ('The quick brown fox jumps over the "lazy" dog.\n' * (chars // 47 + 1))[:chars]
    with path.open("w", encoding="utf-8") as out:
        for row in range(rows):
            messages = [{"role": "user", "content": f"{row} {text}"}]
            body = {"model": "unset", "messages": messages, "max_tokens": 64}
            line = {
                "custom_id": f"request-{row}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": body,
            }
            out.write(json.dumps(line) + "\n")


# The sides --------------------------------------------------------------------------------------------------


def make_run(client: Any, out: Path, models: list[str], **changes: Any) -> Any:
    """
    Return a job of a task's first try.

    :param changes: options that differ from the defaults.
    """
    from airflow_provider_siliconflow.jobs.identity import Submitter
    from airflow_provider_siliconflow.jobs.ledger import Owner
    from airflow_provider_siliconflow.jobs.opening import JobTry
    from airflow_provider_siliconflow.jobs.options import check_options
    from airflow_provider_siliconflow.jobs.run import BatchRun
    from airflow_provider_siliconflow.jobs.submission import Submission

    options: dict[str, Any] = {
        "model": None,
        "models": models,
        "completion_window": "24h",
        "metadata": None,
        "max_rows_per_batch": SHARD_ROWS,
        "max_bytes_per_batch": 10**9,
        "max_in_flight": None,
        "max_row_attempts": 1,
        "max_error_rate": None,
        "prices": None,
        "request_params": None,
    }
    submitter = Submitter("dag", "run", "task", -1, 0)
    return BatchRun(
        JobTry(
            options=check_options(**options | changes),
            submitter=submitter,
            client=client,
            conn_id="siliconflow_default",
            output_dir=out,
            open_submission=lambda ledger: Submission(client, ledger=ledger, earlier_tries="none", since=0.0),
            earlier_tries=False,
            owner=Owner.new(submitter, try_number=1),
            cancel_on_kill=True,
        )
    )


def ours(source: Path, out: Path, url: str, models: list[str]) -> dict[str, int]:
    from airflow_provider_siliconflow.api.client import SiliconFlowClient
    from airflow_provider_siliconflow.api.settings import ClientSettings

    with SiliconFlowClient(ClientSettings("sk-emulator", url)) as client:
        run = make_run(client, out, models)
        wait = run.start(lambda: source, source.name, timeout=None)
        while wait is not None:
            wait = run.resume(wait_for_all(list(wait.batch_ids), client.get_batch))
        manifest = run.finish()
    return {"rows": manifest["rows"]["total"], "ok": manifest["rows"]["ok"]}


def stdlib(source: Path, out: Path, url: str, models: list[str]) -> dict[str, int]:
    import requests

    session = requests.Session()
    session.headers["Authorization"] = "Bearer sk-emulator"

    def answer(method: str, path: str, **arguments: Any) -> Any:
        found = session.request(method, f"{url}{path}", timeout=600, **arguments)
        found.raise_for_status()
        return found.json()

    with source.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    batches: list[tuple[str, str]] = []
    for first in range(0, len(rows), SHARD_ROWS):
        data = "".join(json.dumps(row) + "\n" for row in rows[first : first + SHARD_ROWS]).encode()
        file = answer("POST", "/files", data={"purpose": "batch"}, files={"file": ("shard.jsonl", data)})
        for model in models:
            request = {
                "input_file_id": file["data"]["id"],
                "endpoint": "/v1/chat/completions",
                "completion_window": "24h",
                "replace": {"model": model},
            }
            batches.append((model, answer("POST", "/batches", json=request)["id"]))
    wait_for_all([batch_id for _, batch_id in batches], lambda one: Ended(answer("GET", f"/batches/{one}")))
    results: dict[tuple[str, str], dict[str, Any]] = {}
    for model, batch_id in batches:
        batch = answer("GET", f"/batches/{batch_id}")
        for name in ("output_file_id", "error_file_id"):
            if batch[name]:
                for line in requests.get(batch[name], timeout=600).content.splitlines():
                    result = json.loads(line)
                    results[model, result["custom_id"]] = result
    ok = 0
    for model in models:
        folder = out / model.replace("/", "--")
        folder.mkdir()
        with (folder / "results.jsonl").open("w", encoding="utf-8") as file:
            for row in rows:
                result = results[model, row["custom_id"]]
                ok += not result["error"]
                file.write(json.dumps(result, ensure_ascii=False) + "\n")
    return {"rows": len(results), "ok": ok}


class Ended:
    """The part of a response that shows whether a batch has ended."""

    def __init__(self, batch: dict[str, Any]) -> None:
        self.is_terminal = batch["status"] in ("completed", "failed", "expired", "cancelled")


def wait_for_all(batch_ids: list[str], read: Any) -> list[Any]:
    """Wait as both sides do: poll each open batch every half a second."""
    ended = []
    while batch_ids:
        polled = [(batch_id, read(batch_id)) for batch_id in batch_ids]
        ended += [batch for _, batch in polled if batch.is_terminal]
        batch_ids = [batch_id for batch_id, batch in polled if not batch.is_terminal]
        if batch_ids:
            time.sleep(0.5)
    return ended


SIDES = {"ours": ours, "json and a dict": stdlib}

# Measuring --------------------------------------------------------------------------------------------------


def run_side(name: str, source: Path, out: Path, url: str, models: list[str]) -> dict[str, Any]:
    import requests  # noqa: F401

    import airflow_provider_siliconflow.jobs.run  # noqa: F401

    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu = time.perf_counter(), time.process_time()
    counts = SIDES[name](source, out, url, models)
    return {
        "seconds": time.perf_counter() - start,
        "cpu": time.process_time() - cpu,
        "rss": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024,
        "counts": counts,
    }


@contextlib.contextmanager
def emulator(folder: Path, models: list[str], *options: str) -> Iterator[str]:
    """Run an emulator in a separate process and yield its base URL."""
    port_file = folder / "url"
    command = [sys.executable, "-m", "airflow_provider_siliconflow.emulator", "--port", "0", "--quiet"]
    command += ["--port-file", str(port_file), "--speed", "1000000", *options]
    for model in models:
        command += ["--model", f"{model}=1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while not port_file.exists() or not (url := port_file.read_text().strip()):
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()
        port_file.unlink(missing_ok=True)


def measure(name: str, source: Path, folder: Path, models: list[str]) -> dict[str, Any]:
    with emulator(folder, models) as url, tempfile.TemporaryDirectory(dir=folder) as out:
        command = [sys.executable, __file__, "--run", name, "--url", url]
        command += ["--source", str(source), "--out", out, "--models", str(len(models))]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


# Live -------------------------------------------------------------------------------------------------------

LIVE_DAG = """
import json
from datetime import datetime

from airflow.sdk import DAG, BaseOperator
from airflow_provider_siliconflow.operators.batch import RunBatchOperator


def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))


def measured(name, run):
    with open(PEAKS, "a") as out:
        out.write(json.dumps([name+" starts", peak()]) + "\\n")
    try:
        return run()
    finally:
        with open(PEAKS, "a") as out:
            out.write(json.dumps([name, peak()]) + "\\n")


class Nothing(BaseOperator):
    def execute(self, context):
        return measured("airflow", lambda: None)


class Job(RunBatchOperator):
    def execute(self, context):
        return measured("submit", lambda: super(Job, self).execute(context))

    def execute_complete(self, context, event=None):
        return measured("collect", lambda: super(Job, self).execute_complete(context, event))


with DAG("job", start_date=datetime(2026, 1, 1), schedule=None, catchup=False):
    Nothing(task_id="nothing") >> Job(
        task_id="job", requests=SOURCE, output_dir=OUT, models=MODELS, deferrable=True, poll_interval=1
    )
"""


def run_live(source: Path, folder: Path, models: list[str]) -> dict[str, Any]:
    """Run the job on a live Airflow; return the seconds and the peak RSS in MiB of each of its processes."""
    sys.path.insert(0, str(ROOT))
    from scripts.live_airflow import LiveAirflow

    dags, peaks, out = folder / "dags", folder / "peaks", folder / "live"
    dags.mkdir()
    names = {"SOURCE": str(source), "OUT": str(out), "MODELS": models, "PEAKS": str(peaks)}
    header = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    (dags / "job.py").write_text(header + LIVE_DAG)
    with emulator(folder, models) as url:
        connection = json.dumps({"conn_type": "siliconflow", "host": url, "password": "sk-emulator"})
        env = {"AIRFLOW_CONN_SILICONFLOW_DEFAULT": connection}
        with LiveAirflow(folder / "airflow", dags, env=env) as airflow:
            run_id = airflow.trigger("job")
            airflow.wait_for_task("job", run_id, "nothing", timeout=120)
            start = time.perf_counter()
            state, triggers = None, 0
            while state not in ("success", "failed"):
                time.sleep(0.5)
                state = airflow.run_state("job", run_id)
                triggers = max(triggers, len(airflow.trigger_rows()))
            seconds = time.perf_counter() - start
            if state != "success":
                raise SystemExit(f"the live job failed:\n{airflow.task_log('job', run_id, 'job')}")
            rows = airflow.xcom("job", run_id, "job", "return_value")["rows"]
    found: dict[str, float] = {}
    for line in peaks.read_text().splitlines():
        name, value = json.loads(line)
        found[name] = max(value, found.get(name, 0.0))
    return {"seconds": seconds, "triggers": triggers, "peaks": found, "counts": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--chars", type=int, default=300, help="characters of each prompt")
    parser.add_argument("--models", type=int, default=2)
    parser.add_argument("--folder", help="folder for the files (default: the temporary folder)")
    parser.add_argument("--only", choices=SIDES)
    parser.add_argument("--live", action="store_true", help="also run our side on a live Airflow")
    parser.add_argument("--run", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    options = parser.parse_args()
    models = [f"benchmark/model-{number}" for number in range(options.models)]
    if options.run:
        print(json.dumps(run_side(options.run, options.source, options.out, options.url, models)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as parent:
        folder = Path(parent)
        source = folder / "requests.jsonl"
        write_input(source, options.rows, options.chars)
        print(f"{options.rows:,} rows, {source.stat().st_size / 1e6:,.0f} MB, over {options.models} models")
        found = {}
        for name in SIDES:
            if options.only in (None, name):
                run = found[name] = measure(name, source, folder, models)
                print(
                    f"{name:16} {run['seconds']:7.1f} s wall time, {run['cpu']:7.1f} CPU seconds, "
                    f"peak RSS {run['rss']:7.1f} MiB over the imports, {run['counts']['rows']:,} results"
                )
        if options.live:
            live = run_live(source, folder, models)
            peaks = ", ".join(f"{name} {peak:.1f}" for name, peak in live["peaks"].items())
            print(
                f"{'on live Airflow':16} {live['seconds']:7.1f} s wall time, {live['triggers']} trigger, peak RSS, "
                f"MiB: {peaks} (goal: below 150); {live['counts']['ok']:,} of {live['counts']['total']:,} rows ok"
            )
    if len(found) > 1:
        first, second = found.values()
        if first["counts"] != second["counts"]:
            raise SystemExit(f"the sides disagree: {first['counts']} and {second['counts']}")
        print(
            f"ratios: {second['cpu'] / first['cpu']:.1f}x by CPU, {second['seconds'] / first['seconds']:.1f}x by wall "
            f"time, {second['rss'] / max(first['rss'], 0.1):.1f}x by memory"
        )


if __name__ == "__main__":
    main()
