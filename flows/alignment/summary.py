"""What a run did: the value that the flow returns and `run --json` writes."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class StepSummary(BaseModel):
    """One step of a run."""

    model_config = ConfigDict(frozen=True)

    status: Literal["ran", "cached"]
    seconds: float
    key: str
    digest: str
    mlflow_run_id: str


class RunSummary(BaseModel):
    """A finished run."""

    model_config = ConfigDict(frozen=True)

    experiment: str
    data: dict[str, str]
    mlflow_run_id: str | None
    """None where nothing was to do, and no run was made."""
    prefect_flow_run_id: str | None
    seconds: float
    steps: dict[str, StepSummary]
    metrics: dict[str, float]
    report: str | None
    """Folder of the run's figures and summary; None where no run was made."""
    samples: list[dict[str, Any]]
    """Rows of the evaluation's table."""
    registered: dict[str, str]
    """Name, version and alias of the registered model; a point of a sweep moves no alias."""
