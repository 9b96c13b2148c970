"""Where a run stands in a sweep, if it is one of its points."""

import hashlib
from contextvars import ContextVar
from typing import NamedTuple

from plumbline.errors import PlumblineError
from plumbline.params.schema import Experiment
from plumbline.refs import DataVersion

SWEEP_TAG, POINT_TAG = "sweep:", "point:"
"""Begin the tags of the flow run of a point."""


class Place(NamedTuple):
    """A point's place."""

    sweep_run_id: str
    """MLflow's id of the sweep's run."""
    sweep: str
    """Name of that run."""
    number: int
    """Of the point, from 1."""
    label: str
    """What the point sets."""
    basis: str
    """Digest of the params and the data that the sweep resolved for it."""

    def check(self, experiment: Experiment, data: DataVersion) -> None:
        """Check that the point runs on what the sweep was started with.

        Raises:
            PlumblineError: the params or the data were changed since.
        """
        if basis_of(experiment, data) != self.basis:
            raise PlumblineError(
                f"params/ or {data.path} was changed after the sweep began, so the point would not "
                "compare with those before it: expected both as they were. Start the sweep again "
                "to run every point on what is there now."
            )

    def tags(self) -> dict[str, str]:
        """What the point's run in MLflow says of it."""
        return {
            "mlflow.parentRunId": self.sweep_run_id,
            "plumbline.sweep": self.sweep,
            "plumbline.point": str(self.number),
            "plumbline.point.label": self.label,
        }


def basis_of(experiment: Experiment, data: DataVersion) -> str:
    """Digest of resolved params and of a verified data set."""
    text = f"{experiment.model_dump_json()}{data.path} {data.digest}"
    return hashlib.sha256(text.encode()).hexdigest()


_place: ContextVar[Place | None] = ContextVar("place", default=None)


def place_in_sweep() -> Place | None:
    """The place of the run that this process makes; None outside of a sweep."""
    return _place.get()


def flow_tags() -> list[str]:
    """What the flow run of this process says of its sweep, if there is one."""
    place = place_in_sweep()
    return [f"{SWEEP_TAG}{place.sweep}", f"{POINT_TAG}{place.number}"] if place else []


def take_place(place: Place) -> None:
    """Make the runs of this process points of a sweep."""
    _place.set(place)
