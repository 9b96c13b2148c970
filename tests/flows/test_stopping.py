"""Runs that are stopped, killed, cancelled or started several times at once."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import time
import urllib.request
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flows.stopping import Terminated, insistent, terminable

if TYPE_CHECKING:
    from tests.conftest import SmallProject, Trained

    MakeProject = Callable[..., SmallProject]

LONG = ("--set", "rl.episodes=800", "--set", "checkpoints.every_steps=5")
"""An RL step of some five seconds, in which there is time to be stopped."""
LONGER = ("--set", "rl.episodes=16000", "--set", "checkpoints.every_steps=5")
"""One that does not come to its end."""


def wait_for_step(project: SmallProject, step: str, process: subprocess.Popen[str]) -> None:
    """Until the step computes."""
    deadline = time.monotonic() + 120
    while not any((project.home / "locks").glob(f"{step}-*.lock")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_checkpoint(project: SmallProject, process: subprocess.Popen[str]) -> None:
    """Until the RL step has saved its state."""
    deadline = time.monotonic() + 120
    while not any((project.home / "checkpoints").glob("rl-*/[!.]*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def query(database: Path, sql: str) -> list[Any]:
    with closing(sqlite3.connect(database, timeout=30)) as connection:
        return connection.execute(sql).fetchall()


def mlflow_states(project: SmallProject) -> dict[str, str]:
    """State of each MLflow run by its name; pipelines are `tiny`."""
    rows = query(project.home / "mlflow.db", "select name, status from runs order by start_time")
    return {name.split("-")[0] if name.startswith("tiny") else name: state for name, state in rows}


def post(api: str, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"{api}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


def flow_runs(project: SmallProject, **states: Any) -> list[dict[str, Any]]:
    """The flow runs that processes of this project started, newest first."""
    assert project.prefect_api is not None
    found = post(project.prefect_api, "flow_runs/filter", {"sort": "START_TIME_DESC"})
    ours = {row[0] for row in query(project.home / "mlflow.db", FLOW_RUN_IDS)}
    return [run for run in found if run["id"] in ours]


FLOW_RUN_IDS = "select value from tags where key = 'prefect.flow_run_id'"


@pytest.fixture(scope="module")
def undisturbed(make_project: MakeProject, prefect_api: str) -> dict[str, Any]:
    """What a run brings out that nobody disturbs."""
    return make_project(prefect_api=prefect_api).result("run", *LONG)


def digests(result: dict[str, Any]) -> dict[str, str]:
    return {name: step["digest"] for name, step in result["steps"].items()}


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"]
)
def test_a_stopped_run_is_marked_and_goes_on_to_the_same_bits(
    served_project, undisturbed, number, code
):
    process = served_project.start("run", "tiny", *LONG)
    wait_for_checkpoint(served_project, process)
    began = time.monotonic()
    process.send_signal(number)
    _, said = process.communicate(timeout=60)

    assert time.monotonic() - began < 20
    assert process.returncode == code
    assert "the same command goes on from the last checkpoint" in said
    states = mlflow_states(served_project)
    assert (states["tiny"], states["rl"], states["sft"]) == ("KILLED", "KILLED", "FINISHED")
    assert flow_runs(served_project)[0]["state_type"] == "CRASHED"
    assert list((served_project.home / "locks").iterdir()) == []

    again = served_project.result("run", *LONG)
    assert digests(again) == digests(undisturbed)
    assert [n for n, s in again["steps"].items() if s["status"] == "cached"] == [
        "prepare_data", "base_model", "sft", "reward_model",
    ]  # fmt: skip
    tag = "select value from tags where key = 'resumed_from_step' and run_uuid = '{}'"
    assert query(
        served_project.home / "mlflow.db", tag.format(again["steps"]["rl"]["mlflow_run_id"])
    )
    assert list((served_project.home / "checkpoints").glob("*")) == []


def test_a_run_cancelled_in_the_ui_ends_as_cancelled(served_project):
    process = served_project.start("run", "tiny", *LONGER)
    wait_for_checkpoint(served_project, process)
    run = flow_runs(served_project)[0]
    state = {"state": {"type": "CANCELLING", "name": "Cancelling"}, "force": True}
    began = time.monotonic()
    post(served_project.prefect_api, f"flow_runs/{run['id']}/set_state", state)
    process.communicate(timeout=60)

    assert time.monotonic() - began < 20
    assert process.returncode == 143
    assert flow_runs(served_project)[0]["state_type"] == "CANCELLED"
    assert mlflow_states(served_project)["rl"] == "KILLED"
    assert any((served_project.home / "checkpoints").glob("rl-*/*"))


def test_a_killed_run_is_closed_by_the_next_which_computes_nothing_twice(
    served_project, undisturbed
):
    process = served_project.start("run", "tiny", *LONG)
    wait_for_checkpoint(served_project, process)
    process.kill()
    process.communicate()
    killed = flow_runs(served_project)[0]
    assert killed["state_type"] == "RUNNING"
    assert mlflow_states(served_project)["rl"] == "RUNNING"

    again = served_project.result("run", *LONG)

    assert digests(again) == digests(undisturbed)
    states = query(served_project.home / "mlflow.db", "select status from runs")
    assert sorted({state for (state,) in states}) == ["FINISHED", "KILLED"]
    states = {run["id"]: run["state_type"] for run in flow_runs(served_project)}
    assert states[killed["id"]] == "CRASHED"
    assert list((served_project.home / "locks").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_that_comes_while_garbage_is_cleared_away_is_heard(number, request):
    # A shell that runs the tests in the background makes them deaf to SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    class Garbage:
        def __del__(self) -> None:
            os.kill(os.getpid(), number)
            time.sleep(0.01)

    def run() -> None:
        with terminable(), insistent():
            Garbage()
            time.sleep(10)

    with pytest.raises((Terminated, KeyboardInterrupt)):
        run()


@pytest.mark.parametrize("runs", [2, 4])
def test_simultaneous_runs_compute_each_step_once(make_project, runs):
    # Without a named server: they share the one that the first of them starts.
    project = make_project()
    files = [project.root / f"{number}.json" for number in range(runs)]
    processes = [project.start("run", "tiny", "--json", str(file)) for file in files]
    for process in processes:
        assert process.wait(280) == 0, process.communicate()
        process.communicate()

    results = [json.loads(file.read_bytes()) for file in files]
    for step in results[0]["steps"]:
        made = [result["steps"][step] for result in results]
        assert sum(one["status"] == "ran" for one in made) == 1
        assert len({one["digest"] for one in made}) == 1
    assert list((project.home / "locks").iterdir()) == []
    states = query(project.home / "mlflow.db", "select distinct status from runs")
    assert states == [("FINISHED",)]


# A run with nothing to do.


@pytest.fixture(scope="module")
def settled(trained: Trained, make_project: MakeProject) -> SmallProject:
    """A project whose results are all there, and which has no server."""
    trained.project.result("run")
    return make_project(home=trained.project.home, prefect_api="http://127.0.0.1:9/api")


def test_a_run_with_nothing_to_do_says_so_and_starts_nothing(trained, settled):
    count = "select count(*) from runs"
    before = query(settled.home / "mlflow.db", count)

    done = settled.cli("run", "tiny")

    assert done.returncode == 0, done.stderr
    assert "Nothing to do: all 7 steps of tiny are up to date" in done.stdout
    assert "--record" in done.stdout
    for step in trained.first["steps"].values():
        assert step["digest"][:12] in done.stdout
    assert query(settled.home / "mlflow.db", count) == before


def test_its_json_has_the_same_numbers(trained, settled):
    result = settled.result("run")

    assert result["metrics"] == trained.first["metrics"]
    assert digests(result) == digests(trained.first)
    assert {step["status"] for step in result["steps"].values()} == {"cached"}
    assert result["mlflow_run_id"] is None


def test_it_is_recorded_if_asked(trained):
    result = trained.project.result("run", "--record")

    assert result["mlflow_run_id"]
    assert {step["status"] for step in result["steps"].values()} == {"cached"}


# Last: it leaves another run as the newest one.


def test_a_moved_alias_is_something_to_do(trained):
    project = trained.project
    project.result("run", "--set", "rl.kl_coef=0.2")

    back = project.result("run")

    assert back["mlflow_run_id"] is not None
    assert back["registered"] == trained.first["registered"]
    assert project.result("run")["mlflow_run_id"] is None
