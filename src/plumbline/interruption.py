"""Signals that would end the process, held back while something must not be cut in two."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back inside the context; what came meanwhile is delivered after it.

    Their handlers raise exceptions between any two instructions of the main thread. In other
    threads they never do, and nothing is held back there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    try:
        with _held(SIGNALS[0], arrived), _held(SIGNALS[1], arrived):
            yield
    finally:
        for number in arrived:
            signal.raise_signal(number)


@contextmanager
def _held(number: signal.Signals, arrived: list[int]) -> Iterator[None]:
    handler = signal.getsignal(number)
    # None: not set from Python, which can't put it back.
    if handler is None:
        yield
        return
    # A signal between these lines still finds its handler put back.
    try:
        signal.signal(number, lambda came, _: arrived.append(came))
        yield
    finally:
        signal.signal(number, handler)
