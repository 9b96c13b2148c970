"""PPO as Plumbline does it, with a critic of its own."""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from benchmarks.speed.ours.models import Prompts, memory, ppo_models, synchronize
from benchmarks.speed.worker import Result, Spec, episodes_of, serve, timed
from plumbline.params.schema import RLParams, SamplingParams
from plumbline.rollout.experience import Sequences, response_logprobs, response_values
from plumbline.rollout.generate import sample_responses
from plumbline.training.device import training_device
from plumbline.training.models import Models
from plumbline.training.perf import matmul_rate
from plumbline.training.policy_update import Setting
from plumbline.training.precision import autocast, resolve_precision
from plumbline.training.reporting import ignore_progress, ignore_warnings
from plumbline.training.rl import train_rl

PHASES = ("rollout", "score", "update")


def setting_of(spec: Spec) -> Setting:
    """The params of a spec, all else being TRL's defaults."""
    device = training_device()
    params = RLParams(
        algorithm="ppo",
        critic="reward_model",
        episodes=spec["episodes"],
        rollout_batch_size=spec["batch"],
        mini_batch_size=spec["mini_batch"],
        micro_batch_tokens=spec["micro_batch_tokens"],
        epochs=spec["epochs"],
        learning_rate=spec["learning_rate"],
        schedule="linear",
        warmup_fraction=0.0,
        kl_coef=spec["kl_coef"],
        # TRL never clips the gradient, and takes nothing from responses that do not end.
        max_grad_norm=1e6,
        missing_eos="subtract",
        missing_eos_score=0.0,
    )
    sampling = SamplingParams(
        response_tokens=spec["response_tokens"], temperature=spec["temperature"]
    )
    return Setting(params, sampling, resolve_precision(spec["precision"], device))


def work(spec: Spec) -> Result:
    """Train for some episodes; say how long it took."""
    device = training_device()
    setting = setting_of(spec)
    prompts = Prompts.of(spec)
    models = ppo_models(spec["model"], device, setting.precision)
    warm_up(models, prompts, setting)
    history: list[Mapping[str, float]] = []
    with timed() as clock:

        def note(step: int, metrics: Mapping[str, float]) -> None:
            clock.lap()
            history.append(dict(metrics))

        train_rl(
            models, prompts.names, prompts.encoder(), setting, seed=spec["seed"], log=note,
            progress=ignore_progress, warn=ignore_warnings,
        )  # fmt: skip
        synchronize()
    held = memory()
    if spec.get("save"):
        models.policy.save_pretrained(Path(spec["save"]))
    return {
        **episodes_of(spec, clock),
        "scores": [row["objective/scores"] for row in history],
        "kl": [row["objective/kl"] for row in history],
        "ended_share": [1 - row["response/clipped_fraction"] for row in history],
        "response_tokens": [row["response/length_mean"] for row in history],
        "phases": {name: sum(row[f"time/{name}_s"] for row in history) for name in PHASES},
        "update_mfu": [row["perf/update_mfu"] for row in history],
        "precision": setting.precision,
        "threads": torch.get_num_threads(),
        **held,
    }


def warm_up(models: Models, prompts: Prompts, setting: Setting) -> None:
    """Wake the threads: a few tokens, and a gradient of each network; measure the matrix products.

    The library measures those once a process, and would do it in the time that counts.
    """
    device = models.policy.device
    matmul_rate(device, setting.precision)
    queries = list(prompts.queries[:4])
    with autocast(device, setting.precision):
        responses = sample_responses(
            models.policy, queries, max_tokens=4, stop_token_ids=prompts.stop_token_ids,
            pad_token_id=prompts.pad_token_id, temperature=1.0,
            generator=torch.Generator(device).manual_seed(0),
        )  # fmt: skip
        sequences = Sequences.join(queries, responses, prompts.pad_token_id)
        loss = response_logprobs(models.policy, sequences, 1.0).mean()
        if isinstance(models.critic, PreTrainedModel):
            loss = loss + response_values(models.critic, sequences).mean()
    torch.autograd.backward(loss)
    for network in (models.policy, models.critic):
        if network is not None:
            network.zero_grad(set_to_none=True)


if __name__ == "__main__":
    serve(work)
