"""Every range and every cross-field check of the schema."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

from plumbline.params.fields import catalogue
from plumbline.params.schema import STEP_NAMES, Experiment, ScratchModel, check_context

MODELS: dict[str, dict[str, Any]] = {
    "scratch": {"source": "scratch"},
    "hub": {"source": "hub", "name": "owner/name", "revision": "0123456789abcdef" * 2 + "0" * 8},
    "local": {"source": "local", "path": "models/base"},
}

# key: (values that are taken, values that are refused); the edges of each range from both sides.
RANGES: dict[str, tuple[list[Any], list[Any]]] = {
    "seed": ([0, 2**32 - 1], [-1, 2**32]),
    "data.test_fraction": ([1e-9, 0.999], [0, 0.0, 1, 1.0, -0.1]),
    "data.max_prompt_tokens": ([1], [0, -1]),
    "data.max_response_tokens": ([1], [0]),
    "model.vocab_size": ([300], [299]),
    "model.context_tokens": ([128], [0]),
    "model.hidden_size": ([4], [0]),
    "model.layers": ([1], [0]),
    "model.heads": ([1], [0, -4]),
    "sft.learning_rate": ([1e-12, 1], [0, -1e-3, 1.001]),
    "sft.warmup_fraction": ([0, 1], [-0.01, 1.01]),
    "sft.weight_decay": ([0], [-0.1]),
    "sft.max_grad_norm": ([1e-9], [0, -1]),
    "sft.epochs": ([1], [0]),
    "sft.batch_size": ([32], [0]),
    "sft.micro_batch_size": ([1, 32], [0]),
    "reward_model.learning_rate": ([1], [0]),
    "reward_model.warmup_fraction": ([0, 1], [-0.01, 1.01]),
    "reward_model.weight_decay": ([0], [-0.1]),
    "reward_model.max_grad_norm": ([1e-9], [0]),
    "reward_model.epochs": ([1], [0]),
    "reward_model.batch_size": ([32], [0]),
    "reward_model.micro_batch_size": ([1], [0]),
    "reward_model.centering": ([0], [-0.01]),
    "rl.learning_rate": ([1], [0]),
    "rl.warmup_fraction": ([0, 1], [-0.01, 1.01]),
    "rl.weight_decay": ([0], [-0.1]),
    "rl.max_grad_norm": ([1e-9], [0]),
    "rl.episodes": ([128], [0]),
    "rl.rollout_batch_size": ([64], [0]),
    "rl.mini_batch_size": ([64, 128], [0]),
    "rl.micro_batch_size": ([1], [0]),
    "rl.epochs": ([1], [0]),
    "rl.response_tokens": ([1], [0]),
    "rl.temperature": ([0.1], [0, -1.0]),
    "rl.kl_coef": ([0, 0.0, 10], [-1e-9, -1]),
    "rl.kl_target": ([6], [0, -1]),
    "rl.kl_horizon": ([10_000], [0]),
    "rl.gamma": ([0, 1], [-0.1, 1.1]),
    "rl.gae_lambda": ([0, 1], [-0.1, 1.1]),
    "rl.cliprange": ([0.01, 0.99], [0, 1]),
    "rl.cliprange_value": ([0.01, 5], [0]),
    "rl.value_coef": ([0], [-0.1]),
    "evaluate.max_prompts": ([1], [0]),
    "evaluate.batch_size": ([1], [0]),
    "evaluate.bootstrap_samples": ([100], [99]),
    "evaluate.table_rows": ([1, 500], [0, 501]),
}

PATTERNS: dict[str, tuple[list[Any], list[Any]]] = {
    "model.name": (["a"], [""]),
    "model.revision": (["a" * 40], ["main", "a" * 39, "a" * 41, "A" * 40, "a" * 40 + "\n"]),
    "model.path": (["a"], [""]),
    "evaluate.gold": ([None, "a.b:c", "plumbline.data.sample:gold"], ["a.b", "a:b.c", ":c", ""]),
    "registry.name": (["my policy-1.0"], ["", "a/b", "a:b"]),
    "registry.alias": (["champion", "a-1"], ["", "1a", "a b"]),
}


def nested(key: str, value: object) -> dict[str, Any]:
    """Return {"rl": {"gamma": value}} for rl.gamma, with the source that a model's key needs."""
    section, _, name = key.rpartition(".")
    if not section:
        return {name: value}
    sources = [choice.partition("=")[2] for choice in catalogue().choices(key)]
    base = MODELS[sources[0] if sources else "scratch"] if section == "model" else {}
    return {section: base | {name: value}}


