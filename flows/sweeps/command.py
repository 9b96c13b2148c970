"""The command `plumbline sweep`: checks, a look for what is done, then the flow."""

import time

from rich.console import Console

from flows.sweeps.planning import check_points, finished_sweep, verified_data
from flows.sweeps.summary import SweepSummary
from flows.uncollected import uncollected
from plumbline.params.sweep import load_sweep
from plumbline.project import Project


def run_sweep(
    project: Project,
    console: Console,
    name: str,
    overrides: list[str],
    *,
    allow_dirty: bool,
    record: bool,
) -> SweepSummary:
    """Run a sweep, or say what an earlier one brought out if nothing is to do.

    Args:
        project: the project.
        console: is told that the sweep starts.
        name: of a file in params/, or its path.
        overrides: each KEY=VALUE.
        allow_dirty: accept data that differs from data.dvc.
        record: make a tracked run even if nothing is to do.

    Raises:
        ParamsError, DataError, MachineError: a point can't run; nothing was started.
    """
    started = time.perf_counter()
    loaded = load_sweep(name, project.params, overrides)
    data = verified_data(project, loaded, allow_dirty=allow_dirty)
    if not record and (done := finished_sweep(project, loaded, data, started)):
        return done
    from flows.sweeps.points import warm_up

    # It imports what the points need beside the checks, and beside what is imported here.
    with warm_up(project.home).unless_failing():
        check_points(project, loaded)
    count = len(loaded.points)
    console.print(
        f"[bold]{loaded.name}[/bold]: {count} point{'s' if count > 1 else ''} of "
        f"{loaded.sweep.experiment}, {loaded.sweep.parallel} at a time; starting Prefect and "
        "MLflow …"
    )
    from flows.services.prefect_server import join_server

    join_server(project.home)
    with uncollected():
        from flows.services.calling import calling
        from flows.sweeps.flow import PointsFailed, sweep

    try:
        with calling(project.home):
            return sweep(name, list(overrides), allow_dirty)
    except PointsFailed as failure:
        return failure.summary
