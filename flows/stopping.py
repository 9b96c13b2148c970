"""Stopping a run: signals, and a cancellation in the Prefect UI, which becomes a signal."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from uuid import UUID

SECONDS_BETWEEN_LOOKS = 3.0
SECONDS_UNTIL_AGAIN = 0.2

_cancelled: list[str] = []
"""The flow run of this process whose cancellation was seen."""


class Terminated(BaseException):
    """SIGTERM outside of a flow, where Prefect does not turn it into an exception of its own."""


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM raise `Terminated`, so that everything is put away before the process ends."""

    def terminate(_signal: int, _frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def insistent() -> Iterator[None]:
    """Send this process a signal again whose exception was lost.

    A handler raises between any two instructions of the main thread, also while Python clears
    garbage away, where an exception goes nowhere.
    """
    before = sys.unraisablehook

    def again(lost: "sys.UnraisableHookArgs") -> None:
        if lost.exc_type.__name__ not in ("Terminated", "TerminationSignal", "KeyboardInterrupt"):
            before(lost)
            return
        number = signal.SIGINT if lost.exc_type is KeyboardInterrupt else signal.SIGTERM
        # Not from here, which is the same place.
        timer = threading.Timer(SECONDS_UNTIL_AGAIN, os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextmanager
def cancellable(flow_run_id: str) -> Iterator[None]:
    """Send this process SIGTERM when its flow run is cancelled in the Prefect UI.

    A run that a worker started is left to the worker, which does the same.
    """
    with insistent():
        if "PREFECT__FLOW_RUN_ID" in os.environ:
            yield
            return
        over = threading.Event()
        watch = threading.Thread(target=_watch, args=(flow_run_id, over), daemon=True)
        watch.start()
        try:
            yield
        finally:
            over.set()


def _watch(flow_run_id: str, over: threading.Event) -> None:
    import httpx

    url = f"{os.environ['PREFECT_API_URL']}/flow_runs/{flow_run_id}"
    while not over.wait(SECONDS_BETWEEN_LOOKS):
        try:
            state = httpx.get(url, timeout=SECONDS_BETWEEN_LOOKS).json().get("state_type")
        except (httpx.HTTPError, ValueError):
            continue
        if state in ("CANCELLING", "CANCELLED"):
            _cancelled.append(flow_run_id)
            os.kill(os.getpid(), signal.SIGTERM)
            return


def confirm_cancellation() -> None:
    """Mark the flow run as cancelled if that is why it stopped; Prefect itself calls it crashed."""
    if not _cancelled:
        return
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.objects import State
    from prefect.states import Cancelled

    state: State[None] = Cancelled(
        message="Cancelled in the UI; run again to go on from the last checkpoint."
    )
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(UUID(_cancelled.pop()), state, force=True)
