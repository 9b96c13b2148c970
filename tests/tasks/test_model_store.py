"""Tests of tasks.model_store on a real SQLite store: what is left when a model can't be written."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from plumbline.artifacts import MANIFEST, partial_folder, read_manifest
from plumbline.errors import ParamsError, TrainingError
from plumbline.refs import folder_digest
from tasks import model_store, tracking
from tasks.records import MODEL_PARTS, damage, local_path


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
    assert files(tmp_path / "mlartifacts" / "models") == []
    client = MlflowClient()
    assert client.get_run(tracked.run_id).info.status == "FAILED"
    (model,) = client.search_logged_models([run.experiment_id])
    assert str(model.status) == "FAILED"


def write_model(folder: Path, *_: Any) -> None:
    """As `_save_model` writes, but nothing that needs training."""
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.safetensors").write_bytes(b"weights")
    (folder / "MLmodel").write_text("flavors: {}")


def test_a_model_appears_whole_with_its_manifest(
    run: tracking.PipelineRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[Path] = []

    def save(folder: Path, logged: Any, *_: Any) -> None:
        places.append(folder)
        write_model(folder)
        assert not Path(local_path(logged.artifact_location) or "").exists()

    monkeypatch.setattr(model_store, "_save_model", save)
    with tracking.step_run(run, "sft", {}) as tracked:
        model = model_store.log_model(tracked, "text-generation", None, None, metrics={})  # type: ignore[arg-type]

    folder = local_path(model.uri)
    assert folder is not None
    assert places == [partial_folder(folder)]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert files(folder) == ["MLmodel", MANIFEST, "model.safetensors"]
    assert list(read_manifest(folder)) == ["MLmodel", "model/model.safetensors"]
    assert model.digest == folder_digest(folder, MODEL_PARTS)
    assert damage(model) is None
    assert str(MlflowClient().get_logged_model(model.mlflow_model_id).status) == "READY"


def test_figures_are_named_with_their_content(
    run: tracking.PipelineRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_store, "_save_model", write_model)
    with tracking.step_run(run, "sft", {}) as tracked:
        tracked.json("history", [{"loss": 1.0}])
        tracked.table("samples", [{"prompt": "a"}])
        model = model_store.log_model(tracked, "text-generation", None, None, metrics={})  # type: ignore[arg-type]

    assert set(model.figures) == set(model.figure_digests) == {"history.json", "samples.json"}
    assert damage(model) is None
    for uri in model.figures.values():
        path = local_path(uri)
        assert path is not None
        content = path.read_bytes()
        path.write_bytes(content[:-1] + b"!")
        assert str(damage(model)).startswith(f"{path} does not match its digest")
        path.write_bytes(content)


def test_a_killed_writer_leaves_no_model(run: tracking.PipelineRun, tmp_path: Path) -> None:
    script = """
        import json, sys, time
        from tasks import model_store, tracking

        def save(folder, *_):
            (folder / "model").mkdir(parents=True)
            (folder / "model" / "model.safetensors").write_bytes(b"half")
            print("writing", flush=True)
            time.sleep(120)

        model_store._save_model = save
        run = tracking.PipelineRun(**json.loads(sys.argv[1]))
        with tracking.step_run(run, "sft", {}) as tracked:
            model_store.log_model(tracked, "text-generation", None, None, metrics={})
        """
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), run.model_dump_json()],
        env={**os.environ, "MLFLOW_TRACKING_URI": store},
        stdout=subprocess.PIPE,
        text=True,
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        writer.send_signal(signal.SIGKILL)

    (model,) = MlflowClient().search_logged_models([run.experiment_id])
    folder = local_path(model.artifact_location)
    assert folder is not None
    assert str(model.status) == "PENDING"
    assert list(folder.parent.iterdir()) == [partial_folder(folder)]


def test_an_adapter_s_manifest_has_the_name_of_what_it_changes(
    run: tracking.PipelineRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Saved:
        def save_pretrained(self, folder: Path) -> None:
            folder.mkdir(parents=True)
            (folder / "tokenizer.json").write_text("{}")

    def save_adapter(model: Any, folder: Path, base: str) -> None:
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"base": base}))

    monkeypatch.setattr(model_store, "_save_model", write_model)
    monkeypatch.setattr(model_store, "save_adapter", save_adapter)
    with tracking.step_run(run, "sft", {}) as tracked:
        base = model_store.log_model(tracked, "text-generation", None, None, metrics={})  # type: ignore[arg-type]
        adapter = model_store.log_adapter(
            tracked,
            None,  # type: ignore[arg-type]
            Saved(),  # type: ignore[arg-type]
            base=base,
            max_new_tokens=4,
            metrics={},
        )

    folder = local_path(adapter.uri)
    assert folder is not None
    assert model_store.is_adapter(adapter)
    assert "adapted_model.json" in read_manifest(folder)
    assert damage(adapter) is None
    weights = Path(local_path(base.uri) or "", "model", "model.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + b"!")
    assert str(damage(adapter)).startswith(f"{weights} does not match its digest")
    weights.write_bytes(content)
    (folder / "adapted_model.json").write_text(json.dumps({"uri": "file:///elsewhere"}))
    assert str(damage(adapter)).startswith(f"{folder / 'adapted_model.json'} was cut short")


def test_a_model_that_is_not_registered_is_named(run: tracking.PipelineRun) -> None:
    with pytest.raises(ParamsError, match=r"No registered model nobody@champion.*plumbline run"):
        model_store.registered_folder("nobody@champion")
