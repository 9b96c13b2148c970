"""Tests of tasks.model_store on a real SQLite store: what is left when a model can't be written."""

import errno
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from plumbline.errors import ParamsError, TrainingError
from tasks import model_store, tracking


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_full_disk_leaves_nothing_of_the_model_and_says_what_to_do(
    run: tracking.PipelineRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half_written(folder: Path, *_: Any) -> None:
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(model_store, "_save_model", half_written)
    with (
        pytest.raises(TrainingError, match=r"No space left on device.*Make room"),
        tracking.step_run(run, "sft", {}) as tracked,
    ):
        model_store.log_model(tracked, "text-generation", None, None, metrics={})  # type: ignore[arg-type]
    assert files(tmp_path / "mlartifacts") == []
    client = MlflowClient()
    assert client.get_run(tracked.run_id).info.status == "FAILED"
    (model,) = client.search_logged_models([run.experiment_id])
    assert str(model.status) == "FAILED"


def test_a_model_that_is_not_registered_is_named(run: tracking.PipelineRun) -> None:
    with pytest.raises(ParamsError, match=r"No registered model nobody@champion.*plumbline run"):
        model_store.registered_folder("nobody@champion")
