"""MLflow goes away in the middle of a step: a real server is killed, a real database locked."""

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from mlflow import MlflowClient
from prefect.settings import PREFECT_API_URL, temporary_settings

from plumbline.errors import TrainingError
from tasks import delivery, mlflow_client, tracking
from tasks import spool as spools
from tasks.bookkeeping import close_dead_runs
from tasks.delivery import dataset_record, deliver, metrics_record

ROOT = Path(__file__).resolve().parents[2]
AWAY_SECONDS = 4.0
HELD_UP_SECONDS = 0.8
"""No call that logs may take longer; one that waits takes a second or more."""


class Server:
    """An MLflow server on SQLite, on a port of its own, that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = f"sqlite:///{folder / 'mlflow.db'}"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, and do not wait until it answers."""
        command = [
            sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(self.port),
            "--backend-store-uri", self.store,
            "--artifacts-destination", str(self.folder / "artifacts"),
        ]  # fmt: skip
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def wait(self) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            with suppress(OSError, urllib.error.URLError):
                urllib.request.urlopen(f"{self.uri}/health", timeout=2).close()
                return
            time.sleep(0.1)
        pytest.fail((self.folder / "server.log").read_text()[-3000:])

    def kill(self) -> None:
        """Kill it with all its workers."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(tmp_path: Path, empty_store: Path) -> Iterator[Server]:
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")
    made = Server(tmp_path)
    made.start()
    made.wait()
    yield made
    made.kill()


def points(store: str, run_id: str, name: str) -> list[tuple[int, float]]:
    """What MLflow has of a metric, past its own client's opinion on what is double."""
    with closing(sqlite3.connect(store.removeprefix("sqlite:///"))) as database:
        rows = database.execute(
            "select step, value from metrics where run_uuid = ? and key = ? order by step",
            (run_id, name),
        )
        return [*rows]


def train(tracked: tracking.StepRun, steps: int, each: Callable[[int], None]) -> float:
    """Log as a training does; returns the longest time that a call took."""
    longest = 0.0
    for step in range(steps):
        each(step)
        started = time.monotonic()
        tracked.log(step, {"a": step, "b": -step / 7})
        longest = max(longest, time.monotonic() - started)
        time.sleep(0.05)
    return longest


def test_training_goes_on_while_the_server_is_down_and_no_metric_is_missing_or_double(
    server: Server,
    open_store: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(spools, "SECONDS_BETWEEN_SENDS", 0.2)
    open_store(server.uri)
    run = tracking.start_pipeline("pipeline", tmp_path, {"seed": 0}, {}, {"seed": 0})
    steps, killed = 120, [0.0]

    def outage(step: int) -> None:
        if step == 20:
            server.kill()
            killed[0] = time.monotonic()
        if server.process is None and killed[0] and time.monotonic() - killed[0] > AWAY_SECONDS:
            server.start()

    with tracking.step_run(run, "rl", {}) as tracked:
        longest = train(tracked, steps, outage)
        assert server.process is not None
        tracked.table("samples", [{"prompt": "p", "score": 1.0}])
    tracking.end_run(run.mlflow_run_id, "FINISHED", {"a": 1.0})

    assert longest < HELD_UP_SECONDS
    assert points(server.store, tracked.run_id, "a") == [(s, s) for s in range(steps)]
    assert points(server.store, tracked.run_id, "b") == [(s, -s / 7) for s in range(steps)]
    found = MlflowClient(server.uri).get_run(tracked.run_id)
    assert found.info.status == "FINISHED"
    assert json.loads(found.data.tags["mlflow.loggedArtifacts"])[0]["path"] == "samples.json"
    assert [*(tmp_path / "spool").iterdir()] == []
    said = capsys.readouterr().err
    assert said.count("MLflow does not answer") in (1, 2)
    assert "MLflow answers again" in said


HOLDER = """\
import sqlite3, sys, time
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("begin exclusive")
print("locked", flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def lock(tmp_path: Path) -> Iterator[Callable[[float], subprocess.Popen[str]]]:
    """Locks the test's database from another process, for some seconds."""
    holders = []

    def hold(seconds: float) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER, str(tmp_path / "mlflow.db"), str(seconds)]
        holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        holders.append(holder)
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        return holder

    yield hold
    for holder in holders:
        holder.kill()
        holder.communicate()


