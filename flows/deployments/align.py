"""The deployments that run one experiment: the alignment flow behind a form.

Imports Prefect alone, so that the form is made, and a bad param refused, at once.
"""

from typing import Annotated, Any

from prefect import flow, runtime
from pydantic import WithJsonSchema

from flows.alignment.naming import name_of
from flows.alignment.summary import RunSummary
from flows.deployments.form import (
    as_overrides,
    experiment_schema,
    knobs_schema,
    overrides_schema,
)
from plumbline.errors import ParamsError
from plumbline.params.schema import StepName

Choice = Annotated[str, WithJsonSchema(experiment_schema())]
Knobs = Annotated[dict[str, Any], WithJsonSchema(knobs_schema())]
Overrides = Annotated[list[str], WithJsonSchema(overrides_schema())]
DataRev = Annotated[str, WithJsonSchema({"type": "string", "pattern": r"^([0-9a-f]{32}\.dir)?$"})]


def flow_run_name() -> str:
    """The name of the flow run that starts in this context, by what its form says."""
    given = runtime.flow_run.parameters
    try:
        overrides = as_overrides(given.get("params") or {}, given.get("overrides") or ())
    except ParamsError:
        # The run itself says what is wrong.
        overrides = []
    return name_of(given, overrides)


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
    from flows.alignment.flow import align as run
    from tasks.bookkeeping import tag_flow_run

    tag_flow_run()
    # The function, not the flow: a flow in a flow would be a run of its own in the UI.
    return run.fn(experiment, texts, refresh, allow_dirty, data_rev)
