"""Runs, metrics, figures and data sets in MLflow."""

import contextlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import pandas
from matplotlib.figure import Figure
from mlflow.entities import Param
from mlflow.exceptions import MlflowException
from pydantic import BaseModel, ConfigDict

from plumbline.artifacts import digest_of
from plumbline.errors import MachineError, TrainingError
from plumbline.params.schema import CheckpointParams
from plumbline.process import identity
from plumbline.project import find_project
from plumbline.refs import FileDigest, StepResult
from tasks.delivery import RunState as RunState
from tasks.delivery import (
    close_outbox,
    dataset_record,
    deliver,
    metrics_record,
    open_outbox,
)
from tasks.experiments import experiment_ids, experiment_name, view_tag
from tasks.faults import broken_device, first_line
from tasks.mlflow_client import client as client
from tasks.mlflow_client import gave_up, patiently, say_waiting, wait_seconds
from tasks.progress import show_warning
from tasks.records import local_path
from tasks.system_metrics import system_metrics

log = logging.getLogger("plumbline")

PROCESS_TAG = "plumbline.process"
QUIET_SECONDS = 2.0
"""A wait for MLflow that is shorter is not worth a word."""


class PipelineRun(BaseModel):
    """The run of a whole pipeline, below which the steps hang theirs; in no cache key."""

    model_config = ConfigDict(frozen=True)

    mlflow_run_id: str
    experiment_id: str
    name: str
    key: str = ""
    """Cache key of the step that is about to run; names the folder of its checkpoints."""
    checkpoints: CheckpointParams = CheckpointParams()


class StepRun:
    """The MLflow run of one step; what it logs waits in a spool until MLflow takes it."""

    def __init__(self, run_id: str, experiment_id: str, step: str) -> None:
        self.run_id = run_id
        self.experiment_id = experiment_id
        self.step = step
        self.started = time.perf_counter()
        self.figures: dict[str, str] = {}
        self.figure_digests: dict[str, FileDigest] = {}
        self.warnings = 0
        self.latest: dict[str, float] = {}
        """What was logged last, by name."""
        self._tables: list[str] = []
        self._outbox = open_outbox(run_id)

    @property
    def seconds(self) -> float:
        """Wall time since the step began."""
        return time.perf_counter() - self.started

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log metrics of a step (plumbline.training.reporting.Log); sent in batches."""
        self._outbox.put(metrics_record(metrics, step))
        self.latest = {**self.latest, **metrics}

    def log_system(self, sample: int, metrics: Mapping[str, float]) -> None:
        """Log the load of the machine (tasks.system_metrics.LogSample)."""
        self._outbox.offer(metrics_record(metrics, sample))

    def settle(self) -> None:
        """Wait until MLflow has all that was logged.

        Raises:
            TrainingError: it did not answer in time.
        """
        if not self._outbox.settle(QUIET_SECONDS):
            say_waiting()
            if not self._outbox.settle(wait_seconds()):
                raise gave_up()

    def warn(self, step: int, name: str, message: str) -> None:
        """Show what looks wrong: in the log, and on the run (plumbline.training.reporting.Warn)."""
        self.warnings += 1
        # Prefect sends the log to the run's page; the terminal shows the project's own lines only.
        log.warning("%s: %s (%s %d)", name, message, self.step, step)
        show_warning(f"{self.step} {step}: {name}: {message}")
        self.tag({f"warning.{name}": f"{step}: {message}"})

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags on the run."""
        self._outbox.put({"tags": dict(tags)})

    def finals(self, metrics: Mapping[str, float]) -> None:
        """Log the step's final metrics."""
        if metrics:
            self._outbox.put(metrics_record(metrics))

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
        # MLflow's own log_table adds to the table of an attempt that it had taken already.
        self._tables.append(f"{name}.json")
        self.tag(_as_tables(self._tables))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"{name}.json")
            pandas.DataFrame(columns).to_json(path, orient="split", index=False)
            self.file(path)

    def json(self, name: str, value: Any) -> None:
        """Log a JSON value as `name`.json."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"{name}.json")
            path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n")
            self.file(path)

    def file(self, path: Path) -> None:
        """Log a file under its own name; it is there afterwards (raises as `settle`)."""
        self._outbox.put({}, path)
        self.settle()
        self.figure_digests[path.name] = digest_of(path)
        self.figures[path.name] = f"{self.artifact_uri}/{path.name}"

    def folder(self, path: Path, name: str) -> str:
        """Log a folder as `name`; returns its URI."""
        client().log_artifacts(self.run_id, str(path), name)
        return f"{self.artifact_uri}/{name}"

    def dataset(self, name: str, digest: str, source: str, rows: int, context: str) -> None:
        """Note that the step read a data set; digests are cut to the 36 characters MLflow takes."""
        self._outbox.put(dataset_record(name, digest, source, {"num_rows": rows}, context))

    def close(self, state: RunState, error: BaseException | None = None) -> None:
        """End the run; an MLflow that is away hears of it when it answers, or at the next start."""
        close_outbox(self._outbox, state, error)

    @property
    def artifact_uri(self) -> str:
        """Where the run's files are."""
        return _artifact_uri(self.run_id)


