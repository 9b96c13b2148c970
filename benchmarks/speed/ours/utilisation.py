"""How near the update of PPO comes to the rate of matrix products on this machine.

Policy and critic, each with its own network, on real prompts and their chosen answers. FLOPs are
those of the matrices on real tokens (`plumbline.training.perf.Cost`); what is recomputed, and what
is no matrix product, does not count. The rate is measured right before and right after, and the
higher one of the two is what the update is held against.
"""

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from benchmarks.speed.ours.models import memory, ppo_models, synchronize
from benchmarks.speed.ours.ppo import setting_of
from benchmarks.speed.worker import Result, Spec, rows_of, serve
from plumbline.data.collate import Padded, pad_left, pad_right
from plumbline.rollout.experience import (
    Experience,
    Sequences,
    response_logprobs,
    response_values,
)
from plumbline.training.device import training_device
from plumbline.training.models import Models
from plumbline.training.perf import matmul_rate
from plumbline.training.policy_update import Optimizer, Setting, Update, update
from plumbline.training.precision import autocast

SHOWN = 10
"""Operations in the profile."""


def work(spec: Spec) -> Result:
    """Update once to warm up, once with the clock, and once a mini-batch under the profiler."""
    device = training_device()
    setting = setting_of(spec)
    models = ppo_models(spec["model"], device, setting.precision)
    sequences = read_sequences(spec, device)
    experience = experience_of(models, sequences, setting)
    optimizer = Optimizer.of(models, setting.params)
    shuffling = torch.Generator().manual_seed(spec["seed"])
    before = matmul_rate(device, setting.precision)
    size = setting.params.mini_batch_size
    first = part_of(experience, slice(0, size))
    update(models, first, setting, optimizer, shuffling, 0.0)
    synchronize()
    done = Update()
    update(models, experience, setting, optimizer, shuffling, 0.0, done)
    synchronize()
    held = memory()
    after = matmul_rate.__wrapped__(device, setting.precision)
    rate = max(before, after)
    achieved = done.work.flops / done.seconds
    return {
        "tokens": int(sequences.mask.sum()),
        "seconds": done.seconds,
        "tokens_per_s": done.work.tokens / done.seconds,
        "flops_per_s": achieved,
        "rates": [before, after],
        "share": achieved / rate,
        "precision": setting.precision,
        "profile": profiled(models, first, setting, optimizer, shuffling),
        **held,
    }


def read_sequences(spec: Spec, device: torch.device) -> Sequences:
    """Prompts with their chosen answers."""
    content = rows_of(spec["model"])
    rows, pad = content["sft"][: spec["episodes"]], content["pad"]
    query = pad_left([row["prompt"] for row in rows], pad)
    response = pad_right([row["response"] for row in rows], pad)
    return side_by_side(query, response, device)


def side_by_side(query: Padded, response: Padded, device: torch.device) -> Sequences:
    """Left-padded queries with right-padded responses."""
    ids = torch.cat([query.ids, response.ids], 1).to(device)
    mask = torch.cat([query.mask, response.mask], 1).to(device)
    return Sequences(ids, mask, response.mask.to(device))


@torch.no_grad()
def experience_of(models: Models, sequences: Sequences, setting: Setting) -> Experience:
    """As if the policy had just sampled them, with random advantages."""
    assert isinstance(models.critic, PreTrainedModel)
    mask = sequences.response_mask
    logprobs = torch.zeros(mask.shape, device=mask.device)
    values = torch.zeros_like(logprobs)
    with autocast(mask.device, setting.precision):
        for rows in torch.split(torch.arange(len(mask), device=mask.device), 8):
            part = sequences.rows(rows)
            width = part.response_mask.shape[1]
            logprobs[rows, :width] = response_logprobs(
                models.policy, part, setting.sampling.temperature
            )
            values[rows, :width] = response_values(models.critic, part).float()
    generator = torch.Generator().manual_seed(0)
    advantages = torch.randn(mask.shape, generator=generator).to(mask.device) * mask
    return Experience(sequences, logprobs, logprobs, advantages, values, values + advantages)


def part_of(experience: Experience, rows: slice) -> Experience:
    """Some rows of it."""
    sequences = experience.sequences.rows(rows)
    width = sequences.response_mask.shape[1]
    columns = [column[rows, :width] for column in experience[1:] if column is not None]
    return Experience(sequences, *columns)


def profiled(
    models: Models,
    experience: Experience,
    setting: Setting,
    optimizer: Optimizer,
    shuffling: torch.Generator,
) -> list[dict[str, Any]]:
    """Where the time of a mini-batch goes: operations by their own share of it."""
    on_gpu = models.policy.device.type == "cuda"
    activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        update(models, experience, setting, optimizer, shuffling, 0.0)
        synchronize()
    field = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, field))
    total = sum(getattr(event, field) for event in events)
    return [
        {"name": event.key, "share": getattr(event, field) / total, "calls": event.count}
        for event in events[:SHOWN]
    ]


if __name__ == "__main__":
    serve(work)
