"""Tests of flows.alignment.planning: alone, and by the command line on a project that has run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flows.alignment.planning import explain, finished, make_plan
from flows.alignment.wiring import wiring
from plumbline.params.loader import load_experiment
from plumbline.params.schema import Experiment, LocalModel, steps_of
from plumbline.project import Project
from plumbline.refs import DataVersion, file_digest
from tasks.data_version import current_version, file_hashes
from tasks.keys import Ingredients
from tasks.records import Record, local_path

if TYPE_CHECKING:
    from tests.conftest import SmallProject, Trained

    MakeProject = Callable[..., SmallProject]

ROOT = Path(__file__).resolve().parents[3]
STEPS = steps_of(Experiment())

OLD = Ingredients(
    {"rl.kl_coef": 0.05, "rl.epochs": 4, "seed": 0},
    {"sft": "a" * 64, "reward_model": "b" * 64},
    {"tasks.rl": "1" * 64, "plumbline.losses.policy": "2" * 64, "torch": "2.13.0"},
)


def record(parts: Ingredients, made: float = 0.0) -> Record:
    return Record("rl-1", parts, made)


def changed(**parts: dict[str, object]) -> Ingredients:
    return OLD._replace(**{name: {**getattr(OLD, name), **part} for name, part in parts.items()})


def test_a_step_without_a_past_never_ran():
    assert explain(OLD, []) == "never ran before"


def test_a_changed_param_is_named_with_both_values():
    new = changed(params={"rl.kl_coef": 0.2})

    assert explain(new, [record(OLD)]) == "rl.kl_coef: 0.05 → 0.2"


def test_a_changed_input_is_named_with_both_digests():
    new = changed(inputs={"sft": "c" * 64})

    assert explain(new, [record(OLD)]) == "sft: content aaaaaaaa → cccccccc"


def test_an_input_that_came_or_went_is_a_change():
    more = changed(inputs={"data/a/ratings.jsonl": "c" * 32})

    assert explain(more, [record(OLD)]) == "data/a/ratings.jsonl: new"
    assert explain(OLD, [record(more)]) == "data/a/ratings.jsonl: gone"


def test_a_pending_input_is_no_change():
    new = changed(inputs={"sft": None}, params={"seed": 1})

    assert explain(new, [record(OLD)]) == "seed: 0 → 1"


def test_changed_code_is_named_by_module():
    one = changed(code={"plumbline.losses.policy": "3" * 64})
    more = changed(code=dict.fromkeys(("plumbline.losses.policy", "a", "b", "c"), "3" * 64))
    less = OLD._replace(code={k: v for k, v in OLD.code.items() if k != "tasks.rl"})

    text = "source of plumbline.losses.policy (22222222 → 33333333)"
    assert explain(one, [record(OLD)]) == text
    assert explain(more, [record(OLD)]) == "source of a (new), b (new), c (new) and 1 more"
    assert explain(less, [record(OLD)]) == "source of tasks.rl (gone)"


def test_a_changed_library_is_named_with_both_versions():
    new = changed(code={"torch": "2.14.0"})
    without = OLD._replace(code={k: v for k, v in OLD.code.items() if k != "torch"})

    assert explain(new, [record(OLD)]) == "torch: 2.13.0 → 2.14.0"
    assert explain(without, [record(OLD)]) == "torch: 2.13.0 → none"
    assert explain(OLD, [record(without)]) == "torch: none → 2.13.0"


def test_a_param_that_came_or_went_is_a_change():
    without = OLD._replace(params={k: v for k, v in OLD.params.items() if k != "rl.epochs"})

    assert explain(without, [record(OLD)]) == "rl.epochs: 4 → absent"
    assert explain(OLD, [record(without)]) == "rl.epochs: absent → 4"


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (None, 0.3, "null → 0.3"),
        (True, False, "true → false"),
        (1, True, "1 → true"),
        ("linear", "cosine", "linear → cosine"),
        (5e-05, 1e-4, "5e-05 → 0.0001"),
    ],
)
def test_values_are_written_as_in_yaml(before, after, text):
    old, new = (changed(params={"x": value}) for value in (before, after))

    assert explain(new, [record(old)]) == f"x: {text}"


def test_of_many_changes_three_are_shown_and_the_rest_counted():
    new = changed(params={"rl.kl_coef": 0.2, "rl.epochs": 5, "seed": 1}, inputs={"sft": "c" * 64})

    assert explain(new, [record(OLD)]) == (
        "rl.epochs: 4 → 5; rl.kl_coef: 0.05 → 0.2; seed: 0 → 1; and 1 more"
    )


def test_the_most_similar_past_is_compared():
    far = changed(params={"rl.kl_coef": 0.9, "seed": 9})
    newer = changed(params={"rl.kl_coef": 0.1})
    new = changed(params={"rl.kl_coef": 0.2})

    assert explain(new, [record(far, 2.0), record(OLD, 1.0)]) == "rl.kl_coef: 0.05 → 0.2"
    assert explain(new, [record(newer, 2.0), record(OLD, 1.0)]) == "rl.kl_coef: 0.1 → 0.2"


def test_a_new_checkout_does_not_drown_the_params():
    old_code = {**{f"m{i}": "0" * 64 for i in range(9)}, "torch": "2.13.0"}
    same_params = OLD._replace(code=old_code)
    new = changed(params={"rl.kl_coef": 0.2})

    other_params = changed(params={"seed": 5, "rl.epochs": 9})
    assert "source of" in explain(new, [record(other_params), record(same_params)])


def test_without_a_change_the_result_must_be_gone():
    assert explain(OLD, [record(OLD)]) == "its result is gone"


@pytest.fixture
def fresh(tmp_path) -> Project:
    return Project(tmp_path, tmp_path / ".plumbline")


DATA = DataVersion(digest="d", path="data/a", rev="r", files={"prompts.jsonl": "p"})


def test_a_fresh_project_runs_everything_and_a_plan_makes_nothing(fresh):
    plan = make_plan(fresh, Experiment(), DATA)

    assert tuple(plan) == tuple(wiring(Experiment())) == STEPS
    assert {step.action for step in plan.values()} == {"run"}
    assert {step.because for step in plan.values()} == {"never ran before"}
    assert not fresh.home.exists()


def test_a_step_that_is_asked_for_runs(fresh):
    plan = make_plan(fresh, Experiment(), DATA, refresh=("sft",))

    assert plan["sft"] == ("run", "asked for with --refresh")


def test_a_model_that_is_not_from_scratch_does_not_wait_for_the_data():
    local = Experiment(model=LocalModel(source="local", path="m"))

    arguments = wiring(local)["base_model"]({"prepare_data": None})

    assert arguments["demonstrations"] is None


# On a project that has run, through the command line.


@pytest.fixture
def copy(trained: Trained, make_project: MakeProject) -> SmallProject:
    """A project to change, with the results of the trained one."""
    return make_project(home=trained.project.home, prefect_api=trained.project.prefect_api)


def actions(plan: dict[str, Any]) -> dict[str, str]:
    return {name: step["action"] for name, step in plan.items()}


@pytest.mark.parametrize(
    ("override", "step", "because"),
    [
        ("sft.epochs=2", "sft", "sft.epochs: 1 → 2"),
        ("seed=1", "base_model", "seed: 0 → 1"),
        ("model.layers=2", "base_model", "model.layers: 1 → 2"),
        ("data.on_invalid=quarantine", "prepare_data", "data.on_invalid: fail → quarantine"),
        ("rl.target_kl=0.5", "rl", "rl.target_kl: null → 0.5"),
        (
            "reward_model.objective=pointwise",
            "reward_model",
            "reward_model.centering: 0.0 → absent",
        ),
        ("evaluate.table_rows=9", "evaluate", "evaluate.table_rows: 40 → 9"),
        ("registry.name=another", "register", "registry.name: plumbline-policy → another"),
    ],
)
def test_a_step_is_explained_by_its_param(trained, override, step, because):
    plan = trained.project.result("plan", "--set", override)["steps"]

    assert plan[step]["action"] == "run"
    assert because in plan[step]["because"].split("; ")
    before = STEPS[: STEPS.index(step)]
    untouched = set(before) - ({"prepare_data"} if step == "base_model" else set())
    assert {plan[name]["action"] for name in untouched} <= {"cached"}


@pytest.mark.parametrize(
    "override", ["registry.alias=other", "checkpoints.keep=9", "description=Another."]
)
def test_what_no_step_reads_runs_nothing(trained, override):
    plan = trained.project.result("plan", "--set", override)["steps"]

    assert set(actions(plan).values()) == {"cached"}


def test_a_step_is_explained_by_its_data_file(copy):
    old = file_hashes(copy.data)["prompts.jsonl"]
    copy.write_rows("prompts", copy.rows("prompts")[:-1])
    (copy.data / "notes.txt").write_text("")
    copy.dvc("add", "data")
    new = file_hashes(copy.data)["prompts.jsonl"]

    plan = copy.result("plan")["steps"]

    assert plan["prepare_data"] == {
        "action": "run",
        "because": "data/sample/notes.txt: new; "
        f"data/sample/prompts.jsonl: content {old[:8]} → {new[:8]}",
    }
    assert plan["base_model"] == {
        "action": "unknown",
        "because": "waits for the output of prepare_data",
    }
    assert plan["rl"]["because"] == "waits for the output of sft, reward_model, prepare_data"


@pytest.fixture
def edited_code(tmp_path: Path) -> Path:
    """A copy of the code with one edit, to be put on the path."""
    ignore = shutil.ignore_patterns("__pycache__")
    for package in ("flows", "tasks", "src/plumbline"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignore)
    with (tmp_path / "src/plumbline/losses/policy.py").open("a") as file:
        file.write("# edited\n")
    return tmp_path


def test_a_step_is_explained_by_its_source(trained, edited_code, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{edited_code / 'src'}{os.pathsep}{edited_code}")
    name = "src/plumbline/losses/policy.py"
    old, new = (file_digest(root / name)[:8] for root in (ROOT, edited_code))

    plan = trained.project.result("plan")["steps"]

    assert plan["rl"] == {
        "action": "run",
        "because": f"source of plumbline.losses.policy ({old} → {new})",
    }
    assert set(actions(plan).items()) == {
        *((step, "cached") for step in ("prepare_data", "base_model", "sft", "reward_model")),
        ("rl", "run"),
        *((step, "unknown") for step in ("evaluate", "register")),
    }


def test_a_step_is_explained_by_its_library(trained, tmp_path, monkeypatch):
    info = tmp_path / "pyarrow-99.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pyarrow\nVersion: 99.1\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    plan = trained.project.result("plan")["steps"]

    assert plan["prepare_data"]["because"].startswith("pyarrow: ")
    assert plan["prepare_data"]["because"].endswith(" → 99.1")


def test_a_step_whose_result_is_gone_says_so(trained, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(trained.project.home, home, ignore=shutil.ignore_patterns("mlartifacts"))
    project = type(trained.project)(trained.project.root, home)
    (home / "results" / trained.first["steps"]["sft"]["key"]).write_text("garbled")

    plan = project.result("plan")["steps"]

    assert plan["sft"] == {"action": "run", "because": "its result is gone"}
    assert plan["base_model"]["action"] == "cached"


def test_a_plan_takes_refresh(trained):
    plan = trained.project.result("plan", "--refresh", "sft", "--refresh", "register")["steps"]

    assert plan["sft"] == {"action": "run", "because": "asked for with --refresh"}
    assert plan["register"]["action"] == "run"
    assert plan["base_model"]["action"] == "cached"
    assert plan["reward_model"] == {
        "action": "unknown",
        "because": "waits for the output of sft",
    }
    wrong = trained.project.cli("plan", "tiny", "--refresh", "sftt")
    assert wrong.returncode == 2
    assert "did you mean sft?" in wrong.stderr


def test_a_plan_says_it_on_the_terminal(trained):
    done = trained.project.cli("plan", "tiny", "--set", "rl.kl_coef=0.7")

    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert "cached" in lines["sft"]
    assert lines["rl"].split(maxsplit=2)[1] == "run"
    assert "rl.kl_coef: " in lines["rl"]
    assert lines["rl"].rstrip().endswith(" → 0.7")


@pytest.mark.parametrize("arguments", [(), ("--set", "rl.kl_coef=0.7")], ids=" ".join)
def test_a_plan_of_what_has_run_imports_nothing_heavy(trained, arguments):
    heavy = {
        "torch", "transformers", "mlflow", "prefect", "dvc", "pandas", "numpy", "pyarrow",
        "matplotlib", "grimp", "tokenizers", "sqlalchemy", "httpx",
    }  # fmt: skip
    code = (
        "import sys\n"
        "from flows.cli import app\n"
        f"sys.argv = ['plumbline', 'plan', 'tiny', *{arguments!r}]\n"
        "try:\n"
        "    app()\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        f"print(sorted({heavy!r} & sys.modules.keys()))\n"
    )
    trained.project.result("plan")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=trained.project.root,
        env=trained.project.environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.stdout.splitlines()[-1:] == ["[]"], done.stdout + done.stderr


# What is finished.


def finished_steps(project: SmallProject, *overrides: str) -> Any:
    where = Project(project.root, project.home)
    loaded = load_experiment("tiny", where.params, overrides)
    data = current_version(project.root, "data/sample", allow_dirty=True)
    return finished(where, loaded.experiment, data)


def test_what_has_run_is_finished_with_its_keys_and_results(trained):
    steps = finished_steps(trained.project)

    assert tuple(steps) == STEPS
    assert {name: (step.key, step.result.digest) for name, step in steps.items()} == {
        name: (step["key"], step["digest"]) for name, step in trained.first["steps"].items()
    }


@pytest.mark.parametrize("override", ["seed=1", "registry.name=another", "evaluate.judge=true"])
def test_another_experiment_is_not_finished(trained, override):
    assert finished_steps(trained.project, override) is None


def test_other_data_is_not_finished(copy):
    (copy.data / "notes.txt").write_text("")

    assert finished_steps(copy) is None


def test_a_damaged_result_is_not_finished(trained):
    figure = next(iter(finished_steps(trained.project)["rl"].result.figures.values()))
    path = local_path(figure)
    content = path.read_bytes()
    try:
        path.write_bytes(content[:-1])
        assert finished_steps(trained.project) is None
    finally:
        path.write_bytes(content)
    assert finished_steps(trained.project) is not None


# Runs.


def test_identical_output_stops_what_lies_below(trained, copy):
    (copy.data / "notes.txt").write_text("For people; no step reads it.")
    copy.dvc("add", "data")

    plan = copy.result("plan")["steps"]
    result = copy.result("run")

    assert plan["prepare_data"]["because"] == "data/sample/notes.txt: new"
    assert {plan[name]["action"] for name in STEPS[1:]} == {"unknown"}
    ran = [name for name, step in result["steps"].items() if step["status"] == "ran"]
    assert ran == ["prepare_data"]
    for name, step in result["steps"].items():
        assert step["digest"] == trained.first["steps"][name]["digest"]
    after = copy.result("plan")["steps"]
    assert set(actions(after).values()) == {"cached"}, after


def test_a_run_uses_the_data_that_it_verified(trained, copy):
    target = copy.root / "r.json"
    process = copy.start_anew("run", "tiny", "--refresh", "prepare_data", "--json", str(target))
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if "starting" in line:
                break
        (copy.data / "prompts.jsonl").write_text('{"prompt": "Edited while the run began."}\n')
        _, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()

    assert process.returncode == 0, stderr
    steps = json.loads(target.read_bytes())["steps"]
    assert steps["prepare_data"]["status"] == "ran"
    for name, step in steps.items():
        assert step["digest"] == trained.first["steps"][name]["digest"]
    refused = copy.cli("run", "tiny")
    assert refused.returncode == 2
    assert "changed: data/sample/prompts.jsonl" in refused.stderr
    assert "dvc add data" in refused.stderr
    assert "--allow-dirty" in refused.stderr
