"""Databases that were made when the project was installed, and are copied where one is needed.

To make the tables of MLflow and Prefect takes some fifteen seconds, most of a first run's overhead.
"""

import os
import shutil
import sys
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
