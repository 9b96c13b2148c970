"""Past pipeline runs as MLflow remembers them: what they were made of, and what came of them."""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from plumbline.process import alive
from plumbline.project import find_project
from tasks.experiments import experiment_ids
from tasks.mlflow_client import PatientClient, client
from tasks.tracking import PROCESS_TAG, open_uri

RUN_ID = re.compile(r"[0-9a-f]{32}")
ID_PREFIX = re.compile(r"[0-9a-f]{1,32}")
PIPELINE = "tags.`plumbline.kind` = 'pipeline'"


class PastStep(NamedTuple):
    """A finished step of a past run."""

    run_id: str
    key: str | None
    """Cache key; None where it was not noted."""
    digest: str | None
    """Digest of what it made; None where the run that made it is gone."""
    made_by: str = ""
    """The run that made it: `run_id`, unless the step was cached."""
    datasets: tuple[tuple[str, str], ...] = ()
    """The data sets that it read: "name (context)" and digest."""


class PastRun(NamedTuple):
    """A run in MLflow, with the steps below it."""

    run_id: str
    name: str
    status: str
    artifacts: str
    """URI of its files."""
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]
    """Final metrics."""
    steps: dict[str, PastStep]


def find_run(run_id: str, store: str | None = None) -> PastRun | None:
    """The run with this id, or None where there is none.

    Args:
        run_id: MLflow's id of the run.
        store: URI of the MLflow store to look in; the project's own where none is given.
    """
    if not RUN_ID.fullmatch(run_id):
        return None
    runs = _client(store)
    found = _search(runs, f"attributes.run_id = '{run_id}'", store=store)
    return _past_run(runs, found[0], store) if found else None


def last_pipelines(count: int, store: str | None = None) -> list[PastRun]:
    """The newest finished pipeline runs, newest first, without their steps."""
    finished = f"{PIPELINE} and attributes.status = 'FINISHED'"
    return [_bare(run) for run in _search(_client(store), finished, count, store)]


def last_on_pinned_data(experiment: str) -> PastRun | None:
    """The newest finished run of an experiment as it stands, on data as data.dvc pinned it.

    Of runs with overrides none counts; the steps are left out.
    """
    found = _on_pinned_data(experiment, "FINISHED", 1)
    return found[0] if found else None


def under_way_on_pinned_data(experiment: str) -> list[PastRun]:
    """The runs of an experiment as it stands, on pinned data, that living processes work on."""
    found = _on_pinned_data(experiment, "RUNNING", 1000)
    return [run for run in found if alive(run.tags.get(PROCESS_TAG, "")) is not False]


def _on_pinned_data(experiment: str, status: str, most: int) -> list[PastRun]:
    # MLflow's filters know no escapes.
    if "'" in experiment:
        return []
    condition = " and ".join(
        [
            PIPELINE,
            f"attributes.status = '{status}'",
            f"tags.`plumbline.experiment` = '{experiment}'",
            "tags.`plumbline.overrides` = '{}'",
            "tags.`data.dirty` = 'false'",
        ]
    )
    return [_bare(run) for run in _search(client(), condition, most)]


def pipelines_named(name: str) -> list[PastRun]:
    """The pipeline runs of this name, finished or not, newest first, without their steps."""
    # MLflow's filters know no escapes.
    if "'" in name:
        return []
    found = _search(client(), f"{PIPELINE} and attributes.run_name = '{name}'")
    return [_bare(run) for run in found]


def pipelines_beginning(prefix: str) -> list[PastRun]:
    """The pipeline runs, finished or not, whose ids begin so, newest first, without their steps."""
    if not ID_PREFIX.fullmatch(prefix):
        return []
    found = _search(client(), f"{PIPELINE} and attributes.run_id LIKE '{prefix}%'")
    return [_bare(run) for run in found]


def resolved_experiment(run: PastRun) -> dict[str, Any] | None:
    """The whole experiment that a run of this project's store ran; None where it keeps none."""
    path = _kept_file(client(), run.run_id, run.artifacts, "experiment.json")
    return None if path is None else dict(json.loads(path.read_bytes()))


