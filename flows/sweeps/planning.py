"""What a sweep would do, and what must be right before it starts; imports no framework."""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from flows.alignment.planning import finished, make_plan
from flows.alignment.summary import RunSummary
from flows.alignment.up_to_date import cached_step
from flows.alignment.wiring import wiring
from flows.sweeps.summary import PointSummary, SweepSummary, conclude, finished_point
from plumbline.errors import DataError, ParamsError
from plumbline.params.schema import Experiment, StepName
from plumbline.params.sweep import LoadedSweep, Point
from plumbline.project import Project
from plumbline.refs import DataVersion, RegistrationRef
from tasks.aliases import noted_version
from tasks.data_version import current_version, pull_missing
from tasks.disk import check_room
from tasks.keys import Pending, ingredients
from tasks.sources import note_functions

Data = Mapping[str, DataVersion]
"""The verified data sets of a sweep, by their paths."""


class PlannedStep(NamedTuple):
    """What would happen to a step of a point."""

    action: Literal["run", "cached", "unknown", "shared"]
    because: str
    shared_with: int | None = None
    """The first point that makes it."""


def verified_data(project: Project, loaded: LoadedSweep, *, allow_dirty: bool) -> dict[str, Any]:
    """The data sets of all points as data.dvc pins them.

    Raises:
        DataError: one is missing, or differs.
    """
    pull_missing(project.root)
    paths = dict.fromkeys(point.experiment.data.path for point in loaded.points)
    return {path: current_version(project.root, path, allow_dirty=allow_dirty) for path in paths}


def check_points(project: Project, loaded: LoadedSweep) -> None:
    """Find what would stop any of the points, before the first one starts.

    Raises:
        ParamsError: a point names a model or a function that is not there.
        DataError: a data set lacks a table.
        MachineError: the disk has no room for all points.
    """
    # It imports pandas, which a plan and a sweep with nothing to do need not wait for.
    from plumbline.checks import check_experiment, check_tables

    def note(experiment: Experiment, root: Path) -> None:
        note_functions(experiment.functions())

    for check in (note, check_experiment, check_tables):
        faults: dict[str, Point] = {}
        for point in loaded.points:
            try:
                check(point.experiment, project.root)
            except (ParamsError, DataError) as error:
                kind = type(error)
                faults.setdefault(str(error), point)
        if faults:
            raise kind(
                "\n".join(f"point {p.number} ({p.label}): {line}" for line, p in faults.items())
            )
    for point in loaded.points:
        check_room(project.home, point.experiment, project.root, runs=len(loaded.points))


def finished_sweep(
    project: Project, loaded: LoadedSweep, data: Data, started: float
) -> SweepSummary | None:
    """What a sweep would bring out, if it has nothing to do: no step to run, no alias to move.

    Args:
        project: the project.
        loaded: the sweep.
        data: the verified data.
        started: when the command began, `time.perf_counter()`.
    """
    points = []
    for point in loaded.points:
        found = _finished_point(project, point, data[point.experiment.data.path])
        if found is None:
            return None
        points.append(found)
    summary = conclude(
        loaded,
        points,
        mlflow_run_id=None,
        prefect_flow_run_id=None,
        seconds=round(time.perf_counter() - started, 3),
        report=None,
    )
    best = summary.registered
    if best and noted_version(project.home, best["name"], best["alias"]) != best["version"]:
        return None
    return summary


def _finished_point(project: Project, point: Point, data: DataVersion) -> PointSummary | None:
    try:
        steps = finished(project, point.experiment, data)
    except ParamsError:
        # A key can't be made; the checks before a run say more of the reason.
        return None
    if steps is None:
        return None
    made = steps["register"].result
    assert isinstance(made, RegistrationRef)
    run = RunSummary(
        experiment="",
        data={},
        mlflow_run_id=None,
        prefect_flow_run_id=None,
        seconds=0.0,
        steps={name: cached_step(step) for name, step in steps.items()},
        metrics={k: v for step in steps.values() for k, v in step.result.metrics.items()},
        report=None,
        samples=[],
        registered={"name": made.name, "version": made.version},
    )
    return finished_point(point, run, 0.0)


def plan_sweep(
    project: Project, loaded: LoadedSweep, data: Data
) -> dict[int, dict[StepName, PlannedStep]]:
    """Say for every step of every point whether it would run; what points share runs once."""
    plan: dict[int, dict[StepName, PlannedStep]] = {}
    makers: dict[str, int] = {}
    for point in loaded.points:
        version = data[point.experiment.data.path]
        planned = make_plan(project, point.experiment, version)
        names = _lineages(point.experiment, version)
        plan[point.number] = {}
        for step, (action, because) in planned.items():
            maker = makers.setdefault(names[step], point.number)
            if action != "cached" and maker != point.number:
                shared = PlannedStep("shared", f"made by point {maker}", maker)
                plan[point.number][step] = shared
            else:
                plan[point.number][step] = PlannedStep(action, because)
    return plan


def _lineages(experiment: Experiment, data: DataVersion) -> dict[str, str]:
    """A digest a step of all that it is made from, without the outputs of the steps before it.

    Steps with equal digests have equal cache keys, whatever those outputs will be.
    """
    lineages: dict[str, str] = {}
    results: dict[str, Any] = {"data": data}
    for step, make_arguments in wiring(experiment).items():
        arguments = make_arguments(results)
        before = {
            name: lineages[value.step]
            for name, value in arguments.items()
            if isinstance(value, Pending)
        }
        text = json.dumps([step, ingredients(step, arguments), before], sort_keys=True)
        lineages[step] = hashlib.sha256(text.encode()).hexdigest()
        results[step] = Pending(step)
    return lineages


def show_plan(
    console: Console, loaded: LoadedSweep, plan: Mapping[int, Mapping[StepName, PlannedStep]]
) -> None:
    """Print the plan of a sweep: a row a point, a column a step."""
    steps = list(dict.fromkeys(step for planned in plan.values() for step in planned))
    table = Table("", Column("point", no_wrap=True), box=None, pad_edge=False)
    for step in steps:
        # On two lines, so that all of them fit on a narrow terminal.
        table.add_column(step.replace("_", "_\n"), no_wrap=True)
    colours = {"run": "yellow", "cached": "green", "unknown": "cyan", "shared": "dim"}
    for point in loaded.points:
        cells = [_cell(plan[point.number].get(step)) for step in steps]
        table.add_row(
            str(point.number),
            Text(point.label),
            *(Text(text, colours.get(action, "")) for action, text in cells),
        )
    console.print(table)
    count: Counter[str] = Counter(
        step.action for planned in plan.values() for step in planned.values()
    )
    words = {
        "run": "to run",
        "shared": "shared with an earlier point",
        "cached": "cached",
        "unknown": "unknown until the steps before them have run",
    }
    console.print(", ".join(f"{count[key]} {text}" for key, text in words.items() if count[key]))


def _cell(step: PlannedStep | None) -> tuple[str, str]:
    if step is None:
        return "", "–"
    return step.action, f"as {step.shared_with}" if step.action == "shared" else step.action
