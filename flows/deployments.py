"""What the deployments of prefect.yaml run: the flows of the command line, each behind a form.

Imports Prefect alone, so that the form is made, and a bad param refused, at once.
"""

from typing import Annotated, Any

from prefect import flow
from pydantic import WithJsonSchema

from flows.form import (
    as_overrides,
    experiment_schema,
    knobs_schema,
    overrides_schema,
    parallel_schema,
    sweep_schema,
)
from flows.naming import flow_run_name, sweep_run_name
from flows.summary import RunSummary
from flows.sweep_summary import SweepSummary
from plumbline.params.schema import StepName

Choice = Annotated[str, WithJsonSchema(experiment_schema())]
Knobs = Annotated[dict[str, Any], WithJsonSchema(knobs_schema())]
SweepChoice = Annotated[str, WithJsonSchema(sweep_schema())]
Parallel = Annotated[int | None, WithJsonSchema(parallel_schema())]
Overrides = Annotated[list[str], WithJsonSchema(overrides_schema())]
DataRev = Annotated[str, WithJsonSchema({"type": "string", "pattern": r"^([0-9a-f]{32}\.dir)?$"})]


# Under the name of the command line's flow, so that all its runs stand together.
@flow(name="align", flow_run_name=flow_run_name, persist_result=False)
def align(
    experiment: Choice = "quickstart",
    params: Knobs = {},  # noqa: B006  Prefect reads the default, nobody writes to it
    overrides: Overrides = [],  # noqa: B006
    refresh: list[StepName] = [],  # noqa: B006
    allow_dirty: bool = False,
    data_rev: DataRev = "",
) -> RunSummary:
    """Run an alignment experiment; steps whose inputs did not change come from the cache.

    Args:
        experiment: A file in params/. One that is new appears here after `plumbline up`.
        params: What to change of it; a field that is left empty stays as the experiment says.
        overrides: Changes to any other params, each as KEY=VALUE, for example sft.batch_size=8.
        refresh: Steps to run again although nothing changed.
        allow_dirty: Accept data that differs from data.dvc, and tag the run so.
        data_rev: The version of the data to run on, as data.dvc names it (….dir), whatever is in
            data/ by then. Empty: the one of data.dvc. `data-watch` fills it in.
    """
    from plumbline.params.loader import load_experiment
    from plumbline.project import find_project, make_home
    from tasks.disk import check_room
    from tasks.sources import read_sources

    texts = as_overrides(params, overrides)
    project = find_project()
    make_home(project.home)
    loaded = load_experiment(experiment, project.params, texts)
    check_room(project.home, loaded.experiment, project.root)
    # Before the imports, so that an edit in between is seen.
    read_sources()
    from flows.alignment import align as run
    from tasks.bookkeeping import tag_flow_run

    tag_flow_run()
    # The function, not the flow: a flow in a flow would be a run of its own in the UI.
    return run.fn(experiment, texts, refresh, allow_dirty, data_rev)


@flow(name="sweep", flow_run_name=sweep_run_name, persist_result=False)
def sweep(
    sweep: SweepChoice = "sweep-kl",
    overrides: Overrides = [],  # noqa: B006
    parallel: Parallel = None,
    allow_dirty: bool = False,
) -> SweepSummary:
    """Run an experiment at each point of a sweep; steps that points share run once.

    Args:
        sweep: A sweep in params/. One that is new appears here after `plumbline up`.
        overrides: Changes, each as KEY=VALUE: sweep.best.metric=judge to the sweep, rl.episodes=512
            to its experiment at every point.
        parallel: Points that run at a time, each in a process of its own, 1 to 64; left empty, as
            many as the sweep says.
        allow_dirty: Accept data that differs from data.dvc, and tag the runs so.
    """
    from plumbline.params.sweep import load_sweep
    from plumbline.project import find_project, make_home
    from tasks.sources import read_sources

    texts = as_overrides({"sweep": {"parallel": parallel}}, overrides)
    project = find_project()
    make_home(project.home)
    # What is wrong is found before the imports, which take seconds.
    load_sweep(sweep, project.params, texts)
    read_sources()
    from flows.points import warm_up

    # It imports what the points need beside what is imported here.
    warm_up(project.home)
    from flows.sweep import sweep as run
    from tasks.bookkeeping import tag_flow_run

    tag_flow_run()
    return run.fn(sweep, texts, allow_dirty)
