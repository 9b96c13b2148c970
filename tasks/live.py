"""Progress of long work on the Prefect run's page while it goes on, beside that on the terminal."""

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import copy_context
from typing import NamedTuple
from uuid import UUID

from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.context import FlowRunContext, SyncClientContext
from prefect.utilities.context import get_task_and_flow_run_ids

from plumbline.training.reporting import Progress
from tasks.progress import progress_bar
from tasks.tracking import StepRun

log = logging.getLogger(__name__)

SECONDS_BETWEEN_UPDATES = 3.0
SECONDS_BETWEEN_LOOKS = 0.2
"""Until the work has begun; its first sign of life is shown at once."""

SHOWN = {
    "sft/loss": "loss",
    "reward_model/loss": "loss",
    "judge/loss": "loss",
    "dpo/loss": "loss",
    "dpo/accuracy": "accuracy",
    "objective/scores": "score",
    "objective/judge": "judge",
    "objective/kl": "KL",
}
"""Metrics that stand beside the progress, where a step logs them."""


class Work(NamedTuple):
    """How far the work has come."""

    done: int
    total: int


@contextmanager
def step_progress(tracked: StepRun, unit: str) -> Iterator[Progress]:
    """Show the progress of a step; yields what the step calls with the work done and all of it.

    Args:
        tracked: the step's run, whose last metrics are shown, too.
        unit: of the work.
    """
    with progress_bar(tracked.step, unit) as bar, live_progress(tracked.step, unit) as live:

        def report(done: int, total: int) -> None:
            bar(done, total)
            live.report(done, total, tracked.latest)

        yield report


@contextmanager
def live_progress(name: str, unit: str) -> Iterator["LiveProgress"]:
    """Keep a progress artifact of the flow run up to date inside the context.

    Outside of a flow run nothing is shown.

    Args:
        name: of the work, which the artifact is called by.
        unit: of the work.
    """
    live = LiveProgress(name, unit)
    if FlowRunContext.get() is not None:
        live.start()
    try:
        yield live
    except BaseException:
        live.close("stopped at")
        raise
    live.close()


class LiveProgress:
    """A progress artifact, which a thread keeps up to date.

    The work never waits for Prefect: a server that is slow or away costs the picture alone.
    """

    def __init__(self, name: str, unit: str) -> None:
        self._name = name
        self._unit = unit
        self._work: Work | None = None
        self._metrics: Mapping[str, float] = {}
        self._began = time.monotonic()
        self._over = threading.Event()
        self._end = ""
        self._artifact: UUID | None = None

    def start(self) -> None:
        """Begin to look for progress."""
        # In a copy of the context, by which Prefect knows whose artifact it is.
        run = copy_context().run
        threading.Thread(target=run, args=(self._follow,), name="progress", daemon=True).start()

    def report(self, done: int, total: int, metrics: Mapping[str, float] | None = None) -> None:
        """Take how far the work has come, and the metrics logged last."""
        self._work = Work(done, total)
        self._metrics = metrics or {}

    def close(self, end: str = "") -> None:
        """Show the last state and end; does not wait for it.

        Args:
            end: words that say why the work is over before it is done.
        """
        self._end = end
        self._over.set()

    def _follow(self) -> None:
        shown: Work | None = None
        over = False
        while not over:
            over = self._over.wait(SECONDS_BETWEEN_UPDATES if shown else SECONDS_BETWEEN_LOOKS)
            work = self._work
            if work is not None and (work != shown or over):
                self._show(work)
                shown = work

    def _show(self, work: Work) -> None:
        percent = 100.0 * work.done / max(work.total, 1)
        try:
            with SyncClientContext.get_or_create() as context:
                if self._artifact is None:
                    self._artifact = context.client.create_artifact(self._made(work, percent)).id
                else:
                    update = ArtifactUpdate(data=percent, description=self._described(work))
                    context.client.update_artifact(self._artifact, update)
        except Exception as error:
            log.debug("%s: progress is not shown: %s", self._name, error)

    def _made(self, work: Work, percent: float) -> ArtifactCreate:
        task_run, flow_run = get_task_and_flow_run_ids()
        return ArtifactCreate(
            key=f"{self._name.replace('_', '-')}-progress",
            type="progress",
            data=percent,
            description=self._described(work),
            task_run_id=task_run,
            flow_run_id=flow_run,
        )

    def _described(self, work: Work) -> str:
        """For example "rl: 1,280 of 3,072 episodes, 57.1 episodes/s, 31 s left; KL 1.2"."""
        seconds = time.monotonic() - self._began
        done = f"**{self._name}**: {self._end} {work.done:,} of {work.total:,} {self._unit}"
        words = [" ".join(done.split())]
        if work.done and seconds > 0:
            rate = work.done / seconds
            words.append(f"{rate:.1f} {self._unit}/s")
            if work.done < work.total and not self._end:
                words.append(f"{(work.total - work.done) / rate:.0f} s left")
            else:
                words.append(f"{seconds:.0f} s")
        numbers = [
            f"{label} {self._metrics[name]:.3g}"
            for name, label in SHOWN.items()
            if name in self._metrics
        ]
        return ", ".join(words) + ("; " + ", ".join(numbers) if numbers else "")
