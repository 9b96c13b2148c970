"""One score a response: the reward model's, Python functions', and what a missing end costs."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, SupportsFloat, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plumbline.errors import TrainingError
from plumbline.functions import TextScorer, load_function
from plumbline.ops.rewards import penalise_missing_eos
from plumbline.params.schema import RLParams, reward_name
from plumbline.rollout.experience import Sequences, score_sequences


class Scores(NamedTuple):
    """What a rollout earned."""

    total: Tensor
    """[B], what the policy is trained on."""
    parts: dict[str, Tensor]
    """[B] each, before weights and clipping: reward_model, reward_NAME, judge."""


def load_rewards(params: RLParams) -> dict[str, TextScorer]:
    """Import the functions of `rl.rewards`, by their names in the params.

    Raises:
        ParamsError: one of them can't be imported.
    """
    return {function: load_function(function, "rl.rewards") for function in params.rewards}


def score_responses(
    reward_model: PreTrainedModel,
    judge: PreTrainedModel | None,
    functions: Mapping[str, TextScorer],
    sequences: Sequences,
    has_eos: Tensor,
    prompts: Sequence[str],
    texts: Sequence[str],
    params: RLParams,
) -> Scores:
    """Weigh and add up what a response earns.

    score = w * clip(reward_model, -c, c) + sum_k w_k * f_k(prompt, response), then the missing-EOS
    treatment. The judge's score is not part of it.

    Args:
        reward_model, judge: scalar models.
        functions: the reward functions by their names in `rl.rewards`.
        sequences: the queries with the responses.
        has_eos: bool [B].
        prompts, texts: what the functions read: JSON messages, and the response.
        params: section `rl`.

    Raises:
        TrainingError: a function returned something that is not a finite number.
    """
    model_scores = score_sequences(reward_model, sequences, params.micro_batch_tokens)
    parts = {"reward_model": model_scores}
    clipped = model_scores
    if params.score_clip is not None:
        clipped = model_scores.clamp(-params.score_clip, params.score_clip)
    total = params.reward_model_weight * clipped
    for name, function in functions.items():
        values = [
            _number(name, function(prompt, text))
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        part = torch.tensor(values, dtype=total.dtype, device=total.device)
        parts[f"reward_{reward_name(name)}"] = part
        total = total + params.rewards[name] * part
    if judge is not None:
        parts["judge"] = score_sequences(judge, sequences, params.micro_batch_tokens)
    total = penalise_missing_eos(total, has_eos, params.missing_eos, params.missing_eos_score)
    return Scores(total, parts)


def _number(name: str, value: object) -> float:
    # A tensor or a NumPy scalar is a number, too; a text that spells one is a mistake.
    try:
        number = math.nan if isinstance(value, str | bytes) else float(cast(SupportsFloat, value))
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise TrainingError(f"rl.rewards: expected a finite number from {name}, got {value!r}")
    return number
