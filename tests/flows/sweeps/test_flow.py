"""Tests of sweeps: whole ones by the command line, their plan, and what they leave."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from mlflow import MlflowClient

from flows.storage.housekeeping import running
from flows.sweeps.points import last_words
from flows.sweeps.summary import PointSummary, conclude, markdown
from plumbline.params.sweep import LoadedSweep, load_sweep
from tasks.inventory import Inventory, StoredRun

if TYPE_CHECKING:
    from tests.conftest import SmallProject

    MakeProject = Callable[..., SmallProject]

SWEEP = """\
description: Three points, of which one fails at first.
sweep:
  experiment: tiny
  points:
    - rl.kl_coef: 0.05
    - rl.rewards: {faulty:reward: 0.1}
    - rl.kl_coef: 0.5
  parallel: 2
  best: {metric: gold, kl_at_most: 50.0}
"""
GOOD = "sweep.points=[{rl.kl_coef: 0.05}, {rl.kl_coef: 0.5}]"
FAULTY = 'def reward(prompt, response):\n    raise ValueError("the scorer is broken")\n'
MENDED = "def reward(prompt, response):\n    return float(len(response))\n"
SHARED = ("prepare_data", "base_model", "sft", "reward_model")


def on_path(project: SmallProject) -> dict[str, str]:
    """Lets the project's own modules be imported, before what is there already."""
    return {"PYTHONPATH": os.pathsep.join([str(project.root), os.environ.get("PYTHONPATH", "")])}


def write_sweep(project: SmallProject) -> None:
    (project.root / "params" / "three.yaml").write_text(SWEEP)
    (project.root / "faulty.py").write_text(FAULTY)


def client_of(project: SmallProject) -> MlflowClient:
    return MlflowClient(f"sqlite:///{project.home / 'mlflow.db'}")


def runs_where(project: SmallProject, condition: str) -> list[Any]:
    client = client_of(project)
    experiment = client.get_experiment_by_name("project")
    return list(client.search_runs([experiment.experiment_id], condition))


class Swept(NamedTuple):
    """A sweep with a point that fails, and the same one after its function was mended."""

    project: SmallProject
    first: dict[str, Any]
    output: str
    code: int
    left: list[str]
    """Processes that were there a moment after its end."""


@pytest.fixture(scope="module")
def swept(make_project: MakeProject, processes_in: Callable[[Path], list[str]]) -> Swept:
    # Without a named server: the points share the one that the sweep starts.
    project = make_project()
    write_sweep(project)
    file = project.root / "three.json"
    done = project.cli("sweep", "three", "--json", str(file), **on_path(project))
    assert file.exists(), done.stdout + done.stderr
    deadline = time.monotonic() + 20
    while (left := processes_in(project.root)) and time.monotonic() < deadline:
        time.sleep(0.2)
    output = done.stdout + done.stderr
    return Swept(project, json.loads(file.read_bytes()), output, done.returncode, left)


@pytest.fixture
def served(swept: Swept, prefect_api: str) -> SmallProject:
    """The same project, whose commands need not start a server."""
    return type(swept.project)(swept.project.root, swept.project.home, prefect_api)


# A sweep with a point that fails


def test_a_failed_point_does_not_stop_the_rest_and_its_log_is_named(swept):
    points = swept.first["points"]

    assert swept.code == 1
    assert [point["status"] for point in points] == ["finished", "failed", "finished"]
    assert points[1]["exit_code"] == 1
    assert "the scorer is broken" in points[1]["error"]
    assert "the scorer is broken" in Path(points[1]["log"]).read_text()
    assert (
        f'point 2 (rewards={{"faulty:reward": 0.1}}) failed: {points[1]["error"]}' in swept.output
    )
    assert points[1]["log"] in swept.output


def test_no_process_is_left(swept):
    assert swept.left == []