def step_history(step: PastStep) -> list[dict[str, float]]:
    """The curves of a step's training, a row a rollout or update; empty where none are kept."""
    rows = _step_file(step, "history.json")
    return rows if isinstance(rows, list) else []


def step_table(step: PastStep, name: str) -> list[dict[str, Any]]:
    """The rows of a table that a step logged (`StepRun.table`); empty where it is not kept."""
    table = _step_file(step, f"{name}.json")
    if not isinstance(table, dict):
        return []
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def _step_file(step: PastStep, name: str) -> Any:
    """A JSON file of the run that made a step; None where it is gone or cut short."""
    if not RUN_ID.fullmatch(step.made_by):
        return None
    found = _search(client(), f"attributes.run_id = '{step.made_by}'")
    artifacts = found[0].info.artifact_uri if found else ""
    path = _kept_file(client(), step.made_by, artifacts, name) if found else None
    try:
        return None if path is None else json.loads(path.read_bytes())
    except ValueError:
        return None


def _kept_file(runs: PatientClient, run_id: str, artifacts: str, name: str) -> Path | None:
    """A file of a run; None where it keeps no such file."""
    names = {file.path for file in runs.list_artifacts(run_id)}
    return open_uri(f"{artifacts}/{name}") if name in names else None


def _client(store: str | None) -> PatientClient:
    return client() if store is None else PatientClient(store)


def _search(
    runs: PatientClient, condition: str, most: int = 1000, store: str | None = None
) -> list[Any]:
    """The runs that meet a condition, newest first."""
    ids = experiment_ids(runs, find_project().home if store is None else None)
    if not ids:
        return []
    order = ["attributes.start_time DESC"]
    return list(runs.search_runs(ids, condition, max_results=most, order_by=order))


def _bare(run: Any) -> PastRun:
    data = run.data
    return PastRun(
        run_id=run.info.run_id,
        name=run.info.run_name,
        status=run.info.status,
        artifacts=run.info.artifact_uri,
        tags=dict(data.tags),
        params=dict(data.params),
        metrics=dict(data.metrics),
        steps={},
    )


def _past_run(runs: PatientClient, run: Any, store: str | None) -> PastRun:
    below = _search(runs, f"tags.`mlflow.parentRunId` = '{run.info.run_id}'", store=store)
    # Oldest first: a step that was tried again counts as it ended.
    finished = [child for child in reversed(below) if child.info.status == "FINISHED"]
    steps = {
        child.data.tags["plumbline.step"]: _past_step(runs, child, store)
        for child in finished
        if "plumbline.step" in child.data.tags
    }
    bare = _bare(run)
    return bare._replace(steps=steps, metrics={**_all_metrics(runs, bare), **bare.metrics})


def _all_metrics(runs: PatientClient, run: PastRun) -> dict[str, float]:
    """The final metrics of all steps; the run itself has the headline alone."""
    try:
        path = _kept_file(runs, run.run_id, run.artifacts, "summary.json")
        found = {} if path is None else json.loads(path.read_bytes())["metrics"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    # JSON has no word for what is not a number.
    return {name: math.nan if value is None else float(value) for name, value in found.items()}


def _past_step(runs: PatientClient, step: Any, store: str | None) -> PastStep:
    tags = step.data.tags
    return PastStep(
        run_id=step.info.run_id,
        key=tags.get("plumbline.key"),
        digest=_digest(runs, step, store),
        made_by=tags.get("cache.source_run_id", step.info.run_id),
        datasets=tuple(
            (f"{read.dataset.name} ({_context(read)})", read.dataset.digest)
            for read in step.inputs.dataset_inputs
        ),
    )


def _context(read: Any) -> str:
    """What a data set was read for."""
    return next((tag.value for tag in read.tags if tag.key == "mlflow.data.context"), "")


def _digest(runs: PatientClient, step: Any, store: str | None) -> str | None:
    """The digest that a step's run notes, or that the run notes which a cached step points to."""
    digest: str | None = step.data.tags.get("plumbline.digest")
    source = step.data.tags.get("cache.source_run_id", "")
    if digest is None and RUN_ID.fullmatch(source):
        found = _search(runs, f"attributes.run_id = '{source}'", store=store)
        digest = found[0].data.tags.get("plumbline.digest") if found else None
    return digest
