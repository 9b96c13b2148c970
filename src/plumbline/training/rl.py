"""Reinforcement learning: the policy learns to please the reward model, near the reference.

One loop for all algorithms: they differ in `credit.py` alone, and in whether there is a critic.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from plumbline.data.tokenize import ChatEncoder
from plumbline.ops.kl import AdaptiveKLController, FixedKLController, kl_estimate
from plumbline.ops.logprobs import token_logprobs
from plumbline.ops.masked import masked_mean, masked_sum, masked_var
from plumbline.ops.rewards import token_rewards
from plumbline.params.schema import RLParams
from plumbline.rollout.experience import (
    Experience,
    Sequences,
    pad_columns,
    response_logits,
    response_logprobs,
)
from plumbline.rollout.generate import Responses, sample_responses
from plumbline.rollout.scoring import Scores, load_rewards, score_responses
from plumbline.training.credit import Baseline, assign_credit
from plumbline.training.models import Models
from plumbline.training.monitor import Monitor
from plumbline.training.policy_update import Optimizer, Setting, critic_values, update
from plumbline.training.precision import autocast
from plumbline.training.reporting import Log, Progress, Warn
from plumbline.training.supervised import checkpointing


def train_rl(
    models: Models,
    prompts: Sequence[str],
    encoder: ChatEncoder,
    setting: Setting,
    *,
    seed: int,
    log: Log,
    progress: Progress,
    warn: Warn,
) -> None:
    """Train policy and critic in place, on responses to `prompts`.

    Args:
        models: in evaluation mode, on one device.
        prompts: the training prompts, JSON lists of messages.
        encoder: of prompts and responses.
        setting: params, sampling and precision.
        seed: of the order of the prompts, the sampling and the mini-batches.
        log: called after each rollout with the episodes so far and the metrics.
        progress: called after each rollout with the episodes so far.
        warn: called when the monitor sees a known failure begin.

    Raises:
        ParamsError: a reward function can't be imported.
        TrainingError: a loss, a gradient or a reward is not finite.
    """
    params = setting.params
    device = models.policy.device
    functions = load_rewards(params)
    sampling = torch.Generator(device).manual_seed(seed)
    shuffling = torch.Generator().manual_seed(seed)
    optimizer = Optimizer.of(models, params)
    controller = make_kl_controller(params)
    baseline = Baseline(params)
    monitor = Monitor(params)
    queries = encoder.prompts(prompts)
    batches = prompt_batches(len(prompts), params, shuffling)
    history: list[Mapping[str, float]] = []

    for iteration in range(1, params.episodes // params.rollout_batch_size + 1):
        started = time.perf_counter()
        batch = next(batches)
        with torch.no_grad(), autocast(device, setting.precision):
            # 1. Sample responses from the policy.
            responses = sample_responses(
                models.policy,
                [queries[index] for index in batch],
                max_tokens=setting.sampling.response_tokens,
                stop_token_ids=encoder.stop_token_ids,
                pad_token_id=encoder.pad_token_id,
                temperature=setting.sampling.temperature,
                generator=sampling,
            )
            sampled = time.perf_counter()
            # 2. Score them, and turn scores and KL into advantages.
            sequences = Sequences.join(
                [queries[index] for index in batch], responses, encoder.pad_token_id
            )
            scores = score_responses(
                models.reward_model,
                models.judge,
                functions,
                sequences,
                responses.has_eos,
                [prompts[index] for index in batch],
                encoder.decode(responses.lists()) if functions else [""] * len(batch),
                params,
            )
            experience, metrics = make_experience(
                models, sequences, responses, scores, setting, controller.value, baseline
            )
        scored = time.perf_counter()
        learning_rate = float(optimizer.schedule.get_last_lr()[0])
        # 3. Take the epochs of gradient steps on them.
        with _less_memory(models) if params.gradient_checkpointing else nullcontext():
            metrics |= update(models, experience, setting, optimizer, shuffling, controller.value)
        updated = time.perf_counter()
        # 4. Let the controller follow the KL.
        controller.update(metrics["objective/kl"], len(batch))

        episode = iteration * params.rollout_batch_size
        metrics |= {
            "episode": episode,
            "lr": learning_rate,
            "perf/episodes_per_s": len(batch) / (updated - started),
            "perf/tokens_per_s": float(sequences.mask.sum()) / (updated - started),
            "time/rollout_s": sampled - started,
            "time/score_s": scored - sampled,
            "time/update_s": updated - scored,
        }
        history.append(metrics)
        log(episode, metrics)
        for finding in monitor.watch(history):
            warn(episode, finding.name, finding.message)
        progress(episode, params.episodes)


def _less_memory(models: Models) -> AbstractContextManager[None]:
    return checkpointing(*(m for m in (models.policy, models.critic) if m is not None))


def make_kl_controller(params: RLParams) -> FixedKLController | AdaptiveKLController:
    """The controller that the params name."""
    if params.kl_controller == "adaptive":
        return AdaptiveKLController(params.kl_coef, params.kl_target, params.kl_horizon)
    return FixedKLController(params.kl_coef)


def prompt_batches(
    prompts: int, params: RLParams, generator: torch.Generator
) -> Iterator[list[int]]:
    """The prompts of each rollout without end, by index, in a fresh random order each pass.

    Where an algorithm compares the responses to a prompt, each prompt stands so many times side by
    side.
    """
    copies = params.responses_per_prompt if params.algorithm in ("rloo", "grpo") else 1
    size = params.rollout_batch_size // copies
    order: list[int] = []
    while True:
        while len(order) < size:
            order += torch.randperm(prompts, generator=generator).tolist()
        yield [index for index in order[:size] for _ in range(copies)]
        order = order[size:]


@torch.no_grad()
def make_experience(
    models: Models,
    sequences: Sequences,
    responses: Responses,
    scores: Scores,
    setting: Setting,
    kl_coef: float,
    baseline: Baseline,
) -> tuple[Experience, dict[str, float]]:
    """Turn a scored rollout into advantages; returns it with the rollout's metrics.

    Args:
        models: see what the responses cost.
        sequences: the queries with the responses.
        responses: as they were sampled.
        scores: what they earned.
        setting: params, temperature and precision.
        kl_coef: beta.
        baseline: of reinforce.
    """
    params = setting.params
    mask = sequences.response_mask
    logprobs, ref_logprobs, values = _look_back(models, sequences, setting)
    kl = kl_estimate(logprobs, ref_logprobs)
    penalty = kl_estimate(logprobs, ref_logprobs, params.kl_estimator)
    rewards = token_rewards(scores.total, penalty, mask, kl_coef if params.kl_in == "reward" else 0)
    credit = assign_credit(rewards, values, mask, params, baseline)
    experience = Experience(
        sequences, logprobs, ref_logprobs, credit.advantages, values, credit.returns
    )

    penalty_a_response = kl_coef * masked_sum(penalty, mask, 1).mean()
    gap = torch.where(mask, (responses.logprobs - logprobs).abs(), 0.0)
    metrics: dict[str, float | Tensor] = {
        "objective/scores": scores.total.mean(),
        "objective/scores_std": scores.total.std(correction=0),
        **{f"objective/{name}": part.mean() for name, part in scores.parts.items()},
        "objective/kl": masked_sum(kl, mask, 1).mean(),
        "objective/kl_k3": masked_sum(kl_estimate(logprobs, ref_logprobs, "k3"), mask, 1).mean(),
        "objective/kl_coef": kl_coef,
        "objective/entropy": masked_sum(-logprobs, mask, 1).mean(),
        "objective/non_score_reward": -penalty_a_response,
        "objective/rlhf_reward": scores.total.mean() - penalty_a_response,
        "response/length_mean": mask.sum(1).float().mean(),
        "response/clipped_fraction": (~responses.has_eos).float().mean(),
        "val/num_eos_tokens": responses.has_eos.sum(),
        "val/decode_gap_max": gap.max(),
    }
    if values is not None and credit.returns is not None:
        residual = masked_var(credit.returns - values, mask)
        metrics |= {
            "val/explained_var": 1 - residual / masked_var(credit.returns, mask),
            "val/returns_mean": masked_mean(credit.returns, mask),
            "val/values_mean": masked_mean(values, mask),
        }
    return experience, {name: float(value) for name, value in metrics.items()}


def _look_back(
    models: Models, sequences: Sequences, setting: Setting
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probs of policy and reference, and the critic's values, [B, R] and 0 on padding."""
    mask = sequences.response_mask
    step, temperature = setting.params.micro_batch_size, setting.sampling.temperature
    parts = [sequences.rows(slice(i, i + step)) for i in range(0, len(mask), step)]

    logprobs, values = [], []
    for part in parts:
        logits, hidden = response_logits(models.policy, part)
        logprobs.append(token_logprobs(logits, part.response_ids, temperature))
        value = critic_values(models.critic, part, hidden)
        values += [] if value is None else [value]
    with models.reference() as reference:
        ref_logprobs = [response_logprobs(reference, part, temperature) for part in parts]

    def whole(columns: list[Tensor]) -> Tensor:
        return torch.where(mask, pad_columns(columns, mask.shape[1]), 0.0)

    return whole(logprobs), whole(ref_logprobs), whole(values) if values else None
