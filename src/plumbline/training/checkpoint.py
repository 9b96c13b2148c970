"""Checkpoints of a training: its whole state, visible in one instant and verified before use."""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from plumbline.artifacts import sync, sync_folder
from plumbline.errors import TrainingError
from plumbline.interruption import uninterrupted
from plumbline.params.schema import CheckpointParams
from plumbline.refs import file_digest

State = dict[str, Any]
"""Dicts with text as keys, lists, numbers, texts and None, with tensors at any depth."""

TENSORS, VALUES, MANIFEST = "tensors.safetensors", "values.json", "manifest.json"


class Place(NamedTuple):
    """A commit point of a training: a moment from which it can go on."""

    number: int
    """Grows from each commit point to the next."""
    step: int
    """As in the metrics: optimizer steps, or episodes in RL."""
    label: str
    """For people: `step 120 of 300`."""


class Checkpoint(NamedTuple):
    """A state that was saved."""

    place: Place
    state: State


def _warn(message: str) -> None:
    logging.getLogger("plumbline").warning(message)


class Checkpoints:
    """The newest checkpoints of one training, in a folder of their own.

    Each is a folder with safetensors, JSON and a manifest of their sha256.
    """

    def __init__(
        self,
        folder: Path,
        params: CheckpointParams,
        *,
        warn: Callable[[str], None] = _warn,
        resumed: Callable[[Place], None] = lambda place: None,
    ) -> None:
        """Nothing is written before the first `save`.

        Args:
            folder: of this training alone; made when it is needed.
            params: how often, and how many are kept.
            warn: called with what went wrong with a checkpoint; the training goes on.
            resumed: called with the place from which a training goes on.
        """
        self.folder = folder
        self.params = params
        self.warn = warn
        self.resumed = resumed
        self._commits = 0
        self._last = time.monotonic()

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; damaged ones are reported and removed."""
        for path in reversed(self._paths()):
            damage = _damage(path)
            if damage is None:
                return _read(path)
            self.warn(f"checkpoint {path}: {damage}; it is removed, and the one before is tried")
            # Left there, it would count as the newest of those that are kept.
            shutil.rmtree(path, ignore_errors=True)
        return None

    def due(self) -> bool:
        """Whether to save now; to be asked once at each commit point."""
        self._commits += 1
        every = self.params.every_steps
        waited = time.monotonic() - self._last
        return (every is not None and self._commits >= every) or (
            waited >= 60 * self.params.every_minutes
        )

    def save(self, place: Place, state: State) -> bool:
        """Write a checkpoint and remove the oldest ones; where that fails, warn and go on.

        A training is worth more than its checkpoint. What is half-written is removed, and the
        earlier checkpoints stay.

        Returns:
            Whether it was written.
        """
        # Also after a failure: a full disk should not be tried again at each step.
        self._commits, self._last = 0, time.monotonic()
        path = self.folder / f"{place.number:010d}"
        aside = self.folder / f".{path.name}.{os.getpid()}"
        try:
            self._remove_leftovers()
            aside.mkdir(parents=True, mode=0o700)
            _write(aside, place, state)
            if path.exists():
                shutil.rmtree(path)
            aside.rename(path)
            sync(self.folder)
        except (OSError, SafetensorError) as error:
            kept = self.newest()
            earlier = f"the one at {kept.label} stays" if kept else "there is none before it"
            self.warn(
                f"no checkpoint could be written at {place.label} ({error}); {earlier}, and the "
                f"training goes on. Make room in {self.folder}, or mend its permissions."
            )
            return False
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        for old in self._paths()[: -self.params.keep]:
            shutil.rmtree(old, ignore_errors=True)
        return True

    def newest(self) -> Place | None:
        """Where the newest checkpoint was taken, whole or not."""
        try:
            manifest = json.loads((self._paths()[-1] / MANIFEST).read_bytes())
            return Place(*manifest["place"])
        except (IndexError, OSError, ValueError, KeyError, TypeError):
            return None

    def clear(self) -> None:
        """Remove them all: the training's result is stored."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _paths(self) -> list[Path]:
        """Oldest first; what is not yet visible is left out."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if path.name.isdecimal())

    def _remove_leftovers(self) -> None:
        """What a killed process was writing."""
        for path in self.folder.glob(".*"):
            shutil.rmtree(path, ignore_errors=True)


class Keeper:
    """Saves the last commit point of a training: where due, where interrupted, and at its end.

    The weights are read as they are when they are saved. So they may change only inside
    `uninterrupted()`, together with the commit that follows the change.
    """

    def __init__(self, checkpoints: Checkpoints | None, weights: Callable[[], State]) -> None:
        """Keep a training.

        Args:
            checkpoints: where to; None keeps nothing.
            weights: the large part of the state, which changes at commit points alone.
        """
        self.checkpoints = checkpoints
        self._weights = weights
        self._last: tuple[Place, State] | None = None
        self._saved: int | None = None

    def resume(self) -> State | None:
        """The state to go on from; None where the training starts anew."""
        found = self.checkpoints.latest() if self.checkpoints else None
        if self.checkpoints is None or found is None:
            return None
        self.checkpoints.resumed(found.place)
        return found.state

    def commit(self, place: Place, snapshot: Callable[[], State]) -> None:
        """Note that the training can go on from here, and save it where that is due.

        Args:
            place: where the training is.
            snapshot: the state without the weights; it must not change afterwards.
        """
        if self.checkpoints is None:
            return
        self._last = (place, snapshot())
        if self.checkpoints.due():
            self.save()

    def save(self) -> None:
        """Save the last commit point, unless it is saved already."""
        if self.checkpoints is None or self._last is None or self._last[0].number == self._saved:
            return
        place, state = self._last
        weights = self._weights()
        if not _finite(weights):
            self.checkpoints.warn(
                f"no checkpoint at {place.label}: a weight is not finite, and the training could "
                "not go on from there"
            )
            return
        if self.checkpoints.save(place, {**state, "weights": weights}):
            self._saved = place.number

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Save as the training inside ends or is interrupted; an error leaves the last good one."""
        try:
            yield
            with uninterrupted():
                self.save()
        except TrainingError as error:
            kept = self.checkpoints.newest() if self.checkpoints else None
            if kept is None:
                raise
            raise TrainingError(
                f"{error}. The checkpoint at {kept.label} is kept: the same params go on from "
                "there and may fail there again, changed ones start anew"
            ) from error
        except Exception:
            raise
        except BaseException:
            # Ctrl-C, or a scheduler's SIGTERM. A second one must not spoil what the first saves.
            with uninterrupted():
                self.save()
            raise


