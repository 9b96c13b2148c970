"""Tests of flows.deployments.form: what the form offers, and what it stands for."""

from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from flows.alignment.naming import run_name
from flows.deployments.form import (
    KNOBS,
    as_overrides,
    experiment_schema,
    knobs_schema,
    overrides_schema,
    parallel_schema,
    sweep_schema,
)
from plumbline.errors import ParamsError
from plumbline.params.fields import catalogue
from plumbline.params.loader import load_experiment

PARAMS = Path(__file__).resolve().parents[3] / "params"


def faults(params: object) -> list[str]:
    return [error.message for error in Draft202012Validator(knobs_schema()).iter_errors(params)]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"seed": 3},
        {"rl": {"kl_coef": 0, "algorithm": "grpo", "episodes": 256, "learning_rate": 1e-5}},
        {"sft": {"epochs": 1}, "reward_model": {}, "evaluate": {"best_of_n": 256}},
    ],
)
def test_good_values_pass_the_form(params):
    assert faults(params) == []


@pytest.mark.parametrize(
    "params",
    [
        {"rl": {"kl_coef": -0.1}},
        {"rl": {"kl_coef": "much"}},
        {"rl": {"learning_rate": 0}},
        {"rl": {"learning_rate": 1.5}},
        {"rl": {"episodes": 0}},
        {"rl": {"episodes": 2.5}},
        {"rl": {"algorithm": "ppg"}},
        {"rl": {"klcoef": 0.1}},
        {"seed": -1},
        {"evaluate": {"best_of_n": 257}},
        {"precision": "fp16"},
        {"lr": 0.1},
    ],
)
def test_bad_values_are_refused_by_the_form(params):
    assert faults(params)


def test_the_form_has_a_described_field_for_each_knob_and_no_default():
    for key in KNOBS:
        field = knobs_schema()
        for part in key.split("."):
            field = field["properties"][part]
        expected = catalogue().field(key)
        assert expected is not None
        assert field["description"].startswith(expected.description)
        assert expected.expected in field["description"]
        assert field["title"] == key.rpartition(".")[2]
        # An empty field means as the experiment says, not as the schema does.
        assert "default" not in field


def test_the_choice_is_what_params_holds_now(tmp_path, monkeypatch):
    (tmp_path / "params").mkdir()
    (tmp_path / "data.dvc").write_text("")
    for name in ("b.yaml", "a.yaml", "_base.yaml"):
        (tmp_path / "params" / name).write_text("seed: 0\n")
    (tmp_path / "params" / "s.yaml").write_text("sweep: {experiment: a, grid: {seed: [0, 1]}}\n")
    monkeypatch.chdir(tmp_path)
    assert experiment_schema() == {"type": "string", "enum": ["a", "b"]}

    (tmp_path / "params" / "c.yaml").write_text("seed: 0\n")

    assert experiment_schema()["enum"] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("overrides", "good"),
    [
        ([], True),
        (["rl.kl_coef=0.1", "rl.rewards={a.b:c: 1.0}", "seed="], True),
        (["rl.kl_coef"], False),
        (["=1"], False),
        (["rl kl=1"], False),
        ("rl.kl_coef=1", False),
    ],
)
def test_the_form_of_an_override_is_checked(overrides, good):
    assert Draft202012Validator(overrides_schema()).is_valid(overrides) is good


def test_what_was_filled_in_becomes_overrides_that_the_loader_reads_back():
    filled = {
        "seed": 7,
        "sft": {"learning_rate": 1e-05, "epochs": None},
        "rl": {"algorithm": "grpo", "kl_coef": 0},
    }

    texts = as_overrides(filled, ["sft.weight_decay=0.5"])
    experiment = load_experiment("quickstart", PARAMS, texts).experiment

    assert texts[-1] == "sft.weight_decay=0.5"
    assert not any(text.startswith("sft.epochs") for text in texts)
    assert experiment.seed == 7
    assert experiment.sft.learning_rate == 1e-5
    assert (experiment.rl.algorithm, experiment.rl.kl_coef) == ("grpo", 0)
    assert experiment.sft.weight_decay == 0.5


def test_a_param_in_both_is_refused():
    with pytest.raises(ParamsError, match=r"rl\.kl_coef is set twice.*kl_coef=0\.1.*kl_coef=0\.2"):
        as_overrides({"rl": {"kl_coef": 0.1}}, ["rl.kl_coef=0.2"])


def test_a_value_past_the_form_is_refused_as_on_the_command_line():
    # Through the API with the schema's check off, and by what fields demand of each other.
    for params, message in (
        ({"rl": {"kl_coef": -1}}, r"--set rl\.kl_coef=-1: rl\.kl_coef: expected a number >= 0"),
        ({"rl": {"episodes": 100}}, r"rollout_batch_size must divide episodes"),
        ({"rl": {"kl_coeff": 1}}, r"did you mean rl\.kl_coef\?"),
    ):
        with pytest.raises(ParamsError, match=message):
            load_experiment("quickstart", PARAMS, as_overrides(params, []))


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ({}, "quickstart"),
        ({"rl.kl_coef": 0.05}, "quickstart-kl0.05"),
        ({"rl.kl_coef": "0.05", "rl.algorithm": "grpo", "seed": 3}, "quickstart-kl0.05-grpo-seed3"),
        ({"rl.learning_rate": 1e-5, "sft.epochs": 2}, "quickstart-lr1e-05-sft.epochs2"),
        ({"evaluate.judge": True}, "quickstart-evaluate.judgetrue"),
        ({"data.path": "data/../x y"}, "quickstart-data.pathdata_.._x_y"),
    ],
)
def test_a_run_is_named_by_what_was_set(overrides, name):
    assert run_name("quickstart", overrides) == name


def test_the_name_of_a_run_is_that_of_a_file():
    name = run_name("params/mine.yaml", {"rl.rewards": {"a:b": "/" * 300}})

    assert name.startswith("mine-")
    assert "/" not in name
    assert len(name) <= 80


def test_the_form_of_a_sweep_offers_the_sweeps_alone_and_bounds_the_points_at_a_time():
    assert "sweep-kl" in sweep_schema()["enum"]
    assert not {*sweep_schema()["enum"]} & {*experiment_schema()["enum"]}
    assert parallel_schema() == {"type": "integer", "minimum": 1, "maximum": 64}


def test_points_at_a_time_are_an_override_that_may_be_given_once():
    assert as_overrides({"sweep": {"parallel": None}}, ["seed=1"]) == ["seed=1"]
    assert as_overrides({"sweep": {"parallel": 2}}, []) == ["sweep.parallel=2"]
    with pytest.raises(ParamsError, match=r"sweep\.parallel is set twice"):
        as_overrides({"sweep": {"parallel": 2}}, ["sweep.parallel=3"])