def cases(which: int) -> list[Any]:
    table = {**RANGES, **PATTERNS}
    return [
        pytest.param(key, value, id=f"{key}={value!r}")
        for key, row in table.items()
        for value in row[which]
    ]


@pytest.mark.parametrize(("key", "value"), cases(0))
def test_a_value_inside_the_range_is_taken(key: str, value: object) -> None:
    Experiment.model_validate(nested(key, value))


@pytest.mark.parametrize(("key", "value"), cases(1))
def test_a_value_outside_the_range_is_refused(key: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        Experiment.model_validate(nested(key, value))
    path = [str(part) for part in caught.value.errors()[0]["loc"]]
    assert [part for part in path if part not in MODELS] == key.split(".")


def test_every_field_with_a_range_or_a_pattern_is_in_the_tables() -> None:
    limited = {f.key for f in catalogue().fields if any(c in f.expected for c in "<>^")}
    limited |= {f.key for f in catalogue().fields if "not empty" in f.expected}
    assert limited == set(RANGES) | set(PATTERNS)


NUMBERS = [f for f in catalogue().fields if f.expected.startswith(("a number", "an integer"))]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, "1", True, None, [1]], ids=repr)
@pytest.mark.parametrize("key", [field.key for field in NUMBERS])
def test_a_number_is_a_finite_number_and_nothing_else(key: str, value: object) -> None:
    with pytest.raises(ValidationError):
        Experiment.model_validate(nested(key, value))


@pytest.mark.parametrize("key", [f.key for f in NUMBERS if f.expected.startswith("an int")])
def test_an_integer_is_not_a_float(key: str) -> None:
    with pytest.raises(ValidationError, match="valid integer"):
        Experiment.model_validate(nested(key, 1.0))


def test_an_integer_given_for_a_float_becomes_a_float() -> None:
    kl_coef = Experiment.model_validate({"rl": {"kl_coef": 1}}).rl.kl_coef
    assert (kl_coef, type(kl_coef)) == (1.0, float)


@pytest.mark.parametrize("key", [f.key for f in catalogue().fields if "true or" in f.expected])
@pytest.mark.parametrize("value", [0, 1, "true", "yes", None])
def test_a_switch_is_true_or_false_and_nothing_else(key: str, value: object) -> None:
    with pytest.raises(ValidationError, match="valid boolean"):
        Experiment.model_validate(nested(key, value))


CHOICES: dict[str, list[str]] = {
    "data.on_invalid": ["fail", "quarantine"],
    "sft.schedule": ["constant", "linear", "cosine"],
    "reward_model.schedule": ["constant", "linear", "cosine"],
    "reward_model.objective": ["pairwise"],
    "reward_model.normalize": ["mean", "mean_std"],
    "rl.schedule": ["constant", "linear", "cosine"],
    "rl.algorithm": ["ppo"],
    "rl.kl_controller": ["fixed", "adaptive"],
    "rl.missing_eos": ["replace"],
}


@pytest.mark.parametrize("key", CHOICES)
def test_a_choice_is_one_of_its_names(key: str) -> None:
    for choice in CHOICES[key]:
        Experiment.model_validate(nested(key, choice))
    with pytest.raises(ValidationError, match="literal_error"):
        Experiment.model_validate(nested(key, "nothing"))


@pytest.mark.parametrize("source", MODELS)
def test_each_source_of_a_model_takes_its_own_fields_only(source: str) -> None:
    Experiment.model_validate({"model": MODELS[source]})
    foreign: dict[str, dict[str, Any]] = {
        "scratch": {"path": "a"},
        "hub": {"layers": 2},
        "local": {"revision": "a" * 40},
    }
    with pytest.raises(ValidationError, match="extra_forbidden"):
        Experiment.model_validate({"model": MODELS[source] | foreign[source]})


