"""A second process that takes part of a long piece of work."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from loky import ProcessPoolExecutor

Job = TypeVar("Job")
Result = TypeVar("Result")

WORTH_IT = 8
"""Jobs; its start, with all the imports, takes as long as some of them."""
CHECK_SECONDS = 1
"""So often the second process looks whether the first was killed, and goes, too."""


def map_in_two_processes(
    function: Callable[[Job], Result], jobs: Sequence[Job]
) -> Iterator[Result]:
    """The results of all jobs, in any order; this process does what the second has not begun.

    Fewer than `WORTH_IT` jobs, or any on a single core, are all done here. The function, the jobs
    and the results go from process to process, the function once. What a job raises is raised here.
    The second process is gone in the end.
    """
    if len(jobs) < WORTH_IT or _cores() < 2:
        yield from map(function, jobs)
        return
    # A new interpreter: a copy of this one would have its locks, but not the threads that hold
    # them. Unlike the standard library's, loky's does not run the main module once more.
    with ProcessPoolExecutor(
        1, initializer=_begin, initargs=(function, os.getpid()), env=_environment()
    ) as second:
        futures = [second.submit(_do, job) for job in jobs]
        try:
            # From the end, where it comes last.
            for job, future in zip(reversed(jobs), reversed(futures), strict=True):
                yield function(job) if future.cancel() else future.result()
        finally:
            for future in futures:
                future.cancel()


_function: Callable[[Any], Any]


def _begin(function: Callable[[Any], Any], first: int) -> None:
    global _function
    _function = function
    threading.Thread(target=_end_with, args=(first,), daemon=True).start()


def _end_with(first: int) -> None:
    while os.getppid() == first:
        time.sleep(CHECK_SECONDS)
    os._exit(1)


def _do(job: Any) -> Any:
    return _function(job)


def _cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _environment() -> dict[str, str]:
    """The path of imports, which a script may have changed."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
