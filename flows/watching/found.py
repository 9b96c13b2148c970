"""What one look at the data has found: the values that are shown, announced and written."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

WORK_TREE = "work tree"
"""Where data.dvc is looked at, unless a git ref is named."""

State = Literal["unchanged", "superseded", "under way", "announced before", "changed", "announced"]
"""superseded: the source has not changed, but other data was trained on since."""


class FileChange(BaseModel):
    """A file of the data set that differs; what is not known, or not there, is None."""

    model_config = ConfigDict(frozen=True)

    path: str
    change: Literal["added", "changed", "removed"]
    old_md5: str | None = None
    new_md5: str | None = None
    old_rows: int | None = None
    new_rows: int | None = None


class Trained(BaseModel):
    """The run that an experiment was last trained by, and its data."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    run: str
    rev: str
    digest: str


class PlannedStep(BaseModel):
    """What a run would do with a step."""

    model_config = ConfigDict(frozen=True)

    action: Literal["run", "cached", "unknown"]
    because: str


class Found(BaseModel):
    """What one look at the data has found."""

    model_config = ConfigDict(frozen=True)

    experiment: str
    state: State
    source: str
    """The git ref, or the work tree."""
    commit: str | None
    """Of the ref."""
    dataset: str
    """Folder of the data set."""
    rev: str
    """The .dir hash that data.dvc pins."""
    digest: str
    """Of the data set's files alone."""
    trained: Trained | None
    """None where the experiment was never trained."""
    files: list[FileChange] = []
    steps: dict[str, PlannedStep] = {}
    set_aside: list[dict[str, object]] = []
    """Failures of rows that the run will set aside: file, row, field, reason, value."""
    event: str | None = None
    """Id of the event that announced the change, this time or before."""
