"""An MLflow run on a store of its own."""

from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from tasks import tracking


@pytest.fixture
def run(tmp_path: Path) -> Iterator[tracking.PipelineRun]:
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    cached = (tracking.client, tracking._experiment_id, tracking._artifact_uri)
    for function in cached:
        function.cache_clear()
    yield tracking.start_pipeline("pipeline", tmp_path, {"seed": 0}, {})
    mlflow.set_tracking_uri(before)
    for function in cached:
        function.cache_clear()
