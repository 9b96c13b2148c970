"""Runs, metrics, figures and data sets in MLflow."""

import contextlib
import json
import logging
import os
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import mlflow
import mlflow.transformers
import torch
from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    Metric,
    Param,
    RunTag,
)
from mlflow.exceptions import MlflowException
from pydantic import BaseModel, ConfigDict

from plumbline.refs import StepResult
from tasks.progress import show_warning
from tasks.records import local_path

log = logging.getLogger("plumbline")

EXPERIMENT = "plumbline"
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
            client().log_batch(self.run_id, metrics=self._points[start : start + 1000])
        self._points, self._pending_calls, self._flushed = [], 0, time.monotonic()

    def warn(self, step: int, name: str, message: str) -> None:
        """Show what looks wrong: in the log, and on the run (plumbline.training.reporting.Warn)."""
        self.warnings += 1
        # Prefect sends the log to the run's page; the terminal shows the project's own lines only.
        log.warning("%s: %s (%s %d)", name, message, self.step, step)
        show_warning(f"{self.step} {step}: {name}: {message}")
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
        client().log_table(self.run_id, columns, f"{name}.json")
        self.figures[f"{name}.json"] = f"{self.artifact_uri}/{name}.json"

    def json(self, name: str, value: Any) -> None:
        """Log a JSON value as `name`.json."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"{name}.json")
            path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n")
            self.file(path)

    def file(self, path: Path) -> None:
        """Log a file under its own name."""
        client().log_artifact(self.run_id, str(path))
        self.figures[path.name] = f"{self.artifact_uri}/{path.name}"

    def folder(self, path: Path, name: str) -> str:
        """Log a folder as `name`; returns its URI."""
        client().log_artifacts(self.run_id, str(path), name)
        return f"{self.artifact_uri}/{name}"

    def dataset(self, name: str, digest: str, source: str, rows: int, context: str) -> None:
        """Note that the step read a data set; digests are cut to the 36 characters MLflow takes."""
        _log_dataset(self.run_id, name, digest, source, rows, context)

    @property
    def artifact_uri(self) -> str:
        """Where the run's files are."""
        return _artifact_uri(self.run_id)


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
    run = client().create_run(
        experiment_id, run_name=name, tags={**hardware, **tags, "plumbline.kind": "pipeline"}
    )
    _log_params(run.info.run_id, params)
    return PipelineRun(mlflow_run_id=run.info.run_id, experiment_id=experiment_id, name=name)


def end_run(run_id: str, state: RunState, metrics: Mapping[str, float] | None = None) -> None:
    """Close a run, with its headline metrics."""
    if metrics:
        _log_metrics(run_id, metrics)
    client().set_terminated(run_id, state)


@contextlib.contextmanager
def step_run(run: PipelineRun, step: str, params: Mapping[str, Any]) -> Iterator[StepRun]:
    """Open the run of a step below a pipeline's, and close it as its body ends."""
    tags = {
        "mlflow.parentRunId": run.mlflow_run_id,
        "plumbline.kind": "step",
        "plumbline.step": step,
        "cache.hit": "false",
    }
    opened = client().create_run(run.experiment_id, run_name=step, tags=tags)
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
        client().set_terminated(tracked.run_id, state)


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
    opened = client().create_run(run.experiment_id, run_name=f"{step} (cached)", tags=tags)
    run_id = str(opened.info.run_id)
    _log_metrics(run_id, source.metrics)
    with contextlib.suppress(MlflowException):
        original = client().get_run(source.mlflow_run_id)
        _log_params(run_id, original.data.params)
        if original.inputs.dataset_inputs:
            client().log_inputs(run_id, datasets=original.inputs.dataset_inputs)
    client().set_terminated(run_id, "FINISHED")
    return run_id


def tag_run(run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags on a run."""
    client().log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])


def log_pipeline_dataset(run: PipelineRun, name: str, digest: str, source: str, rows: int) -> None:
    """Note the data version of a whole pipeline."""
    _log_dataset(run.mlflow_run_id, name, digest, source, rows, "alignment")


def log_file(run_id: str, path: Path) -> None:
    """Log a file to a run under its own name."""
    client().log_artifact(run_id, str(path))


def open_uri(uri: str) -> Path:
    """The local path of an artifact, downloaded where it is not on this machine."""
    return local_path(uri) or Path(mlflow.artifacts.download_artifacts(artifact_uri=uri))


@cache
def client() -> MlflowClient:
    """MLflow's client on the project's store."""
    uri = mlflow.get_tracking_uri()
    if uri.startswith("sqlite:///"):
        # Readers then don't wait for writers, and writes take half the time.
        with contextlib.closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as database:
            database.execute("pragma journal_mode=WAL")
    return MlflowClient()


@cache
def _experiment_id(home: Path) -> str:
    found = client().get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return str(found.experiment_id)
    local = mlflow.get_tracking_uri().startswith("sqlite:")
    location = (home / "mlartifacts").as_uri() if local else None
    return str(client().create_experiment(EXPERIMENT, artifact_location=location))


@cache
def _artifact_uri(run_id: str) -> str:
    return str(client().get_run(run_id).info.artifact_uri)


def _log_metrics(run_id: str, metrics: Mapping[str, float]) -> None:
    now = int(time.time() * 1000)
    points = [Metric(name, float(value), now, 0) for name, value in metrics.items()]
    if points:
        client().log_batch(run_id, metrics=points)


def _log_params(run_id: str, params: Mapping[str, Any]) -> None:
    logged = [Param(name, str(value)) for name, value in params.items()]
    for start in range(0, len(logged), 100):
        client().log_batch(run_id, params=logged[start : start + 100])


def _log_dataset(run_id: str, name: str, digest: str, source: str, rows: int, context: str) -> None:
    dataset = Dataset(
        name=name,
        digest=digest[:36],
        source_type="local",
        source=json.dumps({"uri": source}),
        profile=json.dumps({"num_rows": rows}),
    )
    client().log_inputs(
        run_id, datasets=[DatasetInput(dataset, [InputTag("mlflow.data.context", context)])]
    )
