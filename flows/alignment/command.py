"""The command `plumbline run`: checks, a look for what is done, then the flow."""

import time
from collections.abc import Sequence
from typing import cast

from rich.console import Console

from flows.alignment.planning import pinned_data
from flows.alignment.summary import RunSummary
from flows.alignment.up_to_date import up_to_date
from flows.uncollected import uncollected
from plumbline.errors import ParamsError
from plumbline.params.loader import Loaded, load_experiment
from plumbline.params.schema import StepName
from plumbline.project import Project
from plumbline.refs import DataVersion


def run_experiment(
    project: Project,
    console: Console,
    experiment: str,
    overrides: Sequence[str],
    refresh: Sequence[str],
    *,
    allow_dirty: bool,
    record: bool,
) -> RunSummary:
    """Run an experiment, or say what earlier runs brought out if nothing is to do.

    Args:
        project: the project.
        console: is told that the run starts.
        experiment: name of a file in params/, or its path.
        overrides: each KEY=VALUE.
        refresh: steps to run again although nothing changed.
        allow_dirty: accept data that differs from data.dvc.
        record: make a tracked run even if nothing is to do.

    Raises:
        ParamsError, DataError, MachineError: the experiment can't run; nothing was started.
    """
    started = time.perf_counter()
    loaded = load_experiment(experiment, project.params, overrides)
    data = pinned_data(project, loaded.experiment, allow_dirty=allow_dirty)
    if not (refresh or record) and (done := _nothing_to_do(project, loaded, data, started)):
        return done
    _preflight(project, loaded)
    console.print(f"[bold]{experiment}[/bold]: starting Prefect and MLflow …")
    return _align(project, experiment, overrides, refresh, allow_dirty)


def _nothing_to_do(
    project: Project, loaded: Loaded, data: DataVersion, started: float
) -> RunSummary | None:
    try:
        return up_to_date(project, loaded, data, started)
    except ParamsError:
        # A key can't be made; the checks before a run say more of the reason.
        return None


def _preflight(project: Project, loaded: Loaded) -> None:
    """Find what would stop the run, before any server starts."""
    # It imports pandas, which a run with nothing to do need not wait for.
    from plumbline.checks import check_experiment, check_tables
    from tasks.disk import check_room
    from tasks.sources import note_functions

    note_functions(loaded.experiment.functions())
    check_experiment(loaded.experiment, project.root)
    check_tables(loaded.experiment, project.root)
    check_room(project.home, loaded.experiment, project.root)


def _align(
    project: Project,
    experiment: str,
    overrides: Sequence[str],
    refresh: Sequence[str],
    allow_dirty: bool,
) -> RunSummary:
    from flows.services.prefect_server import join_server
    from tasks.sources import read_sources

    join_server(project.home)
    # Before the imports, so that an edit in between is seen.
    read_sources()
    # The server starts beside these imports, which take as long.
    with uncollected():
        from flows.alignment.flow import align
        from flows.alignment.place import flow_tags
        from flows.services.calling import calling

    with calling(project.home, *flow_tags()):
        return align(experiment, list(overrides), cast(list[StepName], [*refresh]), allow_dirty)
