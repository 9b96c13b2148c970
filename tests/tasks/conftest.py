"""An MLflow run on a store of its own."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from tasks import tracking

CACHED = (tracking.client, tracking._experiment_id, tracking._artifact_uri)


@contextmanager
def _store(uri: str, home: Path) -> Iterator[None]:
    before = mlflow.get_tracking_uri()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLUMBLINE_HOME", str(home))
        patch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
        mlflow.set_tracking_uri(uri)
        for function in CACHED:
            function.cache_clear()
        yield
        mlflow.set_tracking_uri(before)
        for function in CACHED:
            function.cache_clear()


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Points the project's MLflow at a store, for the test."""
    contexts = []

    def open_(uri: str) -> None:
        contexts.append(_store(uri, tmp_path))
        contexts[-1].__enter__()

    yield open_
    for context in reversed(contexts):
        context.__exit__(None, None, None)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, to copy: making them takes seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def run(
    tmp_path: Path, empty_store: Path, open_store: Callable[[str], None]
) -> tracking.PipelineRun:
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")
    open_store(f"sqlite:///{tmp_path / 'mlflow.db'}")
    return tracking.start_pipeline("pipeline", tmp_path, {"seed": 0}, {}, {"seed": 0})
