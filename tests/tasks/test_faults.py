"""Tests of tasks.faults: the errors that libraries really raise, and Prefect's retries."""

import errno
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
import requests
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
from prefect import flow, task
from prefect.exceptions import PrefectHTTPStatusError, TerminationSignal
from prefect.settings import PREFECT_API_URL, temporary_settings

from plumbline.errors import MachineError, TrainingError
from tasks.caching import step_options
from tasks.faults import RETRY_DELAYS, broken_device, can_retry, first_line, passing, root_cause

ILLEGAL = "CUDA error: an illegal memory access was encountered"
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 78 GiB in all"


class Answers(BaseHTTPRequestHandler):
    """Answers /500 with 500 and so on, in MLflow's way, and never where it is asked to wait."""

    def do_GET(self) -> None:
        if "wait" in self.path:
            threading.Event().wait(1.0)
        status = next((int(part) for part in self.path.split("/") if part.isdigit()), 200)
        codes = {
            400: "INVALID_PARAMETER_VALUE",
            401: "UNAUTHENTICATED",
            404: "RESOURCE_DOES_NOT_EXIST",
            429: "REQUEST_LIMIT_EXCEEDED",
        }
        body = f'{{"error_code": "{codes.get(status, "INTERNAL_ERROR")}", "message": "m"}}'
        with suppress(OSError):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Answers) as made:
        thread = threading.Thread(target=made.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()


@pytest.fixture
def nowhere() -> str:
    """An address at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def raised_by(call: Callable[[], object]) -> BaseException:
    with pytest.raises(BaseException) as caught:  # noqa: PT011  of every kind
        call()
    return caught.value


def ask_mlflow(uri: str, monkeypatch: pytest.MonkeyPatch) -> BaseException:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    return raised_by(lambda: MlflowClient(tracking_uri=uri).get_run("a" * 32))


def test_a_server_that_is_down_can_come_back(nowhere: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert passing(raised_by(lambda: requests.get(nowhere, timeout=1)))
    assert passing(raised_by(lambda: httpx.get(nowhere)))
    assert passing(ask_mlflow(nowhere, monkeypatch))


def test_a_server_that_is_slow_can_recover(server: str) -> None:
    assert passing(raised_by(lambda: requests.get(f"{server}/wait", timeout=0.05)))
    assert passing(raised_by(lambda: httpx.get(f"{server}/wait", timeout=0.05)))


@pytest.mark.parametrize(
    ("status", "passes"),
    [(500, True), (502, True), (503, True), (429, True), (400, False), (401, False), (404, False)],
)
def test_what_a_server_answers(
    server: str, status: int, passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{server}/{status}"
    assert passing(raised_by(lambda: requests.get(url, timeout=5).raise_for_status())) is passes
    assert passing(ask_mlflow(url, monkeypatch)) is passes
    answer = httpx.get(url)
    prefects = PrefectHTTPStatusError("m", request=answer.request, response=answer)
    assert passing(prefects) is passes


def test_a_locked_database_is_freed_and_a_broken_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as holder:
        holder.execute("begin exclusive")
        with closing(sqlite3.connect(path, timeout=0)) as other:
            locked = raised_by(lambda: other.execute("create table a (b)"))
    with closing(sqlite3.connect(path)) as database:
        missing = raised_by(lambda: database.execute("select * from nothing"))

    assert passing(locked)
    assert not passing(missing)
    for cause, passes in ((locked, True), (missing, False)):
        temporary = MlflowException("of MLflow", error_code=TEMPORARILY_UNAVAILABLE)
        temporary.__cause__ = cause
        assert passing(temporary) is passes


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (ConnectionResetError(), True),
        (BrokenPipeError(), True),
        (TimeoutError(), True),
        (OSError(errno.EHOSTUNREACH, "No route to host"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (FileNotFoundError(), False),
        (PermissionError(), False),
        (ValueError("nan"), False),
        (KeyError("prompt"), False),
        (TrainingError("the loss is not finite"), False),
        (MachineError("no room"), False),
        (MemoryError(), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (RuntimeError(ILLEGAL), False),
        (torch.OutOfMemoryError(OUT_OF_MEMORY), False),
        (MlflowException("anything of its own"), False),
        (KeyboardInterrupt(), False),
        (SystemExit(1), False),
        (TerminationSignal(15), False),
    ],
    ids=first_line,
)
def test_errors_by_themselves(error: BaseException, passes: bool) -> None:
    assert passing(error) is passes


def test_the_cause_counts_where_the_error_does_not_tell() -> None:
    def chained(error: BaseException, cause: BaseException) -> BaseException:
        error.__cause__ = cause
        return error

    lost = ConnectionResetError()
    assert passing(chained(RuntimeError("can't load the file"), lost))
    assert passing(chained(RuntimeError(), chained(RuntimeError(), lost)))
    assert not passing(chained(ValueError("not a number"), lost))
    assert not passing(chained(TrainingError("MLflow did not answer for 600 s"), lost))
    assert not passing(chained(torch.OutOfMemoryError(OUT_OF_MEMORY), lost))
    assert not passing(chained(KeyboardInterrupt(), lost))
    assert not passing(chained(ConnectionResetError(), KeyboardInterrupt()))


def test_an_error_on_the_way_of_handling_another_counts_unless_it_hides_it() -> None:
    def fail(hide: bool) -> None:
        try:
            raise ConnectionResetError
        except ConnectionResetError:
            if hide:
                raise RuntimeError from None
            raise RuntimeError  # noqa: B904  that is what is tested

    assert passing(raised_by(lambda: fail(hide=False)))
    assert not passing(raised_by(lambda: fail(hide=True)))


@pytest.mark.parametrize(
    ("error", "broken"),
    [
        (RuntimeError(f"{ILLEGAL}\nCUDA kernel errors might be reported later"), True),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), True),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
            True,
        ),
        (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:94, remote process exited"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (RuntimeError("CUDA error: out of memory"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), False),
        (torch.OutOfMemoryError(OUT_OF_MEMORY), False),
        (ValueError("CUDA error"), False),
    ],
    ids=first_line,
)
def test_a_broken_gpu_is_told_from_a_full_one_and_from_a_bug(
    error: Exception, broken: bool
) -> None:
    assert broken_device(error) is broken
    assert not passing(error)


def test_an_error_fits_in_a_line() -> None:
    assert first_line(ValueError("bad\nand long")) == "ValueError: bad"
    assert first_line(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_a_server_that_is_down_is_said_in_few_words(
    nowhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = root_cause(ask_mlflow(nowhere, monkeypatch))
    assert said == "ConnectionRefusedError: [Errno 111] Connection refused"


def test_steps_are_tried_again_for_faults_that_can_pass_and_for_no_others(
    prefect_api: str,
) -> None:
    assert step_options["retry_condition_fn"] is can_retry
    assert step_options["retries"] == len(RETRY_DELAYS)
    assert step_options["retry_delay_seconds"] == list(RETRY_DELAYS)
    attempts: list[str] = []
    options = {name: value for name, value in step_options.items() if name.startswith("retr")} | {
        "retry_delay_seconds": 0
    }

    @task(**options)
    def flaky(kind: str) -> int:
        attempts.append(kind)
        if kind == "lost" and attempts.count(kind) < 3:
            raise ConnectionResetError("lost")
        if kind == "bad":
            raise ValueError("bad")
        return attempts.count(kind)

    @flow
    def both() -> int:
        made = flaky("lost")
        with pytest.raises(ValueError, match="bad"):
            flaky("bad")
        return made

    with temporary_settings({PREFECT_API_URL: prefect_api}):
        assert both() == 3
    assert attempts == ["lost", "lost", "lost", "bad"]
