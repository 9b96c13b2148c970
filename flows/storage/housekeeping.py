"""What no kept run refers to any more, and its removal."""

import re
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple
from urllib.parse import urlparse

from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from plumbline.addresses import without_credentials
from plumbline.errors import MachineError
from plumbline.project import Project
from plumbline.refs import StepResult
from tasks import inventory
from tasks.experiments import is_own_store, store_uri
from tasks.inventory import Inventory, StoredModel
from tasks.locks import Busy, step_lock
from tasks.records import adapted_model, read_result, step_of

LEFT_OVER_SECONDS = 3600.0
"""A file aside that is younger than that may still be written to."""
ASIDE = re.compile(r"\.(writable-|.+\.)\d+")
"""Names of files that a process writes before it renames them, or to see whether it can."""
RUN_ID = re.compile(r"[0-9a-f]{32}")
UNREFERRED = "no kept run refers to it"
UNKNOWN = "MLflow does not know it"

Kind = Literal["record", "version", "model", "files", "checkpoints", "reproduction", "leftover"]


class Waste(NamedTuple):
    """Something to remove."""

    kind: Kind
    name: str
    why: str
    paths: tuple[Path, ...] = ()
    key: str = ""
    """Cache key of the step that it belongs to, under whose lock it goes."""
    size: int = 0
    """In bytes."""


class Kept(NamedTuple):
    """What stays: cache keys, MLflow's ids of runs and models."""

    keys: set[str]
    runs: set[str]
    models: set[str]
    oldest: float
    """When the oldest kept run started, in seconds since 1970."""


def find_waste(
    project: Project, keep_last: int | None = None, spared: Collection[str] = ()
) -> list[Waste]:
    """List what can go.

    Args:
        project: whose generated files are looked at.
        keep_last: keep what the newest finished runs use, so many of them, and all runs since
            the first of those; None keeps every result, and what is listed are orphans alone.
        spared: cache keys of results to keep besides.

    Raises:
        MachineError: MLflow's store is not the project's own.
    """
    # Files first: what appears after is not in the list, and what it belongs to is in the store.
    results = {
        path.name: read_result(project.results, step, path.name)
        for path in _inside(project.results)
        if (step := step_of(path.name))
    }
    files = [*_inside(artifacts_of(project))]
    models = [*_inside(artifacts_of(project) / "models")]
    stored = read_store(project)
    kept = _kept(stored, results, keep_last, spared)
    bases = (adapted_model(folder / "artifacts") for folder in models if folder.name in kept.models)
    kept.models.update(_model_id(base[0]) for base in bases if base)
    waste = [
        *_records(project, results, kept),
        *_versions(stored, kept),
        *_models(models, stored, kept),
        *_files_of_runs(files, stored, kept, orphans_only=keep_last is None),
        *_checkpoints(project, results, kept, orphans_only=keep_last is None),
        *_reproductions(project, stored, kept, orphans_only=keep_last is None),
        *_leftovers(project, results),
    ]
    return [one._replace(size=sum(map(_size, one.paths))) for one in waste]


def collect(project: Project, keep_last: int | None = None, *, delete: bool) -> list[Waste]:
    """List what can go, as `find_waste`, or remove it and list what is gone.

    Raises:
        MachineError: another gc is at work, or MLflow's store is not the project's own.
    """
    if not delete:
        return find_waste(project, keep_last)
    try:
        with step_lock(project.home, "gc", wait=False):
            return [*remove_waste(project, keep_last)]
    except Busy as busy:
        raise MachineError(f"Another gc holds {busy}: expected none; wait until it ends.") from busy


def remove_waste(project: Project, keep_last: int | None = None) -> Iterator[Waste]:
    """Remove what can go; yields each thing once it is gone.

    Records go first, each under its step's lock: from then on a run that needs the step makes it
    again. A run that had found one of them before says so in MLflow by the time it ends, and while
    it goes on, what the records named stays.
    """
    removed: list[Waste] = []
    for waste in find_waste(project, keep_last):
        if waste.kind == "record" and _remove_record(project, waste):
            removed.append(waste)
            yield waste
    # Asked before the second look, which then sees all that a run which is over has used.
    in_use = bool(removed and running(read_store(project)))
    spared = [path.name for path in _inside(project.results)]
    for waste in find_waste(project, keep_last, spared):
        named = waste.kind in ("model", "version", "files")
        if waste.kind != "record" and not (named and in_use) and _remove(project, waste):
            yield waste


def artifacts_of(project: Project) -> Path:
    """The folder of MLflow's artifacts."""
    return project.home / "mlartifacts"


