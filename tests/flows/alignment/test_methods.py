"""The ways through the pipeline other than PPO of a plain model on pairs."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import pytest
import torch
from mlflow import MlflowClient

from plumbline.data import sample
from tasks.talker import Talker

if TYPE_CHECKING:
    from tests.conftest import SmallProject, Trained

LORA = tuple(
    part
    for section in ("sft", "reward_model", "rl")
    for part in ("--set", f"{section}.lora.enabled=true", "--set", f"{section}.lora.rank=4")
)


@pytest.fixture
def project(trained: Trained, make_project: Callable[..., SmallProject]) -> SmallProject:
    """A project to change, with the results of the trained one."""
    return make_project(home=trained.project.home, prefect_api=trained.project.prefect_api)


@pytest.fixture
def client(trained: Trained) -> Iterator[MlflowClient]:
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{trained.project.home / 'mlflow.db'}")
    yield MlflowClient()
    mlflow.set_tracking_uri(before)


def statuses(result: dict[str, Any]) -> dict[str, str]:
    return {name: step["status"] for name, step in result["steps"].items()}


def test_dpo_takes_the_place_of_rl(project: SmallProject, client: MlflowClient) -> None:
    result = project.result("run", "--set", "alignment.method=dpo", "--set", "dpo.epochs=1")

    steps = statuses(result)
    assert "rl" not in steps
    assert [name for name, status in steps.items() if status == "ran"] == [
        "dpo", "evaluate", "register",
    ]  # fmt: skip
    metrics = result["metrics"]
    assert 0 <= metrics["dpo/held_out_accuracy"] <= 1
    assert metrics["eval/policy/kl"] != metrics["eval/sft/kl"] == 0
    run = client.get_run(result["steps"]["dpo"]["mlflow_run_id"])
    assert "dpo/chosen_reward" in run.data.metrics
    report = Path(result["report"])
    assert {"curves.png", "reward-kl.png"} <= {path.name for path in report.iterdir()}


def test_best_of_n_stands_beside_the_policy(trained: Trained) -> None:
    metrics = trained.first["metrics"]

    assert metrics["eval/best_of_2/kl_bound"] == pytest.approx(0.6931471806 - 0.5)
    low, high = metrics["eval/best_of_2/score_low"], metrics["eval/best_of_2/score_high"]
    assert low <= metrics["eval/best_of_2/score"] <= high
    assert {"eval/best_of_2/gold", "eval/score_gain_low"} <= set(metrics)


def test_a_judge_learns_from_the_other_half_of_the_pairs(project: SmallProject) -> None:
    result = project.result("run", "--set", "evaluate.judge=true", "--set", "rl.algorithm=grpo")

    steps, metrics = result["steps"], result["metrics"]
    assert statuses(result)["judge"] == "ran"
    assert steps["judge"]["digest"] != steps["reward_model"]["digest"]
    assert {"judge/accuracy", "eval/judge_gain", "eval/policy/judge_low"} <= set(metrics)
    assert "rl/objective/judge" in metrics
    assert "rl/val/explained_var" not in metrics
    rows = metrics["reward_model/training_rows"], metrics["judge/training_rows"]
    assert min(rows) > 0
    assert sum(rows) == metrics["data/preferences/train_rows"]


def test_adapters_are_merged_on_registering_unless_it_is_declined(
    project: SmallProject, client: MlflowClient
) -> None:
    apart = project.result("run", *LORA, "--set", "registry.merge_lora=false")
    folder = Path(mlflow.artifacts.download_artifacts("models:/plumbline-policy@challenger"))
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert not (folder / "model").exists()
    described = mlflow.models.get_model_info(str(folder))
    for schema in (described.signature.inputs, described.signature.outputs):
        assert schema.to_dict() == [{"type": "string", "required": True}]
    prompt = "<|user|>Hi!<|end|><|assistant|>"
    with warnings.catch_warnings():
        # Of MLflow, about type hints of its own.
        warnings.simplefilter("ignore", UserWarning)
        (said,) = mlflow.pyfunc.load_model(str(folder)).predict([prompt])
    assert isinstance(said, str)
    assert not said.startswith(prompt)
    answers = project.cli("chat", "--max-tokens", "4")
    assert answers.returncode == 0, answers.stderr
    # What is served is merged as it is loaded.
    talker = Talker("plumbline-policy@challenger")
    turns = [{"role": "user", "content": "Why?"}]
    reply = talker.reply(turns, temperature=1, max_tokens=4, generator=talker.generator(0))
    assert 1 <= reply.tokens <= 4

    merged = project.result("run", *LORA)
    assert [name for name, status in statuses(merged).items() if status == "ran"] == ["register"]
    loaded = mlflow.transformers.load_model(
        "models:/plumbline-policy@challenger", return_type="components"
    )
    assert not any("lora" in name for name in loaded["model"].state_dict())
    assert apart["metrics"]["eval/policy/score"] == merged["metrics"]["eval/policy/score"]
    assert apart["metrics"]["eval/policy/kl"] != 0
    rewards = apart["steps"]["reward_model"]["mlflow_run_id"]
    (output,) = client.get_run(rewards).outputs.model_outputs
    scorer = mlflow.transformers.load_model(f"models:/{output.model_id}", return_type="components")[
        "model"
    ]
    assert all(torch.isfinite(weight).all() for weight in scorer.state_dict().values())


def test_ratings_train_a_pointwise_reward_model(project: SmallProject) -> None:
    pointwise = ("--set", "reward_model.objective=pointwise")
    refused = project.cli("run", "tiny", *pointwise)
    assert refused.returncode == 2
    assert "expected the table ratings in data/sample" in refused.stderr

    project.write_rows("ratings", list(islice(sample.ratings(random.Random(1)), 200)))
    project.dvc("add", "data")
    result = project.result("run", *pointwise)

    metrics = result["metrics"]
    assert {"reward_model/label_accuracy", "reward_model/accuracy"} <= set(metrics)
    assert metrics["reward_model/normalised_mean"] == pytest.approx(0, abs=1e-4)


def test_bf16_trains_and_starts_at_the_reference(
    project: SmallProject, client: MlflowClient
) -> None:
    result = project.result("run", "--set", "precision=bf16")

    run_id = result["steps"]["rl"]["mlflow_run_id"]
    first = client.get_metric_history(run_id, "objective/kl")[0]
    assert first.value == 0
    assert result["metrics"]["eval/policy/kl"] != 0


def test_a_reward_function_draws_its_curve_and_is_part_of_the_key(
    project: SmallProject, client: MlflowClient
) -> None:
    gold = "plumbline.evaluation.principles:gold_score"
    result = project.result("run", "--set", f"rl.rewards={{{gold}: 0.5}}")

    run_id = result["steps"]["rl"]["mlflow_run_id"]
    curve = client.get_metric_history(run_id, "objective/reward_gold_score")
    assert len(curve) == 2
    assert all(0 <= point.value <= 1 for point in curve)
    plan = project.result("plan", "--set", f"rl.rewards={{{gold}: 0.25}}")["steps"]["rl"]
    assert plan["action"] == "run"
    assert f"rl.rewards.{gold}: 0.5 → 0.25" in plan["because"]


@pytest.mark.parametrize(
    ("name", "says"),
    [("nowhere:at_all", "No module named 'nowhere'"), ("plumbline.refs:nothing", "nothing")],
)
def test_a_reward_function_that_is_not_there_is_refused_before_anything_runs(
    project: SmallProject, name: str, says: str
) -> None:
    done = project.cli("run", "tiny", "--set", f"rl.rewards={{{name}: 1.0}}")

    assert done.returncode == 2
    assert "rl.rewards: expected module:function that can be imported" in done.stderr
    assert says in done.stderr
