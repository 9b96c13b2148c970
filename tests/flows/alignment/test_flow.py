"""Tests of flows.alignment.flow through the command line: what a run leaves, and what it reuses."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import mlflow.transformers
import pytest
import torch
import yaml
from mlflow import MlflowClient

from flows.alignment.headline import headline_metrics
from flows.alignment.reports import PICTURES
from plumbline.data.tokenize import SCRATCH_TEMPLATE, ChatEncoder
from plumbline.models.load import load_tokenizer
from plumbline.models.scalar_head import load_scalar_model, sequence_scores
from plumbline.params.loader import flatten, load_experiment
from plumbline.params.schema import Experiment, steps_of

STEPS = steps_of(Experiment())

SECRETS = {
    "HF_TOKEN": "planted-hub-token",
    "AWS_SECRET_ACCESS_KEY": "planted-key-of-a-store",
    "MLFLOW_TRACKING_PASSWORD": "planted-password-of-mlflow",
}

if TYPE_CHECKING:
    from tests.conftest import SmallProject, Trained

    MakeProject = Callable[..., SmallProject]

MODELS = ("base_model", "sft", "reward_model", "rl")
AFTER_RL = ("rl", "evaluate", "register")
MODEL_NAME = "plumbline-policy"
PASSWORD = "planted-password-of-a-server"
ELSEWHERE = f"http://somebody:{PASSWORD}@127.0.0.1:9"
"""A server that is not there: nothing listens at this port."""


def ran(result: dict[str, Any]) -> tuple[str, ...]:
    """The steps that were not cached, in order."""
    return tuple(name for name, step in result["steps"].items() if step["status"] == "ran")


def digests(result: dict[str, Any]) -> dict[str, str]:
    return {name: step["digest"] for name, step in result["steps"].items()}


def without_times(metrics: dict[str, float]) -> dict[str, float]:
    return {
        name: value for name, value in metrics.items() if not {"perf", "time"} & {*name.split("/")}
    }


def records_of_steps(project: SmallProject) -> dict[str, bytes]:
    """The results that count, by key."""
    return {
        path.name: path.read_bytes()
        for path in (project.home / "results").iterdir()
        if path.name.startswith(STEPS)
    }


@pytest.fixture(scope="module")
def client(trained: Trained) -> Iterator[MlflowClient]:
    """MLflow's client on the store of the trained project."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{trained.project.home / 'mlflow.db'}")
    yield MlflowClient()
    mlflow.set_tracking_uri(before)


@pytest.fixture
def copy(trained: Trained, make_project: MakeProject) -> SmallProject:
    """A project to change, with the results of the trained one."""
    return make_project(home=trained.project.home, prefect_api=trained.project.prefect_api)


