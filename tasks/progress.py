"""Progress of long work on the terminal: how much, how fast, how long still."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from plumbline.training.reporting import Progress as Report

SECONDS_BETWEEN_LINES = 10.0
"""Where no terminal shows a bar, a line says so often how far the work has come."""


class _Rate(ProgressColumn):
    """Units of work a second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f} {self.unit}/s" if speed else f"– {self.unit}/s", style="cyan")


def quiet_libraries() -> None:
    """Keep the bars and warnings of libraries off the terminal, which shows the project's own."""
    # Those who only say something need no transformers.
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # It warns that a model card can't be fetched, for models that have none.
    logging.getLogger("mlflow.transformers").setLevel(logging.ERROR)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)


def show_warning(text: str) -> None:
    """Say on the terminal, above any bar, what looks wrong."""
    Console(stderr=True).print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)


def show_note(text: str) -> None:
    """Say on the terminal, above any bar, what goes on."""
    Console(stderr=True).print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress_bar(step: str, unit: str) -> Iterator[Report]:
    """Show the progress of a step; yields what the step calls with the work done and all of it."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(step, unit)
        return
    columns = (
        TextColumn("[bold]{task.description:<13}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        _Rate(unit),
        TimeElapsedColumn(),
        TextColumn("·"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        bar = bars.add_task(step, total=None)

        def report(done: int, total: int) -> None:
            bars.update(bar, completed=done, total=total)

        yield report


def _lines(step: str, unit: str) -> Report:
    started = last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done < total and now - last < SECONDS_BETWEEN_LINES:
            return
        last = now
        rate = done / max(now - started, 1e-9)
        left = (total - done) / rate if rate else float("inf")
        print(
            f"{step}: {done}/{total} {unit}, {rate:.1f} {unit}/s, {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )

    return report
