"""A look at all that is stored, byte by byte: results, logged models, registered versions."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

from plumbline.artifacts import Fault, Hasher, read_manifest
from plumbline.project import Project
from plumbline.refs import RegistrationRef, StepResult, file_digest
from tasks.inventory import StoredModel, StoredVersion, take_inventory
from tasks.records import (
    RESULT_TYPES,
    adapted_model,
    content_digest,
    faults,
    local_path,
    model_faults,
    read_result,
    step_of,
)

RUNS_AGAIN = "The step runs again as soon as a run needs it."
UNUSED = "No result names it any more: delete it in MLflow unless you can restore it."
RESTORE = "Restore it, or run the experiment again for a new version and delete this one in MLflow."


class Damage(NamedTuple):
    """Something that is not as it was made."""

    owners: list[str]
    """Whose it is: cache keys of steps, versions in the registry, ids of models."""
    what: str
    advice: str


class Verified(NamedTuple):
    """What a look at everything brought out."""

    damaged: list[Damage]
    looked_at: dict[str, int]
    """How many of each kind."""


class _Findings:
    """Damage by what it is, since one file may belong to several owners."""

    def __init__(self) -> None:
        self.damaged: dict[str, Damage] = {}

    def add(self, owner: str, what: Fault | str, advice: str) -> None:
        owners = self.damaged[str(what)].owners if str(what) in self.damaged else []
        self.damaged[str(what)] = Damage([*owners, owner], str(what), advice)


def verify_everything(project: Project) -> Verified:
    """Hash all that results, logged models and registered versions name, and compare.

    What is on a remote store is taken at its word.
    """
    hasher, found = cache(file_digest), _Findings()
    stored = take_inventory(project.home)
    versions = {(version.name, version.version) for version in stored.versions}
    results = dict(_results(project))
    for key, result in results.items():
        if result is None:
            found.add(key, _unreadable(project.results / key), RUNS_AGAIN)
            continue
        for fault in faults(result, hasher):
            found.add(key, fault, RUNS_AGAIN)
        if isinstance(result, RegistrationRef) and (result.name, result.version) not in versions:
            what = f"version {result.version} of {result.name} is gone from the registry"
            found.add(key, what, RUNS_AGAIN)
    named = {result.uri for result in results.values() if result}
    adapters = (adapted_model(path) for uri in named if (path := local_path(uri)))
    named |= {base[0] for base in adapters if base}
    others = [
        model for model in stored.models if model.status == "READY" and model.uri not in named
    ]
    for model in others:
        for fault in _model_faults(model.uri, "", hasher):
            found.add(model.model_id, fault, UNUSED)
    models = {model.model_id: model for model in stored.models}
    for version in stored.versions:
        for wrong in _version_faults(version, models.get(version.model_id), hasher):
            found.add(_called(version), wrong, RESTORE)
    looked_at = {
        "results": len(results),
        "other models": len(others),
        "registered versions": len(stored.versions),
    }
    return Verified([*found.damaged.values()], looked_at)


def _results(project: Project) -> Iterator[tuple[str, StepResult | None]]:
    if project.results.is_dir():
        for path in sorted(project.results.iterdir()):
            if step := step_of(path.name):
                yield path.name, read_result(project.results, step, path.name)


def _unreadable(path: Path) -> Fault:
    step = step_of(path.name)
    assert step is not None
    expected = f"a JSON record of a {RESULT_TYPES[step].__name__}"
    return Fault(path, "can't be read", expected, f"{path.stat().st_size} bytes of something else")


def _version_faults(
    version: StoredVersion, model: StoredModel | None, hasher: Hasher
) -> list[Fault | str]:
    if model is None:
        return [f"logged model {version.model_id} is gone from MLflow"]
    return [*_model_faults(model.uri, version.digest, hasher)]


def _model_faults(uri: str, digest: str, hasher: Hasher) -> list[Fault]:
    """Of a model; without a digest its manifest says all."""
    folder = local_path(uri)
    if folder is None:
        return []
    return model_faults(folder, digest or content_digest(read_manifest(folder)), hasher)


def _called(version: StoredVersion) -> str:
    aliases = "".join(f" @{alias}" for alias in version.aliases)
    return f"{version.name}/{version.version}{aliases}"


def show_verified(console: Console, found: Verified) -> None:
    """Print each damage with its owners and what to do, and what was looked at."""
    for damage in found.damaged:
        console.print(Text.assemble(("damaged ", "bold red"), damage.what), soft_wrap=True)
        console.print(Text(f"  needed by {', '.join(damage.owners)}"), soft_wrap=True)
        console.print(Text(f"  {damage.advice}"), soft_wrap=True)
    counts = ", ".join(f"{count} {kind}" for kind, count in found.looked_at.items())
    state = f"{len(found.damaged)} damaged" if found.damaged else "all as it was made"
    console.print(f"{counts}: {state}")
