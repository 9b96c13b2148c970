"""Where a step keeps the checkpoints of its training, and what it says when it goes on from one."""

import logging
import shutil
from pathlib import Path

from plumbline.project import find_project
from plumbline.training.checkpoint import Checkpoints, Place
from tasks import tracking
from tasks.progress import show_note, show_warning

log = logging.getLogger("plumbline")


def step_checkpoints(run: tracking.PipelineRun, tracked: tracking.StepRun) -> Checkpoints | None:
    """The checkpoints of a step, in a folder named by its cache key; none where it has no key.

    With other params, data or code the key is another one, and the training starts anew.
    """
    if not run.key:
        return None
    step = tracked.step

    def warn(message: str) -> None:
        log.warning("%s: %s", step, message)
        show_warning(f"{step}: {message}")

    def resumed(place: Place) -> None:
        message = f"{step}: goes on from {place.label}, where an earlier run left a checkpoint"
        log.info(message)
        show_note(message)
        tracked.tag({"resumed_from_step": str(place.step)})

    folder = checkpoint_folder(find_project().home, run.key)
    return Checkpoints(folder, run.checkpoints, warn=warn, resumed=resumed)


def discard_checkpoints(home: Path, key: str) -> None:
    """Remove the checkpoints of a step whose result is stored, so that nothing needs them."""
    shutil.rmtree(checkpoint_folder(home, key), ignore_errors=True)


def checkpoint_folder(home: Path, key: str) -> Path:
    """The folder of a step's checkpoints."""
    if not key:
        raise ValueError("checkpoint_folder: expected a step's cache key, got an empty text")
    return home / "checkpoints" / key