def read_store(project: Project) -> Inventory:
    """What MLflow knows of the project's runs.

    Raises:
        MachineError: its store is not the project's own: others may use the same files.
    """
    if not is_own_store(project.home):
        raise MachineError(
            "gc works on the project's own MLflow store alone: expected MLFLOW_TRACKING_URI unset "
            f"or sqlite:///{project.home / 'mlflow.db'}, got "
            f"{without_credentials(store_uri())}. On a shared "
            "store delete runs and models in its UI, then run `mlflow gc`."
        )
    return inventory.take_inventory(project.home)


def running(stored: Inventory) -> list[str]:
    """Pipelines and promotions that have not ended, and sweeps, which will start more."""
    kinds = ("pipeline", "sweep", "promotion")
    return [run.run_id for run in stored.runs if run.kind in kinds and run.status == "RUNNING"]


def _kept(
    stored: Inventory,
    results: Mapping[str, StepResult | None],
    keep_last: int | None,
    spared: Collection[str],
) -> Kept:
    pipelines = [run for run in stored.runs if run.kind == "pipeline"]
    finished = [run.started for run in pipelines if run.status == "FINISHED"]
    oldest = finished[keep_last - 1] if keep_last and keep_last < len(finished) else 0
    alive = running(stored)
    recent = {
        run.run_id: run.status for run in pipelines if run.started >= oldest or run.run_id in alive
    }
    steps = [run for run in stored.runs if run.parent in recent or run.status == "RUNNING"]
    runs = {*recent, *(name for run in steps for name in (run.run_id, run.source))}
    models = _models_of_runs(stored, recent)
    models |= {one.model_id for one in stored.versions if one.aliases or keep_last is None}
    # Nobody knows which results a live run will ask for next.
    keys = {*spared, *(results if keep_last is None or alive else ())}
    keys |= {run.key for run in steps}
    for key, result in results.items():
        if result and (result.mlflow_run_id in runs or _model_id(result.uri) in models):
            keys.add(key)
    for result in (results.get(key) for key in keys):
        if result:
            runs.add(result.mlflow_run_id)
            models.add(_model_id(result.uri))
    return Kept(keys, runs, models, oldest / 1000)


def _models_of_runs(stored: Inventory, pipelines: Mapping[str, str]) -> set[str]:
    """Models that pipelines of these states use: all that one writes which goes on.

    One that broke off refers to the results of the steps that it finished, to no model beside.
    """
    used, written = set(), set()
    for run in stored.runs:
        state = pipelines.get(run.parent)
        if "RUNNING" in (state, run.status):
            written.add(run.run_id)
        if state in ("FINISHED", "RUNNING") and run.status == "FINISHED":
            used |= {run.run_id, run.source}
    return {
        model.model_id
        for model in stored.models
        if model.run_id in written or (model.run_id in used and model.status == "READY")
    }


def _records(
    project: Project, results: Mapping[str, StepResult | None], kept: Kept
) -> Iterator[Waste]:
    for key, result in results.items():
        if result is None or key not in kept.keys:
            why = "can't be read" if result is None else UNREFERRED
            paths = (project.results / key, project.home / "ingredients" / f"{key}.json")
            yield Waste("record", key, why, paths, key)


def _versions(stored: Inventory, kept: Kept) -> Iterator[Waste]:
    known = {model.model_id for model in stored.models}
    for version in stored.versions:
        gone = version.model_id not in known
        if not version.aliases and (gone or version.model_id not in kept.models):
            why = "its model is gone" if gone else UNREFERRED
            yield Waste("version", f"{version.name}/{version.version}", why)


def _models(folders: list[Path], stored: Inventory, kept: Kept) -> Iterator[Waste]:
    known = {model.model_id: model for model in stored.models}
    paths = {folder.name: (folder,) for folder in folders}
    for name in sorted({*known, *paths} - kept.models):
        yield Waste("model", name, _why_unkept(known.get(name)), paths.get(name, ()))


def _why_unkept(model: StoredModel | None) -> str:
    if model is None:
        return UNKNOWN
    if model.status == "READY":
        return f"{model.step}: {UNREFERRED}"
    return f"{model.step}: was never finished"


def _files_of_runs(
    folders: list[Path], stored: Inventory, kept: Kept, *, orphans_only: bool
) -> Iterator[Waste]:
    kinds = {run.run_id: run.kind for run in stored.runs}
    for folder in folders:
        if not RUN_ID.fullmatch(folder.name) or folder.name in kept.runs:
            continue
        if folder.name not in kinds:
            yield Waste("files", folder.name, "MLflow knows no such run", (folder,))
        elif kinds[folder.name] == "step" and not orphans_only:
            yield Waste("files", folder.name, UNREFERRED, (folder,))


