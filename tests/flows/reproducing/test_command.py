"""Tests of flows.reproducing.command: whole reproductions, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import mlflow
import pytest
from mlflow import MlflowClient

from flows.reproducing.command import reproduce
from plumbline.errors import DataError, MachineError, ParamsError, TrainingError
from plumbline.params.schema import Experiment, steps_of
from plumbline.project import Project, make_home
from tasks import tracking
from tasks.experiments import experiment_name
from tasks.locks import step_lock

if TYPE_CHECKING:
    from tests.conftest import SmallProject, Trained

    MakeProject = Callable[..., SmallProject]
    MakeRun = Callable[..., str]

ROOT = Path(__file__).resolve().parents[3]
STEPS = steps_of(Experiment())
UNKNOWN = "0123456789abcdef" * 2


def git(root: Path, *arguments: str) -> str:
    settings = ("user.name=Test", "user.email=test@localhost", "commit.gpgsign=false")
    options = [part for setting in settings for part in ("-c", setting)]
    command = ["git", *options, *arguments]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def contents(root: Path, *left_out: Path) -> dict[str, str]:
    """Every file below a folder, with its sha256 and the time of its last change."""
    return {
        str(path): f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.stat().st_mtime_ns}"
        for path in sorted(root.rglob("*"))
        if path.is_file() and not any(path.is_relative_to(folder) for folder in left_out)
    }


def reproduction_of(project: SmallProject, run_id: str) -> Path:
    return project.home / "reproduce" / run_id


def reproduced(project: SmallProject, *arguments: str) -> tuple[dict[str, Any], str]:
    """Run `plumbline reproduce ARGUMENTS`, which must find that all agrees; JSON and output."""
    file = project.home / "reproduced.json"
    done = project.cli("reproduce", *arguments, "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    value: dict[str, Any] = json.loads(file.read_bytes())
    return value, done.stdout


# A project that holds its own code, and goes on after the run.


class Past(NamedTuple):
    """A project whose data, params and code have changed since a run, and what the run wrote.

    The run's params file was never committed, and is gone.
    """

    project: SmallProject
    first: dict[str, Any]


@pytest.fixture(scope="module")
def past(make_project: MakeProject, prefect_api: str) -> Past:
    project = make_project(prefect_api=prefect_api)
    for folder in ("src", "tasks", "flows"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, project.root / folder, ignore=ignored)
    shutil.copyfile(ROOT / "pyproject.toml", project.root / "pyproject.toml")
    code = project.root / "tasks" / "rl.py"
    code.write_text(code.read_text() + "\n# Only this project's code ends so.\n")
    git(project.root, "add", "--all")
    git(project.root, "commit", "--quiet", "-m", "With its code")

    file = project.home / "first.json"
    project.home.mkdir()
    own_code = f"{project.root / 'src'}:{project.root}"
    mine = project.root / "params" / "mine.yaml"
    mine.write_text("extends: tiny.yaml\nrl:\n  cliprange: 0.25\n")
    asked = ("--set", "rl.kl_coef=0.1", "--json", str(file))
    done = project.cli("run", "mine", *asked, PYTHONPATH=own_code)
    assert done.returncode == 0, done.stderr
    mine.unlink()

    project.write_rows("prompts", project.rows("prompts")[:100])
    project.dvc("add", "data")
    git(project.root, "commit", "--quiet", "--all", "-m", "Fewer prompts")
    params = project.root / "params" / "tiny.yaml"
    params.write_text(params.read_text().replace("episodes: 32", "episodes: 48"))
    code.write_text("raise SystemExit('this is not the code that ran')\n")
    return Past(project, json.loads(file.read_bytes()))


class Reproduced(NamedTuple):
    """A reproduction that was interrupted once, and what it left and found."""

    folder: Path
    interrupted: int
    left_running: list[str]
    finished_early: dict[str, str]
    found: dict[str, Any]
    output: str
    before: dict[str, str]
    after: dict[str, str]


@pytest.fixture(scope="module")
def again(
    past: Past, wait_for: Callable[..., None], processes_in: Callable[[Path], list[str]]
) -> Reproduced:
    project, run_id = past.project, past.first["mlflow_run_id"]
    folder = reproduction_of(project, run_id)
    results = folder / "home" / "results"
    changing = (folder.parent, project.home / "locks", project.home / "reproduced.json")
    # Reading opens MLflow's database, too.
    changing += tuple(project.home.glob("mlflow.db*"))
    changing += tuple(project.home / f"mlflow.db-{kind}" for kind in ("wal", "shm"))
    before = contents(project.root, *changing)

    with project.start("reproduce", run_id, "--keep") as process:
        wait_for(lambda: any(results.glob("base_model-*")) or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    finished_early = contents(results)
    left_running = processes_in(folder)

    found, output = reproduced(project, run_id, "--keep")
    return Reproduced(
        folder, process.returncode, left_running, finished_early, found, output,
        before, contents(project.root, *changing),
    )  # fmt: skip


def test_every_digest_agrees_although_data_params_and_code_have_changed(past, again):
    assert again.found["agrees"]
    assert {name: step["digest"] for name, step in again.found["steps"].items()} == {
        name: step["digest"] for name, step in past.first["steps"].items()
    }
    assert all(step["equal"] for step in again.found["steps"].values())
    assert tuple(again.found["steps"]) == STEPS
    assert again.found["data_rev"] == past.first["data"]["rev"]
    assert "every digest is as it was" in again.output


def test_every_metric_agrees_but_times_are_left_out(past, again):
    metrics = again.found["metrics"]

    assert {metric["agreement"] for metric in metrics.values()} == {"equal"}
    assert set(metrics) | set(again.found["left_out"]) == set(past.first["metrics"])
    assert "eval/win_rate" in metrics
    assert metrics["eval/policy/kl"]["original"] == past.first["metrics"]["eval/policy/kl"]


def test_nothing_else_had_to_be_said(again):
    assert again.found["notes"] == []
    assert again.found["machine"] == {}
    assert again.found["params"] == {}


def test_the_commit_s_own_code_ran(past, again):
    made = {path.name for path in (again.folder / "home" / "results").iterdir()}

    # The keys have the code in them.
    assert {step["key"] for step in past.first["steps"].values()} <= made


def test_the_working_tree_and_the_results_are_left_alone(again):
    assert again.after == again.before


def test_an_interrupted_reproduction_ends_its_run_and_goes_on_later(again):
    assert again.interrupted == 130
    assert again.left_running == []
    early = {name for name in again.finished_early if Path(name).name.startswith(STEPS)}
    assert early
    now = contents(again.folder / "home" / "results")
    assert {name: now[name] for name in early} == {n: again.finished_early[n] for n in early}


def test_a_kept_reproduction_is_named(again):
    assert again.found["folder"] == str(again.folder)
    assert str(again.folder) in again.output
    assert (again.folder / "project" / "data" / "sample").is_dir()


# A project without its code, in a store that some results have been in for long.


@pytest.fixture(scope="module")
def tampered(trained: Trained, make_project: MakeProject) -> tuple[dict[str, Any], str, Path]:
    """The reproduction of a run, most of it cached, whose record was changed by hand."""
    home, api = trained.project.home, trained.project.prefect_api
    project = make_project(home=home, prefect_api=api)
    run_id = project.result("run", "--set", "evaluate.bootstrap_samples=101")["mlflow_run_id"]
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    client.log_metric(run_id, "eval/win_rate", 0.123)
    # As runs were before they kept their experiment.
    for file in home.glob(f"mlartifacts/**/{run_id}/**/experiment.json"):
        file.unlink()
    folder = reproduction_of(project, run_id)
    (folder / "project").mkdir(parents=True)
    (folder / "agreement.json").write_text("{}")
    found, output = reproduced(project, run_id)
    return found, output, folder


def test_a_metric_that_was_tampered_with_is_found(tampered):
    found, output, _ = tampered

    different = {k: m for k, m in found["metrics"].items() if m["agreement"] != "equal"}
    assert set(different) == {"eval/win_rate"}
    assert different["eval/win_rate"]["original"] == 0.123
    assert "1 different" in output
    assert "0.123" in output


def test_a_cached_step_s_digest_is_the_one_of_the_run_that_made_it(trained, tampered):
    steps = tampered[0]["steps"]

    assert tampered[0]["agrees"]
    for name in ("prepare_data", "base_model", "sft", "reward_model", "rl"):
        assert steps[name]["digest"] == trained.first["steps"][name]["digest"]
        assert steps[name]["equal"]


def test_installed_code_is_said_to_be_what_ran(tampered):
    (note,) = tampered[0]["notes"]

    assert "does not hold Plumbline's code" in note
    assert note in tampered[1]


def test_an_old_reproduction_is_replaced_and_the_new_one_is_removed(tampered):
    found, _, folder = tampered

    assert found["folder"] is None
    assert list(folder.parent.glob(f"*{folder.name}*")) == []


# What is refused.


@pytest.fixture(scope="module")
def small(make_project: MakeProject) -> Iterator[SmallProject]:
    """A project with an MLflow store that this process uses."""
    project = make_project()
    make_home(project.home)
    before = mlflow.get_tracking_uri()
    cached = [f for f in vars(tracking).values() if hasattr(f, "cache_clear")]
    mlflow.set_tracking_uri(f"sqlite:///{project.home / 'mlflow.db'}")
    for function in cached:
        function.cache_clear()
    MlflowClient().create_experiment(
        experiment_name(), artifact_location=(project.home / "mlartifacts").as_uri()
    )
    yield project
    mlflow.set_tracking_uri(before)
    for function in cached:
        function.cache_clear()


@pytest.fixture
def make_run(small: SmallProject) -> MakeRun:
    """Makes a pipeline run that could be reproduced, but for what is given."""
    pin = (small.root / "data.dvc").read_text().split("md5: ")[1].split("\n")[0]
    usual = {
        "plumbline.kind": "pipeline",
        "plumbline.experiment": "tiny",
        "plumbline.overrides": "{}",
        "git.commit": git(small.root, "rev-parse", "HEAD"),
        "git.dirty": "false",
        "data.rev": pin,
        "data.dirty": "false",
        "version.plumbline": "0.1.0",
    }

    def make(status: str = "FINISHED", **changes: str | None) -> str:
        client = MlflowClient()
        given = {name.replace("__", "."): value for name, value in changes.items()}
        tags = {k: v for k, v in {**usual, **given}.items() if v is not None}
        experiment = client.get_experiment_by_name(experiment_name())
        run_id = client.create_run(experiment.experiment_id, tags=tags).info.run_id
        if status != "RUNNING":
            client.set_terminated(run_id, status)
        return str(run_id)

    return make


def refused(small: SmallProject, run_id: str, **options: bool) -> Any:
    return reproduce(Project(small.root, small.home), run_id, **options)


@pytest.mark.parametrize("run_id", [UNKNOWN, "nonsense", "", "' or 1=1", "../../etc"])
def test_an_unknown_run_is_refused_and_the_last_ones_are_named(small, make_run, run_id):
    known = make_run()

    with pytest.raises(ParamsError, match=f"no run {run_id}") as refusal:
        refused(small, run_id)
    assert known in str(refusal.value)


def test_a_slip_in_a_run_s_id_is_recognised(small, make_run):
    known = make_run()

    with pytest.raises(ParamsError, match=f"did you mean {known}"):
        refused(small, known[:-1])


@pytest.mark.parametrize("status", ["RUNNING", "FAILED", "KILLED"])
def test_an_unfinished_run_is_refused(small, make_run, status):
    run_id = make_run(status)

    with pytest.raises(ParamsError, match=f"is {status}: expected a finished run"):
        refused(small, run_id)


def test_a_step_is_refused_and_its_pipeline_is_named(small, make_run):
    pipeline = make_run()
    step = make_run(plumbline__kind="step", mlflow__parentRunId=pipeline)

    with pytest.raises(ParamsError, match=f"it is a step of {pipeline}"):
        refused(small, step)


@pytest.mark.parametrize("tag", ["git.commit", "data.rev"])
def test_a_run_without_its_origin_is_refused(small, make_run, tag):
    run_id = make_run(**{tag.replace(".", "__"): None})

    with pytest.raises(ParamsError, match=f"has no tag {tag}"):
        refused(small, run_id)


def test_a_commit_that_is_not_here_is_refused(small, make_run):
    run_id = make_run(git__commit="0" * 40)

    with pytest.raises(ParamsError, match="git fetch origin 0000"):
        refused(small, run_id)


def test_edited_code_is_refused_unless_it_is_allowed(small, make_run):
    run_id = make_run(git__dirty="true", plumbline__experiment="gone")

    with pytest.raises(ParamsError, match="had been edited when it ran"):
        refused(small, run_id)
    # The next thing that is missing.
    with pytest.raises(ParamsError, match=r"ran params/gone\.yaml"):
        refused(small, run_id, allow_dirty=True)


@pytest.mark.parametrize("allow_dirty", [False, True])
def test_edited_data_is_refused(small, make_run, allow_dirty):
    run_id = make_run(data__dirty="true")

    with pytest.raises(DataError, match="nothing has kept that data"):
        refused(small, run_id, allow_dirty=allow_dirty)


def test_data_that_no_commit_pins_is_refused(small, make_run):
    run_id = make_run(data__rev="0" * 32 + ".dir")

    with pytest.raises(DataError, match=r"which no commit's data\.dvc pins"):
        refused(small, run_id)


def test_another_version_of_the_installed_code_is_refused(small, make_run):
    run_id = make_run(version__plumbline="0.0.9")

    with pytest.raises(ParamsError, match=r"pip install plumbline==0\.0\.9"):
        refused(small, run_id)


def test_the_same_reproduction_by_two_processes_is_refused(small, make_run):
    run_id = make_run()

    with (
        step_lock(small.home, f"reproduce-{run_id}"),
        pytest.raises(MachineError, match=f"Another process is reproducing {run_id}"),
    ):
        refused(small, run_id)


def test_a_reproduction_that_fails_keeps_its_folder(small, make_run, capfd):
    run_id = make_run(plumbline__overrides='{"rl.kl_coef": -1}')

    with pytest.raises(TrainingError, match="failed with exit code 2"):
        refused(small, run_id)
    assert "rl.kl_coef" in capfd.readouterr().err
    folder = reproduction_of(small, run_id)
    assert (folder / "project" / "params" / "reproduced.yaml").is_file()
    assert os.listdir(folder.parent / run_id / "project" / "data") == ["sample"]


def test_the_command_line_says_what_is_refused(small, make_run):
    known = make_run()

    done = small.cli("reproduce", UNKNOWN)

    assert done.returncode == 2
    assert f"error no run {UNKNOWN} in MLflow" in done.stderr
    assert known in done.stderr
