"""Which faults can pass by themselves, so that trying again makes sense.

Knows errors by name where their libraries are not imported for it.
"""

import errno
from collections.abc import Iterator
from typing import Any

from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from plumbline.addresses import without_credentials
from plumbline.errors import PlumblineError

LASTING = (
    PlumblineError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    TypeError,
    ValueError,
)
"""The same input brings them about again."""

PASSING = {
    "requests.exceptions.ChunkedEncodingError",
    "requests.exceptions.ConnectionError",
    "requests.exceptions.RetryError",
    "requests.exceptions.Timeout",
    "urllib3.exceptions.ProtocolError",
    "urllib3.exceptions.MaxRetryError",
    "urllib3.exceptions.TimeoutError",
    "httpx.TransportError",
    "botocore.exceptions.HTTPClientError",
    "botocore.exceptions.ConnectionError",
}
"""Errors of a connection that was lost or never came about, and all that are derived from them."""

PASSING_CODES = {"TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED"}
"""MLflow's names for a server, or a database, that is busy."""

PASSING_ERRNOS = {errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH}

TOO_MANY_REQUESTS, SERVER_ERRORS = 429, range(500, 600)

OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED")
DEVICE_FAULTS = ("CUDA error", "CUDA driver error", "cuDNN error", "NCCL error", "HIP error")
BUGS_ON_THE_DEVICE = ("device-side assert",)

RETRY_DELAYS = (2.0, 10.0, 30.0)
"""Seconds before each attempt at a step whose fault can pass."""


def can_retry(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Whether a failed step is worth another attempt (Prefect's retry_condition_fn)."""
    return isinstance(state.data, BaseException) and passing(state.data)


def passing(error: BaseException) -> bool:
    """Whether a fault can pass while this process waits: a lost connection, a locked database.

    Where an error does not tell, what caused it does. A fault of the GPU is none of them: CUDA
    refuses all work in a process that has seen one.
    """
    links = [*_chain(error)]
    # Whoever interrupts a step does not want it again, whatever failed on the way out.
    if not all(isinstance(link, Exception) for link in links):
        return False
    # MLflow calls every fault of a database temporary, a full disk or a missing table, too.
    if any(_is(link, "sqlite3.OperationalError") and not _locked(link) for link in links):
        return False
    for link in links:
        if _lasting(link):
            return False
        if _passing(link):
            return True
    return False


def broken_device(error: BaseException) -> bool:
    """Whether the GPU failed in a way that another process may not see: run again."""
    return any(
        _on_device(link) and not any(bug in str(link) for bug in BUGS_ON_THE_DEVICE)
        for link in _chain(error)
    )


def first_line(error: BaseException) -> str:
    """An error in a line: its type and how its message begins, without passwords of addresses."""
    lines = without_credentials(str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def root_cause(error: BaseException) -> str:
    """What an error came from in the first place, in a line."""
    *_, root = _chain(error)
    return first_line(root)


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _lasting(error: BaseException) -> bool:
    if isinstance(error, LASTING):
        return True
    return _on_device(error) or any(sign in str(error) for sign in OUT_OF_MEMORY)


def _passing(error: BaseException) -> bool:
    if isinstance(error, (ConnectionError, TimeoutError)) or _is(error, *PASSING):
        return True
    if isinstance(error, OSError) and error.errno in PASSING_ERRNOS:
        return True
    status = _status(error)
    return (
        _locked(error)
        or getattr(error, "error_code", None) in PASSING_CODES
        or status == TOO_MANY_REQUESTS
        or status in SERVER_ERRORS
    )


def _locked(error: BaseException) -> bool:
    text = str(error)
    return _is(error, "sqlite3.OperationalError") and ("locked" in text or "busy" in text)


def _status(error: Any) -> int:
    """The HTTP status that a server answered with; 0 where none did."""
    # MLflow counts every error of its own, too, as one of the server.
    if _is(error, "mlflow.exceptions.RestException"):
        return int(error.get_http_status_code())
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)


def _on_device(error: BaseException) -> bool:
    text = str(error)
    return (
        isinstance(error, RuntimeError)
        and any(fault in text for fault in DEVICE_FAULTS)
        and not any(sign in text for sign in OUT_OF_MEMORY)
    )


def _is(error: BaseException, *names: str) -> bool:
    """Whether the error is of a class of one of these full names, or of one derived from it."""
    return any(f"{kind.__module__}.{kind.__qualname__}" in names for kind in type(error).__mro__)
