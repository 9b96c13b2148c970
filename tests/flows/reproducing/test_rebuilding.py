"""Tests of flows.reproducing.rebuilding: params written back, and an environment of its own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from flows.reproducing.rebuilding import acting, environment
from plumbline.params.loader import flatten, list_experiments, load_experiment
from plumbline.project import Project

ROOT = Path(__file__).resolve().parents[3]
EXPERIMENTS = [file.name for file in list_experiments(ROOT / "params")]


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("alignment.method=dpo",),
        ("rl.algorithm=grpo",),
        ("rl.rewards={plumbline.evaluation.principles:gold_score: 0.5}", "rl.learning_rate=1e-7"),
        ("seed=3", "evaluate.judge=true", "checkpoints.every_minutes=0.5"),
    ],
)
def test_a_resolved_experiment_written_back_is_the_same(tmp_path, name, overrides):
    experiment = load_experiment(name, ROOT / "params", overrides).experiment
    logged = {key: str(value) for key, value in flatten(experiment).items()}

    values = acting(experiment.model_dump(mode="json"), logged)
    (tmp_path / "again.yaml").write_text(json.dumps(values, ensure_ascii=False))

    assert load_experiment("again", tmp_path).experiment == experiment


@pytest.mark.parametrize("text", ["1e-4", "null", "yes", "é 🙂 \t\n{%- x -%}", "0o17", " a: b #c"])
def test_a_text_stays_a_text(tmp_path, text):
    local = {"source": "local", "path": "m", "chat_template": text}
    override = f"model={json.dumps(local, ensure_ascii=False)}"
    experiment = load_experiment("quickstart", ROOT / "params", [override]).experiment

    values = acting(experiment.model_dump(mode="json"), flatten(experiment))
    (tmp_path / "again.yaml").write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")

    again = load_experiment("again", tmp_path).experiment
    assert again.model.chat_template == text


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path / "root", tmp_path / "root" / ".plumbline")


def test_nothing_in_the_environment_points_to_the_project(project, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking.example")
    monkeypatch.setenv("PREFECT_LOCAL_STORAGE_PATH", "/shared/results")
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    monkeypatch.setenv("MPLCONFIGDIR", str(project.home / "matplotlib"))
    monkeypatch.setenv("HF_HOME", "/shared/hub")
    monkeypatch.setenv("PYTHONPATH", f"{project.root / 'src'}:{project.root}:/elsewhere")

    env = environment(project, tmp_path / "tree")

    gone = ("MLFLOW_TRACKING_URI", "PREFECT_LOCAL_STORAGE_PATH", "MPLCONFIGDIR", "PLUMBLINE_HOME")
    assert not set(gone) & set(env)
    assert env["PREFECT_API_URL"] == "http://127.0.0.1:1/api"
    assert env["HF_HOME"] == "/shared/hub"
    assert env["PATH"] == os.environ["PATH"]
    tree = str(tmp_path / "tree")
    assert env["PYTHONPATH"].split(":") == [f"{tree}/src", tree, "/elsewhere"]
    assert not [name for name, value in env.items() if str(project.root) in value]
