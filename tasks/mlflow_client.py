"""MLflow's client, which waits where MLflow is away for a while."""

import contextlib
import functools
import logging
import os
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from itertools import chain, repeat
from pathlib import Path
from typing import Any, TypeVar

import mlflow
from mlflow import MlflowClient

from plumbline.addresses import without_credentials
from plumbline.errors import TrainingError
from tasks.faults import passing, root_cause
from tasks.progress import show_warning
from tasks.spool import PAUSES
from tasks.templates import opening

T = TypeVar("T")

WAIT_SECONDS = 600.0
"""How long a step waits for MLflow, unless PLUMBLINE_MLFLOW_WAIT_SECONDS says otherwise."""
LOCK_SECONDS = 1.0
"""A call that finds SQLite locked for so long is tried again later; MLflow itself waits for 20 s,
in which no signal would be heard."""


class PatientClient:
    """MLflow's client, of which every method waits until MLflow answers; `at_once` does not.

    A call that MLflow had taken already when the connection broke is made twice. All that is
    logged stays the same then; of what is created, one is left over.
    """

    def __init__(self, tracking_uri: str | None = None) -> None:
        uri = tracking_uri or mlflow.get_tracking_uri()
        self._database = uri.removeprefix("sqlite:///") if uri.startswith("sqlite:///") else None
        with _opening(self._database):
            self.at_once = MlflowClient(tracking_uri=tracking_uri)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.at_once, name)

        @functools.wraps(method)
        def call(*arguments: Any, **options: Any) -> Any:
            def attempt() -> Any:
                self.check()
                return method(*arguments, **options)

            return patiently(attempt)

        return call

    def check(self) -> None:
        """Raise sqlite3.OperationalError if another process keeps the database locked."""
        if self._database is not None:
            with _connection(self._database) as database:
                database.execute("begin immediate")
                database.rollback()


@cache
def client() -> PatientClient:
    """MLflow's client on the project's store."""
    # This module tries again by itself, more often in the first minute and with less noise.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    for name in ("urllib3.connectionpool", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return patiently(PatientClient)


def preload() -> None:
    """Import what the first call to an SQLite store imports, and leave the store alone."""
    if mlflow.get_tracking_uri().startswith("sqlite:"):
        import_module("mlflow.store.tracking.sqlalchemy_store")
        import_module("mlflow.store.model_registry.sqlalchemy_store")


def patiently(call: Callable[[], T]) -> T:
    """Call again, with pauses, while what stops the call can pass.

    Where an interruption is being handled, one attempt is made: the process is to come to its end.

    Raises:
        TrainingError: it did not pass in time.
    """
    interruption = sys.exc_info()[1]
    started = time.monotonic()
    for attempt, pause in enumerate(chain(PAUSES, repeat(PAUSES[-1]))):
        try:
            result = call()
        except Exception as error:
            if interruption is not None and not isinstance(interruption, Exception):
                raise interruption from None
            if not passing(error):
                raise
            if time.monotonic() - started + pause > wait_seconds():
                raise gave_up(error) from error
            if attempt == 0:
                say_waiting(error)
            time.sleep(pause)
        else:
            if attempt:
                show_warning("MLflow answers again.")
            return result
    raise AssertionError("the pauses have no end")


def wait_seconds() -> float:
    """How long a step waits for MLflow before it fails."""
    return float(os.environ.get("PLUMBLINE_MLFLOW_WAIT_SECONDS", WAIT_SECONDS))


def say_waiting(error: Exception | None = None) -> None:
    """Say on the terminal that the run waits for MLflow, and how long it will."""
    why = f" ({root_cause(error)})" if error else ""
    show_warning(f"MLflow does not answer{why}; waiting for it, up to {wait_seconds():.0f} s …")


def gave_up(error: Exception | None = None) -> TrainingError:
    """The error of a step for which MLflow was away too long."""
    why = f" ({root_cause(error)})" if error else ""
    store = without_credentials(mlflow.get_tracking_uri())
    return TrainingError(
        f"MLflow did not answer for {wait_seconds():.0f} s{why}: expected the store {store}. Bring "
        "it back, then run again: finished steps come from the cache, training resumes at its last "
        "checkpoint, and what was logged meanwhile is sent. PLUMBLINE_MLFLOW_WAIT_SECONDS sets how "
        "long to wait."
    )


@contextlib.contextmanager
def _opening(database: str | None) -> Iterator[None]:
    """Let one process at a time open an SQLite store."""
    if database is None:
        yield
        return
    with opening("mlflow", Path(database), LOCK_SECONDS):
        yield


def _connection(database: str) -> contextlib.closing[sqlite3.Connection]:
    return contextlib.closing(sqlite3.connect(database, timeout=LOCK_SECONDS, isolation_level=None))
