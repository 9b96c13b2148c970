"""Work shared with a second process: the same results, the same errors, and nothing left behind."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from plumbline import second_process
from plumbline.second_process import map_in_two_processes

ROOT = Path(__file__).resolve().parents[2]


class TwiceUnless:
    """Doubles numbers, slowly, and says where it did; refuses one of them."""

    def __init__(self, refused: int | None = None) -> None:
        self.refused = refused

    def __call__(self, number: int) -> tuple[int, int]:
        if number == self.refused:
            raise ValueError(f"not {number}")
        time.sleep(0.1)
        return 2 * number, os.getpid()


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(second_process, "_cores", lambda: 2)


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def test_both_processes_work_and_every_job_is_done_once(two_cores):
    # Its start takes some seconds, in which the first one goes on alone.
    results = list(map_in_two_processes(TwiceUnless(), range(150)))

    assert sorted(number for number, _ in results) == [2 * number for number in range(150)]
    assert len({process for _, process in results}) == 2
    assert os.getpid() in {process for _, process in results}


def test_few_jobs_or_a_single_core_start_nothing(monkeypatch, two_cores):
    few = range(second_process.WORTH_IT - 1)
    assert {process for _, process in map_in_two_processes(TwiceUnless(), few)} == {os.getpid()}

    monkeypatch.setattr(second_process, "_cores", lambda: 1)
    many = range(second_process.WORTH_IT)
    assert {process for _, process in map_in_two_processes(TwiceUnless(), many)} == {os.getpid()}


@pytest.mark.parametrize("refused", [0, 149])
def test_what_a_job_raises_is_raised_and_no_process_stays(two_cores, refused):
    before = children()

    # The first job is the second process's, the last one this one's.
    with pytest.raises(ValueError, match=f"not {refused}"):
        list(map_in_two_processes(TwiceUnless(refused), range(150)))

    # Loky's tracker of shared resources stays as long as this process.
    left = [psutil.Process(pid).cmdline() for pid in children() - before]
    assert [command for command in left if not any("resource_tracker" in c for c in command)] == []


def test_the_second_process_outlives_a_killed_one_by_little():
    script = (
        "import time\n"
        "from plumbline import second_process\n"
        "second_process._cores = lambda: 2\n"
        "for _ in second_process.map_in_two_processes(time.sleep, [0.2] * 500): pass\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    first = subprocess.Popen([sys.executable, "-c", script], env=environment)
    try:
        deadline = time.monotonic() + 60
        seconds: list[psutil.Process] = []
        while not any("popen_loky" in " ".join(one.cmdline()) for one in seconds):
            assert time.monotonic() < deadline
            assert first.poll() is None
            time.sleep(0.1)
            seconds = psutil.Process(first.pid).children(recursive=True)
        time.sleep(2)
    finally:
        first.kill()
        first.wait()

    _, alive = psutil.wait_procs(seconds, timeout=30)

    assert alive == []
