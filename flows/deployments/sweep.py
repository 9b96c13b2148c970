"""The deployment `sweep`: the flow of a sweep behind a form.

Imports Prefect alone, so that the form is made, and a bad param refused, at once.
"""

from typing import Annotated

from prefect import flow
from pydantic import WithJsonSchema

from flows.alignment.naming import sweep_run_name
from flows.deployments.form import as_overrides, overrides_schema, parallel_schema, sweep_schema
from flows.sweeps.summary import SweepSummary

Choice = Annotated[str, WithJsonSchema(sweep_schema())]
Overrides = Annotated[list[str], WithJsonSchema(overrides_schema())]
Parallel = Annotated[int | None, WithJsonSchema(parallel_schema())]


@flow(name="sweep", flow_run_name=sweep_run_name, persist_result=False)
def sweep(
    sweep: Choice = "sweep-kl",
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
    from flows.sweeps.points import warm_up

    # It imports what the points need beside what is imported here.
    warm_up(project.home)
    from flows.sweeps.flow import sweep as run
    from tasks.bookkeeping import tag_flow_run

    tag_flow_run()
    return run.fn(sweep, texts, allow_dirty)
