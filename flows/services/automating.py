"""The automation that answers the event `dvc.data.changed` with a run.

To be imported once PREFECT_API_URL names the server.
"""

import hashlib
from typing import Any

from prefect.client.orchestration import get_client
from prefect.events.actions import RunDeployment
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

EVENT = "dvc.data.changed"
RESOURCE = "dvc.data."
"""Begins the id of the resource that has changed; the data set follows."""
AUTOMATION = "Data changed: run what depends on it"


def make_automation(before: str) -> str:
    """Make the automation that runs a deployment when its data has changed.

    What was done to it in the UI stays, be it switched off, renamed or changed; only where its
    definition here is another one than before it becomes that, on or off as it was.

    Args:
        before: what an earlier call returned, or empty.

    Returns:
        a digest of the definition.
    """
    wanted = AutomationCore(
        name=AUTOMATION,
        description=(
            "Runs the deployment that a data-watch has named, on the version of the data that it "
            "has found. Made by `plumbline up`, which leaves it switched off if you do."
        ),
        enabled=True,
        tags=["data"],
        # Types are given, since an update sends only what is.
        trigger=EventTrigger(
            type="event",
            expect={EVENT},
            match={"prefect.resource.id": RESOURCE + "*"},
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[
            RunDeployment(
                type="run-deployment",
                # The deployment is among the event's related resources.
                source="inferred",
                parameters={
                    "experiment": "{{ event.payload.experiment }}",
                    "data_rev": "{{ event.payload.rev }}",
                    "allow_dirty": False,
                },
            )
        ],
    )
    digest = hashlib.sha256(wanted.model_dump_json().encode()).hexdigest()
    with get_client(sync_client=True) as client:
        found = [one for one in client.read_automations() if _answers(one)]
        if not found:
            client.create_automation(wanted)
        elif digest != before:
            kept = {"enabled": found[0].enabled, "name": found[0].name}
            client.update_automation(found[0].id, wanted.model_copy(update=kept))
    return digest


def _answers(automation: Any) -> bool:
    """Whether an automation answers the event with a run: by what it does, since names change."""
    expected = getattr(automation.trigger, "expect", ())
    return EVENT in expected and any(isinstance(a, RunDeployment) for a in automation.actions)
