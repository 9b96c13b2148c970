"""Reinforcement learning: the policy learns to please the reward model, near the reference.

One loop for all algorithms: they differ in `credit.py` alone, and in whether there is a critic.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plumbline.data.tokenize import ChatEncoder
from plumbline.functions import TextScorer
from plumbline.interruption import uninterrupted
from plumbline.models.packed_attention import take_packed
from plumbline.ops.kl import kl_estimate
from plumbline.ops.masked import masked_mean, masked_sum, masked_var
from plumbline.ops.rewards import token_rewards
from plumbline.rollout.experience import (
    Experience,
    Sequences,
    response_logprobs,
    response_states,
    response_stats,
    response_values,
)
from plumbline.rollout.generate import Responses, sample_responses
from plumbline.rollout.scoring import Scores, load_rewards, score_responses
from plumbline.training.checkpoint import Checkpoints
from plumbline.training.credit import Baseline, assign_credit
from plumbline.training.memory import checkpointing, memory_advice, training_ways, trim_heap
from plumbline.training.models import Models, ValueHead
from plumbline.training.perf import matmul_rate
from plumbline.training.policy_update import Setting, trunk_values, update
from plumbline.training.precision import autocast
from plumbline.training.reporting import Log, Progress, Warn
from plumbline.training.rl_state import RLState, Rollout
from plumbline.training.rl_work import sampling_work, scoring_work


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
    checkpoints: Checkpoints | None = None,
) -> None:
    """Train policy and critic in place, on responses to `prompts`.

    A resumed training first says again what its history says, and then goes on as if it had never
    stopped.

    Args:
        models: in evaluation mode, on one device, as they are before any training.
        prompts: the training prompts, JSON lists of messages.
        encoder: of prompts and responses.
        setting: params, sampling and precision.
        seed: of the order of the prompts, the sampling and the mini-batches.
        log: called after each rollout with the episodes so far and the metrics.
        progress: called after each rollout with the episodes so far.
        warn: called when the monitor sees a known failure begin.
        checkpoints: of this training, which goes on from the newest one.

    Raises:
        ParamsError: a reward function can't be imported.
        TrainingError: a loss, a gradient or a reward is not finite, or the GPU's memory is full.
    """
    params = setting.params
    functions = load_rewards(params)
    state = RLState(models, len(prompts), params, seed, checkpoints)
    queries = encoder.prompts(prompts)
    rate = matmul_rate(models.policy.device, setting.precision)
    longest = max(map(len, queries)) + setting.sampling.response_tokens
    ways = training_ways("rl", params.micro_batch_tokens, longest, params.gradient_checkpointing)
    with state.keeper.watching(), memory_advice("rl", [*ways]):
        if state.resume():
            for row in state.history:
                log(int(row["episode"]), row)
            for episode, finding in state.findings:
                warn(episode, finding.name, finding.message)
            progress(state.episode, params.episodes)

        while state.episode < params.episodes:
            # 1. and 2. Sample responses and score them, unless that was done before.
            if state.rollout is None:
                rollout = roll_out(models, prompts, queries, encoder, functions, setting, state)
                with uninterrupted():
                    state.rollout = rollout
                    state.commit()
            experience, metrics, work = state.rollout
            # 3. Take the epochs of gradient steps on them.
            with _less_memory(models) if params.gradient_checkpointing else nullcontext():
                metrics = metrics | update(
                    models, experience, setting, state.optimizer, state.shuffling,
                    state.controller.value, state.update, state.commit,
                )  # fmt: skip
            trim_heap()
            # 4. Let the controller follow the KL.
            seconds = state.update.seconds
            spent = metrics["time/rollout_s"] + metrics["time/score_s"] + seconds
            metrics |= {
                "episode": state.episode + params.rollout_batch_size,
                "perf/episodes_per_s": params.rollout_batch_size / spent,
                "perf/tokens_per_s": float(experience.sequences.mask.sum()) / spent,
                **(work + state.update.work).metrics(spent, rate),
                "perf/update_mfu": state.update.work.flops / seconds / rate,
                "time/update_s": seconds,
            }
            with uninterrupted():
                findings = state.close_rollout(metrics)
            log(state.episode, metrics)
            for finding in findings:
                warn(state.episode, finding.name, finding.message)
            progress(state.episode, params.episodes)


@torch.no_grad()
def roll_out(
    models: Models,
    prompts: Sequence[str],
    queries: Sequence[list[int]],
    encoder: ChatEncoder,
    functions: Mapping[str, TextScorer],
    setting: Setting,
    state: RLState,
) -> Rollout:
    """Let the policy answer the next prompts, and turn what it earned into experience.

    Args:
        models: the policy samples, the others score.
        prompts, queries: all of them, as texts and as token ids.
        encoder: of prompts and responses.
        functions: the reward functions by their names in `rl.rewards`.
        setting: params, sampling and precision.
        state: its next prompts, generator, coefficient and baseline are used.
    """
    started = time.perf_counter()
    batch = next(state.batches)
    device, asked = models.policy.device, [queries[index] for index in batch]
    # 1. Sample responses from the policy.
    with autocast(device, setting.precision):
        responses = sample_responses(
            models.policy,
            asked,
            max_tokens=setting.sampling.response_tokens,
            stop_token_ids=encoder.stop_token_ids,
            pad_token_id=encoder.pad_token_id,
            temperature=setting.sampling.temperature,
            generator=state.sampling,
        )
    sampled = time.perf_counter()
    # 2. Score them, and turn scores and KL into advantages.
    sequences = Sequences.join(asked, responses, encoder.pad_token_id)
    with autocast(device, setting.precision):
        scores = score_responses(
            models.reward_model,
            models.judge,
            functions,
            sequences,
            responses.has_eos,
            [prompts[index] for index in batch],
            encoder.decode(responses.lists()) if functions else [""] * len(batch),
            setting.params,
        )
    experience, metrics = make_experience(
        models, sequences, responses, scores, setting, state.controller.value, state.baseline
    )
    metrics |= {
        "lr": float(state.optimizer.schedule.get_last_lr()[0]),
        "time/rollout_s": sampled - started,
        "time/score_s": time.perf_counter() - sampled,
    }
    work = sampling_work(models.policy, asked, responses)
    work += scoring_work(models, sequences, setting.params.micro_batch_tokens)
    return Rollout(experience, metrics, work)


def _less_memory(models: Models) -> AbstractContextManager[None]:
    return checkpointing(*(m for m in (models.policy, models.critic) if m is not None))


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
    temperature, critic = setting.sampling.temperature, models.critic

    def policy(part: Sequences) -> list[Tensor]:
        states = response_states(models.policy, part)
        logprobs = response_stats(models.policy, states, part, temperature).logprobs
        if isinstance(critic, ValueHead):
            return [logprobs, trunk_values(critic, part, states.hidden)]
        return [logprobs]

    packed = take_packed(models.policy)
    parts = sequences.micro_batches(setting.params.micro_batch_tokens, packed=packed)
    logprobs, *values = _read(sequences, parts, setting, policy)
    if isinstance(critic, PreTrainedModel):
        values = _read(sequences, parts, setting, lambda part: [response_values(critic, part)])
    with models.reference() as reference:
        (ref_logprobs,) = _read(
            sequences, parts, setting,
            lambda part: [response_logprobs(reference, part, temperature)],
        )  # fmt: skip
    return logprobs, ref_logprobs, values[0] if values else None


def _read(
    sequences: Sequences,
    parts: list[Tensor],
    setting: Setting,
    columns: Callable[[Sequences], list[Tensor]],
) -> list[Tensor]:
    """What a model says about the parts, put together: float32 [B, R] each, 0 on padding."""
    # Autocast keeps narrow copies of the weights as long, and then no more.
    with autocast(sequences.ids.device, setting.precision):
        found = [columns(sequences.rows(rows)) for rows in parts]
    whole = [torch.zeros_like(sequences.response_mask, dtype=torch.float32) for _ in found[0]]
    for rows, said in zip(parts, found, strict=True):
        for column, values in zip(whole, said, strict=True):
            column[rows, : values.shape[1]] = values
    return whole
