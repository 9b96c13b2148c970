"""Databases that were made when the project was installed, and are copied where one is needed.

To make the tables of MLflow and Prefect takes some fifteen seconds, most of a first run's overhead.
"""

import fcntl
import os
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Literal

FOLDER = Path(sys.prefix, "share", "plumbline")

Server = Literal["mlflow", "prefect"]


def template(server: Server) -> Path:
    """Where the database of the installed version is, if it was made."""
    return FOLDER / f"{server}-{version(server)}.db"


def copy_template(server: Server, database: Path) -> None:
    """Copy the template to where a database is to be, unless either is there already or is not.

    Whoever calls it makes sure that nobody else does so at the same time.
    """
    made = template(server)
    if database.exists() or not made.exists():
        return
    aside = database.with_name(f".{database.name}.{os.getpid()}")
    shutil.copyfile(made, aside)
    aside.replace(database)


@contextmanager
def opening(server: Server, database: Path, patience: float = 10.0) -> Iterator[None]:
    """Let one process at a time open a database inside the context.

    The first one makes its tables; two that make them together fail, or spoil them.

    Args:
        server: whose database it is.
        database: its file, which is copied from the template where it is missing.
        patience: how long to wait for another process that keeps the file locked, in seconds.

    Raises:
        sqlite3.OperationalError: it stayed locked.
    """
    database.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{database}.opening").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        copy_template(server, database)
        with closing(sqlite3.connect(database, timeout=patience)) as connection:
            # Readers then don't wait for writers, and writes take half the time.
            connection.execute("pragma journal_mode=WAL")
        yield
