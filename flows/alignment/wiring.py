"""Which params and which earlier results each step takes: the pipeline, in one place.

Imports no framework, so that a plan can walk the pipeline without starting anything.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from plumbline.data.halves import JUDGE_HALF, REWARD_MODEL_HALF
from plumbline.params.schema import Experiment, ModelParams, ScratchModel, StepName, steps_of

SEED_OF_THE_JUDGE = 1_000_003
"""Added to the experiment's seed, so that the judge shares no randomness with the reward model."""

Results = Mapping[str, Any]
"""Results of the steps so far by name, Pending where one is not made yet; and `data`."""

Arguments = dict[str, Any]


def _prepare_data(p: Experiment, r: Results) -> Arguments:
    return {"data": r["data"], "params": p.data, "model": _as_tokenizer(p.model)}


def _as_tokenizer(model: ModelParams) -> ModelParams:
    """The params less those that no tokenizer depends on: another width leaves the data alone."""
    if isinstance(model, ScratchModel):
        return ScratchModel(vocab_size=model.vocab_size)
    return model


def _base_model(p: Experiment, r: Results) -> Arguments:
    # Only a tokenizer from scratch looks at the data.
    scratch = isinstance(p.model, ScratchModel)
    return {
        "params": p.model,
        "seed": p.seed,
        "max_new_tokens": p.data.max_response_tokens,
        "demonstrations": r["prepare_data"].demonstrations.train if scratch else None,
    }


def _sft(p: Experiment, r: Results) -> Arguments:
    return {
        "params": p.sft,
        "precision": p.precision,
        "seed": p.seed,
        # As long as the answers it learns from; that RL samples longer ones does not concern it.
        "max_new_tokens": p.data.max_response_tokens,
        "base_model": r["base_model"],
        "demonstrations": r["prepare_data"].demonstrations,
    }


def _reward_model(p: Experiment, r: Results) -> Arguments:
    return {
        "step": "reward_model",
        "params": p.reward_model,
        "precision": p.precision,
        "seed": p.seed,
        "half": REWARD_MODEL_HALF if p.evaluate.judge else None,
        "sft": r["sft"],
        "preferences": r["prepare_data"].preferences,
        "ratings": _ratings(p, r),
        "demonstrations": r["prepare_data"].demonstrations.train,
    }


def _judge(p: Experiment, r: Results) -> Arguments:
    seed = (p.seed + SEED_OF_THE_JUDGE) % 2**32
    return {**_reward_model(p, r), "step": "judge", "seed": seed, "half": JUDGE_HALF}


def _ratings(p: Experiment, r: Results) -> Any:
    return r["prepare_data"].ratings if p.reward_model.objective == "pointwise" else None


def _rl(p: Experiment, r: Results) -> Arguments:
    return {
        "params": p.rl,
        "sampling": p.sampling,
        "precision": p.precision,
        "seed": p.seed,
        "sft": r["sft"],
        "reward_model": r["reward_model"],
        "judge": r["judge"] if p.evaluate.judge else None,
        "prompts": r["prepare_data"].prompts.train,
    }


def _dpo(p: Experiment, r: Results) -> Arguments:
    return {
        "params": p.dpo,
        "precision": p.precision,
        "seed": p.seed,
        "max_new_tokens": p.sampling.response_tokens,
        "sft": r["sft"],
        "preferences": r["prepare_data"].preferences,
    }


def _evaluate(p: Experiment, r: Results) -> Arguments:
    return {
        "params": p.evaluate,
        "sampling": p.sampling,
        "precision": p.precision,
        "seed": p.seed,
        "sft": r["sft"],
        "reward_model": r["reward_model"],
        "judge": r["judge"] if p.evaluate.judge else None,
        "policy": r[p.alignment.method],
        "prompts": r["prepare_data"].prompts.test,
    }


def _register(p: Experiment, r: Results) -> Arguments:
    return {
        "params": p.registry,
        "max_new_tokens": p.sampling.response_tokens,
        "policy": r[p.alignment.method],
        "evaluation": r["evaluate"],
    }


STEPS: dict[StepName, Callable[[Experiment, Results], Arguments]] = {
    "prepare_data": _prepare_data,
    "base_model": _base_model,
    "sft": _sft,
    "reward_model": _reward_model,
    "judge": _judge,
    "rl": _rl,
    "dpo": _dpo,
    "evaluate": _evaluate,
    "register": _register,
}


def wiring(p: Experiment) -> dict[StepName, Callable[[Results], Arguments]]:
    """The steps of an experiment in the order in which they run; each makes its task's arguments.

    The arguments are made from the results of the steps before.
    """
    return {step: partial(STEPS[step], p) for step in steps_of(p)}
