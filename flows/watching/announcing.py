"""The event `dvc.data.changed`: what it says, and which deployment it is to start.

To be imported once PREFECT_API_URL names the server.
"""

from datetime import UTC, datetime
from typing import Any, NamedTuple
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.events.schemas.events import Event, RelatedResource, Resource

from flows.services.automating import EVENT, RESOURCE
from flows.watching.found import Found
from plumbline.errors import ParamsError

FLOW = "align"
"""Name of the flow whose deployments are started."""
PAGE = 200
FILES_OF_THE_EVENT = 200


class Target(NamedTuple):
    """The deployment that a change starts."""

    id: UUID
    name: str


def find_target(experiment: str) -> Target:
    """The deployment that runs an experiment as it stands.

    Raises:
        ParamsError: there is none.
    """
    with get_client(sync_client=True) as client:
        flow = FlowFilter(name=FlowFilterName(any_=[FLOW]))
        deployed: list[Any] = client.read_deployments(flow_filter=flow, limit=PAGE)
    fitting = [one for one in deployed if _runs_as_it_stands(one.parameters, experiment)]
    # Of several, the one that is called like it.
    fitting.sort(key=lambda one: (one.name != experiment, one.name))
    if not fitting:
        names = ", ".join(sorted(one.name for one in deployed)) or "none"
        raise ParamsError(
            f"No deployment runs the experiment {experiment} as it stands: expected one of the "
            f"flow {FLOW} with the parameters {{experiment: {experiment}}}, got the deployments "
            f"{names}. Add a stanza to prefect.yaml, then run `plumbline up`."
        )
    return Target(fitting[0].id, fitting[0].name)


def _runs_as_it_stands(parameters: dict[str, Any], experiment: str) -> bool:
    changes = parameters.get("params") or parameters.get("overrides")
    return parameters.get("experiment") == experiment and not changes


def announce(found: Found, target: Target, flow_run: tuple[str, str] | None = None) -> str:
    """Tell Prefect that the data has changed; returns the id of the event.

    Args:
        found: the change.
        target: the deployment that it is to start.
        flow_run: id and name of the flow run that has found it.
    """
    dataset = found.dataset.removeprefix("data/").replace("/", ".")
    event = Event(
        event=EVENT,
        occurred=datetime.now(UTC),
        resource=Resource(
            {
                "prefect.resource.id": RESOURCE + dataset,
                "prefect.resource.name": found.dataset,
                "dvc.rev": found.rev,
            }
        ),
        related=_related(target, flow_run),
        payload=_payload(found),
    )
    with get_client(sync_client=True) as client:
        # Prefect's own emit_event sends from a thread, and says nothing if it can't.
        client.request("POST", "/events", json=[event.model_dump(mode="json")])
    return str(event.id)


def _related(target: Target, flow_run: tuple[str, str] | None) -> list[RelatedResource]:
    # The first deployment is the one that the automation runs.
    related = [("deployment", f"prefect.deployment.{target.id}", target.name)]
    if flow_run is not None:
        related.append(("flow-run", f"prefect.flow-run.{flow_run[0]}", flow_run[1]))
    return [
        RelatedResource(
            {
                "prefect.resource.id": resource,
                "prefect.resource.role": role,
                "prefect.resource.name": name,
            }
        )
        for role, resource, name in related
    ]


def _payload(found: Found) -> dict[str, Any]:
    known = ("experiment", "dataset", "source", "commit", "rev", "digest", "trained")
    payload = found.model_dump(mode="json", include=set(known))
    files = [change.model_dump(mode="json") for change in found.files]
    return payload | {"files": files[:FILES_OF_THE_EVENT], "files_changed": len(files)}
