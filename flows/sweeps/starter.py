"""The process that the points of a sweep are forked from, so that none has to import anything.

    python -m flows.sweeps.starter HOME        is how `Starter` (flows/sweeps/points.py) starts it

It reads orders on its standard input, a line of JSON each, and writes a line for each point that
ended. When the input closes, be it that the sweep was killed, it stops the points that are left.
"""

import json
import os
import runpy
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from flows.uncollected import uncollected

SECONDS_BETWEEN_LOOKS = 0.1
"""At points that were told to stop."""
GRACE_SECONDS = 25.0
"""A point that is told to stop has so long to save its state."""

Order = dict[str, Any]
"""A point: `number`, `arguments` of the command line, `log`, and `place` in the sweep."""


class Running(NamedTuple):
    """The process of a point."""

    number: int
    """Of the point."""
    descriptor: int
    """Of the process."""


def main(home: Path) -> None:
    """Import what points need, then fork one for each order."""
    # What libraries print is no report.
    reports = os.dup(1)
    os.dup2(2, 1)
    # Where a worker has started the sweep: its points are runs of their own to Prefect. To others
    # this process still shows what it was started with, and so `plumbline down` knows whose it is.
    for name in [name for name in os.environ if name.startswith("PREFECT__")]:
        del os.environ[name]
    from flows.services.prefect_server import join_server
    from tasks.sources import read_sources

    # Before the imports, so that an edit in between is seen.
    read_sources()
    with uncollected():
        import typer  # noqa: F401

        import plumbline.training.rl  # noqa: F401

        # Only now, when the sweep has made its checks: where one fails, no server has started.
        join_server(home)
        import flows.alignment.flow  # noqa: F401
        from tasks.mlflow_client import preload

        preload()
    order = serve(reports)
    if order is None:
        # Taking the modules apart takes a second, and the sweep waits.
        os._exit(0)
    os.close(reports)
    become(order)


def serve(reports: int) -> Order | None:
    """Fork a point for each order; returns None when all is over, in a forked process its order.

    Args:
        reports: descriptor to which one line is written for each point that ended.
    """
    running: dict[int, Running] = {}
    unread = b""
    while True:
        # The descriptor of a process is readable from the moment at which it ends.
        ready = select.select([0, *(one.descriptor for one in running.values())], [], [])[0]
        if 0 in ready:
            said = os.read(0, 65536)
            if not said:
                break
            *lines, unread = (unread + said).split(b"\n")
            for line in lines:
                order: Order = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    return order
                running[pid] = Running(order["number"], os.pidfd_open(pid))
        report_ended(running, reports)
    stop(running)
    return None


def report_ended(running: dict[int, Running], reports: int) -> None:
    """Write the number and the exit code of each point that ended, and forget it."""
    for pid, (number, descriptor) in [*running.items()]:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            del running[pid]
            os.close(descriptor)
            code = os.waitstatus_to_exitcode(status)
            # As a shell says that a signal ended it.
            line = json.dumps({"number": number, "code": code if code >= 0 else 128 - code})
            os.write(reports, f"{line}\n".encode())


def stop(running: dict[int, Running]) -> None:
    """Let the points save their state and end; then end those that do not."""
    for pid in running:
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    while running and time.monotonic() < deadline:
        for pid in [pid for pid in running if os.waitpid(pid, os.WNOHANG)[0]]:
            del running[pid]
        time.sleep(SECONDS_BETWEEN_LOOKS)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def become(order: Order) -> None:
    """Be the command line that an order asks for, which ends the process."""
    from flows.alignment.place import Place, take_place

    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    take_place(Place(**order["place"]))
    sys.argv = ["plumbline", *order["arguments"]]
    # Only now: it looks where its output goes.
    runpy.run_module("flows.cli", run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
