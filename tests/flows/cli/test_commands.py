"""Tests of flows.cli: what stops before anything starts, and what starts nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from plumbline.params.schema import Experiment, steps_of

STEPS = steps_of(Experiment())

if TYPE_CHECKING:
    from tests.conftest import SmallProject

FRAMEWORKS = ("torch", "transformers", "mlflow", "prefect")


def refused(project: SmallProject, *arguments: str, **env: str) -> str:
    """What a command says that exits with 2; it must have started and written nothing."""
    done = project.cli(*arguments, **env)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "starting" not in done.stderr
    assert_nothing_started(project)
    return done.stderr


def assert_nothing_started(project: SmallProject) -> None:
    for name in ("mlflow.db", "mlartifacts", "prefect", "reports", "ingredients"):
        assert not (project.home / name).exists()
    assert not list(project.home.glob("results/*"))


def write_params(project: SmallProject, text: str) -> None:
    (project.root / "params" / "bad.yaml").write_text(text)


@pytest.mark.parametrize("command", ["run", "plan"])
def test_broken_yaml_is_named_by_file_and_line(project, command):
    write_params(project, "seed: 0\nrl:\n  kl_coef: [0.1\n")

    message = refused(project, command, "bad")

    assert "params/bad.yaml" in message


def test_an_unknown_key_is_named_with_its_file_and_the_nearest(project):
    write_params(project, "extends: tiny.yaml\nrl:\n  kl_coeff: 0.1\n")

    message = refused(project, "run", "bad")

    assert "params/bad.yaml:3: rl.kl_coeff: unknown key; did you mean rl.kl_coef?" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rl.kl_coef=-1", "rl.kl_coef: expected"),
        ("rl.kl_coef=much", "rl.kl_coef: expected"),
        ("seed=-1", "seed: expected"),
        ("rl.algorithm=ppg", "rl.algorithm: expected"),
        ("rl.klcoef=1", "rl.kl_coef"),
        ("rl.mini_batch_size=7", "must divide"),
        ("model.context_tokens=64", "must fit the model's context"),
        ("rl.kl_coef", "rl.kl_coef"),
    ],
)
def test_a_wrong_override_is_named(project, override, expected):
    message = refused(project, "run", "tiny", "--set", override)

    assert expected in message
    if expected.endswith(": expected"):
        assert f"--set {override}: " in message


def test_an_unknown_experiment_is_named_with_the_nearest(project):
    assert "did you mean tiny?" in refused(project, "run", "tinny")


def test_an_unknown_step_is_named_with_the_nearest(project):
    message = refused(project, "run", "tiny", "--refresh", "evaluat")

    assert "did you mean evaluate?" in message


def test_a_result_file_in_a_missing_folder_is_refused_at_once(project):
    target = project.root / "nowhere" / "r.json"

    assert "--json" in refused(project, "run", "tiny", "--json", str(target))
    assert not target.parent.exists()


def test_a_missing_data_set_is_refused(project):
    message = refused(project, "run", "tiny", "--set", "data.path=data/other")

    assert "data/other" in message
    assert "sample" in message


@pytest.mark.parametrize("command", ["run", "plan"])
def test_edited_data_is_refused_with_what_to_do(project, command):
    path = project.data / "prompts.jsonl"
    path.write_text(path.read_text() + '{"prompt": "Hi! What is new?"}\n')

    message = refused(project, command, "tiny")

    assert "changed: data/sample/prompts.jsonl" in message
    assert "dvc add data" in message
    assert "--allow-dirty" in message


def test_data_that_no_remote_has_is_refused(project):
    shutil.rmtree(project.root / "data")
    shutil.rmtree(project.root / ".dvc" / "cache")
    shutil.rmtree(project.root / ".dvc-store")

    assert "data.dvc" in refused(project, "run", "tiny")


@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_home_below_a_file_is_refused(project, command):
    (project.root / "file").write_text("")

    message = refused(project, command, "tiny", PLUMBLINE_HOME=str(project.root / "file" / "home"))

    assert "PLUMBLINE_HOME" in message
    assert (project.root / "file").read_text() == ""


def test_a_project_that_is_none_falls_back_on_the_code_s_own(project, tmp_path):
    done = subprocess.run(
        [Path(sys.executable).with_name("plumbline"), "experiments"],
        cwd=tmp_path,
        env=project.environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode == 0, done.stderr
    assert "quickstart" in done.stdout


def test_the_plan_of_a_fresh_project_runs_everything_and_starts_nothing(project):
    steps = project.result("plan")["steps"]

    assert tuple(steps) == STEPS
    assert all(set(step) == {"action", "because"} for step in steps.values())
    assert {step["action"] for step in steps.values()} == {"run"}
    assert_nothing_started(project)


def test_a_plan_pulls_missing_data(project):
    shutil.rmtree(project.root / "data")
    shutil.rmtree(project.root / ".dvc" / "cache")

    project.result("plan")

    assert len(project.rows("prompts")) > 0


def test_a_plan_goes_on_with_edits_where_that_is_allowed(project):
    (project.data / "prompts.jsonl").write_text('{"prompt": "Hi!"}\n')

    assert project.result("plan", "--allow-dirty")["steps"]["rl"]["action"] == "run"


@pytest.mark.parametrize(
    "arguments", [("plan", "tiny"), ("--help",), ("run", "--help"), ("experiments",)], ids=" ".join
)
def test_what_only_tells_imports_no_framework(project, arguments):
    code = (
        "import sys\n"
        "from flows.cli import app\n"
        f"sys.argv = ['plumbline', *{arguments!r}]\n"
        "try:\n"
        "    app()\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        f"loaded = sorted(set({FRAMEWORKS!r}) & set(sys.modules))\n"
        "print('loaded:', loaded)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=project.root,
        env=project.environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.stdout.splitlines()[-1:] == ["loaded: []"], done.stdout + done.stderr


def test_experiments_are_listed_with_what_they_show(project):
    write_params(project, "seed: x\n")

    done = project.cli("experiments")

    assert done.returncode == 0
    assert "Every step in a few seconds." in done.stdout
    assert "params/bad.yaml:1: seed" in done.stdout


def test_status_says_how_the_data_differs(project):
    clean = project.cli("data", "status")
    (project.data / "prompts.jsonl").write_text("")
    dirty = project.cli("data", "status")

    assert (clean.returncode, dirty.returncode) == (0, 0)
    assert "clean" in clean.stdout
    assert "changed: data/sample/prompts.jsonl" in dirty.stdout


def test_a_check_of_bad_data_exits_with_2_and_names_the_row(project):
    rows = project.rows("preferences")
    rows[3]["chosen"] = " "
    project.write_rows("preferences", rows)

    done = project.cli("data", "check", "tiny")

    assert done.returncode == 2
    assert "preferences.jsonl:4 chosen: blank text" in done.stderr
    assert not (project.home / "mlflow.db").exists()


def test_a_plan_s_file_is_written_whole(project):
    target = project.root / "plan.json"
    target.write_text("old")

    assert project.cli("plan", "tiny", "--json", str(target)).returncode == 0

    assert set(json.loads(target.read_bytes())) == {"steps"}
    assert not list(project.root.glob(".plan.json*"))