def start_pipeline(
    name: str,
    home: Path,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    experiment: Mapping[str, Any] | None = None,
) -> PipelineRun:
    """Open the run of a pipeline, with its params and tags.

    Args:
        name: of the run.
        home: the project's folder for generated files.
        params: dotted names to values; MLflow cuts long ones.
        tags: of the run.
        experiment: all of the params as JSON, kept as experiment.json.
    """
    # Those who only read what was tracked need no torch.
    from torch.cuda import device_count

    experiment_id = _experiment_id(home)
    hardware = {
        "hardware.cpus": str(os.cpu_count()),
        "hardware.gpus": str(device_count()),
        **{
            f"version.{package}": version(package)
            for package in ("plumbline", "torch", "transformers", "prefect", "dvc", "mlflow")
        },
    }
    run_id = _create_run(
        experiment_id, name, {**hardware, **tags, "plumbline.kind": "pipeline"}, params
    )
    if experiment is not None:
        with _killed_if_broken_off(run_id):
            client().log_dict(run_id, dict(experiment), "experiment.json")
    return PipelineRun(mlflow_run_id=run_id, experiment_id=experiment_id, name=name)


def end_run(run_id: str, state: RunState, metrics: Mapping[str, float] | None = None) -> None:
    """Close a run, with its headline metrics; does not wait for an MLflow that is away."""
    outbox = open_outbox(run_id)
    if metrics:
        outbox.put(metrics_record(metrics))
    close_outbox(outbox, state)


@contextlib.contextmanager
def step_run(run: PipelineRun, step: str, params: Mapping[str, Any]) -> Iterator[StepRun]:
    """Open the run of a step below a pipeline's, and close it as its body ends.

    Raises:
        TrainingError: MLflow did not answer in time, or the GPU can't be used any more.
    """
    tags = {
        "mlflow.parentRunId": run.mlflow_run_id,
        "plumbline.kind": "step",
        "plumbline.step": step,
        "plumbline.key": run.key,
        "cache.hit": "false",
    }
    try:
        with (
            _tracked(run.experiment_id, step, step, params, tags) as tracked,
            system_metrics(tracked.log_system),
        ):
            yield tracked
    except BaseException as error:
        if broken_device(error):
            raise TrainingError(
                f"{step}: the GPU failed ({first_line(error)}). This process can't use it any "
                "more; run again: training resumes at its last checkpoint. If it happens again, "
                "look into the GPU's log (nvidia-smi -q, dmesg)."
            ) from error
        raise


def sweep_run(
    name: str, home: Path, params: Mapping[str, Any], tags: Mapping[str, str]
) -> contextlib.AbstractContextManager[StepRun]:
    """Open the run of a sweep, below which its points hang theirs, and close it as its body ends.

    The arguments are those of `start_pipeline`.
    """
    tags = {**tags, "plumbline.kind": "sweep"}
    return _tracked(_experiment_id(home), name, "sweep", params, tags)


def promotion_run(
    name: str, home: Path, params: Mapping[str, Any], tags: Mapping[str, str]
) -> contextlib.AbstractContextManager[StepRun]:
    """Open the run of a promotion, below which the contest hangs its, and close it in the end.

    The arguments are those of `start_pipeline`.
    """
    tags = {**tags, "plumbline.kind": "promotion"}
    return _tracked(_experiment_id(home), name, "promotion", params, tags)


@contextlib.contextmanager
def _tracked(
    experiment_id: str, name: str, step: str, params: Mapping[str, Any], tags: Mapping[str, str]
) -> Iterator[StepRun]:
    """A run that is open while the body works, and says how that ended."""
    tracked = StepRun(_create_run(experiment_id, name, tags, params), experiment_id, step)
    try:
        yield tracked
        tracked.settle()
    except BaseException as error:
        tracked.close("FAILED" if isinstance(error, Exception) else "KILLED", error)
        raise
    tracked.close("FINISHED")


def runs_below(run_id: str, home: Path) -> list[tuple[str, dict[str, str]]]:
    """The ids and the tags of the runs right below a run, oldest first."""
    below = client().search_runs(
        [_experiment_id(home)],
        f"tags.`mlflow.parentRunId` = '{run_id}'",
        order_by=["attributes.start_time ASC"],
    )
    return [(str(run.info.run_id), dict(run.data.tags)) for run in below]


def point_alias(name: str, alias: str, version_number: str) -> None:
    """Let an alias of a registered model name this version."""
    client().set_registered_model_alias(name, alias, version_number)


def aliased_version(name: str, alias: str) -> str | None:
    """The version that an alias names; None where it names none, or MLflow can't say just now."""
    with contextlib.suppress(Exception):
        return str(client().at_once.get_model_version_by_alias(name, alias).version)
    return None


