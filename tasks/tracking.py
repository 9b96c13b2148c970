"""Runs, metrics, figures and models in MLflow: the project's only import of it."""

import contextlib
import json
import logging
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import mlflow
import mlflow.transformers
import torch
import transformers
from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModelOutput,
    Metric,
    Param,
    RunTag,
)
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types.schema import ColSpec, Schema
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plumbline.errors import ParamsError, TrainingError
from plumbline.models.load import load_lm
from plumbline.refs import ModelRef, StepResult, folder_digest
from plumbline.training.lora import load_merged, save_adapter
from tasks.records import MODEL_PARTS, local_path

log = logging.getLogger("plumbline")

EXPERIMENT = "plumbline"
ADAPTED = "adapted_model.json"
"""File beside an adapter that says where the model is that it changes."""
BUFFERED_POINTS = 20
BUFFERED_SECONDS = 5.0

RunState = Literal["FINISHED", "FAILED", "KILLED"]


class PipelineRun(BaseModel):
    """The MLflow run of a whole pipeline, below which the steps hang theirs."""

    model_config = ConfigDict(frozen=True)

    mlflow_run_id: str
    experiment_id: str
    name: str


class StepRun:
    """The MLflow run of one step."""

    def __init__(self, run_id: str, experiment_id: str, step: str) -> None:
        self.run_id = run_id
        self.experiment_id = experiment_id
        self.step = step
        self.started = time.perf_counter()
        self.figures: dict[str, str] = {}
        self.warnings = 0
        self._points: list[Metric] = []
        self._pending_calls = 0
        self._flushed = time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall time since the step began."""
        return time.perf_counter() - self.started

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log metrics of a step (plumbline.training.reporting.Log); written in batches."""
        now = int(time.time() * 1000)
        self._points += [Metric(name, float(value), now, step) for name, value in metrics.items()]
        self._pending_calls += 1
        waited = time.monotonic() - self._flushed
        if self._pending_calls >= BUFFERED_POINTS or waited > BUFFERED_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        for start in range(0, len(self._points), 1000):
            _client().log_batch(self.run_id, metrics=self._points[start : start + 1000])
        self._points, self._pending_calls, self._flushed = [], 0, time.monotonic()

    def warn(self, step: int, name: str, message: str) -> None:
        """Show what looks wrong: in the log, and on the run (plumbline.training.reporting.Warn)."""
        self.warnings += 1
        log.warning("%s: %s (%s %d)", name, message, self.step, step)
        tag_run(self.run_id, {f"warning.{name}": f"{step}: {message}"})

    def finals(self, metrics: Mapping[str, float]) -> None:
        """Log the step's final metrics."""
        _log_metrics(self.run_id, metrics)

    def figure(self, name: str, figure: Figure) -> bytes:
        """Log a figure as `name`.png; returns the picture."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"{name}.png")
            figure.savefig(path)
            self.file(path)
            return path.read_bytes()

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log rows of the same keys as the table `name`.json, shown in the run's page."""
        columns = {key: [row[key] for row in rows] for key in rows[0]} if rows else {"empty": []}
        _client().log_table(self.run_id, columns, f"{name}.json")
        self.figures[f"{name}.json"] = f"{self.artifact_uri}/{name}.json"

    def json(self, name: str, value: Any) -> None:
        """Log a JSON value as `name`.json."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"{name}.json")
            path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n")
            self.file(path)

    def file(self, path: Path) -> None:
        """Log a file under its own name."""
        _client().log_artifact(self.run_id, str(path))
        self.figures[path.name] = f"{self.artifact_uri}/{path.name}"

    def folder(self, path: Path, name: str) -> str:
        """Log a folder as `name`; returns its URI."""
        _client().log_artifacts(self.run_id, str(path), name)
        return f"{self.artifact_uri}/{name}"

    def dataset(self, name: str, digest: str, source: str, rows: int, context: str) -> None:
        """Note that the step read a data set; digests are cut to the 36 characters MLflow takes."""
        _log_dataset(self.run_id, name, digest, source, rows, context)

    @property
    def artifact_uri(self) -> str:
        """Where the run's files are."""
        return _artifact_uri(self.run_id)

    def model(
        self,
        kind: Literal["text-generation", "text-classification"],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_new_tokens: int | None = None,
        metrics: Mapping[str, float],
    ) -> ModelRef:
        """Log a model, its weights written once, and return the ref to it."""

        def save(folder: Path, logged: Any) -> None:
            _save_model(folder, logged, kind, model, tokenizer, max_new_tokens)

        return self._log_model(kind, save, metrics)

    def adapter(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        base: ModelRef,
        metrics: Mapping[str, float],
    ) -> ModelRef:
        """Log the adapters on a model alone, beside the name of the model that they change."""

        def save(folder: Path, logged: Any) -> None:
            save_adapter(model, folder / "adapter", base=f"sha256:{base.digest}")
            tokenizer.save_pretrained(folder / "components" / "tokenizer")
            (folder / ADAPTED).write_text(json.dumps({"uri": base.uri}) + "\n")

        return self._log_model("adapter", save, metrics)

    def policy(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        base: ModelRef | None,
        max_new_tokens: int,
        metrics: Mapping[str, float],
    ) -> ModelRef:
        """Log an aligned language model: whole, or its adapters where it has them on `base`."""
        if base is not None:
            return self.adapter(model, tokenizer, base=base, metrics=metrics)
        return self.model(
            "text-generation", model, tokenizer, max_new_tokens=max_new_tokens, metrics=metrics
        )

    def _log_model(
        self, kind: str, save: Callable[[Path, Any], None], metrics: Mapping[str, float]
    ) -> ModelRef:
        """Let `save` write a new logged model, whole or not at all."""
        logged = _client().create_logged_model(
            self.experiment_id, name=self.step, source_run_id=self.run_id, model_type=kind
        )
        try:
            with _model_folder(logged.artifact_location, logged.model_id) as folder:
                save(folder, logged)
                digest = folder_digest(folder, MODEL_PARTS)
        except BaseException as error:
            _discard_model(logged)
            if isinstance(error, OSError) or "No space" in str(error):
                raise TrainingError(
                    f"{self.step}: can't write the model to {logged.artifact_location} ({error}). "
                    "Make room, then run again: finished steps come from the cache."
                ) from error
            raise
        _client().finalize_logged_model(logged.model_id, "READY")
        _client().log_outputs(self.run_id, [LoggedModelOutput(logged.model_id, step=0)])
        self.finals(metrics)
        return ModelRef(
            digest=digest,
            uri=logged.artifact_location,
            mlflow_run_id=self.run_id,
            mlflow_model_id=logged.model_id,
            metrics=dict(metrics),
            figures=self.figures,
            seconds=self.seconds,
        )


