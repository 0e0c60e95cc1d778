"""Jobs that wait on the cluster: started, watched, and looked at in the end."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from tests.cluster.bill import ENDED, Bill, bill_of

if TYPE_CHECKING:
    from airflow_provider_siliconflow.emulator.server import Emulator
    from scripts.live_airflow.cluster import LiveCluster

T = TypeVar("T")

KEY = "sk-clustertest3Hq8wXz1Lp6R"

#: A row takes 50 seconds, and a batch of 20 some 17 minutes: a part of its rows is done, and billed, whatever is
#: done to it.
WALKING_PACE = {"speed": 1.0, "queue_seconds": 0.0, "rows_per_second": 0.02, "cancelling_seconds": 2.0}

#: Seconds between polls, in turn: the default, at which a triggerer that comes back finds no wait due, and a quick one,
#: at which it polls at once.
POLL_INTERVALS = (60.0, 5.0)


class OpenAccount(Protocol):
    def __call__(self, name: str, **settings: object) -> Emulator: ...


class Jobs:
    """
    One run of a DAG of `cluster_jobs`, over an account of its own.

    :param rows: per job.
    """

    def __init__(
        self,
        cluster: LiveCluster,
        open_account: OpenAccount,
        folder: Path,
        dag_id: str,
        number: int,
        *,
        rows: int,
        poll_interval: float = 5.0,
        **settings: object,
    ) -> None:
        self.cluster, self.folder, self.dag_id = cluster, folder, dag_id
        self.names = [f"job-{index}" for index in range(number)]
        self.rows = {name: [f"{name}.{row}" for row in range(rows)] for name in self.names}
        for name, custom_ids in self.rows.items():
            lines = (
                {"custom_id": one, "messages": [{"role": "user", "content": f"What is {one}?"}]}
                for one in custom_ids
            )
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        account = f"account-{secrets.token_hex(4)}"
        self.emulator = open_account(account, **WALKING_PACE | settings)
        conf = {"folder": str(folder), "conn_id": account, "poll_interval": poll_interval}
        self.run_id = cluster.trigger(dag_id, conf=conf)

    # Watching ---------------------------------------------------------------------------------------------

    def batches(self, job: str | None = None) -> list[dict[str, Any]]:
        """All batches of the account, or those of a job, oldest first."""
        label = f"{self.dag_id}/{job}/{self.run_id}"
        found = self.emulator.service.state()["batches"]
        return [one for one in found if job is None or (one["metadata"] or {}).get("airflow_task") == label]

    def open_batches(self, job: str | None = None) -> list[dict[str, Any]]:
        return [one for one in self.batches(job) if one["status"] not in ENDED]

    def states(self) -> dict[str, str | None]:
        return self.cluster.task_states(self.dag_id, self.run_id)

    def awake(self, jobs: Collection[str]) -> list[str]:
        """Which of these jobs are between two waits."""
        states = self.states()
        return [job for job in jobs if states[job] in ("scheduled", "queued", "running")]

    def cancellations(self) -> list[float]:
        """When (epoch seconds) the account was asked to cancel a batch."""
        asked = self.emulator.requests
        return [one.at for one in asked if one.method == "POST" and one.route == "/batches/*/cancel"]

    def wait_until_waiting(self) -> None:
        """Wait until every job is deferred, its batches are polled, and each of them has done some rows."""
        self.cluster.wait_until_deferred(self.dag_id, self.run_id, len(self.names))
        self.emulator.service.advance(110)
        since = len(self.emulator.requests)
        waiting = {f"/v1/batches/{one['id']}" for one in self.open_batches()}
        eventually(lambda: waiting <= {one.path for one in self.emulator.requests[since:]}, timeout=120)

    def hurry(self) -> None:
        """Let every batch end soon."""
        self.emulator.service.configure({"speed": 500.0, "rows_per_second": 50.0, "queue_seconds": 1.0})

    def end_batch(self, job: str) -> None:
        """End one open batch of a job, if it has one, with every row of it answered."""
        for batch in self.open_batches(job)[:1]:
            self.emulator.service.force_status(batch["id"], "completed")

    def finish(self, timeout: float = 600) -> str:
        """Let the run go to its end; the state of it."""
        self.hurry()
        return self.cluster.wait_for_run(self.dag_id, self.run_id, timeout=timeout)

    # In the end -------------------------------------------------------------------------------------------

    def bill(self) -> Bill:
        """The account's bill once every batch has ended."""
        eventually(lambda: not bill_of(self.emulator).unended, timeout=120)
        return bill_of(self.emulator)

    def incomplete(self) -> dict[str, str]:
        """Jobs whose results are not whole and in the order of the rows, and why."""
        found = {}
        for name, custom_ids in self.rows.items():
            folder = self.folder / name
            try:
                lines = (folder / "results.jsonl").read_text().splitlines()
                manifest = json.loads((folder / "manifest.json").read_text())
            except OSError as error:
                found[name] = str(error)
                continue
            got = [json.loads(line)["custom_id"] for line in lines]
            if got != custom_ids:
                found[name] = f"{len(got)} results for {len(custom_ids)} rows"
            elif manifest["rows"]["ok"] != len(custom_ids):
                found[name] = f"the manifest says {manifest['rows']}"
        return found

    def left_behind(self) -> list[str]:
        """Folders that jobs keep while they run, and remove when they have ended."""
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.glob("*/.siliconflow/*"))

    def check(self, state: str, report: dict[str, object]) -> None:
        """
        Check that the run went as if nothing had happened to it; what there is to measure goes into the report.

        :param state: the run's.
        """
        bill, incomplete, left_behind = self.bill(), self.incomplete(), self.left_behind()
        report |= bill.as_dict() | {"run": state, "incomplete": incomplete, "left_behind": left_behind}
        hurt = [name for name in self.names if any(one["id"] in bill.cancelled for one in self.batches(name))]
        assert bill.is_clean, f"{bill}\n{self.log(hurt[0]) if hurt else ''}"
        assert not incomplete
        assert not left_behind
        assert state == "success"

    def log(self, job: str, lines: int = 60) -> str:
        """The end of a job's log, as a person reads it."""
        from scripts.live_airflow import readable_log

        text = readable_log(self.cluster.task_log(self.dag_id, self.run_id, job))
        return "\n".join(text.splitlines()[-lines:])


def eventually(look: Callable[[], T], timeout: float) -> T:
    """What `look` returns as soon as it is true; fails when it is not in time."""
    deadline = time.monotonic() + timeout
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {timeout:.0f} s"
        time.sleep(0.2)
