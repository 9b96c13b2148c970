"""PPO as TRL 1.12 does it: `trl.experimental.ppo.PPOTrainer`.

The spec's `bf16` says how TRL is given bf16:

no         its defaults. `PPOConfig` turns bf16 on, but its trainer makes an Accelerator that never
           hears of it, so that all is computed in fp32.
autocast   what `accelerate launch --mixed_precision bf16` does: forward passes of the update in
           bf16, sampling and scoring in fp32.
weights    all four models held and trained in bf16, in which most of Adam's steps are too small to
           change a weight.
"""

import os
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer

from benchmarks.speed.peers import common
from benchmarks.speed.worker import Clock, Result, Spec, episodes_of, rows_of, serve, timed


def work(spec: Spec) -> Result:
    """Train for some episodes; say how long it took."""
    if spec["bf16"] == "autocast":
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    dtype = torch.bfloat16 if spec["bf16"] == "weights" else torch.float32
    random.seed(spec["seed"])
    # It shuffles its mini-batches by NumPy's global generator, which it does not seed.
    np.random.seed(spec["seed"])
    torch.manual_seed(spec["seed"])
    model = spec["model"]
    policy = common.language_model(model, dtype)
    critic = common.scalar_model(model, dtype)
    queries = rows_of(model)["queries"]
    tokenizer = common.tokenizer(model)
    tokenizer.padding_side = "left"
    policy.generation_config.pad_token_id = tokenizer.pad_token_id
    warm_up(policy, critic, queries[:4])
    with tempfile.TemporaryDirectory() as folder:
        arguments = PPOConfig(
            output_dir=folder,
            use_cpu=not torch.cuda.is_available(),
            total_episodes=spec["episodes"],
            per_device_train_batch_size=spec["batch"],
            gradient_accumulation_steps=1,
            num_mini_batches=spec["batch"] // spec["mini_batch"],
            num_ppo_epochs=spec["epochs"],
            response_length=spec["response_tokens"],
            temperature=spec["temperature"],
            learning_rate=spec["learning_rate"],
            kl_coef=spec["kl_coef"],
            stop_token="eos",
            # As the other side has it.
            adam_epsilon=1e-5,
            seed=spec["seed"],
            num_sample_generations=0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
        )
        trainer = PPOTrainer(
            args=arguments,
            processing_class=tokenizer,
            model=policy,
            ref_model=common.language_model(model, dtype),
            reward_model=common.scalar_model(model, dtype),
            value_model=critic,
            train_dataset=Dataset.from_dict({"input_ids": queries}),
        )
        with timed() as clock:
            trainer.add_callback(Laps(clock))
            trainer.train()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    memory = common.memory()
    if spec.get("save"):
        policy.float().save_pretrained(Path(spec["save"]))
    logs = [row for row in trainer.state.log_history if "objective/scores" in row]
    return {
        **episodes_of(spec, clock),
        "scores": [row["objective/scores"] for row in logs],
        "kl": [row["objective/kl"] for row in logs],
        "ended_share": [row["val/num_eos_tokens"] / spec["batch"] for row in logs],
        "mixed_precision": trainer.accelerator.mixed_precision,
        **memory,
        **common.setup(),
    }


class Laps(TrainerCallback):
    """A lap of the clock for each batch, at whose end its metrics are logged."""

    def __init__(self, clock: Clock) -> None:
        """Tell this clock."""
        self.clock = clock

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        """Called with what is logged."""
        if "objective/scores" in logs:
            self.clock.lap()


def warm_up(policy: PreTrainedModel, critic: PreTrainedModel, queries: list[list[int]]) -> None:
    """Wake the threads: a few tokens, and a gradient of each network."""
    width = min(map(len, queries))
    ids = torch.tensor([query[-width:] for query in queries], device=policy.device)
    policy.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=True)
    for network in (policy, critic):
        network(input_ids=ids).logits.float().mean().backward()
        network.zero_grad(set_to_none=True)


if __name__ == "__main__":
    serve(work)
