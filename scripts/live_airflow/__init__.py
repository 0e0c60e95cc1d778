"""A real Airflow, run from its components on free ports, for tests and for the demo.

    with LiveAirflow(home=tmp_path, dags=Path("example_dags")) as airflow:
        run_id = airflow.trigger("my_dag")
        assert airflow.wait_for_run("my_dag", run_id) == "success"

Airflow 3: api-server, another one for the tasks, scheduler (LocalExecutor), dag-processor, triggerer. Airflow
2.11: scheduler (LocalExecutor, which sqlite bears here: few writers, and a write-ahead log) and triggerer. The
intervals at which Airflow polls are set low, so that a test waits for its own work and not for Airflow's clocks.

    processes   the operating system's side: components, and a family of processes that leaves none behind
    settings    the environment variables that Airflow's components run with
    database    Airflow's database: how it is made and read; sqlite unless another one is passed
    records     what an Airflow has recorded: states, XComs, logs, trigger rows
    control     what a person would do: trigger, clear, mark, pause
    airflow     LiveAirflow, which puts these together
    dag_test    `airflow dags test` in a home of its own

Needs psutil and cryptography, which every Airflow installs. The interpreter that runs Airflow may be another
one than the caller's.
"""

from scripts.live_airflow.airflow import LiveAirflow
from scripts.live_airflow.dag_test import run_dag_test
from scripts.live_airflow.database import Database, Sqlite
from scripts.live_airflow.errors import LiveAirflowError
from scripts.live_airflow.processes import ProcessFamily, TaskProcesses, free_port
from scripts.live_airflow.records import FINISHED_RUN, FINISHED_TASK, TaskState, readable_log
from scripts.live_airflow.settings import airflow_version

__all__ = [
    "FINISHED_RUN",
    "FINISHED_TASK",
    "Database",
    "LiveAirflow",
    "LiveAirflowError",
    "ProcessFamily",
    "Sqlite",
    "TaskProcesses",
    "TaskState",
    "airflow_version",
    "free_port",
    "readable_log",
    "run_dag_test",
]
