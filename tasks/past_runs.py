"""Past pipeline runs as MLflow remembers them: what they were made of, and what came of them."""

import json
import re
from typing import Any, NamedTuple

from tasks.mlflow_client import PatientClient, client
from tasks.tracking import EXPERIMENT, open_uri

RUN_ID = re.compile(r"[0-9a-f]{32}")


class PastStep(NamedTuple):
    """A finished step of a past run."""

    run_id: str
    key: str | None
    """Cache key; None where it was not noted."""
    digest: str | None
    """Digest of what it made; None where the run that made it is gone."""


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
    found = _search(runs, f"attributes.run_id = '{run_id}'")
    return _past_run(runs, found[0]) if found else None


def last_pipelines(count: int, store: str | None = None) -> list[PastRun]:
    """The newest finished pipeline runs, newest first, without their steps."""
    finished = "tags.`plumbline.kind` = 'pipeline' and attributes.status = 'FINISHED'"
    return [_bare(run) for run in _search(_client(store), finished)[:count]]


def resolved_experiment(run: PastRun) -> dict[str, Any] | None:
    """The whole experiment that a run of this project's store ran; None where it keeps none."""
    names = {file.path for file in client().list_artifacts(run.run_id)}
    if "experiment.json" not in names:
        return None
    path = open_uri(f"{run.artifacts}/experiment.json")
    experiment: dict[str, Any] = json.loads(path.read_bytes())
    return experiment


def _client(store: str | None) -> PatientClient:
    return client() if store is None else PatientClient(store)


def _search(runs: PatientClient, condition: str) -> list[Any]:
    """The runs that meet a condition, newest first."""
    experiment = runs.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return []
    order = ["attributes.start_time DESC"]
    return list(runs.search_runs([experiment.experiment_id], condition, order_by=order))


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


def _past_run(runs: PatientClient, run: Any) -> PastRun:
    below = _search(runs, f"tags.`mlflow.parentRunId` = '{run.info.run_id}'")
    # Oldest first: a step that was tried again counts as it ended.
    finished = [child for child in reversed(below) if child.info.status == "FINISHED"]
    steps = {
        child.data.tags["plumbline.step"]: PastStep(
            child.info.run_id, child.data.tags.get("plumbline.key"), _digest(runs, child)
        )
        for child in finished
        if "plumbline.step" in child.data.tags
    }
    return _bare(run)._replace(steps=steps)


def _digest(runs: PatientClient, step: Any) -> str | None:
    """The digest that a step's run notes, or that the run notes which a cached step points to."""
    digest: str | None = step.data.tags.get("plumbline.digest")
    source = step.data.tags.get("cache.source_run_id", "")
    if digest is None and RUN_ID.fullmatch(source):
        found = _search(runs, f"attributes.run_id = '{source}'")
        digest = found[0].data.tags.get("plumbline.digest") if found else None
    return digest
