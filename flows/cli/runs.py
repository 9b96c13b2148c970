"""Experiments and sweeps: `run`, `plan`, `sweep`, `experiments`."""

from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.table import Table
from rich.text import Text

from flows.cli.common import (
    FAILED,
    JsonFile,
    Overrides,
    err,
    looking,
    out,
    working,
    write_json,
    writing,
)
from plumbline.errors import ParamsError
from plumbline.project import Project

ExperimentName = Annotated[str, typer.Argument(help="A file in params/, by name or path.")]
Refresh = Annotated[list[str], typer.Option(metavar="STEP", help="Run this step again.")]
AllowDirty = Annotated[
    bool, typer.Option("--allow-dirty", help="Accept data that differs from data.dvc.")
]


def run(
    experiment: ExperimentName,
    overrides: Overrides = [],  # noqa: B006  typer reads the default, nobody writes to it
    refresh: Refresh = [],  # noqa: B006
    json_file: JsonFile = None,
    allow_dirty: AllowDirty = False,
    record: Annotated[
        bool, typer.Option("--record", help="Make a tracked run even if nothing is to do.")
    ] = False,
) -> None:
    """Run an experiment; steps whose inputs did not change come from the cache."""
    with working(json_file) as project:
        _check_steps(refresh)
        from flows.alignment.command import run_experiment

        done = run_experiment(
            project, err, experiment, overrides, refresh, allow_dirty=allow_dirty, record=record
        )
        write_json(json_file, done.model_dump(mode="json", exclude={"samples"}))
        from flows.alignment.closing import show_run

        show_run(out, project, done)


def plan(
    experiment: ExperimentName,
    overrides: Overrides = [],  # noqa: B006
    refresh: Refresh = [],  # noqa: B006
    json_file: JsonFile = None,
    allow_dirty: AllowDirty = False,
) -> None:
    """Say which steps a run would run, and why; starts nothing."""
    with writing(json_file) as project:
        _check_steps(refresh)
        from flows.alignment.planning import make_plan, pinned_data
        from plumbline.params.loader import find_params, is_sweep, load_experiment

        if is_sweep(find_params(experiment, project.params)):
            _plan_sweep(project, experiment, overrides, refresh, json_file, allow_dirty)
            return
        wanted = load_experiment(experiment, project.params, overrides).experiment
        data = pinned_data(project, wanted, allow_dirty=allow_dirty)
        planned = make_plan(project, wanted, data, refresh)
        write_json(json_file, {"steps": {name: s._asdict() for name, s in planned.items()}})
        table = Table("step", "action", "because", box=None, pad_edge=False)
        colours = {"run": "yellow", "cached": "green", "unknown": "cyan"}
        for name, step in planned.items():
            table.add_row(name, Text(step.action, colours[step.action]), Text(step.because))
        out.print(table)


def _plan_sweep(
    project: Project,
    name: str,
    overrides: list[str],
    refresh: list[str],
    json_file: Path | None,
    allow_dirty: bool,
) -> None:
    from flows.sweeps.planning import plan_sweep, show_plan, verified_data
    from plumbline.params.sweep import load_sweep

    if refresh:
        raise ParamsError(f"--refresh {refresh[0]}: a sweep has no step to refresh; plan a point")
    loaded = load_sweep(name, project.params, overrides)
    planned = plan_sweep(project, loaded, verified_data(project, loaded, allow_dirty=allow_dirty))
    points = [
        {
            "number": point.number,
            "label": point.label,
            "overrides": point.overrides,
            "steps": {name: s._asdict() for name, s in planned[point.number].items()},
        }
        for point in loaded.points
    ]
    write_json(json_file, {"points": points})
    show_plan(out, loaded, planned)


def sweep(
    name: Annotated[str, typer.Argument(help="A sweep in params/, by name or path.")],
    overrides: Annotated[
        list[str],
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change the sweep (sweep.best.metric=judge), or its experiment at every point.",
        ),
    ] = [],  # noqa: B006
    parallel: Annotated[
        int | None, typer.Option(min=1, max=64, help="Points that run at a time.")
    ] = None,
    json_file: JsonFile = None,
    allow_dirty: AllowDirty = False,
    record: Annotated[
        bool, typer.Option("--record", help="Make tracked runs even if nothing is to do.")
    ] = False,
) -> None:
    """Run an experiment at each point of a sweep; steps that points share run once."""
    with working(json_file) as project:
        from flows.sweeps.command import run_sweep
        from flows.sweeps.summary import show_sweep

        if parallel is not None:
            overrides = [*overrides, f"sweep.parallel={parallel}"]
        done = run_sweep(project, err, name, overrides, allow_dirty=allow_dirty, record=record)
        write_json(json_file, done.model_dump(mode="json"))
        show_sweep(out, project, done)
        if done.failed:
            raise typer.Exit(FAILED)


def experiments() -> None:
    """List the experiments and the sweeps in params/."""
    with looking() as project:
        from plumbline.params.loader import list_experiments
        from plumbline.params.sweep import list_sweeps

        for kind, items in (
            ("experiment", list_experiments(project.params)),
            ("sweep", list_sweeps(project.params)),
        ):
            table = Table(kind, "description", box=None, pad_edge=False)
            for item in items:
                table.add_row(
                    item.name, Text(item.error or item.description, "red" if item.error else "")
                )
            if items:
                out.print(table)


def _check_steps(steps: list[str]) -> None:
    from difflib import get_close_matches

    # It takes as long as all else that `--help` needs.
    from plumbline.params.schema import StepName

    known = get_args(StepName)
    for step in steps:
        if step not in known:
            near = get_close_matches(step, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ParamsError(f"--refresh {step}: no such step{hint} Steps: {', '.join(known)}")