def test_shared_steps_ran_once(swept):
    for step in SHARED:
        condition = f"tags.`plumbline.step` = '{step}' and tags.`cache.hit` = 'false'"
        assert len(runs_where(swept.project, condition)) == 1, step
    ends = [point for point in swept.first["points"] if point["steps"]]
    assert all(point["steps"]["rl"]["status"] == "ran" for point in ends)


def test_the_run_in_mlflow_holds_the_points_the_figure_the_table_and_the_best(swept):
    client, run_id = client_of(swept.project), swept.first["mlflow_run_id"]
    run = client.get_run(run_id)
    tags = run.data.tags
    below = runs_where(swept.project, f"tags.`mlflow.parentRunId` = '{run_id}'")

    assert (tags["plumbline.kind"], run.info.status) == ("sweep", "FAILED")
    assert {child.data.tags["plumbline.kind"] for child in below} == {"pipeline"}
    assert {child.data.tags["plumbline.point"]: child.info.status for child in below} == {
        "1": "FINISHED", "2": "FAILED", "3": "FINISHED",
    }  # fmt: skip
    assert {child.data.tags["plumbline.sweep"] for child in below} == {tags["plumbline.sweep"]}
    for child in below:
        number = child.data.tags["plumbline.point"]
        assert tags[f"plumbline.point.{number}"].startswith(child.info.run_id)
    names = {file.path for file in client.list_artifacts(run_id)}
    assert {"frontier.png", "points.json", "report.md", "sweep.json"} <= names
    best = swept.first["points"][swept.first["best"] - 1]
    assert tags["plumbline.best.run_id"] == best["mlflow_run_id"]
    assert tags["plumbline.best.rule"] == (
        "highest gold score among the points with KL ≤ 50 nats a response"
    )
    assert run.data.metrics["eval/policy/gold"] == best["metrics"]["eval/policy/gold"]
    assert run.data.params["sweep.parallel"] == "2"


def test_the_best_point_has_the_highest_gold_score_and_the_alias(swept):
    finished = [point for point in swept.first["points"] if point["status"] == "finished"]
    # Of equally good ones the one with the smaller KL.
    finished.sort(key=lambda point: point["metrics"]["eval/policy/kl"])
    best = max(finished, key=lambda point: point["metrics"]["eval/policy/gold"])

    assert swept.first["best"] == best["number"]
    made = client_of(swept.project).get_model_version_by_alias("plumbline-policy", "challenger")
    version = swept.first["registered"]["version"]
    assert str(made.version) == best["registered"]["version"] == version


