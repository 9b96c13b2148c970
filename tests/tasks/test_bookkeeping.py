"""Tests of tasks.bookkeeping: what dead processes left open in real MLflow and Prefect stores."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from mlflow import MlflowClient
from prefect import flow, task
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling, Completed, Pending, Running, State

from plumbline.process import identity, pid_of
from tasks import tracking
from tasks.bookkeeping import PROCESS_TAG, close_dead_runs, process_tag

ELSEWHERE = "elsewhere/boot/1/1.00"


@pytest.fixture(scope="module")
def dead() -> str:
    """The identity of a process that was killed."""
    program = "from plumbline.process import identity; print(identity(), flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        process.kill()
    return name


@pytest.fixture
def prefect(prefect_api: str) -> Iterator[SyncPrefectClient]:
    with temporary_settings({PREFECT_API_URL: prefect_api}), get_client(sync_client=True) as client:
        yield client


def opened(run: tracking.PipelineRun, process: str | None, **tags: str) -> str:
    """An MLflow run that somebody opened and did not close."""
    tags |= {} if process is None else {tracking.PROCESS_TAG: process}
    return str(MlflowClient().create_run(run.experiment_id, tags=tags).info.run_id)


def status(run_id: str) -> str:
    return str(MlflowClient().get_run(run_id).info.status)


@flow
def nothing() -> None:
    pass


@task
def step() -> None:
    pass


def started(client: SyncPrefectClient, state: State[Any], *tags: str) -> UUID:
    return client.create_flow_run(nothing, state=state, tags=[*tags]).id


def test_runs_of_dead_processes_are_killed_and_others_left_alone(
    run: tracking.PipelineRun, dead: str, tmp_path: Path, prefect: SyncPrefectClient
) -> None:
    killed, own, far, unknown = (
        opened(run, process) for process in (dead, identity(), ELSEWHERE, None)
    )
    finished = opened(run, dead)
    MlflowClient().set_terminated(finished, "FINISHED")

    close_dead_runs(tmp_path)

    assert status(killed) == "KILLED"
    why = MlflowClient().get_run(killed).data.tags["plumbline.killed"]
    assert f"process {pid_of(dead)} had died" in why
    assert [status(run_id) for run_id in (own, far, unknown)] == ["RUNNING"] * 3
    assert status(finished) == "FINISHED"
    # The fixture's own pipeline run is this process's.
    assert status(run.mlflow_run_id) == "RUNNING"


def test_flow_runs_of_dead_processes_have_crashed_with_their_tasks(
    run: tracking.PipelineRun, dead: str, tmp_path: Path, prefect: SyncPrefectClient
) -> None:
    tag = PROCESS_TAG + dead
    crashed = [started(prefect, make(), tag) for make in (Running, Pending, Cancelling)]
    below = prefect.create_task_run(step, crashed[0], dynamic_key="0", state=Running())
    done = prefect.create_task_run(step, crashed[0], dynamic_key="1", state=Completed())
    left = [
        started(prefect, Running(), process_tag()),
        started(prefect, Running(), PROCESS_TAG + ELSEWHERE),
        started(prefect, Running(), "mine"),
        started(prefect, Running()),
    ]
    finished = started(prefect, Completed(), tag)

    close_dead_runs(tmp_path)

    for flow_run in crashed:
        state = prefect.read_flow_run(flow_run).state
        assert state is not None
        assert state.is_crashed()
        assert state.message == f"process {pid_of(dead)} died; run again to resume"
    assert [read.is_running() for read in states(prefect, left)] == [True] * 4
    assert states(prefect, [finished])[0].is_completed()
    tasks = {
        found.id: found.state_name for found in prefect.read_task_runs() if found.state is not None
    }
    assert (tasks[below.id], tasks[done.id]) == ("Crashed", "Completed")


def states(client: SyncPrefectClient, flow_runs: list[UUID]) -> list[State[Any]]:
    found = [client.read_flow_run(flow_run).state for flow_run in flow_runs]
    return [state for state in found if state is not None]


def test_runs_after_the_first_page_are_found(
    run: tracking.PipelineRun,
    dead: str,
    tmp_path: Path,
    prefect: SyncPrefectClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tasks.bookkeeping.PAGE", 2)
    flow_runs = [started(prefect, Running(), PROCESS_TAG + dead) for _ in range(5)]
    close_dead_runs(tmp_path)
    assert all(state.is_crashed() for state in states(prefect, flow_runs))


def test_where_nothing_is_to_do_it_takes_no_time(
    run: tracking.PipelineRun, tmp_path: Path, prefect: SyncPrefectClient
) -> None:
    def seconds() -> float:
        began = time.perf_counter()
        close_dead_runs(tmp_path)
        return time.perf_counter() - began

    close_dead_runs(tmp_path)
    # At some time a busy machine has it, too.
    assert min(seconds() for _ in range(3)) < 0.5