def _write(folder: Path, place: Place, state: State) -> None:
    tensors: dict[str, Tensor] = {}
    values = _without_tensors(state, "", tensors)
    save_file(tensors, folder / TENSORS)
    (folder / VALUES).write_text(json.dumps(values))
    digests = {name: file_digest(folder / name) for name in (TENSORS, VALUES)}
    (folder / MANIFEST).write_text(json.dumps({"place": place, "sha256": digests}))
    sync_folder(folder)


def _read(folder: Path) -> Checkpoint:
    place = json.loads((folder / MANIFEST).read_bytes())["place"]
    values = json.loads((folder / VALUES).read_bytes())
    return Checkpoint(Place(*place), _with_tensors(values, load_file(folder / TENSORS)))


def _damage(folder: Path) -> str | None:
    """Which file of a checkpoint is not as it was written; None where all are."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        digests = {name: manifest["sha256"][name] for name in (TENSORS, VALUES)}
        Place(*manifest["place"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is missing or can't be read"
    for name, digest in digests.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if file_digest(folder / name) != digest:
            return f"{name} does not match its sha256"
    return None


def _without_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The same value with a name in the place of each tensor, which is moved to `tensors`."""
    match value:
        case Tensor():
            tensor = value.detach().cpu().contiguous()
            # A view would be refused: what else its memory holds may be written, too.
            own = tensor.untyped_storage().nbytes() == tensor.nbytes
            tensors[path] = tensor if own else tensor.clone()
            return {"__tensor__": path}
        case dict():
            return {
                key: _without_tensors(part, f"{path}/{key}", tensors) for key, part in value.items()
            }
        case list() | tuple():
            return [
                _without_tensors(part, f"{path}/{place}", tensors)
                for place, part in enumerate(value)
            ]
    return value


def _with_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    match value:
        case {"__tensor__": name}:
            # Memory of its own: that of the file goes on filling the disk after its removal.
            return tensors[name].clone()
        case dict():
            return {key: _with_tensors(part, tensors) for key, part in value.items()}
        case list():
            return [_with_tensors(part, tensors) for part in value]
    return value


def _finite(value: Any) -> bool:
    match value:
        case Tensor():
            return not value.is_floating_point() or bool(torch.isfinite(value).all())
        case dict():
            return all(map(_finite, value.values()))
        case list() | tuple():
            return all(map(_finite, value))
    return True
