"""Airflow's database: how it is made and how it is read.

Another database than sqlite is another subclass of `Database`, handed to `LiveAirflow(database=...)`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from scripts.live_airflow.errors import LiveAirflowError, tail
from scripts.live_airflow.settings import base_settings, clean_environment


class Database(ABC):
    """An Airflow's database; states, XComs and trigger rows are read straight from it.

    That is the same on every version of Airflow and does not depend on a server being up, which matters in
    tests that kill servers.
    """

    @property
    @abstractmethod
    def url(self) -> str:
        """SQLAlchemy URL, for `[database] sql_alchemy_conn`."""

    def settings(self) -> dict[str, str]:
        """Environment variables that every component needs for this database."""
        return {"AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": self.url}

    @abstractmethod
    def create(self, python: Path | str, version: str) -> None:
        """Make it, migrated and empty; a `LiveAirflowError` when it already holds an Airflow's tables."""

    @abstractmethod
    def query(self, sql: str, parameters: Collection[Any] = ()) -> list[tuple[Any, ...]]:
        """Rows, read-only. Parameters stand as `?` in `sql`, whatever the driver calls them."""

    @abstractmethod
    def tables(self) -> list[str]:
        """Names of all tables."""


def migrate(python: Path | str, version: str, settings: Mapping[str, str]) -> None:
    """Run `airflow db migrate` in a home of its own, on the database that `settings` name."""
    with tempfile.TemporaryDirectory(prefix="airflow-migrate-") as folder:
        home = Path(folder)
        (home / "dags").mkdir()
        done = subprocess.run(
            [str(python), "-m", "airflow", "db", "migrate"],
            env=clean_environment() | base_settings(python, home, home / "dags", version) | dict(settings),
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    if done.returncode:
        raise LiveAirflowError(f"airflow db migrate failed:\n{tail(done.stdout)}")


class Sqlite(Database):
    """A file, copied from a migrated template that is made once per environment.

    :param path: the file
    :param cache: folder of the template (default: the interpreter's environment)
    """

    def __init__(self, path: Path, cache: Path | None = None) -> None:
        self.path = path
        self._cache = cache

    @property
    def url(self) -> str:
        # Two writers at once are normal here, and sqlite's own patience of five seconds too short.
        return f"sqlite:///{self.path}?timeout=60"

    def settings(self) -> dict[str, str]:
        # Airflow 2 otherwise refuses to run tasks side by side on sqlite.
        return super().settings() | {"_AIRFLOW__SKIP_DATABASE_EXECUTOR_COMPATIBILITY_CHECK": "1"}

    def create(self, python: Path | str, version: str) -> None:
        if self.path.exists():
            raise LiveAirflowError(
                f"{self.path.parent} already holds a database: a live Airflow needs a home of its own"
            )
        shutil.copyfile(self._template(python, version), self.path)

    def _template(self, python: Path | str, version: str) -> Path:
        """A migrated, empty database: migrating takes much longer than copying."""
        cache = self._cache
        if cache is None:
            prefix = Path(python).absolute().parent.parent
            cache = prefix if os.access(prefix, os.W_OK) else Path(tempfile.gettempdir())
        template = cache / f"airflow-{version}-template.db"
        if template.exists():
            return template
        with tempfile.TemporaryDirectory(prefix="airflow-template-") as folder:
            made = Sqlite(Path(folder) / "airflow.db")
            migrate(python, version, made.settings())
            with contextlib.closing(sqlite3.connect(made.path)) as database:
                # Lets the many readers go on while one process writes; the setting stays in the file.
                database.execute("PRAGMA journal_mode=WAL")
                database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            # Renamed into place: another test process may be doing the same at this moment.
            partial = cache / f".{template.name}.{os.getpid()}"
            shutil.copyfile(made.path, partial)
            partial.replace(template)
        return template

    def query(self, sql: str, parameters: Collection[Any] = ()) -> list[tuple[Any, ...]]:
        # A reader of a WAL database has to wait only while it is being recovered after a kill.
        with contextlib.closing(
            sqlite3.connect(f"file:{quote(str(self.path))}?mode=ro", uri=True, timeout=10)
        ) as database:
            return database.execute(sql, tuple(parameters)).fetchall()

    def tables(self) -> list[str]:
        return [name for (name,) in self.query("select name from sqlite_master where type = 'table'")]
