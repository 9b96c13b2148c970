"""The update of RL: epochs of clipped gradient steps on one rollout."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, get_scheduler

from plumbline.errors import TrainingError
from plumbline.interruption import uninterrupted
from plumbline.losses.policy import policy_loss
from plumbline.losses.value import value_loss
from plumbline.models.packed_attention import take_packed
from plumbline.ops.kl import kl_estimate
from plumbline.ops.masked import masked_sum
from plumbline.params.schema import RLParams, SamplingParams
from plumbline.rollout.experience import (
    Experience,
    Sequences,
    response_states,
    response_stats,
    response_values,
)
from plumbline.training.models import Models, ValueHead
from plumbline.training.perf import Work
from plumbline.training.precision import Precision, autocast
from plumbline.training.rl_work import update_work


class Setting(NamedTuple):
    """How a policy is trained, beside its data and its models."""

    params: RLParams
    sampling: SamplingParams
    precision: Precision = "fp32"


class Optimizer(NamedTuple):
    """AdamW over all that is trained, and the schedule of its learning rate."""

    adam: AdamW
    schedule: LRScheduler

    @classmethod
    def of(cls, models: Models, params: RLParams) -> "Optimizer":
        """The optimizer for as many updates as the params make."""
        weights = [weight for _, group in models.trained for weight in group]
        adam = AdamW(
            weights, lr=params.learning_rate, eps=1e-5, weight_decay=params.weight_decay, fused=True
        )
        steps = params.episodes // params.mini_batch_size * params.epochs
        schedule = get_scheduler(
            "constant_with_warmup" if params.schedule == "constant" else params.schedule,
            adam,
            num_warmup_steps=round(params.warmup_fraction * steps),
            num_training_steps=steps,
        )
        return cls(adam, schedule)


@dataclass
class Update:
    """How far the update of a rollout has come."""

    stats: list[dict[str, float]] = field(default_factory=list)
    """Of each mini-batch that a step was taken on."""
    order: Tensor | None = None
    """The rollout's responses as this epoch takes them: int64 [B]."""
    seconds: float = 0.0
    """Spent on it."""
    work: Work = field(default_factory=Work)
    """Done in them."""