def start_pipeline(
    name: str, home: Path, params: Mapping[str, Any], tags: Mapping[str, str]
) -> PipelineRun:
    """Open the run of a pipeline, with its params and tags."""
    experiment_id = _experiment_id(home)
    hardware = {
        "hardware.cpus": str(os.cpu_count()),
        "hardware.gpus": str(torch.cuda.device_count()),
        **{
            f"version.{package}": version(package)
            for package in ("plumbline", "torch", "transformers", "prefect", "dvc", "mlflow")
        },
    }
    run = _client().create_run(
        experiment_id, run_name=name, tags={**hardware, **tags, "plumbline.kind": "pipeline"}
    )
    _log_params(run.info.run_id, params)
    return PipelineRun(mlflow_run_id=run.info.run_id, experiment_id=experiment_id, name=name)


def end_run(run_id: str, state: RunState, metrics: Mapping[str, float] | None = None) -> None:
    """Close a run, with its headline metrics."""
    if metrics:
        _log_metrics(run_id, metrics)
    _client().set_terminated(run_id, state)


@contextlib.contextmanager
def step_run(run: PipelineRun, step: str, params: Mapping[str, Any]) -> Iterator[StepRun]:
    """Open the run of a step below a pipeline's, and close it as its body ends."""
    tags = {
        "mlflow.parentRunId": run.mlflow_run_id,
        "plumbline.kind": "step",
        "plumbline.step": step,
        "cache.hit": "false",
    }
    opened = _client().create_run(run.experiment_id, run_name=step, tags=tags)
    tracked = StepRun(opened.info.run_id, run.experiment_id, step)
    _log_params(tracked.run_id, params)
    state: RunState = "KILLED"
    try:
        yield tracked
        state = "FINISHED"
    except Exception:
        state = "FAILED"
        raise
    finally:
        tracked.flush()
        _client().set_terminated(tracked.run_id, state)


