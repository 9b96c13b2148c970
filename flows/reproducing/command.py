"""Making a tracked run again, from its commit, its params and its data, away from the user's tree.

A reproduction has a folder of its own, HOME/reproduce/RUN_ID: project/ holds the files of the
commit and the data, home/ what the run generates. One that was broken off goes on where it was.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from flows.comparing.choosing import what_there_is
from flows.environment import database_uri
from flows.reproducing.agreement import Agreement, compare
from flows.reproducing.rebuilding import EXPERIMENT, Rebuilt, environment, rebuild
from plumbline.errors import DataError, MachineError, ParamsError, PlumblineError, TrainingError
from plumbline.project import Project
from tasks import past_runs, revisions
from tasks.locks import Busy, step_lock
from tasks.past_runs import PastRun

GRACE_SECONDS = 25.0
"""A run that is told to stop has so long to save its state."""
REMOVAL_SECONDS = 15.0
"""A server that the run had started still writes a little after its end."""


def reproduce(
    project: Project, run_id: str, *, allow_dirty: bool = False, keep: bool = False
) -> Agreement:
    """Run a past pipeline run again from what it was made of, and compare the two.

    Args:
        project: the project that tracked the run.
        run_id: MLflow's id of the pipeline run.
        allow_dirty: take the commit although files had been edited since when the run was made.
        keep: leave the reproduction's folder although every digest agrees.

    Raises:
        ParamsError: there is no such run, or it was not made from a commit that is here.
        DataError: the data that it was made from can't be had.
        MachineError: another process reproduces the same run.
        TrainingError: the run fails.
    """
    original = _finished_run(run_id)
    notes = _check_origin(project, original, allow_dirty)
    folder = project.home / "reproduce" / run_id
    try:
        with step_lock(project.home, f"reproduce-{run_id}", wait=False):
            if _finished_mark(folder).exists():
                _remove(folder)
            _sweep(folder.parent)
            rebuilt = rebuild(project, original, folder, notes)
            reproduced = _run(project, rebuilt)
            homes = (project.home, rebuilt.home)
            found = compare(original, reproduced, homes, rebuilt.notes)
            if found.agrees and not keep:
                _remove(folder)
                return found
            found = found.model_copy(update={"folder": str(folder)})
            _mark_finished(folder, found)
            return found
    except Busy as busy:
        raise MachineError(
            f"Another process is reproducing {run_id}; wait until it has ended. ({busy})"
        ) from None


def _finished_run(run_id: str) -> PastRun:
    run = past_runs.find_run(run_id)
    if run is None:
        raise ParamsError(f"no run {run_id} in MLflow{what_there_is(run_id)}")
    if run.tags.get("plumbline.kind") != "pipeline":
        parent = run.tags.get("mlflow.parentRunId")
        below = f"it is a step of {parent}; reproduce that" if parent else "it is another kind"
        if run.tags.get("plumbline.kind") == "sweep":
            below = "it is a sweep; reproduce the run of one of its points"
        raise ParamsError(f"{run_id} ({run.name}): expected the run of a pipeline; {below}")
    if run.status != "FINISHED":
        raise ParamsError(
            f"{run_id} ({run.name}) is {run.status}: expected a finished run, since the others "
            f"have no results to compare{what_there_is(run_id)}"
        )
    return run


def _check_origin(project: Project, run: PastRun, allow_dirty: bool) -> list[str]:
    """Refuse what can't be rebuilt; returns what the reader must know of what can."""
    commit = run.tags.get("git.commit")
    if commit is None or "data.rev" not in run.tags:
        missing = "git.commit" if commit is None else "data.rev"
        raise ParamsError(
            f"{run.name}: has no tag {missing}, so what it was made from is not known. Runs in a "
            "git repository with DVC data can be reproduced."
        )
    if not revisions.has_commit(project.root, commit):
        raise ParamsError(
            f"{run.name}: was made from commit {commit}, which this repository does not have. "
            f"Fetch it (`git fetch origin {commit}`), or run this where it was made."
        )
    if run.tags.get("data.dirty") == "true":
        raise DataError(
            f"{run.name}: ran with --allow-dirty on data that differed from data.dvc, and nothing "
            "has kept that data. Runs on data that was added with `dvc add data` can be reproduced."
        )
    if run.tags.get("git.dirty") != "true":
        return []
    if not allow_dirty:
        raise ParamsError(
            f"{run.name}: files of commit {commit[:12]} had been edited when it ran, and nothing "
            "has kept the edits. With --allow-dirty the commit is taken as it is: where the edits "
            "changed a result, its digest differs."
        )
    return [
        f"files of commit {commit[:12]} had been edited when the original ran; the commit was "
        "taken as it is, so a digest that differs may be the work of those edits"
    ]


def _run(project: Project, rebuilt: Rebuilt) -> PastRun:
    """Run the experiment in the rebuilt project; returns what its own MLflow store says of it."""
    command = [sys.executable, "-m", "flows.cli", "run", EXPERIMENT]
    log = rebuilt.folder / "output.txt"
    env = {**environment(project, rebuilt.tree), "PLUMBLINE_HOME": str(rebuilt.home)}
    with log.open("a", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            cwd=rebuilt.tree,
            env=env,
            stdin=subprocess.DEVNULL,
            # Its closing words name models and commands of a folder that will not stay.
            stdout=output,
            # A Ctrl-C is for this process, which passes it on once.
            start_new_session=True,
        )
        try:
            code = process.wait()
        except BaseException:
            _stop(process)
            raise
    if code != 0:
        raise TrainingError(
            f"The reproduction failed with exit code {code}; its messages are above and in {log}. "
            f"Its folder, {rebuilt.folder}, is kept: the same command goes on from there."
        )
    store = database_uri(rebuilt.home)
    for made in past_runs.last_pipelines(1, store):
        if (found := past_runs.find_run(made.run_id, store)) is not None:
            return found
    raise PlumblineError(
        f"The reproduction ended well, but left no run in {store}. Its output is in {log}."
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Let a run save its state and end; then end it, and what it may have left running."""
    process.terminate()
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _finished_mark(folder: Path) -> Path:
    return folder / "agreement.json"


def _mark_finished(folder: Path, found: Agreement) -> None:
    """The next reproduction of the run begins anew, and does not find this one's results."""
    aside = folder / ".agreement"
    aside.write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")
    aside.replace(_finished_mark(folder))


def _remove(folder: Path) -> None:
    """Remove a reproduction: out of sight at once, then file by file."""
    gone = folder.with_name(f".{folder.name}-{os.getpid()}")
    folder.rename(gone)
    deadline = time.monotonic() + REMOVAL_SECONDS
    while gone.exists() and time.monotonic() < deadline:
        shutil.rmtree(gone, ignore_errors=True)
        if gone.exists():
            time.sleep(0.5)


def _sweep(folder: Path) -> None:
    """Remove what earlier removals had to leave."""
    for gone in folder.glob(".*"):
        shutil.rmtree(gone, ignore_errors=True)
