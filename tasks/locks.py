"""Locks between processes, so that two runs compute a step once."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class Busy(Exception):
    """Another process holds the lock, and the caller did not want to wait."""


@contextmanager
def step_lock(
    home: Path, key: str, wait: bool = True, waiting: Callable[[str], None] = lambda holder: None
) -> Iterator[None]:
    """Let one process at a time compute the step with this cache key.

    The lock belongs to an open file and goes with its process, however that ends: a killed process
    leaves an empty promise on the disk, which blocks nobody.

    Args:
        home: the project's folder for generated files.
        key: of the step.
        wait: until the lock is free, or raise `Busy` at once.
        waiting: called once with the holder's process id, if there is something to wait for.

    Raises:
        Busy: the lock is taken and `wait` is off.
    """
    path = home / "locks" / f"{key}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _locked(path, wait, waiting)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        # While it is held: nobody can have locked the same file since.
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _locked(path: Path, wait: bool, waiting: Callable[[str], None]) -> int:
    """A descriptor of the file that is at `path` now, locked."""
    told = False
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise Busy(str(path)) from None
                if not told:
                    waiting(os.pread(descriptor, 32, 0).decode() or "unknown")
                told = True
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            # Its last holder may have removed the file while this process waited for it.
            if _same_file(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
