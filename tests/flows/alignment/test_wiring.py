"""Tests of flows.alignment.wiring: what each step's key depends on, against tables made by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Set
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flows.alignment.wiring import wiring
from plumbline.params.schema import (
    STEP_NAMES,
    Experiment,
    GGUFModel,
    HubModel,
    LocalModel,
    ScratchModel,
    steps_of,
)
from plumbline.refs import (
    DataRef,
    DataVersion,
    EvaluationRef,
    ModelRef,
    PreparedData,
    RegistrationRef,
    SplitRef,
)
from tasks.keys import cache_key, ingredients

ROOT = Path(__file__).resolve().parents[3]
MODEL_STEPS = ("sft", "reward_model", "judge", "rl", "dpo", "evaluate")

SEEN_BY: dict[str, tuple[str, ...]] = {
    "description": (),
    "checkpoints": (),
    "seed": ("base_model", *MODEL_STEPS),
    "precision": MODEL_STEPS,
    "data": ("prepare_data",),
    "data.max_response_tokens": ("prepare_data", "base_model", "sft"),
    "model": ("base_model",),
    **dict.fromkeys(
        (f"model.{name}" for name in ("source", "vocab_size", "name", "revision", "path", "file")),
        ("prepare_data", "base_model"),
    ),
    "model.package": ("prepare_data", "base_model"),
    "model.chat_template": ("prepare_data", "base_model"),
    "sampling": ("rl", "evaluate"),
    "sampling.response_tokens": ("rl", "dpo", "evaluate", "register"),
    "sft": ("sft",),
    "reward_model": ("reward_model", "judge"),
    "rl": ("rl",),
    "dpo": ("dpo",),
    "evaluate": ("evaluate",),
    "evaluate.judge": ("reward_model", "rl", "evaluate"),
    "registry": ("register",),
    "registry.alias": (),
}
"""The steps that can see a param, by the longest name that fits it."""

LORA = {"enabled": True}
OPTIMIZER: dict[str, Any] = {
    "learning_rate": 2e-4, "schedule": "cosine", "warmup_fraction": 0.2, "weight_decay": 0.1,
    "max_grad_norm": 2.0, "gradient_checkpointing": True, "lora.enabled": True,
}  # fmt: skip
SUPERVISED = {**OPTIMIZER, "epochs": 5, "batch_size": 64, "micro_batch_tokens": 512}

VALUES: dict[str, Any] = {
    "description": "Another.", "seed": 1, "precision": "fp32",
    "data.path": "data/b", "data.test_fraction": 0.2, "data.on_invalid": "quarantine",
    "data.max_prompt_tokens": 60, "data.max_response_tokens": 60, "data.long_prompts": "drop_turns",
    "model.vocab_size": 2048, "model.context_tokens": 256, "model.hidden_size": 64,
    "model.layers": 2, "model.heads": 2,
    "sampling.response_tokens": 40, "sampling.temperature": 0.7,
    **{f"sft.{name}": value for name, value in SUPERVISED.items()}, "sft.train_on_prompt": True,
    **{f"reward_model.{name}": value for name, value in SUPERVISED.items()},
    "reward_model.objective": "pointwise", "reward_model.centering": 0.1,
    "reward_model.normalize": "mean_std",
    **{f"rl.{name}": value for name, value in OPTIMIZER.items()},
    "rl.algorithm": "rloo", "rl.episodes": 8192, "rl.rollout_batch_size": 256,
    "rl.mini_batch_size": 128, "rl.micro_batch_tokens": 1024, "rl.epochs": 2, "rl.critic": "shared",
    "rl.kl_coef": 0.1, "rl.kl_estimator": "k2", "rl.kl_controller": "adaptive", "rl.gamma": 0.99,
    "rl.gae_lambda": 0.9, "rl.cliprange": 0.1, "rl.cliprange_high": 0.3, "rl.cliprange_value": 0.1,
    "rl.value_coef": 0.2, "rl.entropy_coef": 0.01, "rl.target_kl": 0.1,
    "rl.whiten_advantages": False, "rl.whiten_rewards": True, "rl.reward_model_weight": 0.5,
    "rl.score_clip": 3.0, "rl.rewards": {"plumbline.evaluation.principles:gold_score": 0.0},
    "rl.missing_eos": "subtract", "rl.missing_eos_score": -2.0,
    "evaluate.max_prompts": 64, "evaluate.batch_size": 64, "evaluate.bootstrap_samples": 200,
    "evaluate.table_rows": 10, "evaluate.gold": "plumbline.evaluation.principles:gold_score",
    "evaluate.best_of_n": 2, "evaluate.judge": True,
    "registry.name": "another", "registry.alias": "other",
    "checkpoints.every_minutes": 1.0, "checkpoints.every_steps": 3, "checkpoints.keep": 5,
}  # fmt: skip
"""Another value of each param that acts by default."""

OTHER_BASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"rl.algorithm": "grpo"}, {"rl.responses_per_prompt": 8}),
    ({"rl.algorithm": "reinforce"}, {"rl.baseline": "none"}),
    ({"rl.algorithm": "reinforce", "rl.baseline": "moving_average"}, {"rl.baseline_decay": 0.5}),
    ({"rl.kl_controller": "adaptive"}, {"rl.kl_target": 3.0, "rl.kl_horizon": 500}),
    ({"rl.kl_estimator": "k3"}, {"rl.kl_in": "loss"}),
    ({"rl.lora.enabled": True}, {"registry.merge_lora": False, "rl.lora.rank": 4}),
    ({"rl.lora.enabled": True}, {"rl.lora.alpha": 8.0}),
    ({"sft.lora.enabled": True}, {"sft.lora.rank": 4, "sft.lora.alpha": 8.0}),
    ({"reward_model.lora.enabled": True}, {"reward_model.lora.rank": 4}),
    ({"reward_model.lora.enabled": True}, {"reward_model.lora.alpha": 8.0}),
    (
        {"alignment.method": "dpo"},
        {
            **{f"dpo.{name}": value for name, value in SUPERVISED.items()},
            "dpo.beta": 0.2, "dpo.label_smoothing": 0.1, "sampling.response_tokens": 40, "seed": 1,
            "precision": "bf16",
        },
    ),
    ({"alignment.method": "dpo", "dpo.lora.enabled": True}, {"dpo.lora.rank": 4}),
    ({"alignment.method": "dpo", "dpo.lora.enabled": True}, {"dpo.lora.alpha": 8.0}),
    ({"evaluate.judge": True}, {"seed": 7, "precision": "fp32", "reward_model.epochs": 9}),
    (
        {"model": {"source": "hub", "name": "a/b", "revision": "0" * 40}},
        {"model.name": "a/c", "model.revision": "1" * 40, "model.chat_template": "{{ x }}"},
    ),
]  # fmt: skip
"""Params that act only beside others: those, and another value of each."""

ELSEWHERE = {"model.source", "model.path", "model.file", "model.package", "alignment.method"}
"""Params whose change brings other files or other steps; tests of their own below."""


def experiment(*changes: dict[str, Any]) -> Experiment:
    """The default experiment with dotted changes."""
    tree: dict[str, Any] = {"model": {"source": "scratch"}}
    for name, value in (item for change in changes for item in change.items()):
        section, node = name.split("."), tree
        for part in section[:-1]:
            node = node.setdefault(part, {})
        known = node.get(section[-1])
        node[section[-1]] = {**known, **value} if isinstance(known, dict) and value else value
    return Experiment.model_validate(tree)


ARTIFACTS = (
    *(f"data/{name}" for name in ("demonstrations", "preferences", "prompts", "ratings")),
    *(
        f"prepare_data/{table}/{split}"
        for table in ("demonstrations", "preferences", "prompts", "ratings")
        for split in ("train", "test")
    ),
    "base_model", "sft", "reward_model", "judge", "rl", "dpo", "evaluate",
)  # fmt: skip
"""Everything that is handed to a step."""


def read_by(e: Experiment) -> dict[str, set[str]]:
    """The artifacts that each step reads."""
    judged = "ratings" if e.reward_model.objective == "pointwise" else "preferences"
    scoring = {
        "sft", "prepare_data/preferences/train", "prepare_data/preferences/test",
        "prepare_data/demonstrations/train",
        *(f"prepare_data/{judged}/{split}" for split in ("train", "test")),
    }  # fmt: skip
    judge = {"judge"} if e.evaluate.judge else set()
    return {
        "prepare_data": {name for name in ARTIFACTS if name.startswith("data/")},
        "base_model": {"prepare_data/demonstrations/train"} if _from_scratch(e) else set(),
        "sft": {"base_model", *_both("demonstrations")},
        "reward_model": scoring,
        "judge": scoring,
        "rl": {"sft", "reward_model", "prepare_data/prompts/train", *judge},
        "dpo": {"sft", *_both("preferences")},
        "evaluate": {
            "sft", "reward_model", e.alignment.method, "prepare_data/prompts/test", *judge,
        },
        "register": {e.alignment.method, "evaluate"},
    }  # fmt: skip


def _both(table: str) -> set[str]:
    return {f"prepare_data/{table}/train", f"prepare_data/{table}/test"}


def _from_scratch(e: Experiment) -> bool:
    return isinstance(e.model, ScratchModel)


def results(changed: Set[str] = frozenset(), noise: int = 0) -> dict[str, Any]:
    """Results of all steps; `noise` changes all of them that is no content."""

    def digest(name: str) -> str:
        return f"{name}{' changed' if name in changed else ''}"

    def model(name: str) -> ModelRef:
        return ModelRef(
            digest=digest(name), uri=f"file:///{noise}", mlflow_run_id=f"r{noise}",
            mlflow_model_id=f"m{noise}", metrics={"a": float(noise)}, seconds=noise,
            figures={f"{noise}.png": "file:///p"},
        )  # fmt: skip

    def table(name: str) -> SplitRef:
        train, test = (
            DataRef(digest=digest(f"prepare_data/{name}/{split}"), uri=f"/{noise}", rows=noise)
            for split in ("train", "test")
        )
        return SplitRef(train=train, test=test)

    names = ["demonstrations", "preferences", "prompts", "ratings"]
    files = {f"{name}.jsonl": digest(f"data/{name}") for name in names}
    if noise % 2:
        files = dict(reversed(files.items()))
    common = {"uri": "", "mlflow_run_id": f"r{noise}"}
    return {
        "data": DataVersion(
            digest=f"d{noise}", path="data/a", rev=f"v{noise}", files=files, dirty=bool(noise)
        ),
        "prepare_data": PreparedData(
            digest=f"p{noise}", **common, **{name: table(name) for name in names}
        ),
        "evaluate": EvaluationRef(digest=digest("evaluate"), **common),
        "register": RegistrationRef(digest="r", **common, name="n", version=str(noise)),
        **{name: model(name) for name in ("base_model", *MODEL_STEPS[:-1])},
    }


def keys(e: Experiment, made: dict[str, Any] | None = None) -> dict[str, str]:
    """The key of each step, given results of the steps before."""
    made = made or results()
    return {step: cache_key(step, ingredients(step, of(made))) for step, of in wiring(e).items()}


def missed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    """The steps in both runs that would not find their result again."""
    return {step for step in before.keys() & after.keys() if before[step] != after[step]}


def seen_by(param: str) -> set[str]:
    parts = param.split(".")
    names = [".".join(parts[:i]) for i in range(len(parts), 0, -1)]
    return set(next(SEEN_BY[name] for name in names if name in SEEN_BY))


CASES = [
    *(({}, name, value) for name, value in VALUES.items()),
    *((base, name, value) for base, values in OTHER_BASES for name, value in values.items()),
]


@pytest.mark.parametrize(
    ("base", "param", "value"), CASES, ids=[f"{name}={value}" for _, name, value in CASES]
)
def test_a_param_changes_the_keys_of_the_steps_that_see_it(base, param, value):
    before = experiment(base)
    change = {param: value}
    # Values that only hold together.
    if param == "rl.missing_eos":
        change["rl.missing_eos_score"] = 1.0
    if param == "rl.rollout_batch_size":
        change["rl.mini_batch_size"] = 64
    after = experiment(base, change)

    expected = seen_by(param) & set(steps_of(before)) & set(steps_of(after))

    assert missed(keys(before), keys(after)) == expected
    assert keys(experiment(base)) == keys(before)


def leaves(tree: dict[str, Any], prefix: str = "") -> set[str]:
    found: set[str] = set()
    for name, value in tree.items():
        key = f"{prefix}{name}"
        found |= leaves(value, f"{key}.") if isinstance(value, dict) and value else {key}
    return found


def test_no_param_is_left_out_of_the_table():
    models = (ScratchModel, HubModel, LocalModel, GGUFModel)
    known = {name for _, name, _ in CASES} | ELSEWHERE

    assert known == leaves(Experiment().model_dump()) | {
        f"model.{name}" for model in models for name in model.model_fields
    }
    for name in known - {"alignment.method"}:
        assert seen_by(name) <= set(STEP_NAMES)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"evaluate.judge": True},
        {"reward_model.objective": "pointwise", "evaluate.judge": True},
        {"alignment.method": "dpo"},
        {"model": {"source": "hub", "name": "a/b", "revision": "0" * 40}},
    ],
    ids=str,
)
def test_an_input_changes_the_keys_of_the_steps_that_read_it(changes):
    e = experiment(changes)
    before, reads = keys(e), read_by(e)

    for name in ARTIFACTS:
        expected = {step for step in steps_of(e) if name in reads[step]}
        assert missed(before, keys(e, results({name}))) == expected, name


RANDOM = {name: value for name, value in VALUES.items() if name not in ("rl.missing_eos",)}
INDEPENDENT = sorted(
    RANDOM.keys()
    # These make others idle, or must fit them.
    - {"rl.algorithm", "rl.rollout_batch_size", "rl.mini_batch_size", "rl.critic"}
    - {"reward_model.objective", "evaluate.judge", "rl.lora.enabled"}
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    params=st.sets(st.sampled_from(INDEPENDENT), max_size=5),
    changed=st.sets(st.sampled_from(ARTIFACTS), max_size=4),
    noise=st.integers(0, 5),
    judge=st.booleans(),
)
def test_keys_change_exactly_when_something_that_the_step_can_see_does(
    params, changed, noise, judge
):
    base = {"evaluate.judge": judge}
    before = experiment(base)
    after = experiment(base, {name: RANDOM[name] for name in params})
    reads = read_by(before)

    expected = {
        step
        for step in steps_of(before)
        if reads[step] & changed or any(step in seen_by(name) for name in params)
    }

    assert missed(keys(before), keys(after, results(changed, noise))) == expected


def test_another_way_of_aligning_keeps_what_comes_before():
    rl, dpo = keys(experiment({})), keys(experiment({"alignment.method": "dpo"}))

    assert missed(rl, dpo) == {"evaluate", "register"}
    assert rl.keys() ^ dpo.keys() == {"rl", "dpo"}


def test_the_judge_is_another_training_than_the_reward_model():
    made = keys(experiment({"evaluate.judge": True}))

    assert made["judge"].removeprefix("judge-") != made["reward_model"].removeprefix(
        "reward_model-"
    )


def test_a_value_that_is_idle_does_not_count():
    # The default of another algorithm's param, written out or not.
    said = Experiment.model_validate({**Experiment().model_dump()})

    assert keys(said) == keys(Experiment())


def test_keys_are_the_same_in_another_process_folder_and_home(tmp_path):
    code = (
        "import json, tests_wiring as t;"
        "print(json.dumps(t.keys(t.experiment({'evaluate.judge': True}))))"
    )
    (tmp_path / "tests_wiring.py").write_text(Path(__file__).read_text())
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), str(tmp_path)])
    found = []
    for seed in ("1", "2"):
        home = tmp_path / seed
        home.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=home,
            env={
                **os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": seed,
                "PLUMBLINE_HOME": str(home / "home"),
            },
            capture_output=True,
            text=True,
            timeout=60,
        )  # fmt: skip
        found.append(json.loads(done.stdout or done.stderr))

    assert found == [keys(experiment({"evaluate.judge": True}))] * 2
