"""A tracked run's project as it was: code and params of its commit, data of its revision.

Nothing of the user's working tree is changed, and nothing of it is used but what is in no commit:
a pretrained model, which is said.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from plumbline.errors import DataError, ParamsError, PlumblineError
from plumbline.project import Project
from tasks import past_runs, revisions
from tasks.past_runs import PastRun

EXPERIMENT = "reproduced"
"""Name of the params file that a reproduction runs."""

PACKAGES = {"plumbline": "src/plumbline", "tasks": "tasks", "flows": "flows"}
"""The project's own code: its packages, and their folders in the repository."""


class Rebuilt(NamedTuple):
    """A run's project as it was, in a folder of its own."""

    folder: Path
    notes: list[str]
    """What of it is not as it was, or can't be known to be."""

    @property
    def tree(self) -> Path:
        """Code, params and data."""
        return self.folder / "project"

    @property
    def home(self) -> Path:
        """What the run generates."""
        return self.folder / "home"


def rebuild(project: Project, run: PastRun, folder: Path, notes: list[str]) -> Rebuilt:
    """Write a run's project as it was into a folder, whole or not at all.

    Args:
        project: the project that tracked the run.
        run: with the tags git.commit and data.rev; the repository has the commit.
        folder: holds nothing, or what an earlier call has left.
        notes: what is known already.

    Raises:
        DataError: the data can't be had.
        ParamsError: the params, or the version of the code, can't be had.
        PlumblineError: git can't read the commit, or other code than its own would run.
    """
    tree = folder / "project"
    if not tree.is_dir():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        aside = folder / ".project"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        revisions.write_tree(project.root, run.tags["git.commit"], aside)
        _write_data(project, run, aside)
        _write_experiment(run, aside)
        aside.rename(tree)
    about_model = _link_model(project, run, tree)
    return Rebuilt(folder, [*notes, *about_model, *_check_code(project, tree, run)])


def _write_data(project: Project, run: PastRun, tree: Path) -> None:
    pin, commit = run.tags["data.rev"], run.tags["git.commit"]
    source = revisions.commit_with_pin(project.root, commit, pin)
    if source is None:
        raise DataError(
            f"{run.name}: ran on the data {pin}, which no commit's data.dvc pins, so DVC can't "
            "read it. Where data.dvc still pins it, commit data.dvc, then try again."
        )
    revisions.write_data(project.root, source, pin, tree)


def _write_experiment(run: PastRun, tree: Path) -> None:
    """Write the run's experiment as a params file: as it was resolved, or else by its parts."""
    resolved = past_runs.resolved_experiment(run)
    values = acting(resolved, run.params) if resolved is not None else _by_parts(run, tree)
    (tree / "params").mkdir(exist_ok=True)
    # Every JSON value is the same value in YAML.
    text = json.dumps(values, ensure_ascii=False, indent=1)
    (tree / "params" / f"{EXPERIMENT}.yaml").write_text(text + "\n", encoding="utf-8")


def acting(
    experiment: Mapping[str, Any], names: Collection[str], prefix: str = ""
) -> dict[str, Any]:
    """The values of a resolved experiment that act: those whose dotted names are among `names`.

    A params file may not name the others, and a run logs no others.
    """
    values: dict[str, Any] = {}
    for name, value in experiment.items():
        if isinstance(value, Mapping):
            if below := acting(value, names, f"{prefix}{name}."):
                values[name] = below
        elif f"{prefix}{name}" in names:
            values[name] = value
    return values


def _by_parts(run: PastRun, tree: Path) -> dict[str, Any]:
    """What a run was asked for that kept no resolved experiment: a file and changes to it."""
    name = run.tags["plumbline.experiment"]
    if not (tree / "params" / f"{name}.yaml").is_file():
        raise ParamsError(
            f"{run.name}: ran params/{name}.yaml, which commit {run.tags['git.commit'][:12]} does "
            "not have, and it kept no resolved experiment. Runs whose params are committed can be "
            "reproduced."
        )
    values: dict[str, Any] = {"extends": f"{name}.yaml"}
    for key, value in json.loads(run.tags.get("plumbline.overrides", "{}")).items():
        *sections, last = key.split(".")
        section = values
        for part in sections:
            section = section.setdefault(part, {})
        section[last] = value
    return values


def _link_model(project: Project, run: PastRun, tree: Path) -> list[str]:
    """Show the tree a pretrained model that lies in the project's folder but in no commit."""
    path = Path(run.params.get("model.path", "None"))
    outside, inside = project.root / path, tree / path
    if path.is_absolute() or not outside.exists() or inside.exists():
        return [] if not inside.is_symlink() else [_about_model(path)]
    inside.parent.mkdir(parents=True, exist_ok=True)
    inside.symlink_to(outside)
    return [_about_model(path)]


def _about_model(path: Path) -> str:
    return (
        f"the model {path} is in no commit and was read where it is now; the digest of base_model "
        "says whether it is what it was"
    )


def _check_code(project: Project, tree: Path, run: PastRun) -> list[str]:
    """Make sure that the commit's own code would run, or else that the installed one is the same.

    Raises:
        ParamsError: it is another version.
        PlumblineError: the commit's code is there, and other code would be imported.
    """
    if not all((tree / folder / "__init__.py").is_file() for folder in PACKAGES.values()):
        then, now = run.tags.get("version.plumbline"), version("plumbline")
        if then != now:
            raise ParamsError(
                f"{run.name}: ran Plumbline {then}, and {now} is installed. Its commit does not "
                f"hold the code, so install that version first: pip install plumbline=={then}"
            )
        return [
            f"the commit does not hold Plumbline's code, so the installed one ran: version {now}, "
            "as then"
        ]
    names = ", ".join(PACKAGES)
    ask = f"import json, {names}; print(json.dumps([m.__file__ for m in ({names})]))"
    asked = subprocess.run(
        [sys.executable, "-c", ask],
        cwd=tree,
        env=environment(project, tree),
        capture_output=True,
        check=False,
    )
    found = json.loads(asked.stdout) if asked.returncode == 0 else []
    if not found or not all(Path(file).resolve().is_relative_to(tree.resolve()) for file in found):
        said = ", ".join(found) or asked.stderr.decode(errors="replace").strip()
        raise PlumblineError(
            f"The code of commit {run.tags['git.commit'][:12]} would not run: expected its "
            f"packages to be imported from {tree}, got {said}. Install Plumbline without a hook "
            "that comes before PYTHONPATH."
        )
    return []


def environment(project: Project, tree: Path) -> dict[str, str]:
    """This process's environment, but nothing in it points to the project's own files.

    What names a server of Prefect's stays; the results never live there.
    """
    kept = {}
    for name, value in os.environ.items():
        ours = name.startswith(("PLUMBLINE_", "MLFLOW_", "DVC_", "PREFECT_"))
        ours = ours and not name.startswith("PREFECT_API_")
        if not ours and not value.startswith(str(project.home)):
            kept[name] = value
    paths = [str(tree / "src"), str(tree)]
    for entry in filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        path = Path(entry).resolve()
        if path.is_relative_to(project.root):
            path = tree / path.relative_to(project.root)
        paths.append(str(path))
    kept["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    # The tree may lie inside the user's repository, and is no part of it.
    kept["GIT_CEILING_DIRECTORIES"] = str(tree.parent)
    return kept