def stub_run(run: PipelineRun, step: str, key: str, source: StepResult) -> str:
    """Show a cached step below a pipeline's run: its final metrics, and where they come from."""
    tags = {
        "mlflow.parentRunId": run.mlflow_run_id,
        "plumbline.kind": "step",
        "plumbline.step": step,
        "plumbline.key": key,
        "cache.hit": "true",
        "cache.source_run_id": source.mlflow_run_id,
        "mlflow.note.content": f"Cached: made by run {source.mlflow_run_id}.",
    }
    opened = _client().create_run(run.experiment_id, run_name=f"{step} (cached)", tags=tags)
    run_id = str(opened.info.run_id)
    _log_metrics(run_id, source.metrics)
    with contextlib.suppress(MlflowException):
        original = _client().get_run(source.mlflow_run_id)
        _log_params(run_id, original.data.params)
        if original.inputs.dataset_inputs:
            _client().log_inputs(run_id, datasets=original.inputs.dataset_inputs)
    _client().set_terminated(run_id, "FINISHED")
    return run_id


def tag_run(run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags on a run."""
    _client().log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])


def log_pipeline_dataset(run: PipelineRun, name: str, digest: str, source: str, rows: int) -> None:
    """Note the data version of a whole pipeline."""
    _log_dataset(run.mlflow_run_id, name, digest, source, rows, "alignment")


def log_file(run_id: str, path: Path) -> None:
    """Log a file to a run under its own name."""
    _client().log_artifact(run_id, str(path))


def register_model(name: str, model: ModelRef, tags: Mapping[str, str]) -> str:
    """Make a version of a registered model from a logged model; returns the version's number."""
    with contextlib.suppress(MlflowException):
        _client().create_registered_model(name)
    made = _client().create_model_version(
        name,
        source=f"models:/{model.mlflow_model_id}",
        run_id=model.mlflow_run_id,
        model_id=model.mlflow_model_id,
        tags=dict(tags),
    )
    return str(made.version)


def point_alias(name: str, alias: str, version_number: str) -> None:
    """Let an alias of a registered model name this version."""
    _client().set_registered_model_alias(name, alias, version_number)


def version_exists(name: str, version_number: str) -> bool:
    """Whether the registry has this version of the model."""
    try:
        return _client().get_model_version(name, version_number) is not None
    except MlflowException:
        return False


def open_uri(uri: str) -> Path:
    """The local path of an artifact, downloaded where it is not on this machine."""
    return local_path(uri) or Path(mlflow.artifacts.download_artifacts(artifact_uri=uri))


def registered_folder(name: str) -> Path:
    """The local folder of a registered model, NAME@ALIAS or NAME/VERSION.

    Raises:
        ParamsError: the registry has no such model.
    """
    try:
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=f"models:/{name}"))
    except MlflowException as error:
        raise ParamsError(
            f"No registered model {name}: expected NAME@ALIAS or NAME/VERSION, for example "
            "plumbline-policy@challenger. Run an experiment first: plumbline run quickstart. "
            f"({error})"
        ) from error


def model_folder(model: ModelRef) -> Path:
    """Folder of a whole model's config and weights."""
    return open_uri(model.uri) / "model"


def is_adapter(model: ModelRef) -> bool:
    """Whether a logged model is an adapter on another one."""
    return (open_uri(model.uri) / ADAPTED).exists()


