"""The flow of the deployment `data-watch`: looks at data.dvc, and announces a change.

Imports Prefect alone, so that the form is made, and a bad param refused, at once.
"""

from typing import Annotated, Any

from prefect import flow, runtime
from prefect.client.schemas.objects import State
from pydantic import WithJsonSchema

from flows.deployments.form import experiment_schema

Choice = Annotated[str, WithJsonSchema(experiment_schema())]


@flow(name="data-watch", flow_run_name="data of {experiment}", persist_result=False)
def data_watch(experiment: Choice = "quickstart", ref: str = "", again: bool = False) -> State[Any]:
    """Start a run of an experiment if its data differs from what it was last trained on.

    Args:
        experiment: Whose data to look at, and whose deployment to start.
        ref: A git ref, for example origin/main: it is fetched, and its data.dvc counts. Empty: the
            data.dvc of the work tree.
        again: Start a run also for a version that has started one before, for example if it failed.
    """
    from prefect.artifacts import create_markdown_artifact
    from prefect.states import Completed, Failed

    from flows.watching.announcing import announce, find_target
    from flows.watching.found import Found
    from flows.watching.look import watch
    from flows.watching.report import artifact_key, heading, invalid_page, page, sentence
    from plumbline.data.validation import InvalidData
    from plumbline.project import find_project, make_home

    project = find_project()
    make_home(project.home)
    target = find_target(experiment)
    this_run = (str(runtime.flow_run.id), str(runtime.flow_run.name))

    def tell(found: Found) -> str:
        return announce(found, target, this_run)

    key = artifact_key(experiment)
    try:
        found = watch(project, experiment, ref, again=again, announce=tell)
    except InvalidData as error:
        create_markdown_artifact(
            key=key,
            markdown=invalid_page(experiment, ref, error.failures),
            description=f"{experiment}: the changed data is not valid, nothing was started",
        )
        return Failed(name="Invalid data", message=f"Nothing was started: {error}")
    if found.files:
        create_markdown_artifact(key=key, markdown=page(found), description=sentence(found))
    return Completed(name=heading(found), message=sentence(found))