def test_training_goes_on_while_the_database_is_locked(
    run: tracking.PipelineRun,
    lock: Callable[[float], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spools, "SECONDS_BETWEEN_SENDS", 0.2)
    steps = 60

    def locked(step: int) -> None:
        if step == 10:
            lock(AWAY_SECONDS)

    with tracking.step_run(run, "rl", {}) as tracked:
        longest = train(tracked, steps, locked)
        tracked.finals({"final": 2.0})

    assert longest < HELD_UP_SECONDS
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert points(store, tracked.run_id, "a") == [(step, step) for step in range(steps)]
    assert points(store, tracked.run_id, "final") == [(0, 2.0)]
    assert MlflowClient().get_run(tracked.run_id).info.status == "FINISHED"


def test_a_call_that_can_not_wait_on_disk_waits_for_the_database_and_says_so(
    run: tracking.PipelineRun,
    lock: Callable[[float], Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    lock(4)
    tracking.tag_run(run.mlflow_run_id, {"t": "v"})
    assert MlflowClient().get_run(run.mlflow_run_id).data.tags["t"] == "v"
    said = capsys.readouterr().err
    assert "MLflow does not answer (OperationalError: database is locked); waiting for it" in said
    assert "MLflow answers again." in said


def test_what_mlflow_has_already_changes_nothing(run: tracking.PipelineRun, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    records = [
        metrics_record({"a": 0.1, "nan": float("nan"), "inf": float("inf")}, 1),
        metrics_record({"a": 0.2}, 2),
        {"tags": {"t": "v"}},
        {"file": "a.txt"},
        dataset_record("prompts", "d" * 64, "file:///p", {"num_rows": 3}, "training"),
        {"end": "KILLED", "time": 1000},
    ]
    for sent in (records[:1], records[:4], records, records):
        deliver(tracking.client(), run.mlflow_run_id, sent, tmp_path)

    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert points(store, run.mlflow_run_id, "a") == [(1, 0.1), (2, 0.2)]
    assert len(points(store, run.mlflow_run_id, "nan")) == 1
    assert len(points(store, run.mlflow_run_id, "inf")) == 1
    found = MlflowClient().get_run(run.mlflow_run_id)
    assert (found.info.status, found.info.end_time) == ("KILLED", 1000)
    assert len(found.inputs.dataset_inputs) == 1


TRAINING = """\
import os, sys, time
from pathlib import Path
import mlflow
from tasks import tracking

def train(run):
    with tracking.step_run(run, "rl", {}) as tracked:
        print(tracked.run_id, flush=True)
        sys.stdin.readline()
        for step in range(50):
            tracked.log(step, {"a": step})
        print("logged", flush=True)
        time.sleep(120)

home = Path(os.environ["PLUMBLINE_HOME"])
mlflow.set_tracking_uri(f"sqlite:///{home / 'mlflow.db'}")
try:
    train(tracking.PipelineRun(mlflow_run_id=sys.argv[1], experiment_id=sys.argv[2], name="p"))
finally:
    print("ended", flush=True)
"""


@pytest.fixture
def training(
    run: tracking.PipelineRun, tmp_path: Path
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process in the middle of a step, which logs when it is told to; and the step's run."""
    command = [sys.executable, "-c", TRAINING, run.mlflow_run_id, run.experiment_id]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    yield process, process.stdout.readline().strip()
    process.kill()
    process.communicate()


def log_all(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "logged\n"


def test_what_a_killed_process_had_logged_is_sent_at_the_next_start(
    training: tuple[subprocess.Popen[str], str],
    run: tracking.PipelineRun,
    lock: Callable[[float], subprocess.Popen[str]],
    tmp_path: Path,
    prefect_api: str,
) -> None:
    process, run_id = training
    holder = lock(60)
    log_all(process)
    process.kill()
    process.wait()
    holder.kill()
    holder.wait()
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert points(store, run_id, "a") == []
    assert MlflowClient().get_run(run_id).info.status == "RUNNING"

    with temporary_settings({PREFECT_API_URL: prefect_api}):
        close_dead_runs(tmp_path)
    assert points(store, run_id, "a") == [(step, step) for step in range(50)]
    found = MlflowClient().get_run(run_id)
    assert found.info.status == "KILLED"
    assert f"process {process.pid} had died" in found.data.tags["plumbline.killed"]
    assert [*(tmp_path / "spool").iterdir()] == []
    assert MlflowClient().get_run(run.mlflow_run_id).info.status == "RUNNING"


def test_an_interrupted_process_ends_soon_although_the_database_is_locked(
    training: tuple[subprocess.Popen[str], str],
    lock: Callable[[float], subprocess.Popen[str]],
    tmp_path: Path,
) -> None:
    process, run_id = training
    holder = lock(60)
    log_all(process)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "ended\n"
    assert time.monotonic() - started < 3 * delivery.CLOSING_SECONDS
    _, said = process.communicate(timeout=60)
    assert "the next run sends it" in said
    holder.kill()
    holder.wait()

    delivery.send_orphans()
    found = MlflowClient().get_run(run_id)
    assert found.info.status == "KILLED"
    assert found.data.tags["plumbline.error"] == "KeyboardInterrupt"
    # It ended when it was interrupted, not when MLflow heard of it.
    assert found.info.end_time - found.info.start_time < 60_000
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert len(points(store, run_id, "a")) == 50


def test_a_step_that_needs_mlflow_waits_and_then_says_what_to_do(
    open_store: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PLUMBLINE_MLFLOW_WAIT_SECONDS", "1.5")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        open_store(f"http://127.0.0.1:{free.getsockname()[1]}")
    started = time.monotonic()
    with pytest.raises(TrainingError, match=r"did not answer for 2 s.*http.*run again.*checkpoint"):
        tracking.start_pipeline("pipeline", tmp_path, {}, {})
    assert time.monotonic() - started < 15
    assert "waiting for it, up to 2 s" in capsys.readouterr().err


def test_an_interruption_does_not_wait_for_mlflow() -> None:
    calls: list[int] = []

    def lost() -> None:
        calls.append(1)
        raise ConnectionResetError

    def interrupted() -> None:
        try:
            raise KeyboardInterrupt
        finally:
            mlflow_client.patiently(lost)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert calls == [1]


def test_a_step_whose_end_mlflow_does_not_take_fails_with_the_same_words(
    run: tracking.PipelineRun,
    lock: Callable[[float], subprocess.Popen[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PLUMBLINE_MLFLOW_WAIT_SECONDS", "1")
    monkeypatch.setattr(mlflow_client, "LOCK_SECONDS", 0.2)
    monkeypatch.setattr(tracking, "QUIET_SECONDS", 0.2)
    monkeypatch.setattr(delivery, "CLOSING_SECONDS", 0.2)
    holders = []

    def body() -> None:
        with tracking.step_run(run, "rl", {}) as tracked:
            holders.append((lock(60), tracked.run_id))
            tracked.log(1, {"a": 1.0})

    with pytest.raises(TrainingError, match=r"did not answer for 1 s"):
        body()
    ((holder, run_id),) = holders
    holder.kill()
    holder.wait()
    # The thread goes on: the process is alive.
    deadline = time.monotonic() + 40
    while (tmp_path / "spool" / run_id).exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    found = MlflowClient().get_run(run_id)
    assert found.info.status == "FAILED"
    assert found.data.tags["plumbline.error"].startswith("TrainingError: MLflow did not answer")
    assert found.data.metrics == {"a": 1.0}


def test_figures_and_files_are_there_when_the_call_returns(
    run: tracking.PipelineRun, tmp_path: Path
) -> None:
    with tracking.step_run(run, "evaluate", {}) as tracked:
        figure, _ = plt.subplots()
        picture = tracked.figure("curves", figure)
        plt.close(figure)
        assert tracking.open_uri(tracked.figures["curves.png"]).read_bytes() == picture
        tracked.table("samples", [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}])
        table = json.loads(tracking.open_uri(tracked.figures["samples.json"]).read_bytes())
        assert table == {"columns": ["a", "b"], "data": [[1, "x"], [2, "y"]]}
    assert set(tracked.figure_digests) == {"curves.png", "samples.json"}
