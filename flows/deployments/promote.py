"""The deployment `promote` of prefect.yaml: a promotion behind a form.

Imports Prefect alone, so that the form is made, and a bad value refused, at once.
"""

from typing import Annotated, Any

from prefect import flow
from pydantic import Field

ModelName = Annotated[str, Field(pattern=r"^[\w .-]+[@/][\w-]+$")]
Threshold = Annotated[float, Field(ge=0, lt=1)]
Hours = Annotated[float, Field(gt=0, le=168)]


# Under the name of the command line's flow, so that all its runs stand together.
@flow(name="promote", flow_run_name="{model}", persist_result=False)
def promote(
    model: ModelName = "plumbline-policy@challenger",
    threshold: Threshold = 0.5,
    require_approval: bool = True,
    approval_hours: Hours = 24.0,
) -> Any:
    """Let a registered version meet the champion on held-out prompts, and promote the better one.

    Args:
        model: The challenger, as NAME@ALIAS or NAME/NUMBER. The champion is NAME@champion.
        threshold: The lower end of the win rate's 95% interval has to be above it. From 0 to
            below 1.
        require_approval: Wait for a person's word on the run's page before the alias moves.
        approval_hours: How long to wait for it; no answer is a no. Above 0, at most 168.
    """
    # Before the imports, so that an edit in between is seen.
    from tasks.sources import read_sources

    read_sources()
    from flows.promotion.approval import form
    from flows.promotion.flow import conduct
    from tasks.bookkeeping import tag_flow_run

    tag_flow_run()
    return conduct(model, threshold, form(approval_hours) if require_approval else None)