def stub_run(run: PipelineRun, step: str, key: str, source: StepResult) -> str:
    """Show a cached step below a pipeline's run: its final metrics, and where they come from."""
    tags = {
        "mlflow.parentRunId": run.mlflow_run_id,
        "plumbline.kind": "step",
        "plumbline.step": step,
        "plumbline.key": key,
        "plumbline.digest": source.digest,
        "cache.hit": "true",
        "cache.source_run_id": source.mlflow_run_id,
        "mlflow.note.content": f"Cached: made by run {source.mlflow_run_id}.",
    }
    run_id = _create_run(run.experiment_id, f"{step} (cached)", tags, {})
    with _killed_if_broken_off(run_id):
        if source.metrics:
            deliver(client(), run_id, [metrics_record(source.metrics)])
        with contextlib.suppress(MlflowException):
            original = client().get_run(source.mlflow_run_id)
            _log_params(run_id, original.data.params)
            if original.inputs.dataset_inputs:
                client().log_inputs(run_id, datasets=original.inputs.dataset_inputs)
        client().set_terminated(run_id, "FINISHED")
    return run_id


def tags_of(run_id: str) -> dict[str, str]:
    """The tags of a run."""
    return dict(client().get_run(run_id).data.tags)


def tag_run(run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags on a run."""
    deliver(client(), run_id, [{"tags": dict(tags)}])


def running(home: Path) -> list[tuple[str, str]]:
    """The runs that MLflow counts as running: their ids, and the processes that opened them."""
    found: list[tuple[str, str]] = []
    ids = experiment_ids(client(), home)
    token: str | None = "" if ids else None
    while token is not None:
        page = client().search_runs(ids, "attributes.status = 'RUNNING'", page_token=token or None)
        found += [(run.info.run_id, run.data.tags.get(PROCESS_TAG, "")) for run in page]
        token = page.token or None
    return found


def kill_run(run_id: str, why: str) -> None:
    """Close a run that nobody works on any more."""
    tag_run(run_id, {"plumbline.killed": why})
    client().set_terminated(run_id, "KILLED")


def log_pipeline_dataset(run: PipelineRun, name: str, digest: str, source: str, files: int) -> None:
    """Note the data version of a whole pipeline, with the digest that DVC has for it."""
    record = dataset_record(name, digest, source, {"num_files": files}, "alignment")
    with _killed_if_broken_off(run.mlflow_run_id):
        deliver(client(), run.mlflow_run_id, [record])


def log_file(run_id: str, path: Path) -> None:
    """Log a file to a run under its own name."""
    client().log_artifact(run_id, str(path))


def log_table(run_id: str, path: Path) -> None:
    """Log a table that a step has logged to another run, too (`StepRun.table`)."""
    log_file(run_id, path)
    tag_run(run_id, _as_tables([path.name]))


def experiment_id() -> str:
    """MLflow's id of this project's experiment."""
    return _experiment_id(find_project().home)


def open_uri(uri: str) -> Path:
    """The local path of an artifact, downloaded where it is not on this machine."""
    return local_path(uri) or Path(
        patiently(lambda: mlflow.artifacts.download_artifacts(artifact_uri=uri))
    )


def _as_tables(names: Sequence[str]) -> dict[str, str]:
    """The tag by which MLflow knows which files of a run are tables."""
    tables = [{"path": name, "type": "table"} for name in names]
    return {"mlflow.loggedArtifacts": json.dumps(tables)}


@cache
def _experiment_id(home: Path) -> str:
    name = experiment_name()
    local = mlflow.get_tracking_uri().startswith("sqlite:")
    location = (home / "mlartifacts").as_uri() if local else None
    found = client().get_experiment_by_name(name)
    if found is None:
        # Another first run may be quicker.
        with contextlib.suppress(MlflowException):
            client().create_experiment(name, artifact_location=location, tags=view_tag())
        found = client().get_experiment_by_name(name)
    if found.lifecycle_stage == "deleted":
        raise MachineError(
            f"The MLflow experiment {name} was deleted: expected one that takes runs. Restore it "
            f"(mlflow experiments restore --experiment-id {found.experiment_id}), or set "
            "MLFLOW_EXPERIMENT_NAME to another name."
        )
    for key, value in view_tag().items():
        if found.tags.get(key) != value:
            client().set_experiment_tag(found.experiment_id, key, value)
    return str(found.experiment_id)


@cache
def _artifact_uri(run_id: str) -> str:
    return str(client().get_run(run_id).info.artifact_uri)


def _create_run(
    experiment_id: str, name: str, tags: Mapping[str, str], params: Mapping[str, Any]
) -> str:
    made = client().create_run(experiment_id, run_name=name, tags={**tags, PROCESS_TAG: identity()})
    run_id = str(made.info.run_id)
    with _killed_if_broken_off(run_id):
        _log_params(run_id, params)
    return run_id


@contextlib.contextmanager
def _killed_if_broken_off(run_id: str) -> Iterator[None]:
    """Close a run that a signal or an error meets before anybody else is there to close it."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):
            client().set_terminated(run_id, "KILLED")
        raise


def _log_params(run_id: str, params: Mapping[str, Any]) -> None:
    logged = [Param(name, str(value)) for name, value in params.items()]
    for start in range(0, len(logged), 100):
        client().log_batch(run_id, params=logged[start : start + 100])
