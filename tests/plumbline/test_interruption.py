"""Signals are held back, delivered afterwards, and their handlers put back."""

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from plumbline.interruption import SIGNALS, uninterrupted


class Terminated(BaseException):
    """As schedulers raise it on SIGTERM."""


def terminate(number: int, frame: Any) -> None:
    raise Terminated


@pytest.fixture(autouse=True)
def handlers() -> Iterator[dict[int, Any]]:
    """Ctrl-C and SIGTERM raise, also where the tests were started deaf to them."""
    wanted = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: terminate}
    before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    yield wanted
    for number, handler in before.items():
        signal.signal(number, handler)


RAISED = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_waits_until_the_end(number: signal.Signals, handlers: dict[int, Any]) -> None:
    done = []

    def work() -> None:
        with uninterrupted():
            os.kill(os.getpid(), number)
            done.append(sum(range(10_000)))
        done.append(-1)

    with pytest.raises(RAISED[number]):
        work()
    assert len(done) == 1
    assert {n: signal.getsignal(n) for n in SIGNALS} == handlers


def test_nothing_happens_without_a_signal(handlers: dict[int, Any]) -> None:
    with uninterrupted():
        assert all(signal.getsignal(n) != handler for n, handler in handlers.items())
    assert {n: signal.getsignal(n) for n in SIGNALS} == handlers


def test_the_outermost_section_decides() -> None:
    done = []

    def work() -> None:
        with uninterrupted():
            with uninterrupted():
                signal.raise_signal(signal.SIGINT)
            done.append("outer")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["outer"]


@pytest.mark.parametrize("number", SIGNALS)
def test_of_two_signals_one_is_enough(number: signal.Signals, handlers: dict[int, Any]) -> None:
    def work() -> None:
        with uninterrupted():
            for each in (number, *SIGNALS):
                signal.raise_signal(each)

    with pytest.raises((KeyboardInterrupt, Terminated)):
        work()
    assert {n: signal.getsignal(n) for n in SIGNALS} == handlers


def test_an_error_inside_puts_the_handlers_back(handlers: dict[int, Any]) -> None:
    with pytest.raises(ZeroDivisionError), uninterrupted():
        1 / 0  # noqa: B018
    assert {n: signal.getsignal(n) for n in SIGNALS} == handlers

    def work() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            raise ValueError

    with pytest.raises(KeyboardInterrupt):
        work()


def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with uninterrupted():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_other_threads_need_no_protection(handlers: dict[int, Any]) -> None:
    seen: list[Any] = []

    def work() -> None:
        with uninterrupted():
            seen.append({n: signal.getsignal(n) for n in SIGNALS})

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [handlers]
