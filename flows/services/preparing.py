"""What an installation can do once for all first runs: `python -m flows.services.preparing`."""

import os
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

from flows.environment import prepare_environment
from plumbline.project import Project
from tasks.templates import FOLDER, Server, template


def prepare() -> None:
    """Make the databases that first runs copy."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder).resolve()
        os.environ.pop("PREFECT_API_URL", None)
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        os.environ.pop("PREFECT_HOME", None)
        prepare_environment(Project(home, home))
        from flows.services.prefect_server import join_server, wait_for_server

        join_server(home)
        from tasks.tracking import client

        client()
        wait_for_server(home)
        FOLDER.mkdir(parents=True, exist_ok=True)
        # The first experiment remembers where it was made; MLflow makes it again where it is gone.
        _keep("mlflow", home / "mlflow.db", "delete from experiments")
        _keep("prefect", home / "prefect" / "prefect.db")


def _keep(server: Server, database: Path, without: str = "") -> None:
    """Copy a database that is in use, whole but for what a statement removes from the copy."""
    target = template(server)
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    aside.unlink(missing_ok=True)
    with closing(sqlite3.connect(database)) as source:
        source.execute("vacuum into ?", (str(aside),))
    with closing(sqlite3.connect(aside)) as copy:
        copy.executescript(without)
    aside.replace(target)


if __name__ == "__main__":
    prepare()
