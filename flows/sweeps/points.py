"""Running the points of a sweep: one process each, at most so many at a time."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from flows.alignment.place import Place
from flows.alignment.summary import RunSummary
from flows.services.prefect_server import is_own
from flows.sweeps.starter import GRACE_SECONDS
from plumbline.errors import PlumblineError
from plumbline.params.sweep import LoadedSweep, Point

SECONDS_BETWEEN_LOOKS = 0.2
TAIL_BYTES = 4000

_warm: list["Starter"] = []
"""The starter that was started ahead of its first point."""


class Outcome(NamedTuple):
    """How a point ended."""

    point: Point
    code: int
    """Of its process: 0 where it finished."""
    seconds: float
    summary: RunSummary | None
    """What it brought out; None where it did not finish."""
    log: Path


class Starter:
    """A process of `flows.sweeps.starter`."""

    def __init__(self, home: Path) -> None:
        env = dict(os.environ)
        if is_own():
            # The points use the project's own server, too, and have to say so themselves.
            del env["PREFECT_API_URL"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "flows.sweeps.starter", str(home)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # A Ctrl-C is for the sweep, which stops its points.
            start_new_session=True,
            env=env,
        )
        self._unread = b""

    def start(self, number: int, arguments: Sequence[str], log: Path, place: Place) -> None:
        """Start a point: `plumbline ARGUMENTS`, whose output goes to a log.

        Raises:
            PlumblineError: the starter is gone.
        """
        order = {
            "number": number,
            "arguments": list(arguments),
            "log": str(log),
            "place": place._asdict(),
        }
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._gone() from None

    def ended(self, seconds: float) -> list[tuple[int, int]]:
        """Wait at most so long for points to end; returns their numbers and exit codes.

        Raises:
            PlumblineError: the starter is gone.
        """
        assert self._process.stdout is not None
        output = self._process.stdout.fileno()
        if not select.select([output], [], [], seconds)[0]:
            return []
        said = os.read(output, 65536)
        if not said:
            raise self._gone()
        *lines, self._unread = (self._unread + said).split(b"\n")
        reports = [json.loads(line) for line in lines]
        return [(report["number"], report["code"]) for report in reports]

    def stop(self) -> None:
        """Stop the points that run, which save their state, and the starter."""
        assert self._process.stdin is not None
        try:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_SECONDS + 5)
        finally:
            self._kill()

    @contextmanager
    def unless_failing(self) -> Iterator[None]:
        """End the starter, which has no points yet, where the context is left by an exception."""
        try:
            yield
        except BaseException:
            self._kill()
            raise

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _gone(self) -> PlumblineError:
        code = self._process.wait()
        return PlumblineError(
            f"The process that starts the points of the sweep ended with exit code {code}; its "
            "messages are above. The same command goes on with the points that are not finished."
        )


def warm_up(home: Path) -> Starter:
    """The starter for the next points; it imports what they need while the caller goes on."""
    if not _warm:
        _warm.append(Starter(home))
    return _warm[0]


def run_points(
    home: Path,
    loaded: LoadedSweep,
    folder: Path,
    starting: Callable[[Point], Place],
    *,
    allow_dirty: bool,
    say: Callable[[str], None],
) -> Generator[Outcome, None, None]:
    """Run all points; yields each as it ends. Stops those that run when the caller stops.

    Each is what `plumbline run EXPERIMENT --record --set …` would be, in a process of its own.
    Points that need the same step at the same time wait for the one that is at it.

    Args:
        home: the project's folder for generated files.
        loaded: the sweep.
        folder: for a log and a JSON file a point.
        starting: called as a point starts; gives its place in the sweep.
        allow_dirty: accept data that differs from data.dvc.
        say: called again and again with what the points that run said last.

    Raises:
        PlumblineError: no point can be started.
    """
    waiting = list(loaded.points)
    running: dict[int, tuple[Point, float]] = {}
    starter = warm_up(home)
    try:
        while waiting or running:
            while waiting and len(running) < loaded.sweep.parallel:
                point = waiting.pop(0)
                command = _command(loaded, point, folder, allow_dirty)
                starter.start(point.number, command, _log(folder, point), starting(point))
                running[point.number] = (point, time.perf_counter())
            for number, code in starter.ended(SECONDS_BETWEEN_LOOKS):
                point, began = running.pop(number)
                yield _outcome(point, code, time.perf_counter() - began, folder)
            say("; ".join(_heard(point, folder) for point, _ in running.values()))
    finally:
        _warm.clear()
        starter.stop()


def last_words(log: Path) -> str:
    """The last line of a log, or the error that it reports."""
    try:
        with log.open("rb") as file:
            file.seek(max(log.stat().st_size - TAIL_BYTES, 0))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    said = [line.strip() for line in lines if line.strip()]
    errors = [line.removeprefix("error ") for line in said if line.startswith("error ")]
    return (errors or said or [""])[-1]


def _command(loaded: LoadedSweep, point: Point, folder: Path, allow_dirty: bool) -> list[str]:
    overrides = [part for text in point.overrides for part in ("--set", text)]
    # Tracked in any case: a point of this sweep it is, whoever computed its steps.
    command = ["run", loaded.sweep.experiment, "--record", "--json", str(_json(folder, point))]
    return [*command, *overrides, *(["--allow-dirty"] if allow_dirty else [])]


def _outcome(point: Point, code: int, seconds: float, folder: Path) -> Outcome:
    log, file = _log(folder, point), _json(folder, point)
    summary = None
    if code == 0:
        summary = RunSummary.model_validate({**json.loads(file.read_bytes()), "samples": []})
    return Outcome(point, code, seconds, summary, log)


def _heard(point: Point, folder: Path) -> str:
    words = last_words(_log(folder, point))
    return f"point {point.number} ({point.label}): {words}"


def _log(folder: Path, point: Point) -> Path:
    return folder / f"point-{point.number}.log"


def _json(folder: Path, point: Point) -> Path:
    return folder / f"point-{point.number}.json"
