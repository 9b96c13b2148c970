"""PPO: the policy learns to please the reward model without leaving the reference too far."""

import math
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import AdamW
from transformers import PreTrainedModel, get_scheduler

from plumbline.errors import TrainingError
from plumbline.losses.policy import policy_loss
from plumbline.losses.value import value_loss
from plumbline.ops.advantages import gae
from plumbline.ops.kl import AdaptiveKLController, FixedKLController, kl_estimate
from plumbline.ops.masked import masked_mean, masked_sum, masked_var, whiten
from plumbline.ops.rewards import penalise_missing_eos, token_rewards
from plumbline.params.schema import RLParams
from plumbline.rollout.experience import (
    Experience,
    Sequences,
    pad_columns,
    response_logprobs,
    response_values,
    score_sequences,
)
from plumbline.rollout.generate import Responses, sample_responses
from plumbline.training.reporting import Log, Progress


class Models(NamedTuple):
    """The four models of PPO; only policy and critic are trained."""

    policy: PreTrainedModel
    ref_policy: PreTrainedModel
    reward_model: PreTrainedModel
    critic: PreTrainedModel


class Tokens(NamedTuple):
    """Ids of the tokens that end and fill up a response."""

    eos: int
    pad: int


def train_rl(
    models: Models,
    queries: Sequence[Sequence[int]],
    params: RLParams,
    *,
    tokens: Tokens,
    seed: int,
    log: Log,
    progress: Progress,
) -> None:
    """Train policy and critic in place, by PPO on responses to `queries`.

    Args:
        models: in evaluation mode, on one device.
        queries: token ids of the training prompts, without padding.
        params: section `rl`.
        tokens: the end and the pad token.
        seed: of the order of the queries, the sampling and the mini-batches.
        log: called after each rollout with the episodes so far and the metrics.
        progress: called after each rollout with the episodes so far.

    Raises:
        TrainingError: a loss is not finite.
    """
    sampling = torch.Generator(models.policy.device).manual_seed(seed)
    shuffling = torch.Generator().manual_seed(seed)
    trained = [*models.policy.parameters(), *models.critic.parameters()]
    optimizer = AdamW(trained, lr=params.learning_rate, eps=1e-5, weight_decay=params.weight_decay)
    iterations = params.episodes // params.rollout_batch_size
    updates = iterations * params.epochs * (params.rollout_batch_size // params.mini_batch_size)
    scheduler = get_scheduler(
        "constant_with_warmup" if params.schedule == "constant" else params.schedule,
        optimizer,
        num_warmup_steps=round(params.warmup_fraction * updates),
        num_training_steps=updates,
    )
    controller = make_kl_controller(params)
    batches = query_batches(queries, params.rollout_batch_size, shuffling)

    for iteration in range(1, iterations + 1):
        started = time.perf_counter()
        # 1. Sample responses from the policy.
        batch = next(batches)
        responses = sample_responses(
            models.policy,
            batch,
            max_tokens=params.response_tokens,
            eos_token_id=tokens.eos,
            pad_token_id=tokens.pad,
            temperature=params.temperature,
            generator=sampling,
        )
        sampled = time.perf_counter()
        # 2. Score them, and turn scores and KL into advantages.
        sequences = Sequences.join(batch, responses, tokens.pad)
        experience, metrics = make_experience(
            models, sequences, responses, params, controller.value
        )
        scored = time.perf_counter()
        learning_rate = scheduler.get_last_lr()[0]
        # 3. Take the epochs of PPO on them.
        metrics |= update(models, experience, params, optimizer, scheduler, shuffling)
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
        log(episode, metrics)
        progress(episode, params.episodes)


def make_kl_controller(params: RLParams) -> FixedKLController | AdaptiveKLController:
    """The controller that the params name."""
    if params.kl_controller == "adaptive":
        return AdaptiveKLController(params.kl_coef, params.kl_target, params.kl_horizon)
    return FixedKLController(params.kl_coef)


def query_batches(
    queries: Sequence[Sequence[int]], size: int, generator: torch.Generator
) -> Iterator[list[Sequence[int]]]:
    """Batches of queries without end, in a fresh random order each pass, none left out."""
    order: list[int] = []
    while True:
        while len(order) < size:
            order += torch.randperm(len(queries), generator=generator).tolist()
        yield [queries[i] for i in order[:size]]
        order = order[size:]


@torch.no_grad()
def make_experience(
    models: Models,
    sequences: Sequences,
    responses: Responses,
    params: RLParams,
    kl_coef: float,
) -> tuple[Experience, dict[str, float]]:
    """Score a rollout and estimate its advantages; returns them with the rollout's metrics."""
    mask = sequences.response_mask
    columns: dict[str, list[Tensor]] = {"logprobs": [], "ref_logprobs": [], "values": []}
    for start in range(0, len(mask), params.micro_batch_size):
        part = sequences.rows(slice(start, start + params.micro_batch_size))
        columns["logprobs"].append(response_logprobs(models.policy, part, params.temperature)[0])
        columns["ref_logprobs"].append(
            response_logprobs(models.ref_policy, part, params.temperature)[0]
        )
        columns["values"].append(response_values(models.critic, part))
    logprobs, ref_logprobs, values = (
        torch.where(mask, pad_columns(parts, mask.shape[1]), 0.0) for parts in columns.values()
    )
    raw_scores = score_sequences(models.reward_model, sequences, params.micro_batch_size)
    scores = penalise_missing_eos(
        raw_scores, responses.has_eos, params.missing_eos, params.missing_eos_score
    )
    kl = kl_estimate(logprobs, ref_logprobs)
    rewards = token_rewards(scores, kl, mask, kl_coef)
    if params.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(rewards, values, mask, params.gamma, params.gae_lambda)
    explained = 1 - masked_var(returns - values, mask) / masked_var(returns, mask)
    if params.whiten_advantages:
        advantages = whiten(advantages, mask)
    experience = Experience(sequences, logprobs, ref_logprobs, values, rewards, advantages, returns)

    lengths = mask.sum(1).float()
    kl_a_response = masked_sum(kl, mask, 1)
    metrics = {
        "objective/scores": scores.mean(),
        "objective/scores_std": scores.std(correction=0),
        "objective/kl": kl_a_response.mean(),
        "objective/kl_coef": torch.tensor(kl_coef),
        "objective/entropy": masked_sum(-logprobs, mask, 1).mean(),
        "objective/non_score_reward": -kl_coef * kl_a_response.mean(),
        "objective/rlhf_reward": scores.mean() - kl_coef * kl_a_response.mean(),
        "response/length_mean": lengths.mean(),
        "response/clipped_fraction": (~responses.has_eos).float().mean(),
        "val/num_eos_tokens": responses.has_eos.sum(),
        "val/explained_var": explained,
        "val/returns_mean": masked_mean(returns, mask),
        "val/values_mean": masked_mean(values, mask),
    }
    return experience, {name: float(value) for name, value in metrics.items()}


def update(
    models: Models,
    experience: Experience,
    params: RLParams,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    shuffling: torch.Generator,
) -> dict[str, float]:
    """Run the epochs of PPO on a rollout; returns the metrics averaged over its updates.

    Raises:
        TrainingError: a loss is not finite.
    """
    size = len(experience.logprobs)
    history = []
    for _ in range(params.epochs):
        order = torch.randperm(size, generator=shuffling)
        for mini_batch in torch.split(order, params.mini_batch_size):
            history.append(_optimizer_step(models, experience, mini_batch, params, optimizer))
            scheduler.step()
    stacked = {name: [stats[name] for stats in history] for name in history[0]}
    metrics = {name: sum(values) / len(values) for name, values in stacked.items()}
    ratios = torch.tensor(stacked["val/ratio"])
    return metrics | {"val/ratio_var": float(ratios.var()) if len(ratios) > 1 else 0.0}


def _optimizer_step(
    models: Models,
    experience: Experience,
    mini_batch: Tensor,
    params: RLParams,
    optimizer: torch.optim.Optimizer,
) -> dict[str, float]:
    """One step on a mini-batch; its gradient does not depend on the micro-batches."""
    num_tokens = int(experience.sequences.response_mask[mini_batch].sum())
    sums: dict[str, float] = {}
    optimizer.zero_grad(set_to_none=True)
    for rows in torch.split(mini_batch, params.micro_batch_size):
        sequences = experience.sequences.rows(rows)
        mask = sequences.response_mask
        old_logprobs, old_values, advantages, returns = (
            column[rows, : mask.shape[1]]
            for column in (
                experience.logprobs,
                experience.values,
                experience.advantages,
                experience.returns,
            )
        )
        logprobs, uncertainty = response_logprobs(models.policy, sequences, params.temperature)
        values = response_values(models.critic, sequences)
        loss_policy, policy = policy_loss(
            logprobs, old_logprobs, advantages, mask, params.cliprange, num_tokens
        )
        loss_value, value = value_loss(
            values, old_values, returns, mask, params.cliprange_value, num_tokens
        )
        torch.autograd.backward(loss_policy + params.value_coef * loss_value)
        for name, part in {
            "loss/policy_avg": loss_policy.detach(),
            "loss/value_avg": loss_value.detach(),
            "policy/approxkl_avg": policy.approx_kl / num_tokens,
            "policy/clipfrac_avg": policy.clip_fraction / num_tokens,
            "policy/entropy_avg": masked_sum(uncertainty, mask) / num_tokens,
            "val/ratio": policy.ratio / num_tokens,
            "val/clipfrac_avg": value.clip_fraction / num_tokens,
        }.items():
            sums[name] = sums.get(name, 0.0) + float(part)
    # Each network has its own scale of gradients: one norm over both would let the critic's
    # early errors shrink the policy's steps.
    for prefix, model in (("policy", models.policy), ("val", models.critic)):
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), params.max_grad_norm)
        sums[f"{prefix}/grad_norm"] = float(norm)
    if not all(math.isfinite(value) for value in sums.values()):
        raise TrainingError(
            f"rl: expected finite losses and gradients, got {sums}; lower rl.learning_rate or "
            "raise rl.kl_coef"
        )
    optimizer.step()
    return sums