def children(client: MlflowClient, run_id: str) -> dict[str, Any]:
    """The runs below a pipeline's, by step."""
    experiment = client.get_experiment_by_name("project")
    found = client.search_runs(
        [experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'"
    )
    return {run.data.tags["plumbline.step"]: run for run in found}


def artifact_names(client: MlflowClient, run_id: str) -> set[str]:
    return {Path(item.path).name for item in client.list_artifacts(run_id)}


# The first run.


def test_the_result_has_the_agreed_keys(trained):
    first = trained.first

    assert {
        "experiment",
        "data",
        "mlflow_run_id",
        "prefect_flow_run_id",
        "seconds",
        "steps",
        "metrics",
    } <= set(first)
    assert first["experiment"] == "tiny"
    assert set(first["data"]) == {"rev", "digest"}
    assert tuple(first["steps"]) == STEPS
    for step in first["steps"].values():
        assert set(step) == {"status", "seconds", "key", "digest", "mlflow_run_id"}
        assert step["seconds"] > 0
    assert ran(first) == STEPS
    assert first["seconds"] >= sum(step["seconds"] for step in first["steps"].values())


def test_the_result_has_the_agreed_metrics(trained):
    metrics = trained.first["metrics"]

    agreed = {
        "reward_model/accuracy",
        "eval/sft/score",
        "eval/policy/score",
        "eval/sft/gold",
        "eval/policy/gold",
        "eval/policy/kl",
        "eval/win_rate",
        "eval/win_rate_low",
        "eval/sft/distinct_2",
        "eval/policy/distinct_2",
    }
    assert agreed <= set(metrics)
    for name in (
        "reward_model/accuracy",
        "eval/win_rate",
        "eval/sft/gold",
        "eval/policy/gold",
        "eval/policy/distinct_2",
    ):
        assert 0 <= metrics[name] <= 1
    assert metrics["eval/win_rate_low"] <= metrics["eval/win_rate"] <= metrics["eval/win_rate_high"]
    assert metrics["eval/sft/kl"] == 0


def test_the_data_is_named_by_dvc_s_own_hash(trained):
    pin = yaml.safe_load((trained.project.root / "data.dvc").read_text())

    assert trained.first["data"]["rev"] == pin["outs"][0]["md5"]


def test_the_pipeline_s_run_is_finished_and_has_what_made_it(trained, client):
    run = client.get_run(trained.first["mlflow_run_id"])
    experiment = load_experiment("tiny", trained.project.root / "params").experiment

    assert run.info.status == "FINISHED"
    assert run.data.params == {name: str(v) for name, v in flatten(experiment).items()}
    assert run.data.params["rl.kl_coef"] == "0.05"
    assert run.data.tags["plumbline.experiment"] == "tiny"
    assert run.data.tags["git.dirty"] == "false"
    assert run.data.tags["prefect.flow_run_id"] == trained.first["prefect_flow_run_id"]
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.digest == trained.first["data"]["digest"]
    assert json.loads(dataset.dataset.profile) == {"num_files": 3}


def test_the_pipeline_s_run_has_the_headline_and_the_table_of_answers(trained, client):
    run = client.get_run(trained.first["mlflow_run_id"])

    assert run.data.metrics == pytest.approx(headline_metrics(trained.first["metrics"]))
    assert {"eval/win_rate_low", "eval/policy/gold", "eval/sft/gold"} <= set(run.data.metrics)
    assert len(run.data.metrics) < 25
    assert "beats the SFT model's on **" in run.data.tags["mlflow.note.content"]
    assert "samples.json" in artifact_names(client, run.info.run_id)
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [
        {"path": "samples.json", "type": "table"}
    ]


def test_the_load_of_the_machine_is_logged_with_a_step(trained, client):
    steps = trained.first["steps"]
    long = max(steps, key=lambda name: steps[name]["seconds"])

    logged = client.get_run(steps[long]["mlflow_run_id"]).data.metrics
    assert 0 <= logged["system/cpu_utilization_percentage"] <= 100
    assert logged["system/system_memory_usage_megabytes"] > 0


def test_each_step_has_a_run_below_the_pipeline_s(trained, client):
    runs = children(client, trained.first["mlflow_run_id"])

    assert set(runs) == set(STEPS)
    for name, run in runs.items():
        step = trained.first["steps"][name]
        assert run.info.run_id == step["mlflow_run_id"]
        assert run.info.status == "FINISHED"
        assert run.data.tags["cache.hit"] == "false"
        assert run.data.tags["plumbline.key"] == step["key"]
        assert run.data.tags["plumbline.digest"] == step["digest"]
    assert runs["rl"].data.params["kl_coef"] == "0.05"
    (source,) = runs["prepare_data"].inputs.dataset_inputs
    assert source.dataset.digest == trained.first["data"]["digest"]


def test_the_curves_of_rl_have_a_point_a_rollout(trained, client):
    run_id = trained.first["steps"]["rl"]["mlflow_run_id"]

    for name in ("objective/kl", "objective/scores", "loss/policy_avg", "response/length_mean"):
        assert [m.step for m in client.get_metric_history(run_id, name)] == [16, 32]


def test_figures_and_tables_are_artifacts(trained, client):
    steps = trained.first["steps"]

    def names(step):
        return artifact_names(client, steps[step]["mlflow_run_id"])

    assert {"curves.png", "history.json"} <= names("rl")
    assert {"scores.png", "reward-kl.png", "samples.json"} <= names("evaluate")
    assert {"reward_model_scores.png", "reward_model_calibration.png"} <= names("reward_model")
    assert "prepared" in names("prepare_data")


def test_the_report_has_the_figures_and_the_numbers(trained):
    report = Path(trained.first["report"])

    for name in PICTURES:
        if name.startswith("judge"):
            continue
        assert (report / name).read_bytes().startswith(b"\x89PNG")
    assert "![curves](curves.png)" in (report / "report.md").read_text()
    summary = json.loads((report / "summary.json").read_bytes())
    assert summary["metrics"] == trained.first["metrics"]
    assert not [path for path in report.parent.iterdir() if path.name.startswith(".")]


@pytest.fixture(scope="module")
def model_ids(trained: Trained, client: MlflowClient) -> dict[str, str]:
    """The logged model of each step."""
    ids = {}
    for name in MODELS:
        run = client.get_run(trained.first["steps"][name]["mlflow_run_id"])
        (output,) = run.outputs.model_outputs
        ids[name] = output.model_id
    return ids


@pytest.mark.parametrize("step", ["base_model", "sft", "rl"])
def test_a_language_model_loads_from_mlflow_and_generates(client, model_ids, step):
    logged = client.get_logged_model(model_ids[step])
    assert str(logged.status) == "READY"
    assert logged.source_run_id is not None

    pipeline = mlflow.transformers.load_model(f"models:/{model_ids[step]}")
    (made,) = pipeline("<|user|>Hi!<|end|><|assistant|>", max_new_tokens=4)

    assert pipeline.task == "text-generation"
    assert isinstance(made["generated_text"], str)


def test_the_reward_model_loads_from_mlflow_and_returns_the_raw_score(trained, client, model_ids):
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{model_ids['reward_model']}"))
    tokenizer = load_tokenizer(folder / "components" / "tokenizer")
    encoder = ChatEncoder(tokenizer)
    model = load_scalar_model(folder / "model").eval()
    pipeline = mlflow.transformers.load_model(f"models:/{model_ids['reward_model']}")
    assert pipeline.task == "text-classification"
    assert tokenizer.chat_template == SCRATCH_TEMPLATE
    scores = []
    for row in trained.project.rows("preferences")[:8]:
        prompt = json.dumps([{"role": "user", "content": row["prompt"]}])
        ids = [*encoder.prompts([prompt])[0], *encoder.responses([row["chosen"]])[0]]
        tokens = torch.tensor([ids])
        with torch.no_grad():
            (expected,) = sequence_scores(model, tokens, torch.ones_like(tokens).bool()).tolist()
        text = f"<|user|>{row['prompt']}<|end|><|assistant|>{row['chosen']}<|end|>"
        (got,) = pipeline(text)
        assert got["score"] == pytest.approx(expected, abs=1e-4)
        scores.append(expected)

    assert min(scores) < 0


def test_weights_are_on_disk_once_and_only_as_safetensors(trained):
    names = [path for path in trained.project.home.rglob("*") if path.is_file()]
    weights = [path for path in names if path.suffix == ".safetensors"]
    assert len(weights) >= len(MODELS)
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in weights]

    assert len(set(hashes)) == len(hashes)
    assert not [p for p in names if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".pickle")]


