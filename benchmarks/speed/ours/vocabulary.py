"""Memory of the update as the vocabulary grows at the same width.

The weights of embedding and head grow with the vocabulary, and with them their gradients and
Adam's averages: those are there whatever the update does. What the update itself takes is the peak
during it, less what was held before it, less the gradients, which it leaves behind.
"""

import torch

from benchmarks.speed.ours.models import ppo_models
from benchmarks.speed.ours.ppo import setting_of
from benchmarks.speed.ours.utilisation import experience_of, side_by_side
from benchmarks.speed.worker import Result, Spec, forget_peak, peak_mb, resident_mb, serve
from plumbline.data.collate import pad_left, pad_right
from plumbline.rollout.experience import Sequences
from plumbline.training.device import training_device
from plumbline.training.memory import release_memory
from plumbline.training.models import Models
from plumbline.training.policy_update import Optimizer, update


def work(spec: Spec) -> Result:
    """Update twice; the second one is measured, when Adam has its averages."""
    device = training_device()
    setting = setting_of(spec)
    models = ppo_models(spec["model"], device, setting.precision)
    experience = experience_of(models, random_sequences(spec, device), setting)
    # Neither of them takes part in the update.
    models = Models(models.policy, models.policy, models.policy, models.critic)
    optimizer = Optimizer.of(models, setting.params)
    shuffling = torch.Generator().manual_seed(0)
    update(models, experience, setting, optimizer, shuffling, 0.0)
    optimizer.adam.zero_grad(set_to_none=True)
    release_memory()
    held = resident_mb()
    forget_peak()
    update(models, experience, setting, optimizer, shuffling, 0.0)
    peak = peak_mb()
    trained = [weight for _, weights in models.trained for weight in weights]
    gradients = sum(weight.numel() * weight.element_size() for weight in trained) / 1e6
    return {
        "vocabulary": models.policy.config.vocab_size,
        "precision": setting.precision,
        "parameters": models.policy.num_parameters(),
        "held_mb": held,
        "gradients_mb": gradients,
        "peak_mb": peak,
        "update_mb": peak - held - gradients,
    }


def random_sequences(spec: Spec, device: torch.device) -> Sequences:
    """As many random prompts and responses as a rollout has, all of one length."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = spec["model"]["shape"]["vocab_size"]
    size, tokens = spec["episodes"], spec["response_tokens"]
    ids = torch.randint(3, vocabulary, (size, 2 * tokens), generator=generator).tolist()
    query = pad_left([row[:tokens] for row in ids], 0)
    response = pad_right([row[tokens:] for row in ids], 0)
    return side_by_side(query, response, device)


if __name__ == "__main__":
    serve(work)
