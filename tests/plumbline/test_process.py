"""Tests of plumbline.process on real processes."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

from plumbline.process import alive, identity, pid_of

CHILD = """\
import sys
from plumbline.process import identity
print(identity(), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def child() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that waits, and who it says it is."""
    with subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
        process.kill()


def test_this_process_is_alive_and_stays_the_same() -> None:
    assert alive(identity()) is True
    assert identity() == identity()


def test_a_process_is_alive_until_it_is_killed(child: tuple[subprocess.Popen[str], str]) -> None:
    process, name = child
    assert pid_of(name) == str(process.pid)
    assert alive(name) is True
    process.kill()
    # A zombie by then, or gone; wait() alone would take it away.
    for _ in range(200):
        if alive(name) is False:
            break
        process.poll()
    assert alive(name) is False
    process.wait()
    assert alive(name) is False


def test_another_process_with_the_same_number_is_another(
    child: tuple[subprocess.Popen[str], str],
) -> None:
    host, boot, pid, start = child[1].split("/")
    assert alive(f"{host}/{boot}/{pid}/{float(start) - 60:.2f}") is False


def test_no_process_outlives_a_boot() -> None:
    host, _, pid, start = identity().split("/")
    assert alive(f"{host}/another-boot/{pid}/{start}") is False


@pytest.mark.parametrize("name", ["", "nonsense", "a/b/c/d", "elsewhere/boot/1/1.00"])
def test_of_another_host_or_of_nonsense_nothing_is_known(name: str) -> None:
    assert alive(name) is None
