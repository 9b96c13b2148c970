"""The lock of a step: one holder at a time, and none that outlives its process."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tasks.locks import Busy, step_lock

HOLD = """
import sys, time
from pathlib import Path
from tasks.locks import step_lock
with step_lock(Path(sys.argv[1]), "sft-1"):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(home: Path) -> subprocess.Popen[str]:
    """Another process that has the lock of sft-1."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(home)],
        stdout=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background makes its children deaf to SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str], number: signal.Signals = signal.SIGKILL) -> None:
    process.send_signal(number)
    process.communicate(timeout=20)


def test_a_lock_leaves_nothing_behind(tmp_path):
    with step_lock(tmp_path, "sft-1"):
        assert [path.name for path in (tmp_path / "locks").iterdir()] == ["sft-1.lock"]

    assert list((tmp_path / "locks").iterdir()) == []


def test_a_lock_is_given_back_when_its_body_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), step_lock(tmp_path, "sft-1"):
        raise ZeroDivisionError

    with step_lock(tmp_path, "sft-1", wait=False):
        pass


def test_another_process_is_busy_with_it(tmp_path):
    process = holder(tmp_path)
    try:
        with pytest.raises(Busy), step_lock(tmp_path, "sft-1", wait=False):
            pass
        with step_lock(tmp_path, "sft-2", wait=False):
            pass
    finally:
        end(process)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_lock_of_a_process_that_died_does_not_block(tmp_path, number):
    end(holder(tmp_path), number)

    with step_lock(tmp_path, "sft-1", wait=False):
        pass
    assert list((tmp_path / "locks").iterdir()) == []


def test_who_waits_is_told_for_whom_and_goes_on_when_that_one_is_killed(tmp_path):
    process = holder(tmp_path)
    told: list[str] = []
    entered = threading.Event()

    def wait() -> None:
        with step_lock(tmp_path, "sft-1", waiting=told.append):
            entered.set()

    waiter = threading.Thread(target=wait, daemon=True)
    waiter.start()
    time.sleep(0.3)
    assert not entered.is_set()
    end(process)
    assert entered.wait(10)
    waiter.join(10)
    assert told == [str(process.pid)]
    assert list((tmp_path / "locks").iterdir()) == []


def test_many_processes_never_hold_it_together(tmp_path):
    script = """
import os, sys, time
from pathlib import Path
from tasks.locks import step_lock
home = Path(sys.argv[1])
for _ in range(30):
    with step_lock(home, "k"):
        inside = os.open(home / "inside", os.O_CREAT | os.O_EXCL)
        time.sleep(0.001)
        os.close(inside)
        os.unlink(home / "inside")
"""
    processes = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) for _ in range(4)]

    assert [process.wait(60) for process in processes] == [0, 0, 0, 0]
    assert os.listdir(tmp_path / "locks") == []