def update(
    models: Models,
    experience: Experience,
    setting: Setting,
    optimizer: Optimizer,
    shuffling: torch.Generator,
    kl_coef: float,
    done: Update | None = None,
    commit: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Run the epochs on a rollout; returns the metrics averaged over its mini-batches.

    Args:
        models: policy and critic change in place.
        experience: the rollout.
        setting: params, sampling temperature and precision.
        optimizer: of all trained weights.
        shuffling: of the mini-batches.
        kl_coef: beta, for a KL penalty in the loss.
        done: the part of this very update that was done earlier; kept up to date.
        commit: called after each step, before a signal can interrupt.

    Raises:
        TrainingError: a loss or a gradient is not finite.
    """
    params = setting.params
    done = done or Update()
    began = time.perf_counter() - done.seconds
    size = len(experience.logprobs)
    an_epoch = math.ceil(size / params.mini_batch_size)
    planned = params.epochs * (size // params.mini_batch_size)
    history = list(done.stats)
    while len(done.stats) < params.epochs * an_epoch:
        place = len(done.stats) % an_epoch * params.mini_batch_size
        if place == 0:
            done.order = torch.randperm(size, generator=shuffling)
        assert done.order is not None
        mini_batch = done.order[place : place + params.mini_batch_size]
        stats = _accumulate(models, experience, mini_batch, setting, optimizer, kl_coef)
        history.append(stats)
        work = done.work + update_work(
            models, experience.sequences.rows(mini_batch), params.micro_batch_tokens
        )
        if params.target_kl is not None and stats["policy/approxkl_avg"] > params.target_kl:
            done.work = work
            break
        with uninterrupted():
            optimizer.adam.step()
            optimizer.schedule.step()
            done.stats.append(stats)
            done.work = work
            done.seconds = time.perf_counter() - began
            commit()
    done.seconds = time.perf_counter() - began
    taken = len(done.stats)
    # Steps that were not taken use up their share of the schedule, which ends with the episodes.
    for _ in range(planned - taken):
        optimizer.schedule.step()
    stacked = {name: [stats[name] for stats in history] for name in history[0]}
    metrics = {name: sum(values) / len(values) for name, values in stacked.items()}
    ratios = torch.tensor(stacked["val/ratio"])
    return metrics | {
        "val/ratio_var": float(ratios.var()) if len(ratios) > 1 else 0.0,
        "policy/ratio_max": max(stacked["policy/ratio_max"]),
        "policy/epochs": taken * params.mini_batch_size / size,
    }


def _accumulate(
    models: Models,
    experience: Experience,
    mini_batch: Tensor,
    setting: Setting,
    optimizer: Optimizer,
    kl_coef: float,
) -> dict[str, float]:
    """Leave the clipped gradient of a mini-batch, which does not depend on its micro-batches."""
    params = setting.params
    # Shuffled on the CPU, whose generator is saved.
    mini_batch = mini_batch.to(experience.logprobs.device)
    sequences = experience.sequences.rows(mini_batch)
    num_tokens = int(sequences.response_mask.sum())
    groups = sequences.micro_batches(params.micro_batch_tokens, packed=take_packed(models.policy))
    losses = [_policy_loss]
    if isinstance(models.critic, PreTrainedModel):
        # After the policy's, so that the activations of one network alone are in memory.
        losses.append(_critic_loss)
    sums: dict[str, float] = {}
    optimizer.adam.zero_grad(set_to_none=True)
    for loss_of in losses:
        # Weights are narrowed once for all micro-batches: autocast keeps the copies.
        with autocast(mini_batch.device, setting.precision):
            for group in groups:
                loss, stats = loss_of(
                    models, experience, mini_batch[group], setting, kl_coef, num_tokens
                )
                with autocast(mini_batch.device, "fp32"):
                    torch.autograd.backward(loss)
                largest = max(sums.get("policy/ratio_max", 0.0), stats.pop("policy/ratio_max", 0.0))
                for name, part in stats.items():
                    sums[name] = sums.get(name, 0.0) + part
                sums["policy/ratio_max"] = largest
    for prefix, weights in models.trained:
        norm = get_total_norm([w.grad for w in weights if w.grad is not None])
        # Most are small enough, and need not be written again.
        if norm > params.max_grad_norm:
            clip_grads_with_norm_(weights, params.max_grad_norm, norm)
        sums[f"{prefix}/grad_norm"] = float(norm)
    if not all(math.isfinite(value) for value in sums.values()):
        raise TrainingError(
            f"rl: expected finite losses and gradients, got {sums}; lower rl.learning_rate or "
            "raise rl.kl_coef"
        )
    return sums


def _policy_loss(
    models: Models,
    experience: Experience,
    rows: Tensor,
    setting: Setting,
    kl_coef: float,
    num_tokens: int,
) -> tuple[Tensor, dict[str, float]]:
    """L_policy + beta * KL - c_e * entropy, each where the params want it.

    With c_v * L_value of a critic on the policy's trunk.
    """
    params = setting.params
    sequences = experience.sequences.rows(rows)
    mask = sequences.response_mask
    width = mask.shape[1]
    states = response_states(models.policy, sequences)
    logprobs, entropies = response_stats(
        models.policy, states, sequences, setting.sampling.temperature
    )
    mean_entropy = masked_sum(entropies, mask) / num_tokens
    loss, policy = policy_loss(
        logprobs,
        experience.logprobs[rows, :width],
        experience.advantages[rows, :width],
        mask,
        params.cliprange,
        num_tokens,
        params.cliprange_high,
    )
    stats = {
        "loss/policy_avg": float(loss.detach()),
        "policy/approxkl_avg": float(policy.approx_kl) / num_tokens,
        "policy/clipfrac_avg": float(policy.clip_fraction) / num_tokens,
        "policy/entropy_avg": float(mean_entropy.detach()),
        "policy/ratio_max": float(policy.ratio_max),
        "val/ratio": float(policy.ratio) / num_tokens,
    }
    if isinstance(models.critic, ValueHead):
        values = trunk_values(models.critic, sequences, states.hidden)
        loss_value, value_stats = _value_loss(experience, rows, values, mask, params, num_tokens)
        loss, stats = loss + loss_value, stats | value_stats
    if params.kl_in == "loss":
        ref_logprobs = experience.ref_logprobs[rows, :width]
        # Masked before exp: a pad may be so unlikely that its k3 is infinite, and inf * 0 is NaN.
        real = torch.where(mask, logprobs, ref_logprobs)
        kl = kl_estimate(real, ref_logprobs, params.kl_estimator)
        loss_kl = masked_sum(kl, mask) / num_tokens
        loss = loss + kl_coef * loss_kl
        stats["loss/kl_avg"] = float(loss_kl.detach())
    if params.entropy_coef:
        loss = loss - params.entropy_coef * mean_entropy
    return loss, stats


def _critic_loss(
    models: Models,
    experience: Experience,
    rows: Tensor,
    setting: Setting,
    kl_coef: float,
    num_tokens: int,
) -> tuple[Tensor, dict[str, float]]:
    """c_v * L_value of a critic with a network of its own; the KL is the policy's affair."""
    assert isinstance(models.critic, PreTrainedModel)
    sequences = experience.sequences.rows(rows)
    values = response_values(models.critic, sequences).float()
    return _value_loss(
        experience, rows, values, sequences.response_mask, setting.params, num_tokens
    )


def _value_loss(
    experience: Experience,
    rows: Tensor,
    values: Tensor,
    mask: Tensor,
    params: RLParams,
    num_tokens: int,
) -> tuple[Tensor, dict[str, float]]:
    assert experience.values is not None
    assert experience.returns is not None
    width = mask.shape[1]
    loss, stats = value_loss(
        values,
        experience.values[rows, :width],
        experience.returns[rows, :width],
        mask,
        params.cliprange_value,
        num_tokens,
    )
    return params.value_coef * loss, {
        "loss/value_avg": float(loss.detach()),
        "val/clipfrac_avg": float(stats.clip_fraction) / num_tokens,
    }


def trunk_values(critic: ValueHead, sequences: Sequences, hidden: Tensor) -> Tensor:
    """The value before each response token by a head on the policy's trunk: float32 [B, R].

    Args:
        critic: the head.
        sequences: the queries with the responses; 0 on their padding.
        hidden: [N, H], of the policy, before each of the N response tokens.
    """
    return sequences.spread(critic(hidden).float())
