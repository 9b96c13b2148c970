"""What MLflow's store holds: runs, logged models and registered versions; and taking them out."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from plumbline.process import alive
from tasks.experiments import experiment_ids, is_own_store
from tasks.mlflow_client import client
from tasks.tracking import PROCESS_TAG


class StoredRun(NamedTuple):
    """A run of a pipeline or of a step."""

    run_id: str
    kind: str
    """pipeline, step, sweep or promotion; empty of a run that is none of this project's."""
    status: str
    started: int
    """Milliseconds since 1970."""
    parent: str
    key: str
    """Cache key of a step that finished."""
    source: str
    """The run that a cached step points to."""


class StoredModel(NamedTuple):
    """A logged model."""

    model_id: str
    step: str
    status: str
    """READY, PENDING while it is written, FAILED."""
    run_id: str
    uri: str
    """Where its files are."""


class StoredVersion(NamedTuple):
    """A version of a registered model."""

    name: str
    version: str
    model_id: str
    digest: str
    """Of the model's content, as it was registered; empty where that was not noted."""
    aliases: tuple[str, ...]


class Inventory(NamedTuple):
    """All of it, at one time."""

    runs: list[StoredRun]
    """Newest first."""
    models: list[StoredModel]
    versions: list[StoredVersion]


def take_inventory(home: Path) -> Inventory:
    """Read the whole store; runs and models that were deleted in MLflow are not in it."""
    if is_own_store(home) and not _database(home).exists():
        return Inventory([], [], [])
    ids = experiment_ids(client(), home)
    if not ids:
        return Inventory([], [], [])
    # In this order: a run comes before its models, and a model before its versions.
    versions = list(_versions())
    models = list(_pages(client().search_logged_models, ids))
    runs = list(_pages(client().search_runs, ids, order_by=["attributes.start_time DESC"]))
    # A notebook may log to an experiment of its own beside ours.
    ours = {run.info.experiment_id for run in runs if "plumbline.kind" in run.data.tags}
    return Inventory(
        [_run(found) for found in runs if found.info.experiment_id in ours],
        [_model(found) for found in models if found.experiment_id in ours],
        versions,
    )


def remove_model(model_id: str) -> None:
    """Let MLflow offer a logged model no longer; its files stay."""
    client().delete_logged_model(model_id)


def remove_version(name: str, version: str) -> None:
    """Take a version out of the registry."""
    client().delete_model_version(name, version)


def _database(home: Path) -> Path:
    return home / "mlflow.db"


def _versions() -> Iterator[StoredVersion]:
    aliases = {
        (registered.name, str(version)): alias
        for registered in _pages(client().search_registered_models)
        for alias, version in registered.aliases.items()
    }
    for found in _pages(client().search_model_versions):
        # The registry is the whole store's; others may keep models in it.
        if "plumbline.run_id" not in found.tags:
            continue
        named = (found.name, str(found.version))
        yield StoredVersion(
            *named,
            model_id=str(found.source).removeprefix("models:/"),
            digest=found.tags.get("plumbline.digest", ""),
            aliases=tuple(alias for version, alias in aliases.items() if version == named),
        )


def _model(found: Any) -> StoredModel:
    return StoredModel(
        model_id=found.model_id,
        step=found.name,
        status=str(found.status),
        run_id=found.source_run_id or "",
        uri=found.artifact_location,
    )


def _run(found: Any) -> StoredRun:
    tags = found.data.tags
    # The next run closes it; until then MLflow takes it for running.
    dead = found.info.status == "RUNNING" and alive(tags.get(PROCESS_TAG, "")) is False
    return StoredRun(
        run_id=found.info.run_id,
        kind=tags.get("plumbline.kind", ""),
        status="KILLED" if dead else found.info.status,
        started=found.info.start_time,
        parent=tags.get("mlflow.parentRunId", ""),
        key=tags.get("plumbline.key", ""),
        source=tags.get("cache.source_run_id", ""),
    )


def _pages(search: Callable[..., Any], *arguments: Any, **options: Any) -> Iterator[Any]:
    """All that a search finds, page by page."""
    token = None
    while True:
        page = search(*arguments, **options, page_token=token)
        yield from page
        token = page.token
        if not token:
            return
