"""Figures as MLflow artifacts and, at once, as images on the Prefect run's page."""

import base64

from matplotlib.figure import Figure
from prefect.artifacts import create_image_artifact

from tasks.tracking import StepRun


def publish_image(tracked: StepRun, name: str, figure: Figure) -> None:
    """Log a figure to the step's MLflow run, and show it in the Prefect UI under its name."""
    picture = base64.b64encode(tracked.figure(name, figure)).decode()
    create_image_artifact(
        image_url=f"data:image/png;base64,{picture}",
        key=name,
        description=f"{tracked.step}: {name}",
    )
