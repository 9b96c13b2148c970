"""Which params and which earlier results each step takes: the pipeline, in one place.

Imports no framework, so that a plan can walk the pipeline without starting anything.
"""

from collections.abc import Callable, Mapping
from typing import Any

from plumbline.params.schema import Experiment, ScratchModel, StepName

Results = Mapping[str, Any]
"""Results of the steps so far by name, Pending where one is not made yet; and `data`."""

Arguments = dict[str, Any]


def _prepare_data(p: Experiment, r: Results) -> Arguments:
    return {"data": r["data"], "params": p.data, "model": p.model}


def _base_model(p: Experiment, r: Results) -> Arguments:
    # Only a tokenizer from scratch looks at the data.
    scratch = isinstance(p.model, ScratchModel)
    return {
        "params": p.model,
        "seed": p.seed,
        "max_new_tokens": p.sampling.response_tokens,
        "demonstrations": r["prepare_data"].demonstrations.train if scratch else None,
    }


def _sft(p: Experiment, r: Results) -> Arguments:
    return {
        "params": p.sft,
        "seed": p.seed,
        "max_new_tokens": p.sampling.response_tokens,
        "base_model": r["base_model"],
        "demonstrations": r["prepare_data"].demonstrations,
    }


def _reward_model(p: Experiment, r: Results) -> Arguments:
    return {
        "params": p.reward_model,
        "seed": p.seed,
        "sft": r["sft"],
        "preferences": r["prepare_data"].preferences,
        "demonstrations": r["prepare_data"].demonstrations.train,
    }


def _rl(p: Experiment, r: Results) -> Arguments:
    return {
        "params": p.rl,
        "seed": p.seed,
        "sft": r["sft"],
        "reward_model": r["reward_model"],
        "prompts": r["prepare_data"].prompts.train,
    }


def _evaluate(p: Experiment, r: Results) -> Arguments:
    return {
        "params": p.evaluate,
        "seed": p.seed,
        "max_tokens": p.sampling.response_tokens,
        "temperature": p.sampling.temperature,
        "sft": r["sft"],
        "reward_model": r["reward_model"],
        "policy": r["rl"],
        "prompts": r["prepare_data"].prompts.test,
    }


def _register(p: Experiment, r: Results) -> Arguments:
    return {"params": p.registry, "policy": r["rl"], "evaluation": r["evaluate"]}


WIRING: dict[StepName, Callable[[Experiment, Results], Arguments]] = {
    "prepare_data": _prepare_data,
    "base_model": _base_model,
    "sft": _sft,
    "reward_model": _reward_model,
    "rl": _rl,
    "evaluate": _evaluate,
    "register": _register,
}
"""The steps in the order in which they run; each makes its task's arguments."""
