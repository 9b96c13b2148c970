"""How a training tells the outside what it does, without knowing who listens."""

from collections.abc import Mapping
from typing import Protocol


class Log(Protocol):
    """Receives metrics."""

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a step (optimizer steps in SFT and reward model, episodes in RL)."""


class Progress(Protocol):
    """Receives how far the work has come."""

    def __call__(self, done: int, total: int) -> None:
        """Take the units of work that are done, and all there are."""


class Warn(Protocol):
    """Receives what looks wrong."""

    def __call__(self, step: int, name: str, message: str) -> None:
        """Take a known failure that begins at this step: its name, and what to do about it."""


def ignore_metrics(step: int, metrics: Mapping[str, float]) -> None:
    """A Log that nobody reads."""


def ignore_progress(done: int, total: int) -> None:
    """A Progress that nobody watches."""


def ignore_warnings(step: int, name: str, message: str) -> None:
    """A Warn that nobody hears."""
