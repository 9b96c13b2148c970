"""Tests of tasks.tracking on a real SQLite store: what is left when a model can't be written."""

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient

from plumbline.errors import ParamsError, TrainingError
from tasks import tracking


@pytest.fixture
def run(tmp_path: Path) -> Iterator[tracking.PipelineRun]:
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    cached = (tracking._client, tracking._experiment_id, tracking._artifact_uri)
    for function in cached:
        function.cache_clear()
    yield tracking.start_pipeline("pipeline", tmp_path, {"seed": 0}, {})
    mlflow.set_tracking_uri(before)
    for function in cached:
        function.cache_clear()


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_full_disk_leaves_nothing_of_the_model_and_says_what_to_do(
    run: tracking.PipelineRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half_written(folder: Path, *_: Any) -> None:
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tracking, "_save_model", half_written)
    with (
        pytest.raises(TrainingError, match=r"No space left on device.*Make room"),
        tracking.step_run(run, "sft", {}) as tracked,
    ):
        tracked.model("text-generation", None, None, metrics={})  # type: ignore[arg-type]
    assert files(tmp_path / "mlartifacts") == []
    client = MlflowClient()
    assert client.get_run(tracked.run_id).info.status == "FAILED"
    (model,) = client.search_logged_models([run.experiment_id])
    assert str(model.status) == "FAILED"


def test_an_interrupted_step_is_killed_and_keeps_its_metrics(run: tracking.PipelineRun) -> None:
    opened: list[str] = []

    def interrupted() -> None:
        with tracking.step_run(run, "rl", {}) as tracked:
            opened.append(tracked.run_id)
            tracked.log(128, {"objective/kl": 0.5})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    found = MlflowClient().get_run(opened[0])
    assert found.info.status == "KILLED"
    assert found.data.metrics == {"objective/kl": 0.5}


def test_metrics_are_written_in_batches_and_none_is_lost(run: tracking.PipelineRun) -> None:
    with tracking.step_run(run, "rl", {}) as tracked:
        for step in range(2 * tracking.BUFFERED_POINTS + 3):
            tracked.log(step, {"a": step, "b": -step})
    history = MlflowClient().get_metric_history(tracked.run_id, "b")
    assert [(point.step, point.value) for point in history] == [
        (step, -step) for step in range(2 * tracking.BUFFERED_POINTS + 3)
    ]


def test_a_model_that_is_not_registered_is_named(run: tracking.PipelineRun) -> None:
    with pytest.raises(ParamsError, match=r"No registered model nobody@champion.*plumbline run"):
        tracking.registered_folder("nobody@champion")