def open_policy(folder: Path) -> PreTrainedModel:
    """The language model of a logged model: whole, or an adapter merged into what it changes."""
    if not (folder / ADAPTED).exists():
        return load_lm(folder / "model")
    model = load_lm(open_uri(json.loads((folder / ADAPTED).read_bytes())["uri"]) / "model")
    load_merged(model, folder / "adapter")
    return model


def tokenizer_folder(model: ModelRef) -> Path:
    """Folder of the model's tokenizer."""
    return open_uri(model.uri) / "components" / "tokenizer"


@cache
def _client() -> MlflowClient:
    uri = mlflow.get_tracking_uri()
    if uri.startswith("sqlite:///"):
        # Readers then don't wait for writers, and writes take half the time.
        with contextlib.closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as database:
            database.execute("pragma journal_mode=WAL")
    return MlflowClient()


@cache
def _experiment_id(home: Path) -> str:
    found = _client().get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return str(found.experiment_id)
    local = mlflow.get_tracking_uri().startswith("sqlite:")
    location = (home / "mlartifacts").as_uri() if local else None
    return str(_client().create_experiment(EXPERIMENT, artifact_location=location))


@cache
def _artifact_uri(run_id: str) -> str:
    return str(_client().get_run(run_id).info.artifact_uri)


@contextlib.contextmanager
def _model_folder(location: str, model_id: str) -> Iterator[Path]:
    """The folder to save a logged model in: its own place, or one that is sent there afterwards."""
    path = local_path(location)
    if path is not None:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder, "model")
        _client().log_model_artifacts(model_id, str(Path(folder, "model")))


def _discard_model(logged: Any) -> None:
    """Leave nothing of a model that was written in part."""
    _client().finalize_logged_model(logged.model_id, "FAILED")
    path = local_path(logged.artifact_location)
    if path is not None:
        shutil.rmtree(path, ignore_errors=True)


def _save_model(
    folder: Path,
    logged: Any,
    kind: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int | None,
) -> None:
    text = Schema([ColSpec("string")])
    if kind == "text-generation":
        signature = ModelSignature(inputs=text, outputs=text)
        config = {"max_new_tokens": max_new_tokens, "return_full_text": False}
    else:
        score = Schema([ColSpec("string", "label"), ColSpec("double", "score")])
        signature, config = ModelSignature(inputs=text, outputs=score), {}
    # An empty name keeps MLflow from looking for a model card on the hub.
    model.name_or_path = ""
    mlflow.transformers.save_model(
        {"model": model.cpu(), "tokenizer": tokenizer},
        str(folder),
        task=kind,
        signature=signature,
        model_config=config,
        # Named, or MLflow would load the model in a fresh process to find them out.
        pip_requirements=[
            f"torch=={torch.__version__}",
            f"transformers=={transformers.__version__}",
        ],
        mlflow_model=Model(
            run_id=logged.source_run_id,
            model_id=logged.model_id,
            artifact_path=logged.artifact_location,
        ),
    )


def _log_metrics(run_id: str, metrics: Mapping[str, float]) -> None:
    now = int(time.time() * 1000)
    points = [Metric(name, float(value), now, 0) for name, value in metrics.items()]
    if points:
        _client().log_batch(run_id, metrics=points)


def _log_params(run_id: str, params: Mapping[str, Any]) -> None:
    logged = [Param(name, str(value)) for name, value in params.items()]
    for start in range(0, len(logged), 100):
        _client().log_batch(run_id, params=logged[start : start + 100])


def _log_dataset(run_id: str, name: str, digest: str, source: str, rows: int, context: str) -> None:
    dataset = Dataset(
        name=name,
        digest=digest[:36],
        source_type="local",
        source=json.dumps({"uri": source}),
        profile=json.dumps({"num_rows": rows}),
    )
    _client().log_inputs(
        run_id, datasets=[DatasetInput(dataset, [InputTag("mlflow.data.context", context)])]
    )
