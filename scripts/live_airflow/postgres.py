"""A Postgres server of one's own, as Airflow's database: `LiveAirflow(home, dags, database=Postgres())`.

It needs the server's programs (on Debian and Ubuntu: `apt-get install postgresql`), and the drivers psycopg2 and
asyncpg in the interpreter that runs Airflow; psycopg2 also in the caller's.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Collection, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from scripts.live_airflow.database import Database, migrate
from scripts.live_airflow.errors import LiveAirflowError, tail
from scripts.live_airflow.processes import ProcessFamily, free_port

#: Who runs the server when root asks for it, which Postgres refuses to run as: the first of them that there is.
_USERS = ("postgres", "nobody")
_NAME = "airflow"


class Postgres(Database):
    """A server in a temporary folder, on a free port; a context manager, or `create()` and `stop()`.

    It keeps nothing: the folder is removed in the end, and nothing is flushed to the disk.

    :param max_connections: of all of Airflow's components together
    """

    def __init__(self, *, max_connections: int = 300) -> None:
        self._programs = _programs()
        for driver in ("psycopg2", "asyncpg"):
            if find_spec(driver) is None:
                raise LiveAirflowError(
                    f"Airflow on Postgres needs {driver}: pip install psycopg2-binary asyncpg"
                )
        self._max_connections = max_connections
        self._password = secrets.token_hex(16)
        self._family = ProcessFamily()
        self._server: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None
        self.port = free_port()

    @property
    def url(self) -> str:
        return f"postgresql+psycopg2://{_NAME}:{self._password}@127.0.0.1:{self.port}/{_NAME}"

    def settings(self) -> dict[str, str]:
        return super().settings() | {
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN_ASYNC": self.url.replace("psycopg2", "asyncpg"),
        }

    def __enter__(self) -> Postgres:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def create(self, python: Path | str, version: str) -> None:
        if self._server is not None:
            raise LiveAirflowError(
                "this Postgres already holds an Airflow's tables: make one for each Airflow"
            )
        try:
            self._start()
            migrate(python, version, self.settings())
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        self._folder = folder = Path(tempfile.mkdtemp(prefix="airflow-postgres-"))
        identity = _identity()
        if identity:
            os.chown(folder, identity["user"], identity["group"])
        data, password = folder / "data", folder / "password"
        password.write_text(self._password)
        if identity:
            os.chown(password, identity["user"], identity["group"])
        environment = {**os.environ, **self._family.environment, "LC_ALL": "C.UTF-8"}
        made = subprocess.run(
            [
                str(self._programs / "initdb"),
                f"--pgdata={data}",
                f"--username={_NAME}",
                f"--pwfile={password}",
                "--auth=scram-sha-256",
                "--encoding=UTF8",
                "--no-sync",
            ],
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            **identity,
        )
        if made.returncode:
            raise LiveAirflowError(f"initdb failed:\n{tail(made.stdout + made.stderr)}")
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": folder,
            "max_connections": self._max_connections,
            "fsync": "off",
            "synchronous_commit": "off",
            "full_page_writes": "off",
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        self._family.watch()
        with (folder / "postgres.log").open("wb") as log:
            self._server = subprocess.Popen(
                [str(self._programs / "postgres"), "-D", str(data), *options],
                env=environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **identity,
            )
        self._wait_until_ready()
        with contextlib.closing(self._connect("postgres")) as connection:
            connection.autocommit = True
            connection.cursor().execute(f"create database {_NAME}")

    def _wait_until_ready(self, timeout: float = 60) -> None:
        import psycopg2

        assert self._server
        assert self._folder
        deadline = time.monotonic() + timeout
        while True:
            try:
                self._connect("postgres").close()
            except psycopg2.OperationalError as error:
                log = tail((self._folder / "postgres.log").read_text(errors="replace"))
                if self._server.poll() is not None:
                    raise LiveAirflowError(f"Postgres ended at its start; its log:\n{log}") from None
                if time.monotonic() > deadline:
                    raise LiveAirflowError(f"Postgres is not ready: {error}\n{log}") from None
                time.sleep(0.1)
            else:
                return

    def stop(self) -> None:
        """End the server and remove its folder; does nothing the second time."""
        server, self._server = self._server, None
        if server is not None:
            self._signal(signal.SIGCONT, _tree(server.pid))
            # An immediate shutdown: its data goes anyway.
            with contextlib.suppress(ProcessLookupError):
                server.send_signal(signal.SIGQUIT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(timeout=30)
        self._family.kill()
        folder, self._folder = self._folder, None
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    # A database that hangs, as in a failover --------------------------------------------------------------

    @contextlib.contextmanager
    def hanging(self) -> Iterator[None]:
        """Stop every process of the server: connections stay, and nobody answers on them, nor on new ones."""
        if self._server is None:
            raise LiveAirflowError("Postgres does not run")
        # The first one forks the others, so none is added once it stands still.
        self._signal(signal.SIGSTOP, [self._server.pid])
        stopped = _tree(self._server.pid)
        try:
            self._signal(signal.SIGSTOP, stopped)
            yield
        finally:
            self._signal(signal.SIGCONT, stopped)

    def hang(self, seconds: float) -> None:
        """Hang for so long."""
        with self.hanging():
            time.sleep(seconds)

    @staticmethod
    def _signal(number: signal.Signals, pids: list[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    # Reading ----------------------------------------------------------------------------------------------

    def _connect(self, database: str = _NAME) -> Any:
        import psycopg2

        return psycopg2.connect(
            host="127.0.0.1",
            port=self.port,
            user=_NAME,
            password=self._password,
            dbname=database,
            connect_timeout=10,
            options="-c statement_timeout=30000",
        )

    def query(self, sql: str, parameters: Collection[Any] = ()) -> list[tuple[Any, ...]]:
        with contextlib.closing(self._connect()) as connection:
            connection.set_session(readonly=True, autocommit=True)
            cursor = connection.cursor()
            cursor.execute(sql.replace("%", "%%").replace("?", "%s"), tuple(parameters))
            return list(cursor.fetchall())

    def tables(self) -> list[str]:
        found = self.query(
            "select table_name from information_schema.tables where table_schema = ? order by table_name",
            ("public",),
        )
        return [name for (name,) in found]


def _programs() -> Path:
    """The folder of the server's programs, the newest one: distributions keep them off the PATH."""
    folders = list(Path("/usr/lib/postgresql").glob("*/bin"))
    folders.sort(key=lambda path: [int(part) for part in path.parent.name.split(".") if part.isdecimal()])
    on_path = shutil.which("pg_ctl")
    if on_path:
        folders.append(Path(on_path).resolve().parent)
    for folder in reversed(folders):
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    raise LiveAirflowError(
        "Postgres is not installed: neither is pg_ctl on the PATH, nor is there a /usr/lib/postgresql/*/bin. "
        "On Debian and Ubuntu: apt-get install postgresql; on macOS: brew install postgresql"
    )


def _identity() -> dict[str, Any]:
    """Arguments for `subprocess` under which Postgres runs; none for who is not root."""
    if os.geteuid() != 0:
        return {}
    for name in _USERS:
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": ()}
    raise LiveAirflowError(
        f"Postgres does not run as root, and there is no user {' or '.join(_USERS)} to run it as"
    )


def _tree(pid: int) -> list[int]:
    try:
        process = psutil.Process(pid)
        return [pid, *(child.pid for child in process.children(recursive=True))]
    except psutil.NoSuchProcess:
        return []
