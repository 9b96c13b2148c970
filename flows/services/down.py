"""`plumbline down`: end what `plumbline up` started; runs save a checkpoint first."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from pydantic import BaseModel

from flows.services.prefect_server import LASTING, USERS, closing_lasting
from flows.services.processes import (
    CHECKPOINT_SECONDS,
    FLOW_RUN,
    MLFLOW,
    PREFECT,
    WORKER,
    State,
    alone,
    answers,
    end,
    environment,
    members,
    read_state,
    service_names,
    write_state,
)
from plumbline.errors import MachineError, PlumblineError
from plumbline.project import Project

SERVER_SECONDS = 10.0
STOPPED = "Stopped by `plumbline down`; run again to go on from the last checkpoint."


class Ended(BaseModel):
    """What was ended."""

    services: list[str] = []
    """Names of the services that were alive."""
    runs: list[str] = []
    """Ids of the flow runs that were in progress."""
    killed: list[int] = []
    """Numbers of the processes that did not end by themselves in time."""


def take_down(project: Project, say: Callable[[str], None]) -> Ended:
    """End all services of a project, and wait until they are gone.

    Raises:
        MachineError: runs of the command line use the Prefect server.
        PlumblineError: a process can't be ended.
    """
    home = project.home
    with alone(home), closing_lasting(home) as used:
        if used:
            raise MachineError(
                f"Runs of the command line use the Prefect server ({_users(home)}): expected none, "
                "they would be cut off. Wait for them, or stop them with Ctrl-C, then try again."
            )
        state = read_state(home)
        ended = Ended(services=service_names(home))
        _end_workers(home, state, ended, say)
        for name in (MLFLOW, PREFECT):
            ended.killed += [one.pid for one in end(members(home, name), SERVER_SECONDS)]
        # Of a service that this version does not know.
        ended.killed += [one.pid for one in end(members(home), SERVER_SECONDS)]
        if left := members(home):
            raise PlumblineError(
                f"expected all services to end, got {_described(left)}. End them by hand."
            )
        write_state(home, state.model_copy(update={"services": {}}))
    return ended


def _end_workers(home: Path, state: State, ended: Ended, say: Callable[[str], None]) -> None:
    """End the workers with their runs.

    A worker that is told to end kills its runs at once. So it is held first, the runs are told to
    end and save their state, and the worker follows.
    """
    names = [name for name in ended.services if name.startswith(WORKER)]
    processes = [process for name in names for process in members(home, name)]
    workers = [process for process in processes if FLOW_RUN not in environment(process)]
    with _held(workers):
        # One may have been started until that moment.
        runs = [
            process
            for name in names
            for process in members(home, name)
            if FLOW_RUN in environment(process)
        ]
        ended.runs = sorted({environment(run)[FLOW_RUN] for run in runs})
        if ended.runs:
            say(f"stopping {len(ended.runs)} run(s); each saves a checkpoint first …")
        # What a run has started is the run's to end.
        inner = {run.pid for run in runs}
        first = [run for run in runs if _parent(run) not in inner]
        ended.killed += [one.pid for one in end(first, CHECKPOINT_SECONDS)]
        ended.killed += [one.pid for one in end(runs, 0.0) if one not in first]
        ended.killed += [one.pid for one in end(workers, SERVER_SECONDS)]
    _mark(state, ended.runs)


@contextmanager
def _held(processes: list[psutil.Process]) -> Iterator[None]:
    """Hold processes; those that are still there after the context go on."""
    for process in processes:
        with suppress(psutil.Error):
            process.suspend()
    try:
        yield
    finally:
        for process in processes:
            with suppress(psutil.Error):
                process.resume()


def _parent(process: psutil.Process) -> int | None:
    try:
        return int(process.ppid())
    except psutil.Error:
        return None


def _mark(state: State, runs: list[str]) -> None:
    """Close the flow runs that had no time to do it themselves."""
    service = state.services.get(PREFECT)
    if service is not None and service.address is not None:
        os.environ["PREFECT_API_URL"] = f"{service.address.url}/api"
    api = os.environ.get("PREFECT_API_URL")
    if not runs or not api or not answers(f"{api}/health"):
        return
    from flows.services.deploying import close_run

    for run in runs:
        close_run(run, STOPPED)


def _users(home: Path) -> str:
    """The processes that hold the server, in words."""
    path = str((home / "prefect" / USERS[LASTING]).resolve())
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if any(opened.path == path for opened in process.open_files()):
                found.append(process)
    return _described(found) if found else "of processes that this user may not see"


def _described(processes: list[psutil.Process]) -> str:
    words = []
    for process in processes:
        with suppress(psutil.Error):
            words.append(f"process {process.pid}: {' '.join(process.cmdline())[:120]}")
    return "; ".join(words)