CROSS_FIELD: dict[str, tuple[dict[str, Any], str]] = {
    "heads": (
        {"model": {"source": "scratch", "hidden_size": 10, "heads": 4}},
        "hidden_size must be a multiple of heads: expected 10 % 4 == 0, got 2",
    ),
    "sft": (
        {"sft": {"batch_size": 32, "micro_batch_size": 12}},
        "micro_batch_size must divide batch_size: expected 32 % 12 == 0, got 8",
    ),
    "sft larger": (
        {"sft": {"batch_size": 8, "micro_batch_size": 16}},
        "micro_batch_size must divide batch_size: expected 8 % 16 == 0, got 8",
    ),
    "reward_model": (
        {"reward_model": {"batch_size": 9, "micro_batch_size": 2}},
        "micro_batch_size must divide batch_size: expected 9 % 2 == 0, got 1",
    ),
    "episodes": (
        {"rl": {"episodes": 200}},
        "rollout_batch_size must divide episodes: expected 200 % 128 == 0, got 72",
    ),
    "mini": (
        {"rl": {"mini_batch_size": 48}},
        "mini_batch_size must divide rollout_batch_size: expected 128 % 48 == 0, got 32",
    ),
    "micro": (
        {"rl": {"micro_batch_size": 48}},
        "micro_batch_size must divide mini_batch_size: expected 64 % 48 == 0, got 16",
    ),
    "penalty": (
        {"rl": {"missing_eos": "subtract"}},
        "missing_eos=subtract takes away: expected a number >= 0, got -1.0",
    ),
    "kl_target": (
        {"rl": {"kl_target": 3.0}},
        "kl_target acts only with kl_controller=adaptive, and kl_controller is fixed",
    ),
    "both": (
        {"rl": {"kl_horizon": 3, "kl_target": 3.0}},
        "kl_target, kl_horizon acts only with kl_controller=adaptive",
    ),
    "prompt": (
        {"data": {"max_prompt_tokens": 65}},
        "<= 128, got 65 + 64 = 129",
    ),
    "sampled response": (
        {"rl": {"response_tokens": 65}},
        "<= 128, got 64 + 65 = 129",
    ),
}


@pytest.mark.parametrize("case", CROSS_FIELD)
def test_fields_that_contradict_each_other_are_refused(case: str) -> None:
    values, message = CROSS_FIELD[case]
    with pytest.raises(ValidationError) as caught:
        Experiment.model_validate(values)
    (fault,) = caught.value.errors()
    assert message in fault["msg"]


@pytest.mark.parametrize(
    "values",
    [
        {"rl": {"kl_controller": "adaptive", "kl_target": 3.0, "kl_horizon": 5}},
        {"rl": {"missing_eos": "subtract", "missing_eos_score": 0.0}},
        {"sft": {"batch_size": 32, "micro_batch_size": 8}},
        {"data": {"max_prompt_tokens": 64, "max_response_tokens": 64}},
        {"model": MODELS["hub"], "data": {"max_prompt_tokens": 10_000}},
    ],
)
def test_fields_that_fit_each_other_are_taken(values: dict[str, Any]) -> None:
    Experiment.model_validate(values)


def test_the_context_of_a_pretrained_model_is_checked_once_it_is_known() -> None:
    experiment = Experiment.model_validate({"model": MODELS["hub"]})
    check_context(experiment, 128)
    with pytest.raises(ValueError, match="<= 127, got 64 \\+ 64 = 128"):
        check_context(experiment, 127)


@pytest.mark.parametrize("source", MODELS)
def test_a_dumped_experiment_validates_to_itself(source: str) -> None:
    experiment = Experiment.model_validate({"model": MODELS[source]})
    assert Experiment.model_validate(experiment.model_dump()) == experiment
    assert Experiment.model_validate_json(experiment.model_dump_json()) == experiment


def test_an_experiment_is_frozen_and_refuses_unknown_keys() -> None:
    experiment = Experiment()
    assert isinstance(experiment.model, ScratchModel)
    with pytest.raises(ValidationError, match="frozen"):
        experiment.rl.kl_coef = 1.0  # type: ignore[misc]
    for key in ["unknown", *(f"{section}.unknown" for section in catalogue().sections)]:
        with pytest.raises(ValidationError, match="extra_forbidden"):
            Experiment.model_validate(nested(key, 1))


def test_the_keys_and_steps_that_others_rely_on_are_there() -> None:
    keys = {field.key for field in catalogue().fields}
    assert {"seed", "rl.algorithm", "rl.kl_coef"} <= keys
    assert STEP_NAMES == (
        "prepare_data",
        "base_model",
        "sft",
        "reward_model",
        "rl",
        "evaluate",
        "register",
    )