def test_what_is_generated_is_this_user_s_alone(trained):
    assert trained.project.home.stat().st_mode & 0o077 == 0
    assert (trained.project.home / "results").stat().st_mode & 0o077 == 0


def ask(api: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """An answer of Prefect's API."""
    request = urllib.request.Request(
        f"{api}{path}",
        data=json.dumps(body).encode() if body is not None else None,
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.loads(answer.read())


def artifacts_of(api: str, flow_run_id: str) -> dict[str, str]:
    """The type of each artifact of a flow run, by its key."""
    body = {"flow_runs": {"id": {"any_": [flow_run_id]}}}
    found = ask(api, "/artifacts/filter", body)
    return {artifact["key"]: artifact["type"] for artifact in found if artifact["key"]}


def test_prefect_has_the_run_its_steps_and_its_pictures(trained):
    api, flow_run_id = trained.project.prefect_api, trained.first["prefect_flow_run_id"]

    flow_run = ask(api, f"/flow_runs/{flow_run_id}")
    tasks = ask(api, "/task_runs/filter", {"flow_runs": {"id": {"any_": [flow_run_id]}}})

    assert flow_run["state"]["name"] == "Completed"
    assert flow_run["name"] == "tiny"
    assert sorted(task["name"].rpartition("-")[0] for task in tasks) == sorted(STEPS)
    assert {task["state"]["name"] for task in tasks} == {"Completed"}
    progress = ("sft", "reward-model", "rl", "evaluate")
    assert artifacts_of(api, flow_run_id) == {
        **dict.fromkeys((f"{step}-progress" for step in progress), "progress"),
        **dict.fromkeys(("curves", "reward-kl", "scores"), "image"),
        **dict.fromkeys(("mlflow", "report"), "markdown"),
        "validation": "table",
    }


def artifact(api: str, flow_run_id: str, key: str) -> dict[str, Any]:
    body = {"flow_runs": {"id": {"any_": [flow_run_id]}}, "artifacts": {"key": {"any_": [key]}}}
    (found,) = ask(api, "/artifacts/filter", body)
    made: dict[str, Any] = found
    return made


def test_the_progress_of_a_step_ends_complete(trained):
    found = artifact(*page_of(trained.project, trained.first), "rl-progress")

    assert float(found["data"]) == 100
    assert found["description"].startswith("**rl**: 32 of 32 episodes, ")
    assert "score " in found["description"]
    assert "KL " in found["description"]
    assert found["task_run_id"] is not None


def page_of(project: SmallProject, result: dict[str, Any]) -> tuple[str, str]:
    """Where the run's page is: the API, and the flow run."""
    assert project.prefect_api is not None
    return project.prefect_api, result["prefect_flow_run_id"]


def test_the_report_on_the_page_has_links_figures_answers_and_where_it_comes_from(trained, client):
    first = trained.first
    text = artifact(*page_of(trained.project, first), "report")["data"]
    experiment = client.get_experiment_by_name("project").experiment_id
    runs = f"http://127.0.0.1:5000/#/experiments/{experiment}/runs/"

    assert f"({runs}{first['mlflow_run_id']})" in text
    assert f"({runs}{first['steps']['rl']['mlflow_run_id']})" in text
    version = first["registered"]["version"]
    assert f"(http://127.0.0.1:5000/#/models/plumbline-policy/versions/{version})" in text
    assert "`plumbline up` starts it at http://127.0.0.1:5000" in text
    assert "![curves](data:image/png;base64,iVBOR" in text
    assert first["data"]["rev"] in text
    assert "params/tiny.yaml" in text
    assert text.count("score ") >= 24


def test_the_page_shows_the_rows_of_the_tables(trained):
    found = artifact(*page_of(trained.project, trained.first), "validation")

    rows = {row["table"]: row for row in json.loads(found["data"])}
    counts = trained.first["metrics"]
    assert rows["prompts"]["held-out rows"] == counts["data/prompts/test_rows"]
    assert set(rows) == {"demonstrations", "preferences", "prompts"}
    assert "rows that break a rule: 0" in found["description"]


# A change of one param.


@pytest.fixture(scope="module")
def changed(trained: Trained) -> dict[str, Any]:
    """The plan and the run with another kl_coef, and the run after it with the old one."""
    project, other = trained.project, ("--set", "rl.kl_coef=0.2")
    return {
        "plan": project.result("plan", *other)["steps"],
        "run": project.result("run", *other),
        "alias": _challenger(project),
        "back": project.result("run"),
        "alias back": _challenger(project),
    }


def _challenger(project: SmallProject) -> Any:
    client = MlflowClient(f"sqlite:///{project.home / 'mlflow.db'}")
    return client.get_model_version_by_alias(MODEL_NAME, "challenger")


def test_the_plan_says_what_a_change_touches_and_why(changed):
    actions = {name: step["action"] for name, step in changed["plan"].items()}

    assert actions == {
        **dict.fromkeys(("prepare_data", "base_model", "sft", "reward_model"), "cached"),
        "rl": "run",
        "evaluate": "unknown",
        "register": "unknown",
    }
    assert changed["plan"]["rl"]["because"] == "rl.kl_coef: 0.05 → 0.2"
    assert "rl" in changed["plan"]["evaluate"]["because"]


def test_a_change_of_rl_runs_rl_and_what_follows(changed):
    assert ran(changed["run"]) == AFTER_RL


def test_the_alias_follows_the_run(trained, changed, model_ids):
    assert str(changed["alias"].version) == changed["run"]["registered"]["version"]
    assert str(changed["alias back"].version) == trained.first["registered"]["version"]
    assert changed["alias"].version != changed["alias back"].version
    assert changed["alias back"].source == f"models:/{model_ids['rl']}"
    assert changed["alias back"].tags["plumbline.digest"] == digests(trained.first)["rl"]


def test_a_version_says_which_run_data_and_commit_made_it_and_how_good_it_is(
    trained, changed, client
):
    tags, first = changed["alias back"].tags, trained.first
    run = client.get_run(first["mlflow_run_id"])

    assert tags["plumbline.run_id"] == first["mlflow_run_id"]
    assert tags["data.rev"] == first["data"]["rev"]
    assert tags["git.commit"] == run.data.tags["git.commit"]
    assert tags["plumbline.experiment"] == "tiny"
    for name in ("eval/win_rate", "eval/win_rate_low", "eval/win_rate_high", "eval/policy/kl_high"):
        assert tags[name.replace("/", ".")] == f"{first['metrics'][name]:.4f}"
    description = changed["alias back"].description
    assert f"data {first['data']['rev']}" in description
    low, high = (first["metrics"][f"eval/win_rate_{end}"] for end in ("low", "high"))
    assert f"[{low:.3f}, {high:.3f}]" in description
    assert client.get_registered_model(MODEL_NAME).tags["plumbline.project"] == "project"


# Runs that find everything as it was.


@pytest.fixture(scope="module")
def again(changed: dict[str, Any]) -> dict[str, Any]:
    """A run of what has run before, although something else has run since."""
    back: dict[str, Any] = changed["back"]
    return back


def test_a_value_set_back_finds_its_results_again_and_trains_nothing(trained, again):
    assert ran(again) == ()
    assert digests(again) == digests(trained.first)
    assert again["metrics"] == trained.first["metrics"]
    assert again["data"] == trained.first["data"]
    assert set(again) == set(trained.first)


def test_a_cached_step_shows_where_it_comes_from(trained, again, client):
    runs = children(client, again["mlflow_run_id"])

    assert set(runs) == set(STEPS)
    for name, run in runs.items():
        source = client.get_run(trained.first["steps"][name]["mlflow_run_id"])
        assert run.info.run_id == again["steps"][name]["mlflow_run_id"] != source.info.run_id
        assert run.info.status == "FINISHED"
        assert run.data.tags["cache.hit"] == "true"
        assert run.data.tags["cache.source_run_id"] == source.info.run_id
        assert run.data.params == source.data.params
        assert run.data.metrics.items() <= source.data.metrics.items()
        assert len(run.inputs.dataset_inputs) == len(source.inputs.dataset_inputs)
    assert "eval/win_rate" in runs["evaluate"].data.metrics


def test_the_page_of_a_run_from_the_cache_has_data_figures_and_report_too(trained, again):
    assert artifacts_of(*page_of(trained.project, again)) == {
        **dict.fromkeys(("curves", "reward-kl", "scores"), "image"),
        **dict.fromkeys(("mlflow", "report"), "markdown"),
        "validation": "table",
    }


def test_the_plan_of_a_finished_run_is_all_cached(trained, again):
    steps = trained.project.result("plan")["steps"]

    assert {step["action"] for step in steps.values()} == {"cached"}


# Runs that must do something again.


def test_a_step_that_is_asked_for_runs_alone(trained):
    result = trained.project.result("run", "--refresh", "evaluate")

    assert ran(result) == ("evaluate",)
    assert digests(result) == digests(trained.first)
    assert result["metrics"] == trained.first["metrics"]


def test_an_evaluation_that_fills_the_gpu_names_the_field_to_lower(trained, tmp_path):
    (tmp_path / "full.py").write_text(
        "import torch\n\n\ndef gold(prompt, response):\n"
        "    raise torch.OutOfMemoryError('CUDA out of memory.')\n"
    )

    done = trained.project.cli(
        "run", "tiny", "--set", "evaluate.gold=full:gold", PYTHONPATH=str(tmp_path)
    )

    assert done.returncode == 1
    assert "evaluate: the GPU's memory is full (CUDA out of memory.). To go on" in done.stderr
    assert "lower evaluate.batch_size, which is 128" in done.stderr


def test_a_damaged_model_is_made_again_and_can_be_loaded(trained, client):
    project = trained.project
    weights = policy_weights()
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert project.result("plan")["steps"]["rl"]["action"] == "run"
    target = project.root / "r.json"

    done = project.cli("run", "tiny", "--json", str(target))

    assert done.returncode == 0, done.stderr
    assert f"{weights} does not match its digest" in done.stderr
    assert "; the step runs again" in done.stderr
    result = json.loads(target.read_bytes())
    assert "rl" in ran(result)
    # The same bytes came out again, so what was made of them still holds.
    assert digests(result) == digests(trained.first)
    assert result["steps"]["evaluate"]["status"] == "cached"
    assert policy_weights().read_bytes() == content


def policy_weights() -> Path:
    """The weights that are loaded by the registered model's alias."""
    folder = mlflow.artifacts.download_artifacts(f"models:/{MODEL_NAME}@challenger")
    return Path(folder, "model", "model.safetensors")


def test_a_changed_prompt_runs_rl_but_not_the_trainings_before_it(copy):
    rows = [{"prompt": f"{row['prompt']} Please!"} for row in copy.rows("prompts")]
    copy.write_rows("prompts", rows)
    copy.dvc("add", "data")

    plan = copy.result("plan")["steps"]
    result = copy.result("run")

    assert (plan["prepare_data"]["action"], plan["rl"]["action"]) == ("run", "unknown")
    assert "data/sample/prompts.jsonl" in plan["prepare_data"]["because"]
    assert ran(result) == ("prepare_data", *AFTER_RL)


# Bad rows.


def test_bad_rows_stop_the_run_and_count_nowhere(copy, client, tmp_path):
    rows = copy.rows("preferences")
    rows[6]["chosen"] = "a\x00"
    rows[8]["rejected"] = rows[8]["chosen"]
    copy.write_rows("preferences", rows)
    copy.dvc("add", "data")
    records, target = records_of_steps(copy), copy.root / "r.json"
    reports = set((copy.home / "reports").iterdir())

    done = copy.cli("run", "tiny", "--json", str(target), TMPDIR=str(tmp_path))

    assert done.returncode == 2, done.stderr
    assert "2 failures in 1 file" in done.stderr
    assert "preferences.jsonl:7 chosen: control character" in done.stderr
    assert "preferences.jsonl:9 chosen: chosen equals rejected" in done.stderr
    assert "Traceback" not in done.stderr
    assert not target.exists()
    assert records_of_steps(copy) == records
    assert set((copy.home / "reports").iterdir()) == reports
    assert not list(tmp_path.iterdir())
    pipeline = last_pipeline(client)
    assert pipeline.info.status == "FAILED"
    (step,) = children(client, pipeline.info.run_id).values()
    assert step.info.status == "FAILED"
    assert "validation.json" in artifact_names(client, step.info.run_id)
    found = artifacts_of(copy.prefect_api, pipeline.data.tags["prefect.flow_run_id"])
    assert found["validation"] == "table"


def test_quarantine_goes_on_without_the_bad_rows_and_keeps_them(copy, client):
    rows = copy.rows("preferences")
    rows[6]["chosen"] = "a\x00"
    rows[8]["rejected"] = " "
    copy.write_rows("preferences", rows)

    # The data is not added to DVC, either.
    result = copy.result("run", "--allow-dirty", "--set", "data.on_invalid=quarantine")

    assert result["metrics"]["data/quarantined_rows"] == 2
    counts = [result["metrics"][f"data/preferences/{split}_rows"] for split in ("train", "test")]
    assert sum(counts) == len(rows) - 2
    assert client.get_run(result["mlflow_run_id"]).data.tags["data.dirty"] == "true"
    step = result["steps"]["prepare_data"]["mlflow_run_id"]
    assert "validation.json" in artifact_names(client, step)
    stored = client.download_artifacts(step, "prepared/quarantine/preferences.jsonl")
    kept = [json.loads(line) for line in Path(stored).read_text().splitlines()]
    assert [row["row"] for row in kept] == [7, 9]
    assert result["steps"]["sft"]["status"] == "cached"


# Runs that do not end well.


def last_pipeline(client: MlflowClient) -> Any:
    """The newest run of a pipeline."""
    experiment = client.get_experiment_by_name("project")
    (run,) = client.search_runs(
        [experiment.experiment_id],
        "tags.`plumbline.kind` = 'pipeline'",
        max_results=1,
        order_by=["attributes.start_time DESC"],
    )
    return run


def test_a_failed_step_exits_with_1_and_leaves_the_finished_ones(trained, client):
    project, records = trained.project, records_of_steps(trained.project)
    # Too large for float32 once it is squared.
    failing = ("--set", "rl.missing_eos_score=-1e30")

    done = project.cli("run", "tiny", *failing)

    assert done.returncode == 1, done.stderr
    assert "rl: expected finite losses and gradients" in done.stderr
    assert "Traceback" not in done.stderr
    pipeline = last_pipeline(client)
    assert pipeline.info.status == "FAILED"
    runs = children(client, pipeline.info.run_id)
    assert {name: run.info.status for name, run in runs.items()} == {
        **dict.fromkeys(("prepare_data", "base_model", "sft", "reward_model"), "FINISHED"),
        "rl": "FAILED",
    }
    assert runs["rl"].outputs.model_outputs == []
    assert records_of_steps(project) == records
    plan = project.result("plan", *failing)["steps"]
    assert [plan[name]["action"] for name in ("reward_model", "rl")] == ["cached", "run"]


def test_an_interrupt_exits_with_130_and_closes_the_runs(trained, client):
    project, records = trained.project, records_of_steps(trained.project)
    before = last_pipeline(client).info.run_id
    process = project.start("run", "tiny", "--set", "rl.episodes=1600000")
    try:
        wait_for_rl(client, before, process)
        os.kill(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()

    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    pipeline = last_pipeline(client)
    assert pipeline.info.status == "KILLED"
    assert children(client, pipeline.info.run_id)["rl"].info.status == "KILLED"
    assert records_of_steps(project) == records


def wait_for_rl(client: MlflowClient, before: str, process: Any) -> None:
    """Wait until the newest pipeline has logged points of its rl step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        pipeline = last_pipeline(client)
        if pipeline.info.run_id != before:
            run = children(client, pipeline.info.run_id).get("rl")
            if run is not None and "objective/kl" in run.data.metrics:
                return
        time.sleep(0.3)
    pytest.fail(f"rl did not start: {process.poll()}")


# Secrets, last: what the runs above have left, the failed ones too, is looked through.


def test_no_secret_of_the_environment_is_written_down(trained):
    project = trained.project
    assert set(SECRETS.items()) <= set(project.environment().items())
    said = [project.cli("plan", "tiny", "--set", "rl.kl_coef=-1")]
    away = {"MLFLOW_TRACKING_URI": ELSEWHERE, "PLUMBLINE_MLFLOW_WAIT_SECONDS": "1"}
    said.append(project.cli("run", "tiny", "--record", **away))
    assert [done.returncode for done in said] == [2, 1]
    assert "expected the store http://127.0.0.1:9" in said[1].stderr
    told = [done.stdout + done.stderr for done in said]
    pages = {
        what: json.dumps(ask(project.prefect_api, f"/{what}/filter", {"limit": 200}))
        for what in ("flow_runs", "task_runs", "logs", "artifacts")
    }

    for secret in (*SECRETS.values(), PASSWORD):
        for text in (*told, *pages.values()):
            assert secret not in text
        for file in [*project.home.rglob("*"), *project.root.rglob("*")]:
            if file.is_file():
                assert secret.encode() not in file.read_bytes(), file