def _checkpoints(
    project: Project,
    results: Mapping[str, StepResult | None],
    kept: Kept,
    *,
    orphans_only: bool,
) -> Iterator[Waste]:
    for folder in _inside(project.home / "checkpoints"):
        if results.get(folder.name) is not None:
            yield Waste("checkpoints", folder.name, "its step is finished", (folder,), folder.name)
        elif not orphans_only and _changed(folder) < kept.oldest:
            why = "nobody went on from it since the kept runs began"
            yield Waste("checkpoints", folder.name, why, (folder,), folder.name)


def _reproductions(
    project: Project, stored: Inventory, kept: Kept, *, orphans_only: bool
) -> Iterator[Waste]:
    """What `plumbline reproduce` has left: one that differed, was asked to stay, or broke off."""
    known = {run.run_id for run in stored.runs}
    for folder in _inside(project.home / "reproduce"):
        # Where that did not end, a process may have begun to remove the folder under another name.
        if not RUN_ID.fullmatch(folder.name):
            if _left(folder):
                name = _shown(project.home, folder)
                yield Waste("leftover", name, "a process left it half-removed", (folder,))
            continue
        lock = f"reproduce-{folder.name}"
        if folder.name not in known:
            yield Waste("reproduction", folder.name, UNKNOWN, (folder,), lock)
        elif not orphans_only and folder.name not in kept.runs:
            yield Waste("reproduction", folder.name, "its run is not kept", (folder,), lock)


def _leftovers(project: Project, results: Mapping[str, StepResult | None]) -> Iterator[Waste]:
    home = project.home
    aside = [path for path in _inside(home) if ASIDE.fullmatch(path.name)]
    aside += [path for path in _inside(project.reports) if path.name.startswith(".")]
    aside += [path for path in _inside(home / "ingredients") if path.name.startswith(".")]
    for path in aside:
        if _left(path):
            yield Waste("leftover", _shown(home, path), "a process left it half-written", (path,))
    for path in _inside(project.results):
        if step_of(path.name) is None and _left(path):
            yield Waste("leftover", _shown(home, path), "belongs to no step", (path,))
    for path in _inside(home / "ingredients"):
        if path.suffix == ".json" and path.stem not in results and _left(path):
            why = "its step left no result"
            yield Waste("leftover", _shown(home, path), why, (path,), path.stem)


def _remove_record(project: Project, waste: Waste) -> bool:
    """Remove a result's record, unless a run is at the step; says whether it is gone."""
    try:
        with step_lock(project.home, waste.key, wait=False):
            step = step_of(waste.key)
            assert step is not None
            # One that could not be read may have been in the midst of being written.
            whole = read_result(project.results, step, waste.key) is not None
            if whole and waste.why != UNREFERRED:
                return False
            _delete(waste.paths)
            return True
    except Busy:
        return False


def _remove(project: Project, waste: Waste) -> bool:
    """Remove what no record is; says whether it is gone."""
    if waste.kind == "version":
        inventory.remove_version(*waste.name.split("/"))
    # First from what MLflow offers: a model that is not whole should never be on offer.
    if waste.kind == "model" and waste.why != UNKNOWN:
        inventory.remove_model(waste.name)
    if not waste.key:
        _delete(waste.paths)
        return True
    try:
        with step_lock(project.home, waste.key, wait=False):
            _delete(waste.paths)
            return True
    except Busy:
        return False


def _delete(paths: Collection[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _model_id(uri: str) -> str:
    """MLflow's id of the logged model that a URI names; of another URI something else."""
    return PurePosixPath(urlparse(uri).path).parent.name


def _inside(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _size(path: Path) -> int:
    if not path.is_dir():
        return path.stat().st_size if path.exists() else 0
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _changed(folder: Path) -> float:
    """When a folder or something in it changed last."""
    return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))


def _left(path: Path) -> bool:
    return time.time() - path.lstat().st_mtime > LEFT_OVER_SECONDS


def _shown(home: Path, path: Path) -> str:
    return path.relative_to(home).as_posix()


def waste_table(waste: Collection[Waste]) -> Table:
    """What, why and how much, with the sum."""
    total = decimal(sum(one.size for one in waste))
    table = Table("what", "why", "size", box=None, pad_edge=False)
    table.columns[-1].justify = "right"
    for one in waste:
        table.add_row(Text(f"{one.kind} {one.name}"), Text(one.why), decimal(one.size))
    table.add_row(f"[bold]{len(waste)} in all[/bold]", "", f"[bold]{total}[/bold]")
    return table