def test_the_report_has_the_figure_the_table_and_what_failed(swept):
    folder = Path(swept.first["report"])
    report = (folder / "report.md").read_text()

    assert folder.parent == swept.project.home / "reports"
    assert (folder / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert "![scores against KL](frontier.png)" in report
    assert r"Best point of the 2 points that finished: kl\_coef=" in report
    assert "the scorer is broken" in report
    assert "| 3 |" in report
    assert {path.name for path in folder.glob("point-*.log")} == {
        "point-1.log", "point-2.log", "point-3.log",
    }  # fmt: skip


# The same sweep again


def test_a_point_is_what_run_brings_out(swept, served):
    point = swept.first["points"][2]

    again = served.result("run", "--set", "rl.kl_coef=0.5", "--refresh", "rl")

    digests = {name: step["digest"] for name, step in point["steps"].items()}
    assert {name: step["digest"] for name, step in again["steps"].items()} == digests


def test_the_same_sweep_again_runs_what_is_not_finished(swept, served):
    (swept.project.root / "faulty.py").write_text(MENDED)
    file = swept.project.root / "again.json"

    done = served.cli("sweep", "three", "--json", str(file), **on_path(served))

    assert done.returncode == 0, done.stdout + done.stderr
    again = json.loads(file.read_bytes())
    ran = [
        {name for name, step in point["steps"].items() if step["status"] == "ran"}
        for point in again["points"]
    ]
    assert ran == [set(), {"rl", "evaluate", "register"}, set()]
    below = runs_where(served, f"tags.`mlflow.parentRunId` = '{again['mlflow_run_id']}'")
    assert {child.info.status for child in below} == {"FINISHED"}
    assert len(below) == 3
    assert client_of(served).get_run(again["mlflow_run_id"]).info.status == "FINISHED"

    began = time.monotonic()
    settled = served.cli("sweep", "three", "--json", str(file), **on_path(served))

    assert "Nothing to do: all 3 points of three are up to date" in settled.stdout
    assert time.monotonic() - began < 20
    rest = json.loads(file.read_bytes())
    assert (rest["mlflow_run_id"], rest["best"]) == (None, again["best"])
    assert rest["registered"] == again["registered"]


def test_to_gc_a_sweep_under_way_is_a_run_under_way():
    runs = [
        StoredRun(kind, kind, state, 0, "", "", "")
        for kind, state in (("sweep", "RUNNING"), ("step", "RUNNING"), ("pipeline", "FINISHED"))
    ]
    assert running(Inventory(runs, [], [])) == ["sweep"]


# A sweep that is stopped

LONG = ("--set", "rl.episodes=1600", "--set", "checkpoints.every_steps=5")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["SIGINT", "SIGKILL"])
def test_a_stopped_sweep_leaves_checkpoints_and_no_process(
    swept, served, number, wait_for, processes_in
):
    points = f"sweep.points=[{{rl.kl_coef: 0.0{number.value}}}]"
    before = {*(served.home / "checkpoints").glob("rl-*")}

    def checkpoints() -> bool:
        new = {*(served.home / "checkpoints").glob("rl-*")} - before
        return any(path for folder in new for path in folder.glob("[!.]*"))

    process = served.start("sweep", "three", *LONG, "--set", points, **on_path(served))
    wait_for(lambda: process.poll() is not None or checkpoints())
    assert process.poll() is None, process.communicate()
    process.send_signal(number)
    process.communicate(timeout=60)

    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    wait_for(lambda: not processes_in(served.root), 40)
    assert checkpoints()
    with closing(sqlite3.connect(served.home / "mlflow.db", timeout=30)) as database:
        (state,) = database.execute(
            "select status from runs where name like 'three-%' order by start_time desc limit 1"
        ).fetchone()
    # What was killed can't say so; the next run does.
    assert state == ("KILLED" if number == signal.SIGINT else "RUNNING")
    newest = runs_where(served, "tags.`plumbline.point` = '1'")[0]
    assert newest.info.status == "KILLED"


# What starts nothing


@pytest.fixture
def sweep_of(project: SmallProject) -> LoadedSweep:
    write_sweep(project)
    overrides = [GOOD, "sweep.best.kl_at_most=5"]
    return load_sweep("three", project.root / "params", overrides)


def test_the_plan_shows_what_points_share(project):
    write_sweep(project)
    file = project.root / "plan.json"

    done = project.cli("plan", "three", "--set", GOOD, "--json", str(file), **on_path(project))

    assert done.returncode == 0, done.stderr
    one, two = (point["steps"] for point in json.loads(file.read_bytes())["points"])
    assert {step["action"] for step in one.values()} == {"run"}
    assert {name for name, step in two.items() if step["action"] == "shared"} == set(SHARED)
    assert two["sft"]["shared_with"] == 1
    assert "10 to run, 4 shared with an earlier point" in done.stdout


def test_a_sweep_with_a_faulty_point_starts_nothing(project):
    write_sweep(project)

    done = project.cli("sweep", "three", "--set", "sweep.points=[{seed: 1}, {rl.kl_coef: -1}]")

    assert done.returncode == 2
    assert "point 2 (kl_coef=-1): --set rl.kl_coef=-1: rl.kl_coef: expected" in done.stderr
    assert "starting" not in done.stderr
    assert not (project.home / "mlflow.db").exists()


def test_a_function_that_is_not_there_is_found_before_the_first_point_starts(project):
    write_sweep(project)
    (project.root / "faulty.py").unlink()

    done = project.cli("sweep", "three", **on_path(project))

    assert done.returncode == 2
    assert "point 2 (rewards=" in done.stderr
    assert "rl.rewards: expected module:function that can be imported" in done.stderr
    assert not (project.home / "mlflow.db").exists()


def test_run_and_sweep_name_each_other(project):
    write_sweep(project)

    assert "run it with `plumbline sweep three`" in project.cli("run", "three").stderr
    assert "run it with `plumbline run tiny`" in project.cli("sweep", "tiny").stderr
    listed = project.cli("experiments").stdout
    assert "tiny at 3 points of rl.kl_coef, rl.rewards: Three points" in listed


def point_summary(number: int, **changes: Any) -> PointSummary:
    metrics = {"eval/policy/kl": 2.0, "eval/policy/gold": 0.5 + number / 10}
    values = {
        "number": number,
        "label": f"kl_coef=0.{number}",
        "values": {"rl.kl_coef": number / 10},
        "status": "finished",
        "exit_code": 0,
        "seconds": 3.0,
        "mlflow_run_id": "r",
        "steps": {},
        "metrics": metrics | {f"{name}_low": 0.0 for name in metrics},
        "registered": {"name": "plumbline-policy", "version": str(number)},
        "log": "l",
        "error": None,
    }
    return PointSummary.model_validate({**values, **changes})


FACTS = {"mlflow_run_id": "m", "prefect_flow_run_id": "p", "seconds": 9.0, "report": "r"}


def test_where_no_point_is_within_the_budget_there_is_no_best(sweep_of):
    far = {"eval/policy/kl": 7.0, "eval/policy/gold": 0.9}
    summary = conclude(sweep_of, [point_summary(2, metrics=far)], **FACTS)

    assert (summary.best, summary.registered) == (None, {})
    assert (
        "**There is no best point: no point has KL ≤ 5 nats a response; the nearest is "
        r"kl\_coef=0.2 with 7.00.**" in markdown(summary)
    )


def test_where_every_point_failed_there_is_no_figure_either(sweep_of):
    failed = {"status": "failed", "metrics": {}, "exit_code": 143, "error": "a | b"}
    summary = conclude(sweep_of, [point_summary(n, **failed) for n in (2, 1)], **FACTS)

    page = markdown(summary)
    assert [point.number for point in summary.points] == [1, 2]
    assert "frontier.png" not in page
    assert "There is no best point of the 0 points that finished: no point finished." in page
    assert r"| 1: kl\_coef=0.1 | 143 | `a \| b` | `l` |" in page


def test_points_with_different_sft_models_are_marked_as_such(sweep_of):
    def step(digest: str) -> dict[str, Any]:
        made = {"status": "ran", "seconds": 1.0, "key": "k", "mlflow_run_id": "r"}
        return {"sft": {**made, "digest": digest}}

    points = [point_summary(1, steps=step("a")), point_summary(2, steps=step("b"))]

    assert "different SFT models" in markdown(conclude(sweep_of, points, **FACTS))
    assert conclude(sweep_of, [points[0]], **FACTS).notes == []


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("sft: 1/2\nerror rl: the loss is inf\nbye\n", "rl: the loss is inf"),
        ("Traceback\n\nValueError: broken\n\n", "ValueError: broken"),
        ("", ""),
    ],
)
def test_the_last_words_of_a_log_are_its_error(tmp_path, log, words):
    (tmp_path / "log").write_text(log)

    assert last_words(tmp_path / "log") == words
    assert last_words(tmp_path / "none") == ""


def test_what_leads_a_sweep_imports_no_torch():
    # Its points import it at the same time, and there may be two cores.
    code = "import sys, flows.sweeps.flow; print({'torch', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)

    assert done.stdout.strip() == "set()", done.stderr
